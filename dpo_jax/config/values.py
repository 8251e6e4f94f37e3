"""How the words after an option are read as its value."""

import dataclasses
import difflib
from collections.abc import Container, Mapping
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from dpo_jax.config.names import option
from dpo_jax.errors import InputError


def negated(name: str) -> str:
    """The option that switches the option `name` off, if it is a switch."""
    section, dot, own = name.rpartition(".")
    return f"{section}{dot}no_{own}"


def built(cls: Any, given: Mapping[str, list[str]], default: Any, advice: str, prefix: str = "") -> Any:
    """`default`, or a new `cls` where it is None, with the options `given`: name -> the words after it, in their order.

    Raises `InputError` for words that are no value, with `advice` behind, and for what the classes refuse.
    """
    values, kinds = {}, get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        if dataclasses.is_dataclass(field.type):
            section = cls.usual(field.name) if default is None else getattr(default, field.name)
            values[field.name] = built(field.type, given, section, advice, f"{name}.")
            continue
        name = option(name).removeprefix("--")
        spelled = (name, negated(name)) if field.type is bool else (name,)
        for said in [one for one in given if one in spelled][-1:]:
            try:
                value = _value(said, kinds[field.name], given[said])
            except ValueError as error:
                raise InputError(f"{error} {advice}") from None
            values[field.name] = value if said == name else not value
    return cls(**values) if default is None else dataclasses.replace(default, **values)


def greedy(given: dict[str, list[str]], names: Container[str]) -> dict[str, list[str]]:
    """With a temperature of 0, what defaults or a CONFIG.py filter samples with gives way, for it would do nothing."""
    for name in [name for name, words in given.items() if name.endswith("sample.temperature") and _is_zero(words)]:
        filters = [name.removesuffix("temperature") + one for one in ("top_k", "top_p", "min_p")]
        given = {one: ["None"] for one in filters if one in names} | given
    return given


def _is_zero(words: list[str]) -> bool:
    try:
        return float(" ".join(words)) == 0
    except ValueError:  # told when it is read
        return False


def _is_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _value(name: str, kind: Any, words: list[str]) -> Any:
    """What the words after option `name` say, as a value of type `kind`. Raises `ValueError` for what they do not."""
    if kind is bool:
        said = words[:1] in (["true"], ["false"])
        if left := words[said:]:
            raise ValueError(f"Unrecognized options: {', '.join(left)}")
        return words != ["false"]
    if optional := NoneType in get_args(kind):
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
        if words == ["None"]:
            return None
    if kind == str | tuple[str, ...]:
        kind = str if len(words) < 2 else tuple[str, ...]
    if not _is_tuple(kind):
        if len(words) > 1:
            raise ValueError(f"Unrecognized options: {', '.join(words[1:])}")
        if not words:
            raise ValueError(f"Missing value for argument '--{name}'. Expected 1 values.")
        return _one(name, kind, words[0], optional=optional)
    of = get_args(kind)[0]
    if not _is_tuple(of):
        return tuple(_one(name, of, word) for word in words)
    kinds = get_args(of)
    if len(words) % len(kinds):
        raise ValueError(f"--{name}: Could not find valid parse for arguments: {words}")
    values = [_one(name, kinds[i % len(kinds)], word) for i, word in enumerate(words)]
    return tuple(tuple(values[i : i + len(kinds)]) for i in range(0, len(values), len(kinds)))


def _one(name: str, kind: Any, word: str, *, optional: bool = False) -> Any:
    """One word as a value of type `kind`."""
    choices = ("True", "False") if kind is bool else get_args(kind)
    if choices and word not in choices:
        expected = (("None",) if optional else ()) + choices
        near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
        guess = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"invalid choice '{word}' for argument '--{name}'. Expected one of {expected}.{guess}")
    if choices:
        return word == "True" if kind is bool else word
    try:
        return kind(word)
    except ValueError as error:
        raise ValueError(f"--{name}: {error}") from None
