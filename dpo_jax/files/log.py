"""What a run says while it runs: metrics.jsonl, TensorBoard events, a progress bar, and warnings in words."""

import functools
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dpo_jax.errors import InputError
from dpo_jax.files.folder import close_after, writing
from dpo_jax.files.jsonl import read_lines
from dpo_jax.files.wandb_log import WandbLog
from dpo_jax.processes import distributed
from dpo_jax.voice import listen, mode, say, tell

__all__ = ["DriftWarning", "MetricLog", "ProgressBar", "read_metrics", "say", "show_cursor", "show_log", "summary_text"]

# Wall-clock figures: the only keys of metrics.jsonl in which two runs of the same options may differ.
_SECONDS = ("seconds_per_step", "seconds_saving", "seconds_sampling", "seconds_measuring", "seconds_scoring")
CLOCK_KEYS = ("tokens_per_second", *_SECONDS, "tflops_per_device", "mfu")

Row = dict[str, float | int]


@functools.cache
def _console() -> Console:
    """One console for all bars, so that one may run inside another (evaluation inside training)."""
    return Console(stderr=True)


def show_log(*libraries: str) -> None:
    """Let the package's notes (which attention kernel runs, rows left out) through to stderr, of one process only.

    libraries: whose warnings are to be ours, too.
    """
    listen(*libraries)
    if jax.process_index() > 0:
        for name in ("dpo_jax", *libraries):
            logging.getLogger(name).setLevel(logging.ERROR)


def show_cursor() -> None:
    """A bar hides the terminal's cursor; give it back, for a process that ends without ending its bar."""
    if _console().is_terminal:
        _console().show_cursor(True)


class ProgressBar:
    """A bar on a terminal; elsewhere (a file, a job's log) one plain line every ten seconds and one at the end.

    Either says what time is left. With --json the same lines as JSON objects, on a terminal too; with --quiet nothing.

    A `transient` bar leaves nothing behind when it is done.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        done: int = 0,
        shown: bool = True,
        transient: bool = False,
        every_seconds: float = 10.0,
    ):
        console = _console()
        self._label, self._total, self._done, self._text = label, total, done, ""
        self._every, self._last = every_seconds, time.monotonic()
        self._began = self._first = (self._last, done)
        self._figures: Mapping[str, float] = {}
        shown = shown and mode() != "quiet"
        self._plain = shown and (not console.is_terminal or mode() == "json")
        self._printed, self._transient = -1, transient
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=transient,
            disable=not shown or self._plain,
        )
        self._task = self._bar.add_task(label, total=total, completed=done, text="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._plain and not self._transient and self._printed != self._done:
            self._line()
        self._bar.stop()

    def update(self, done: int, text: str = "", figures: Mapping[str, float] | None = None) -> None:
        """Show that `done` of `total` are done, with a few figures as `text`; all `figures` are for --json."""
        distributed.sign()
        now = time.monotonic()
        if self._first == self._began and done > self._began[1]:
            self._first = (now, done)
        self._done, self._text, self._figures = done, text, figures or {}
        self._bar.update(self._task, completed=done, text=text)
        if self._plain and now - self._last >= self._every:
            self._line()

    def say(self, text: str, event: Literal["note", "warning"] = "note") -> None:
        """Print a line without tearing the bar."""
        if self._bar.disable:
            say(text, event)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def _line(self) -> None:
        self._last, self._printed = time.monotonic(), self._done
        spent = self._last - self._began[0]
        since, done = self._first if self._done > self._first[1] else self._began  # compiling belongs to the first
        made = self._done - done
        left = (self._last - since) / made * (self._total - self._done) if made > 0 else None
        if mode() == "json":
            told = {"event": "progress", "of": self._label, "done": self._done, "total": self._total}
            rounded = None if left is None else round(left, 1)
            tell(told | {"seconds": round(spent, 1), "seconds_left": rounded} | {"figures": dict(self._figures)})
            return
        time_left = f"  {_clock(left)} left" if left and self._done < self._total else ""
        say(f"{self._label} {self._done}/{self._total} {self._text}".rstrip() + time_left)


def _clock(seconds: float) -> str:
    """12 s, 3:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{rest} s" if not (hours or minutes) else f"{f'{hours}:{minutes:02}' if hours else minutes}:{rest:02}"


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, none where it is not there; see `read_lines`."""
    return read_lines(path) if path.exists() else []


def _of_steps(path: Path) -> list[Row]:
    """`read_metrics` of a run in steps. Raises `InputError` where a row has no step, or other things than numbers."""
    rows = read_metrics(path)
    for number, row in enumerate(rows, 1):
        bad = [name for name, value in row.items() if type(value) not in (int, float)]
        if type(row.get("step")) is not int or bad:
            what = "no step" if "step" not in row else f"no number as {bad[0] if bad else 'step'}"
            raise InputError(
                f"{path}, line {number}: a row with {what}; restore the file, or start again with another --out"
            )
    return rows


class MetricLog:
    """The log of one run. Only the process that `writes` touches the disk and the terminal.

    Args:
      folder: the run folder; `metrics.jsonl` and the TensorBoard events go there.
      total: steps of the whole run.
      start: steps already done (of a resumed run): rows after it are cut off, so that the run repeats them exactly.
      also: who is told of every row, too.

    Attributes:
      stopped: set where a signal ends the run before its last step.
    """

    def __init__(self, folder: Path, *, total: int, start: int = 0, writes: bool = True, also: WandbLog | None = None):
        self.path = folder / "metrics.jsonl"
        self.rows: list[Row] = [row for row in _of_steps(self.path) if row["step"] <= start] if start else []
        self._writes, self._also, self.stopped = writes, also, False
        self._drift = DriftWarning()
        self.bar = ProgressBar("training", total, done=start, shown=writes)
        for row in self.rows:
            self._drift.add(row)
        if not writes:
            return
        # Step 0: an evaluation before the first step, where there was one.
        if [row["step"] for row in self.rows if row["step"]] != list(range(1, start + 1)):
            raise InputError(
                f"{self.path}: does not hold steps 1 to {start}, which the checkpoint has; restore the file, or start"
                " again with another --out"
            )
        from dpo_jax.files.events import EventFile

        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            kept = "".join(json.dumps(row) + "\n" for row in self.rows)
            self._file = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115 - closed by `close`
            self._file.write(kept.encode())
            self._file.truncate()
            self._file.flush()
            self._events = EventFile(folder / "tensorboard", purge_from=start + 1 if start else None)

    def __enter__(self) -> Self:
        self.bar.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.bar.__exit__(kind, error, trace)
        if self._also is not None:
            self._also.close(error is not None or self.stopped)
        if self._writes:
            close_after(self._events, self.path.with_name("tensorboard"), error)
            close_after(self._file, self.path, error)

    def write(self, row: Row) -> None:
        """Append the row of one step ("step" and the metrics): to the file (flushed), TensorBoard and the bar."""
        if "logps/chosen" in row and "logps/chosen_change" not in row:
            # Without a reference that stays: against the first step, whose metrics are those of the untrained model.
            first = next((earlier for earlier in self.rows if "logps/chosen" in earlier), row)
            row = {**row, "logps/chosen_change": row["logps/chosen"] - first["logps/chosen"]}
        self.rows.append(row)
        if not self._writes:
            distributed.sign()
            return
        with writing(self.path):
            self._file.write((json.dumps(row) + "\n").encode())
            self._file.flush()
            self._events.add(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
        if self._also is not None:
            self._also.add(row)
        self.bar.update(int(row["step"]), summary_text(row), row)
        warning = self._drift.add(row)
        if warning:
            self.bar.say(f"warning: {warning}", "warning")

    def sync(self) -> None:
        """Make sure that what was written is on the disk (before a checkpoint claims those steps as done)."""
        if not self._writes:
            return
        with writing(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._events.sync()


_TELLING = (
    ("objective/scores", "score", ".3f"),
    ("objective/kl", "KL", ".2f"),
    ("loss", "loss", ".4f"),
    ("rewards/accuracies", "accuracy", ".2f"),
    ("mean_token_accuracy", "token accuracy", ".2f"),
)
"""Figures by what they tell of a run: metric, what it is called beside the bar, its format."""


def summary_text(row: Mapping[str, float]) -> str:
    """What stands beside the progress bar: the two figures that tell most, and the speed."""
    telling = [one for one in _TELLING if one[0] in row][:2]
    shown = (*telling, ("tokens_per_second", "tokens/s", ",.0f"))
    return "  ".join(f"{label} {row[key]:{form}}" for key, label, form in shown if key in row)


class DriftWarning:
    """Notices, once a run, that the chosen responses become less likely while the accuracy rises.

    That is what a preference loss may do unseen: it asks only for the difference of the two. The means over the last
    `window` steps are compared with those over the first, beyond twice the standard error of their difference.
    """

    def __init__(self, window: int = 20):
        self._window = window
        self._logps: list[float] = []
        self._accuracies: list[float] = []
        self._warned = False

    def add(self, row: Mapping[str, float]) -> str | None:
        """Take in the row of a step; return the warning, in words, if now is the time for it."""
        if self._warned or "logps/chosen" not in row or "rewards/accuracies" not in row:
            return None
        self._logps.append(row.get("logps/chosen_change", row["logps/chosen"]))
        self._accuracies.append(row["rewards/accuracies"])
        n = self._window
        if len(self._logps) < 2 * n:
            return None
        first, last = np.asarray(self._logps[:n]), np.asarray(self._logps[-n:])
        error = np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / n)
        accuracy_first, accuracy_last = np.mean(self._accuracies[:n]), np.mean(self._accuracies[-n:])
        if last.mean() >= first.mean() - 2 * error or accuracy_last <= accuracy_first:
            return None
        self._warned = True
        return (
            f"at step {int(row['step'])} the chosen responses have become less likely (each by"
            f" {first.mean() - last.mean():.1f} nats on average) while the accuracy rose"
            f" ({accuracy_first:.2f} to {accuracy_last:.2f}):"
            " the model is pushed away from the rejected responses and from the chosen ones too; a smaller learning"
            " rate, a larger --dpo.beta, --dpo.nll_coefficient or --dpo.loss dpop counteracts this"
        )
