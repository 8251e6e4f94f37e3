"""One program to compile, as a value that goes to another process and names a file of results."""

import dataclasses
import hashlib
import json
import os
import typing
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import dpo_jax
from dpo_jax.config import TrainingRun
from dpo_jax.config.command_line.words import COMMANDS
from dpo_jax.files.folder import as_json
from dpo_jax.model.architecture import LlamaConfig


@dataclass(frozen=True)
class Job:
    """What to compile, and for what.

    Attributes:
      word: the command.
      program: which of its programs.
      run: the command's options; files that they name are not read.
      shape: the model's.
      topology: as `hardware.Topology` reads it.
      prompt, response: tokens of a full row.
      teacher: the shape of `--teacher`, of distillation.
    """

    word: str
    program: str
    run: TrainingRun
    shape: LlamaConfig
    topology: str
    prompt: int
    response: int
    teacher: LlamaConfig | None = None

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return as_json(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Job":
        """The job that `to_json` gave."""
        options = COMMANDS[raw["word"]].options
        parts = {"run": from_json(options, raw["run"]), "shape": from_json(LlamaConfig, raw["shape"])}
        if raw.get("teacher") is not None:
            parts["teacher"] = from_json(LlamaConfig, raw["teacher"])
        return cls(**{**raw, **parts})

    @property
    def key(self) -> str:
        """The same for jobs that compile to the same program, with this code and these compilers."""
        raw = self.to_json()
        for name in ("model", "out", "eval_data", "on_bad_rows", "checkpoint", "distributed", "energy"):
            raw["run"].pop(name)
        raw["run"]["data"].pop("files")
        text = json.dumps([raw, _versions(), _source(), os.environ.get("LIBTPU_INIT_ARGS", "")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def from_json(cls: Any, raw: dict[str, Any]) -> Any:
    """The dataclass whose `as_json` is `raw`."""
    hints = typing.get_type_hints(cls)
    return cls(**{name: _value(hints[name], value) for name, value in raw.items()})


def _value(hint: Any, value: Any) -> Any:
    if isinstance(value, dict):
        (cls,) = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
        return from_json(cls, value)
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _versions() -> list[str]:
    packages = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda12-plugin")
    found = []
    for name in packages:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    return found


# Files on which a job's figures depend.
_SOURCES = (
    "*.py",
    "align/*.py",
    "config/**/*.py",
    "model/*.py",
    "sample/*.py",
    "commands/dpo.py",
    "data/sets/batches.py",
    "data/sets/dealing.py",
    "data/sets/group_packing.py",
    "data/sets/group_windows.py",
    "data/sets/sampled_windows.py",
    "data/sets/segment_views.py",
    "train/answered.py",
    "train/flops.py",
    "commands/ppo.py",
    "train/online_pairs.py",
    "commands/reward.py",
    "train/rollout_packing.py",
    "train/rollouts.py",
    "train/row_data.py",
    "commands/sft.py",
    "plan/h*.py",
    "plan/programs*.py",
    "plan/worker.py",
)


@cache
def _source() -> str:
    """A hash of the text of `_SOURCES`."""
    root = Path(dpo_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in root.glob(pattern)):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
