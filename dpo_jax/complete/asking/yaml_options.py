"""Options of a command in a YAML file: read as the command line reads them, with the names and types of a dataclass."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union

import yaml

from dpo_jax.config.command_line.yaml_file import FAULTS, Strict
from dpo_jax.errors import InputError

_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def read_yaml(file: str) -> Any:
    """What a YAML file holds, without aliases and doubled keys. Raises `InputError` for one that is none."""
    try:
        return yaml.load(Path(file).expanduser().read_text(encoding="utf-8"), Loader=Strict)
    except (OSError, *FAULTS) as error:
        raise InputError(f"not readable as YAML: {' '.join(str(error).split())[:200]}") from error


def fields_of(kind: type, found: Any, prefix: str, known: Sequence[str]) -> dict[str, Any]:
    """The fields of the dataclass `kind` that the mapping `found` holds, of their types.

    Args:
      prefix: what stands before their names in messages.
      known: those that may be given.

    Raises `InputError` for another name, or a value of another type.
    """
    if not isinstance(found, Mapping):
        raise InputError(f"{prefix.rstrip('.') or 'the file'} holds no options; write NAME: VALUE lines")
    hints = typing.get_type_hints(kind)
    unknown = [str(name) for name in found if name not in known]
    if unknown:
        raise InputError(f"{prefix}{unknown[0]} is no option here; there are {', '.join(known)}")
    own = {field.name: field for field in dataclasses.fields(kind)}
    return {name: _value(hints[name], value, f"{prefix}{name}", own[name]) for name, value in found.items()}


def _value(hint: Any, value: Any, name: str, field: "dataclasses.Field[Any]") -> Any:
    """`value` of YAML as `field`, of type `hint`. Raises `InputError` for one of another kind."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        own = fields_of(hint, value, f"{name}.", [one.name for one in dataclasses.fields(hint)])
        # What is not given is as this command has it (of a judge 512 new tokens at temperature 0), not as elsewhere.
        made: Any = field.default_factory
        return dataclasses.replace(made(), **own)
    kinds = typing.get_args(hint) if isinstance(hint, UnionType) or typing.get_origin(hint) is Union else (hint,)
    for one in kinds:
        origin = typing.get_origin(one)
        if origin is Literal and value in typing.get_args(one):
            return value
        if origin is tuple and isinstance(value, list):
            return tuple(_value(typing.get_args(one)[0], entry, name, field) for entry in value)
        if one is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if one in (int, str, bool, NoneType) and type(value) is one:
            return value
    wanted = " or ".join(
        ", ".join(map(str, typing.get_args(one))) if typing.get_origin(one) is Literal else _NAMES.get(one, "a list")
        for one in kinds
        if one is not NoneType
    )
    raise InputError(f"{name} {value!r:.60} is not {wanted}")
