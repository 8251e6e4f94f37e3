"""CONFIG.py files: read, found among those that come with the package, and made of one another."""

import dataclasses
import difflib
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.config.training.presets import PRESETS
from dpo_jax.errors import InputError, nearest

_PACKAGE = Path(__file__).resolve().parents[2]


def shipped() -> dict[str, Path]:
    """Name -> path of every CONFIG.py of `configs/`: in a wheel inside the package, in a clone beside it."""
    inside = _PACKAGE / "configs"
    folder = inside if inside.is_dir() else _PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def find(name: str) -> Path:
    """The path of the shipped CONFIG.py of that name. Raises `InputError` where there is none."""
    paths = shipped()
    if name not in paths:
        near = difflib.get_close_matches(name, paths, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"no CONFIG {name} comes with this dpo_jax{guess} (dpo-jax configs lists them)")
    return paths[name]


def load(path: str) -> Any:
    """What a CONFIG.py, or the shipped one of that name, calls `config`. Raises `InputError` for what is neither."""
    if not path.endswith(".py"):
        if path not in (known := shipped()):
            near = difflib.get_close_matches(path, known, n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            if path in PRESETS:
                guess = f"; of grpo and ppo, --ppo.preset {path} is one"
            raise InputError(
                f"{path}: CONFIG must be a Python file (.py), a YAML file (.yaml) or a name that dpo-jax configs"
                f" lists{guess}; data and model go after --data and --model"
            )
        path = str(known[path])
    if not Path(path).is_file():
        name = Path(path).stem
        copy = f"; dpo-jax configs copy {name} writes one" if name in shipped() else ""
        raise InputError(f"{path}: no such CONFIG file{nearest(path)}{copy}")
    try:
        return runpy.run_path(path).get("config")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error


def derive(name: str, changes: Mapping[str, Any] | None = None) -> Any:
    """The options of the shipped CONFIG.py `name`, with `changes`: option, as the command line calls it -> value.

    `derive("llama2_ppo", {"train.accumulate": 8, "mesh.fsdp": 8})` works in a file that lies anywhere. Raises
    `InputError` for a name or an option that does not exist, and for options that do not go together.
    """
    return changed(runpy.run_path(str(find(name)))["config"], changes or {})


def changed(options: Any, changes: Mapping[str, Any]) -> Any:
    """`options` with `changes`: option, as the command line calls it -> value. Raises `InputError` as `derive`."""
    whole: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    known = [field.name for field in dataclasses.fields(options)]
    for option, value in changes.items():
        field, dot, rest = option.partition(".")
        if field not in known or (dot and not dataclasses.is_dataclass(getattr(options, field))):
            raise InputError(f"{type(options).__name__} has no option {option}; it has {', '.join(known)}")
        if dot:  # together, since a section checks what goes together
            parts.setdefault(field, {})[rest] = value
        else:
            whole[field] = value
    whole |= {field: changed(getattr(options, field), inner) for field, inner in parts.items()}
    return dataclasses.replace(options, **whole)
