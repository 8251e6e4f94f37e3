"""What all recipes share: stages in one folder, done one after the other, each once.

A recipe's folder is a run folder (`files/folder.py`: run.json, config.json) with stages.json in it: of each stage that
is done what it read (with a hash of the content), what it made, how long it took, and its figures. A stage is done when
it stands there and its output is whole. What was read by a stage that is done must not change.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_jax.errors import InputError, Stopped
from dpo_jax.files.folder import RunFolder, as_json, is_finished, write_atomically
from dpo_jax.files.log import read_metrics, say

RECORD = "stages.json"
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


class Recipe:
    """The folder of a recipe, and what is done in it.

    Attributes:
      out: the folder, as an absolute path, so that runs inside may be gone on with from elsewhere.
    """

    def __init__(self, name: str, config: Any, resolved: Any):
        """Opens the folder `config.out`; `resolved`: the options with everything filled in, for config.json.

        Raises `InputError` where it holds something else, or this recipe with other options (the first that differs is
        named).
        """
        self.out, self._name = Path(config.out).absolute(), name
        self._resolved, command = as_json(resolved), f"recipe {name}"
        self._folder = RunFolder(self.out, command, as_json(config), started=lambda path: (path / RECORD).exists())
        self.status = self._folder.open()
        self._done: dict[str, Any] = {}
        if (self.out / RECORD).exists():
            try:
                self._done = dict(json.loads((self.out / RECORD).read_text()))
            except (OSError, ValueError, TypeError) as error:
                raise InputError(f"{self.out / RECORD}: not readable; choose another --out") from error

    def perform(self, stages: Sequence[Stage]) -> None:
        """Do the stages that are not done. `Stopped` where a signal stopped one: the same command goes on there."""
        remaining = [stage.name for stage in stages if not self._is_done(stage)]
        if self.status == "finished" and not remaining:
            return
        self._folder.claim(self._resolved)
        say(f"recipe {self._name}: {len(stages)} stages, {len(stages) - len(remaining)} done; results in {self.out}")
        for number, stage in enumerate(stages, 1):
            head = f"[{number}/{len(stages)}] {stage.name}"
            if stage.name not in remaining:
                say(f"{head}: done ({_told(self._done[stage.name]['figures'])})")
                continue
            say(head)
            start = time.monotonic()
            read = {str(source): content(source) for source in stage.inputs}
            try:
                figures = dict(stage.work())
            except Stopped:
                left = len(stages) - number
                say(f"{head}: stopped; the same command goes on with it ({left} stages after it)")
                raise
            seconds = round(time.monotonic() - start, 1)
            self._done[stage.name] = {
                "inputs": read,
                "output": str(stage.output),
                "seconds": seconds,
                "figures": figures,
            }
            write_atomically(self.out / RECORD, json.dumps(self._done, indent=2) + "\n")
            say(f"{head}: {_told(figures)}; {seconds:.0f} s")

    def _is_done(self, stage: Stage) -> bool:
        """Raises `InputError` where its inputs have changed since."""
        if stage.name not in self._done or not stage.whole:
            return False
        for source, before in self._done[stage.name]["inputs"].items():
            if content(source) != before:
                raise InputError(
                    f"{self.out}: {source} is not what it was when the stage '{stage.name}' read it; restore it, or"
                    " choose another --out"
                )
        return True

    @property
    def record(self) -> dict[str, Any]:
        """Of each stage that is done: `inputs`, `output`, `seconds`, `figures`."""
        return dict(self._done)

    def finish(self) -> None:
        """Mark the recipe as finished."""
        self._folder.finish()


def last_figures(folder: Path, names: Mapping[str, str]) -> Figures:
    """The newest values in a run folder's metrics.jsonl: what they are to be called -> their name there."""
    found: dict[str, float | int | str] = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        found |= {name: row[key] for name, key in names.items() if key in row}
    return found


def content(source: str | Path) -> str:
    """A hash of a file; of a run of ours, that of its options and figures; of another folder, of names and sizes.

    A reward of the user's own, FILE.py:FUNCTION, counts as its file. What is neither file nor folder (a hub id, a
    reward by name) is its own content.
    """
    file, _, _ = str(source).rpartition(":")
    path, digest = Path(file if file.endswith(".py") else source).expanduser(), hashlib.sha256()
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
