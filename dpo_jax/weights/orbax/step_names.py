"""Which entries of a folder orbax takes for checkpoints."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import orbax.checkpoint as ocp
from etils import epath

from dpo_jax.weights.integrity.folder import steps_in


class StepNames(ocp.path.step.NameFormat[ocp.path.step.Metadata]):
    """Tells orbax which entries of the folder are checkpoints: those of `steps_in`, and no others."""

    def build_name(self, step: int) -> str:
        return str(step)

    def find_all(self, base_path: epath.PathLike) -> Iterator[ocp.path.step.Metadata]:
        for step in steps_in(Path(base_path)):
            yield self.find_step(base_path, step)

    def find_step(self, base_path: epath.PathLike, step: int) -> ocp.path.step.Metadata:
        path = epath.Path(base_path) / str(step)
        if not path.is_dir():
            raise ValueError(f"no checkpoint at {path}")
        return _Found(step, path)


class _Found(ocp.path.step.Metadata):
    """A checkpoint's place. Orbax asks for its age, which decides nothing here, and would read it from a file that no
    checksum covers."""

    @property
    def commit_timestamp(self) -> datetime:
        return datetime.fromtimestamp(self.path.stat().mtime, tz=UTC)
