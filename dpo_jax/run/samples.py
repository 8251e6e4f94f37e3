"""samples.jsonl of a PPO run: every response with its score, and what the report shows of them."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_jax.errors import InputError
from dpo_jax.run import report
from dpo_jax.run.folder import cannot_write
from dpo_jax.run.log import Row, read_metrics

_SHOWN = 4


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
        try:
            if not self._begun:
                self._cut(step - 1)
                self._begun = True
            with open(self.path, "ab") as file:
                file.write(lines.encode("utf-8", "replace"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error

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


def samples_section(path: Path) -> report.Section:
    """Some responses of the first and of the last iteration, with their scores."""
    rows = read_rows(path)
    steps = sorted({row["step"] for row in rows})
    shown = [row for step in dict.fromkeys((*steps[:1], *steps[-1:])) for row in _of_step(rows, step)]
    cells = [(row["step"], prompt_text(row["prompt"]), row["response"], f"{row['score']:.4g}") for row in shown]
    head = ("step", "prompt", "response", "score")
    note = "The first responses of the first and of the last iteration; all of them are in samples.jsonl."
    return report.Section("Samples", note, table=report.Table(head, cells, texts=("prompt", "response")))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a samples.jsonl."""
    rows: list[Any] = read_metrics(path)
    return rows


def _of_step(rows: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    return [row for row in rows if row["step"] == step][:_SHOWN]


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as one text, for people."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def progress(rows: list[Row]) -> str:
    """Score and KL divergence at the beginning and at the end, in one sentence."""
    first, last = rows[0], rows[-1]
    return (
        f"Mean score {first['objective/scores']:.3f} in the first iteration and {last['objective/scores']:.3f} in the"
        f" last, at a KL divergence of {last['objective/kl']:.2f} nats a response."
    )
