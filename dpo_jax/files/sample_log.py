"""samples.jsonl of a PPO run: every response with its score, and what the report shows of them."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_jax.errors import InputError
from dpo_jax.files.folder import writing


class SampleLog:
    """The file, in step with the checkpoints: what an interrupted run wrote after its last one is cut off.

    Only the process that `writes` touches the disk.
    """

    def __init__(self, path: Path, *, writes: bool):
        self.path, self._writes, self._begun = path, writes, False

    def append(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows of one step (from 1), at once on the disk. Steps come in order; the first may be any."""
        if not self._writes:
            return
        lines = "".join(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)
        with writing(self.path):
            if not self._begun:
                self._cut(step - 1)
                self._begun = True
            with open(self.path, "ab") as file:
                file.write(lines.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())

    def _cut(self, done: int) -> None:
        """Keep the rows of the steps up to `done`, which must all be there."""
        kept, last = 0, 0
        if self.path.exists() and done:
            with open(self.path, "rb") as file:
                for line in file:
                    step = _step_of(line)
                    if step is None or step > done:
                        break
                    kept, last = kept + len(line), step
        if last != done:
            raise InputError(
                f"{self.path}: does not hold steps 1 to {done}, which the checkpoint has; restore the file, or start"
                " again with another --out"
            )
        with open(self.path, "ab") as file:
            file.truncate(kept)


def _step_of(line: bytes) -> int | None:
    """The step of a row; None for a line that was cut."""
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
