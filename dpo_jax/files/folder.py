"""The run folder: what is in it, whether it is ours, and whether a run in it is new, unfinished or finished.

run.json       marks the folder as a run of ours: the options as given, and whether the run has finished;
config.json    the resolved options (what was computed from the data, such as the number of steps, filled in);
local.json     names the run where it keeps checkpoints on its hosts' own disks;
metrics.jsonl, TensorBoard events, checkpoints/, model/, adapter/, report.html
"""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from dpo_jax.config.commands.judge import DECIDE_NO_REPLY
from dpo_jax.config.names import option, with_new_names
from dpo_jax.errors import InputError
from dpo_jax.headers import read_json
from dpo_jax.weights.integrity.folder import steps_in

# Options that change no number of a run, but by rounding, nor what it learns from: a rerun may differ in them.
FREE = (
    "out",
    "mesh.",
    "distributed.",
    "checkpoint.",
    "data.workers",
    "energy.",
    "train.peak_flops",
    "train.crossing_dtype",  # a run whose second slice is lost goes on with one, where nothing crosses
    "reward_timeout",
    "sample_batch_size",
    "sample.layout",
    "ignore_config_keys",
    "log.",
    "push_to_hub",
    *(f"{of}endpoint.{name}" for of in ("", "dsft.") for name in DECIDE_NO_REPLY),
)

STAGES, INPUTS = "stages.json", "inputs.json"
"""Of a run of several stages (`files/stages.py`): those that are done, and fingerprints of what it was begun with."""

_METRIC = "checkpoint.best"
"""Free, but where it decides when a run ends."""
_TIMEOUT = "reward_timeout"
"""Free, but where a command judges (`--reward run:COMMAND`): what runs out of time scores 0."""
_JUDGES = ("reward", "safety_reward")

Status = Literal["new", "unfinished", "finished"]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def as_json(config: Any) -> dict[str, Any]:
    """A configuration dataclass as what `json` reads back (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that it is there whole or not at all. Raises `InputError` when the disk is full or read-only.

    It grows as .NAME.partial. What a process that was killed left there is taken over by whoever writes NAME next.
    Half of a surrogate pair in a text is spelled \\ud83d, which JSON reads again as what it was.
    """
    data = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _taken(partial) as file:
            try:
                file.truncate(0)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise cannot_write(path, error) from error


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@contextmanager
def _taken(path: Path) -> Iterator[BinaryIO]:
    """The file `path`, for this writer alone: another process that writes it (jobs share caches) is waited for.

    Where the file system has no locks, nobody waits.
    """
    while True:
        with open(path, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
            if _is_at(file, path):  # and has not got its name meanwhile
                yield file
                return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def write_json(path: Path, value: Any, *, indent: int = 2, ensure_ascii: bool = True) -> None:
    """Write a value as a file of JSON, whole or not at all. Raises `InputError`: see `write_atomically`."""
    write_atomically(path, json.dumps(value, indent=indent, ensure_ascii=ensure_ascii) + "\n")


def cannot_write(path: Path | str, error: OSError) -> InputError:
    """The one line for a full or unwritable disk."""
    return InputError(f"{path}: cannot be written ({error.strerror or error}); free space or choose another folder")


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Within the block an `OSError` is the one line for a full or unwritable disk."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def close_after(file: Any, path: Path, error: BaseException | None) -> None:
    """Close a file at the end of a `with` block that `error` ended, if anything did.

    Closing writes what is left, and fails where the disk is full: `InputError`, unless `error` has told of it already.
    """
    try:
        file.close()
    except OSError as failure:
        if error is None:
            raise cannot_write(path, failure) from failure


class RunFolder:
    """One run folder of one command. `open` decides what may happen in it, before anything expensive."""

    def __init__(self, path: Path, command: str, config: Mapping[str, Any], *, writes: bool = True):
        """Args:
        path, command: the folder, and what runs in it.
        config: the options as given (JSON-able, nested).
        writes: False in every process but the first.
        """
        self.path = path
        self.command = command
        self.given = dict(config)
        self.writes = writes

    @property
    def marker(self) -> Path:
        """The file that makes a folder a run folder."""
        return self.path / "run.json"

    def open(self) -> Status:
        """Say whether the run is new, unfinished or finished. Nothing is written yet (see `claim`).

        Raises `InputError` where the folder holds something else, a run of another command, a run with other options
        (the first that differs is named), or cannot be written. A run with nothing to go on with counts as new.
        """
        if not self.marker.exists():
            self._check_free()
            return "new"
        command, before, finished = _read_marker(self.marker)
        if command != self.command:
            raise InputError(f"{self.path}: holds a run of `dpo-jax {command}`; choose another --out")
        if not finished and not _started(self.path):
            return "new"
        now = flatten(self.given)
        commands = any(str(one).startswith("run:") for key in _JUDGES for one in _listed(now.get(key)))
        for name in sorted(before.keys() | now.keys()):
            bound = (name == _METRIC and now.get("train.stop_after") is not None) or (name == _TIMEOUT and commands)
            if (name.startswith(FREE) and not bound) or before.get(name) == now.get(name):
                continue
            if name not in before and now[name] is False:
                continue  # an earlier version began it, which had no such option: it is off, as it was
            has, wants = before.get(name), now.get(name)
            raise InputError(
                f"{self.path}: the run in it has {f'no {option(name)}' if has is None else f'{option(name)} {has}'},"
                f" this command has {'none' if wants is None else wants};"
                " give the same value to go on with it, or choose another --out"
            )
        return "finished" if finished else "unfinished"

    def _check_free(self) -> None:
        with writing(self.path):
            begun = _partial(self.marker)  # by a process that was killed before the folder was its own
            if self.path.exists() and (not self.path.is_dir() or any(path != begun for path in self.path.iterdir())):
                raise InputError(f"{self.path}: exists and is not a run of dpo-jax; choose another --out")
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"{self.path}: {parent} is not a writable folder; choose another --out")

    def resolved(self) -> dict[str, Any]:
        """The resolved options of the run in the folder, flat. Raises `InputError` where they cannot be read."""
        path = self.path / "config.json"
        try:
            return with_new_names(flatten(json.loads(path.read_text())), path)
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: not readable as the options of a run; choose another --out") from error

    def claim(self, resolved: Mapping[str, Any]) -> None:
        """Make the folder ours: write the marker and the resolved options. Call it once the input has been checked."""
        self._mark(finished=False)
        if self.writes:
            write_json(self.path / "config.json", resolved)

    def run_name(self) -> str:
        """A name of this run with these options, for what it keeps outside its folder: no other run has had it.

        Process 0 asks, once the folder is claimed.
        """
        path = self.path / "local.json"
        try:
            made = str(read_json(path)["run"])
        except (InputError, KeyError, TypeError):
            made = secrets.token_hex(8)
            write_json(path, {"run": made})
        bound = {name: value for name, value in flatten(self.given).items() if not name.startswith(FREE)}
        return f"{made}-{hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()[:8]}"

    def _mark(self, *, finished: bool) -> None:
        if self.writes:
            write_json(self.marker, {"command": self.command, "finished": finished, "given": self.given})

    def finish(self) -> None:
        """Mark the run as finished."""
        self._mark(finished=True)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _started(path: Path) -> bool:
    """True where a run folder holds anything to go on with: a whole checkpoint, or the record of stages."""
    return bool(steps_in(path / "checkpoints")) or any((path / name).exists() for name in (STAGES, INPUTS))


def is_finished(path: Path) -> bool:
    """True where a run folder's run has finished."""
    marker = path / "run.json"
    return marker.exists() and _read_marker(marker)[2]


def _read_marker(path: Path) -> tuple[str, dict[str, Any], bool]:
    """The command of a run, the options that it was given, flat, and whether it has finished. Raises `InputError`."""
    try:
        marker = read_json(path)
        command, given, finished = marker["command"], marker["given"], marker["finished"]
        if not (isinstance(command, str) and isinstance(given, dict) and isinstance(finished, bool)):
            raise InputError(f"{path}: command, given or finished is of the wrong kind")
    except (InputError, KeyError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error).removeprefix(f"{path}: ")
        raise InputError(f"{path}: not readable as the marker of a run ({why}); choose another --out") from error
    return command, with_new_names(flatten(given), path), finished
