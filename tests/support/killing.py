"""A command started as a fork of this process, and killed by SIGKILL with its whole process group, where it is told to.

A start costs no imports where this process has made them before; it must not have begun to compute. A kill happens at
a moment (`seconds` after the start), or at a file operation below a folder: the so-manieth of its kind, before it is
done, after, or shortly after, while libraries that write by themselves (tensorstore, safetensors) are at work; a write
may also be cut in its middle. Python's own operations are wrapped in the child, so that this needs no privilege.
"""

import builtins
import contextlib
import functools
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

MOMENT, WRITE = "moment", "write"
BEFORE, AFTER, SOON, HALF = "before", "after", "soon after", "half of"
SOON_AFTER = 0.05
"""Seconds, at most."""

# Functions by their kind; a `replace` is a rename, a `remove` an unlink.
_FUNCTIONS: dict[str, tuple[tuple[Any, str], ...]] = {
    "open": ((os, "open"), (io, "open")),
    "rename": ((os, "rename"), (os, "replace")),
    "mkdir": ((os, "mkdir"),),
    "truncate": ((os, "truncate"), (os, "ftruncate")),
    "fsync": ((os, "fsync"),),
    "unlink": ((os, "unlink"), (os, "remove")),
    "rmdir": ((os, "rmdir"),),
    "rmtree": ((shutil, "rmtree"),),
}
KINDS = (*_FUNCTIONS, WRITE)


@dataclass(frozen=True)
class Kill:
    """Where a start ends.

    Attributes:
      kind: `MOMENT`, or one of `KINDS`.
      number: of the operations of this kind, from 1.
      when: `BEFORE`, `AFTER`, `SOON` or `HALF`.
      seconds: after the start, or after the operation where `when` is `SOON`.
    """

    kind: str
    number: int = 0
    when: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.kind == MOMENT:
            return f"{self.seconds:.2f} s"
        return f"{self.when} {self.kind} {self.number}"


@dataclass(frozen=True)
class Ended:
    """How a start ended: its exit code, negative the number of a signal; what it said; seconds."""

    code: int
    said: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


def die() -> NoReturn:
    """End this process and those that it started."""
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("it goes on after SIGKILL")


def forked(work: Callable[[], int], said: Path | None = None, kill_after: float | None = None) -> Ended:
    """Run `work` in a fork that leads a process group of its own; its exit code is what `work` returns.

    said: a file for stdout and stderr. kill_after: seconds until the group is killed, where it still runs.
    """
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            if said is not None:
                descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
            code = work()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    with contextlib.suppress(PermissionError, ProcessLookupError):  # whoever comes first
        os.setpgid(child, child)
    code = os.waitstatus_to_exitcode(_status(child, kill_after))
    return Ended(code, "" if said is None else said.read_text(errors="replace"), time.monotonic() - start)


def _status(child: int, kill_after: float | None) -> int:
    """What `waitpid` says of the child, whose group is killed after so many seconds."""
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while deadline is not None and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.002)
    if deadline is not None:
        os.killpg(child, signal.SIGKILL)  # not waited for yet, so the number is still its own
    return os.waitpid(child, 0)[1]


class Watched:
    """Python's file operations below a folder, counted from `watch` on, and the one at which this process dies.

    Attributes:
      counts: operations of each kind so far, done or not.
    """

    def __init__(self, folder: Path, kill: Kill | None):
        self.counts: Counter[str] = Counter()
        self._root = f"{folder.resolve()}{os.sep}"
        self._kill = kill if kill is not None and kill.kind != MOMENT else None
        self._lock = threading.Lock()

    def watch(self) -> None:
        """Wrap the operations, for the rest of this process."""
        for kind, places in _FUNCTIONS.items():
            for module, name in places:
                wrapped = self._opening if (kind, module) == ("open", io) else functools.partial(self._wrapped, kind)
                setattr(module, name, wrapped(getattr(module, name)))
        builtins.open = io.open

    def _below(self, path: Any, folder: int | None = None) -> bool:
        """Whether a path, or the file of a descriptor, lies in the watched folder."""
        if isinstance(path, int):
            place = os.readlink(f"/proc/self/fd/{path}")
        else:
            base = os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}")
            place = os.path.normpath(os.path.join(base, os.fsdecode(path)))
        return f"{place}{os.sep}".startswith(self._root)

    @contextlib.contextmanager
    def _at(self, kind: str) -> Iterator[bool]:
        """Around an operation; whether it is to be done by half."""
        with self._lock:
            self.counts[kind] += 1
            kill = self._kill
            hit = kill is not None and (kind, self.counts[kind]) == (kill.kind, kill.number)
        when = kill.when if kill is not None and hit else None
        if when == BEFORE:
            die()
        yield when == HALF
        if when in (AFTER, HALF):
            die()
        if when == SOON:
            assert kill is not None
            timer = threading.Timer(kill.seconds, die)
            timer.daemon = True
            timer.start()

    def _wrapped(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose first argument is a path or a descriptor."""

        @functools.wraps(real)
        def function(path: Any, *args: Any, **named: Any) -> Any:
            flags = (*args, named.get("flags"))[0] if kind == "open" else os.O_WRONLY
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            folder = named.get("dir_fd", named.get("src_dir_fd"))
            if not writes or not self._below(path, folder):
                return real(path, *args, **named)
            with self._at(kind):
                return real(path, *args, **named)

        return function

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """`open`: of a file to be written, its `write` and `truncate` are watched, too."""

        @functools.wraps(real)
        def function(path: Any, mode: str = "r", *args: Any, **named: Any) -> Any:
            if not set(mode) & set("wax+") or not self._below(path):
                return real(path, mode, *args, **named)
            with self._at("open"):
                file = real(path, mode, *args, **named)
            if hasattr(file, "__dict__"):
                file.write = self._writing(file.write, file.flush)
                file.truncate = self._method("truncate", file.truncate)
            return file

        return function

    def _method(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any) -> Any:
            with self._at(kind):
                return real(*args)

        return function

    def _writing(self, real: Callable[[Any], int], flush: Callable[[], None]) -> Callable[[Any], int]:
        def function(data: Any) -> int:
            with self._at(WRITE) as half:
                if half:
                    whole = data if isinstance(data, str) else bytes(data)
                    real(whole[: len(whole) // 2])
                    flush()
                    return 0
                return real(data)

        return function


def run_watched(run: Callable[[Sequence[str]], int], words: Sequence[str], watched: Watched, told: Path) -> int:
    """The exit code of a command whose file operations are watched; `told` gets their counts and the modules read."""
    watched.watch()
    code = run(words)
    told.write_text(json.dumps({"counts": watched.counts, "modules": list(sys.modules)}))
    return code
