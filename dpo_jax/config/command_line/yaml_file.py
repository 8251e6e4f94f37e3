"""YAML in the place of a CONFIG.py: options under the names of the command line, as the words that would say them.

command: dpo
from: zephyr_ddpo            # a shipped recipe or a CONFIG.py; left out: the defaults
data: {max_length: 768}      # or data.max_length: 768
dpo.beta: 0.05
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dpo_jax.config.commands.judge import DECIDE_NO_REPLY
from dpo_jax.errors import InputError

SUFFIXES = (".yaml", ".yml")
LARGEST = 1 << 20
"""Bytes of a file that is read at all."""


class Strict(yaml.SafeLoader):
    """YAML without what options need none of: aliases, which can multiply a file, and keys that come twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [str(key) for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.YAMLError(f"{twice[0]} stands there twice")
        return super().construct_mapping(node, deep)


FAULTS = (ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError)
"""What `yaml.load` raises for a text that is none: its constructors do not expect `!!bool foo`, or `!!int ''`."""


def words_of(path: str) -> tuple[str, list[str]]:
    """The command that the YAML file is about, and its other words: a CONFIG, where it has one, and the options.

    Raises `InputError` for what is no such file. Whether the options exist and go together is not looked at.
    """
    try:
        if Path(path).stat().st_size > LARGEST:
            raise InputError(f"{path}: larger than {LARGEST >> 20} MiB, which no list of options is")
        found = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=Strict)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, *FAULTS) as error:
        raise InputError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no options under their names, such as `command: dpo` and `model: smollm2`")
    if not isinstance(found.get("command"), str):
        raise InputError(f"{path}: does not say which command it is for; begin it with the line `command: dpo`")
    command, base = found.pop("command"), found.pop("from", None)
    if base is not None and (not isinstance(base, str) or base.startswith("-") or base.endswith(SUFFIXES)):
        raise InputError(f"{path}: `from` names a shipped recipe or a CONFIG.py, not {base}")
    words = [] if base is None else [base]
    for name, value in _options(path, found):
        if isinstance(value, list):
            listed = [_word(path, name, one) for one in value]
            if dashed := [one for one in listed if one.startswith("-") and one.lstrip("-")[:1].isalpha()]:
                raise InputError(f"{path}: {name}: {dashed[0]} in a list would be read as an option")
            words += [f"--{name}", *listed]
        else:
            words.append(f"--{name}={_word(path, name, value)}")
    return command, words


def _options(path: str, section: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if not isinstance(name, str) or not name.replace("_", "").replace(".", "").isalnum():
            raise InputError(f"{path}: {prefix}{name} is no name of an option")
        if isinstance(value, dict):
            yield from _options(path, value, f"{prefix}{name}.")
        else:
            yield (prefix + name).removesuffix(".files"), value


def _word(path: str, name: str, value: Any) -> str:
    """One value as it is typed: YAML's true, null and 1e-6 too."""
    if isinstance(value, (list, dict)):
        raise InputError(f"{path}: {name}: a list holds single values, not {type(value).__name__}s")
    return str(value).lower() if isinstance(value, bool) else str(value)


def decisive(path: Path) -> str | None:
    """What a YAML file says, as JSON, without the options of an endpoint that decide no reply; None of another file."""
    try:
        return json.dumps(_decisive(yaml.load(path.read_text(encoding="utf-8"), Strict)), sort_keys=True, default=str)
    except (OSError, *FAULTS):
        return None


def _decisive(said: Any, *, endpoint: bool = False) -> Any:
    if isinstance(said, list):
        return [_decisive(one) for one in said]
    if not isinstance(said, dict):
        return said
    kept = ((str(name), value) for name, value in said.items() if not (endpoint and name in DECIDE_NO_REPLY))
    return {name: _decisive(value, endpoint=name == "endpoint") for name, value in kept}
