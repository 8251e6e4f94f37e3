"""A command of several stages: what it was begun with, its stages one after the other, each once, gone on with.

Its folder is a run folder (`files/folder.py`: run.json, config.json) with stages.json in it: of each stage that is done
what it read (with a hash of the content), what it made, how long it took, and its figures. A stage is done when it
stands there and its output is whole. What was read by a stage that is done must not change, nor what the command was
begun with: inputs.json, where the options name files that are read before the first stage.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_jax.config.command_line.yaml_file import SUFFIXES, decisive
from dpo_jax.errors import InputError, Stopped
from dpo_jax.files.folder import INPUTS, STAGES, RunFolder, as_json, is_finished, write_json
from dpo_jax.files.log import read_metrics, say
from dpo_jax.processes import distributed

Figures = Mapping[str, float | int | str]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
      name: what it is called, on the screen and in the record.
      inputs: files, folders and names that it reads.
      output: file or run folder that it makes; whole once it is there, a run folder once its run has finished.
      work: does it, or goes on with it, and returns its figures. `Stopped` where a signal ended it early.
    """

    name: str
    inputs: tuple[str | Path, ...]
    output: Path
    work: Callable[[], Figures]

    @property
    def whole(self) -> bool:
        """Whether the output is there, all of it."""
        return is_finished(self.output) if (self.output / "run.json").exists() else self.output.is_file()


class Stages:
    """A run folder, and the stages that are done in it. Every process calls this; process 0 writes and talks.

    Attributes:
      status: of the run, when its folder was opened.
      record: of each stage that is done: `inputs`, `output`, `seconds`, `figures`.
    """

    def __init__(self, folder: RunFolder):
        """Opens the folder. Raises `InputError` where it holds something else, or a run with other options."""
        self._folder, self.out, self.status = folder, folder.path, folder.open()
        self.record: dict[str, Any] = self._read(STAGES)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.out / name
        try:
            return dict(json.loads(path.read_text())) if path.exists() else {}
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: not readable; choose another --out") from error

    def perform(self, stages: Sequence[Stage], resolved: Any, inputs: Mapping[str, Any] | None = None) -> None:
        """Do the stages that are not done. `Stopped` where a signal stopped one: the same command goes on there.

        Args:
          stages: all of them, in order.
          resolved: the options with everything filled in, for config.json.
          inputs: option -> a fingerprint of what it names, JSON-able: as it was when the run began, or `InputError`.
        """
        for name, before in self._read(INPUTS).items():
            if inputs and name in inputs and inputs[name] != before:
                raise InputError(
                    f"{self.out}: what {name} names has changed since this run began; restore it, or choose another"
                    " --out"
                )
        remaining = [stage.name for stage in stages if not distributed.flag_from_main(self._is_done(stage))]
        if self.status == "finished" and not remaining:
            return
        self._folder.claim(as_json(resolved))
        if inputs:
            self._write(INPUTS, inputs)
        self._write(STAGES, self.record)
        done = len(stages) - len(remaining)
        self._say(f"{self._folder.command}: {len(stages)} stages, {done} done; results in {self.out}")
        for number, stage in enumerate(stages, 1):
            head = f"[{number}/{len(stages)}] {stage.name}"
            if stage.name not in remaining:
                self._say(f"{head}: done ({_told(self.record[stage.name]['figures'])})")
                continue
            self._say(head)
            start = time.monotonic()
            read = {str(source): content(source) for source in stage.inputs}
            try:
                figures = dict(stage.work())
            except Stopped:
                left = len(stages) - number
                self._say(f"{head}: stopped; the same command goes on with it ({left} stages after it)")
                raise
            seconds = round(time.monotonic() - start, 1)
            made = {"inputs": read, "output": str(stage.output), "seconds": seconds, "figures": figures}
            self.record[stage.name] = made
            self._write(STAGES, self.record)
            distributed.barrier(head)
            self._say(f"{head}: {_told(figures)}; {seconds:.0f} s")

    def _is_done(self, stage: Stage) -> bool:
        """Raises `InputError` where its inputs have changed since."""
        if stage.name not in self.record or not stage.whole:
            return False
        before = self.record[stage.name]["inputs"].values()
        for source in stage.inputs:
            if content(source) not in before:
                raise InputError(
                    f"{self.out}: {source} is not what it was when the stage '{stage.name}' read it; restore it, or"
                    " choose another --out"
                )
        return True

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        if self._folder.writes:
            write_json(self.out / name, values)

    def _say(self, text: str) -> None:
        if self._folder.writes:
            say(text)

    def finish(self) -> None:
        """Mark the run as finished, once every process is here."""
        distributed.barrier("run finished")
        self._folder.finish()


def last_figures(folder: Path, names: Mapping[str, str]) -> Figures:
    """The newest values in a run folder's metrics.jsonl: what they are to be called -> their name there."""
    found: dict[str, float | int | str] = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        found |= {name: row[key] for name, key in names.items() if key in row}
    return found


def content(source: str | Path) -> str:
    """A hash of a file; of a run of ours, that of its options and figures; of another folder, of names and sizes.

    Of a YAML file, of what it says, but for what decides no reply of an endpoint: a budget may be raised.

    A reward of the user's own, FILE.py:FUNCTION, counts as its file. What is neither file nor folder (a hub id, a
    reward by name) is its own content.
    """
    file, _, _ = str(source).rpartition(":")
    path, digest = Path(file if file.endswith(".py") else source).expanduser(), hashlib.sha256()
    if path.is_file() and path.suffix in SUFFIXES and (said := decisive(path)) is not None:
        return hashlib.sha256(said.encode()).hexdigest()
    if path.is_file():
        with open(path, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    if not path.is_dir():
        return str(source)
    if (path / "run.json").exists():
        for name in ("run.json", "config.json", "metrics.jsonl"):
            digest.update((path / name).read_bytes() if (path / name).exists() else b"")
        return digest.hexdigest()
    for each in sorted(path.rglob("*")):
        if each.is_file():
            digest.update(f"{each.relative_to(path)} {each.stat().st_size}\n".encode())
    return digest.hexdigest()


def _told(figures: Figures) -> str:
    cells = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    )
    return ", ".join(cells) or "no figures"
