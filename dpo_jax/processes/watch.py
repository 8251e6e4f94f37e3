"""Several processes watch each other, so that one that is lost, hangs or failed ends the others too, in one clear line.

Without this the others would wait in a collective operation for good, or be aborted by jax with a log of its own.

Every process writes into the key-value store of jax's coordination service (it lives in process 0), every few seconds:
a beat, and how many signs of progress it has given (steps, batches of an evaluation). And it reads what the others
wrote. The threads that do so work also while the main thread waits for devices.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dpo_jax.errors import BAD_INPUT
from dpo_jax.voice import say

TRY_AGAIN = 75
"""Exit code of a process that ends because of another one (EX_TEMPFAIL of BSD's sysexits.h), unless that ended with bad
input, which is there again when all are started again."""

_FOLDER = "dpo_jax/watch"
_FINISHED = ""
_GRACE = 5.0
"""Seconds that a process has to tell of its own error before another's ends it."""


class Store(Protocol):
    """What is used of jax's client of the coordination service."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


@dataclass
class _Other:
    """What is known of another process; times are of this process's clock."""

    host: str
    beat: int
    changed: float
    ended: str | None = None
    ended_at: float = 0.0
    code: int = 0
    passed_on: bool = False
    """What `ended` says is of a third process."""


class Judge:
    """Decides from what the processes wrote whether this one must end. No thread, no clock, no network of its own.

    Args:
      me, processes: this process's number, and how many there are.
      lost_after: seconds without a beat after which a process counts as lost.
      stuck_after: seconds without progress of any process, while progress is expected, after which all end.
      now: the time at the beginning, in seconds of any clock.
    """

    def __init__(self, me: int, processes: int, *, lost_after: float, stuck_after: float, now: float):
        self._me, self._lost_after, self._stuck_after = me, lost_after, stuck_after
        self._others = {i: _Other("", -1, now) for i in range(processes) if i != me}
        self._signs: dict[int, int] = {}
        self._progress = self._looked = now

    def read(self, notes: Mapping[int, Mapping[str, Any]], now: float) -> None:
        """Take in the newest note of every process (its own too)."""
        away, self._looked = now - self._looked, now
        if away > self._lost_after / 2:  # this process itself stood still, and maybe all: nothing can be said yet
            self._progress += away
            for other in self._others.values():
                other.changed += away
        for i, note in notes.items():
            if self._signs.get(i) != note["signs"]:
                self._signs[i], self._progress = note["signs"], now
            other = self._others.get(i)
            if other is None:
                continue
            if note["beat"] != other.beat:
                other.beat, other.changed, other.host = note["beat"], now, note["host"]
            if note["ended"] is not None and other.ended is None:
                other.ended, other.ended_at = note["ended"], now
                other.code, other.passed_on = note["code"], note["passed_on"]

    def verdict(self, now: float, *, expecting: bool) -> str | None:
        """Why this process must end; None while all is well. `expecting`: that it is making progress."""
        if failure := self.failure(now - _GRACE):
            return failure
        for i, other in self._others.items():
            if other.ended is None and now - other.changed > self._lost_after:
                return f"{self.name(i)} is lost: no sign of life for {now - other.changed:.0f} s"
        if not expecting:
            self._progress = now
        if now - self._progress > self._stuck_after:
            least = min(self._signs.values(), default=0)
            behind = [str(i) for i, signs in sorted(self._signs.items()) if signs == least]
            return (
                f"no process has finished a step for {now - self._progress:.0f} s (--distributed.stuck_after); the"
                f" least far is process {', '.join(behind[:8])}"
            )
        return None

    def failure(self, until: float) -> str | None:
        """What another process that failed by `until` said; at once, where it passes on why a third one is missed."""
        for i, other in self._others.items():
            if other.ended and other.passed_on:
                return other.ended
            if other.ended and other.ended_at <= until:
                return f"{self.name(i)} ended with an error: {other.ended}"
        return None

    @property
    def code(self) -> int:
        """What a process exits with that ends because of another one."""
        return BAD_INPUT if any(other.code == BAD_INPUT for other in self._others.values()) else TRY_AGAIN

    def silent(self, now: float, seconds: float) -> list[int]:
        """The processes that are not done and have written no beat for so many seconds."""
        return [i for i, other in self._others.items() if other.ended is None and now - other.changed > seconds]

    def alone(self, now: float, seconds: float) -> bool:
        """Whether every other process has ended, or been silent for so many seconds."""
        silent = self.silent(now, seconds)
        return all(other.ended is not None or i in silent for i, other in self._others.items())

    def name(self, i: int) -> str:
        """Process `i` and, where it has told, its host."""
        other = self._others.get(i)
        return f"process {i} on {other.host}" if other is not None and other.host else f"process {i}"


class Watch:
    """The threads that watch. `end` is how this process is ended (a test passes its own)."""

    def __init__(
        self,
        store: Store,
        me: int,
        processes: int,
        *,
        lost_after: float,
        stuck_after: float,
        end: Callable[[int], Any] = os._exit,
    ):
        self.done = False
        self._store, self._me, self._end = store, me, end
        self._lost_after = lost_after
        self._judge = Judge(me, processes, lost_after=lost_after, stuck_after=stuck_after, now=time.monotonic())
        self._host = socket.gethostname()
        self._period = min(lost_after / 5, _GRACE / 2)
        self._silence = 2.5 * self._period
        self._lock, self._failing = threading.Lock(), threading.Lock()
        self._beat, self._signs = 0, 0
        self._expecting = False
        self._closing = threading.Event()
        self._reached = time.monotonic()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._look)]
        for thread in self._threads:
            thread.start()

    @property
    def first(self) -> str:
        """Process 0, in words."""
        return self._judge.name(0)

    @property
    def own(self) -> str:
        """This process, in words."""
        return f"process {self._me} on {self._host}"

    def sign(self) -> None:
        """Tell that the main thread gets on."""
        self._signs += 1

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """While this is entered, signs are expected."""
        self._expecting = True
        try:
            yield
        finally:
            self._expecting = False

    def close(self) -> None:
        """This process is done; from now on it is not missed."""
        self.done = True
        self._closing.set()
        for thread in self._threads:
            thread.join(self._period + 1)
        self._briefly(lambda: self._tell(_FINISHED))

    def leave(self, code: int, line: str) -> None:
        """End this process after an error of its own, which has been printed. Does not return.

        jax's way out would wait for the others, and they for this process. Process 0 goes last: with it goes the store.
        """
        self._failing.acquire()  # for good: nobody else is to speak or to end this process
        self._closing.set()
        self._part(line, code, passed_on=False)
        self._stop(code)

    def _part(self, line: str, code: int, *, passed_on: bool) -> None:
        """Tell the others why this process ends; process 0 waits until they have read it and ended, too."""
        until = time.monotonic() + (4 * _GRACE if self._me == 0 else 0)
        self._briefly(lambda: self._exchange(line, code, passed_on))
        while not self._judge.alone(time.monotonic(), self._silence) and time.monotonic() < until:
            time.sleep(0.1)
            self._briefly(lambda: self._exchange(line, code, passed_on))

    def lost_connection(self, error: BaseException) -> str:
        """What an error that jax raised in the main thread because of another process came from, in one line.

        Whoever is left goes on writing beats, so that the process that is gone is the one without.
        """
        began = time.monotonic()
        while time.monotonic() < began + 2 * self._silence:
            self._briefly(lambda: self._exchange(None))
            now = time.monotonic()
            if failure := self._judge.failure(now):
                return failure
            if self._reached > began and (silent := self._judge.silent(now, self._silence)):
                return f"{self._judge.name(silent[0])} is gone: its connection broke, and it gives no sign of life"
            time.sleep(0.1)
        if self._reached < began:
            return f"{self._judge.name(0)} is gone: its connection broke, and it does not answer"
        return f"the connection to another process broke, which still gives signs of life ({line_of(error)})"

    def fail(self, line: str, *, tell: bool = True) -> None:
        """End this process because of another one; `tell` the others why."""
        self._failing.acquire()  # for good: whoever comes second waits for the end
        code, told = self._judge.code, line
        if code == TRY_AGAIN:
            told += "; the last checkpoint is intact: start all processes again with the same command to go on from it"
        say(f"dpo-jax: error: {told}", "error", code=code)
        if tell:
            self._part(line, code, passed_on=True)
        self._stop(code)

    def _stop(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._end(code)

    def _briefly(self, work: Callable[[], None]) -> None:
        """Do something with the store, which may be gone or not answer: give it two seconds."""

        def attempt() -> None:
            with contextlib.suppress(RuntimeError):  # jax's own
                work()

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(2)

    def _talk(self) -> None:
        """What the first thread does: write and read notes. It may hang where process 0 does."""
        while True:  # the first note at once: it tells the others this host's name
            with contextlib.suppress(RuntimeError):  # jax's own: process 0 is gone; `_look` notices
                self._exchange(None)
            if self._closing.wait(self._period):
                return

    def _look(self) -> None:
        """What the second thread does: judge."""
        before = time.monotonic()
        while not self._closing.wait(self._period):
            now = time.monotonic()
            if (away := now - before) > self._lost_after / 2:  # this process itself stood still
                self._reached += away
            before = now
            verdict = self._judge.verdict(now, expecting=self._expecting)
            if now - self._reached > self._lost_after:
                verdict = f"{self._judge.name(0)} is lost: it has not answered for {now - self._reached:.0f} s"
            if verdict and not self._closing.is_set():
                self.fail(verdict)
                return

    def _exchange(self, ended: str | None, code: int = 0, passed_on: bool = False) -> None:
        with self._lock:
            self._tell(ended, code, passed_on)
            entries = self._store.key_value_dir_get(_FOLDER)
            notes = {int(key.rpartition("/")[2]): json.loads(value) for key, value in entries}
            self._reached = time.monotonic()
            self._judge.read(notes, self._reached)

    def _tell(self, ended: str | None, code: int = 0, passed_on: bool = False) -> None:
        self._beat += 1
        note = {"host": self._host, "beat": self._beat, "signs": self._signs}
        note |= {"ended": ended, "code": code, "passed_on": passed_on}
        self._store.key_value_set(f"{_FOLDER}/{self._me}", json.dumps(note), allow_overwrite=True)


def say_when_aborted(address: str, watch: Watch) -> None:
    """Let a process that jax aborts because process 0 is gone say so, and exit as `Watch.fail` does.

    jax's client of the coordination service ends the process from C++ as soon as its connection breaks; the only way to
    hear of that is the signal that it raises, SIGABRT, in the thread that raises it, where Python's own handlers never
    run. Where `address` (host:port of process 0) still answers, the cause is another one, and the abort goes on.
    """

    def handle(number: int) -> None:
        if watch.done:
            return
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            watch.fail(f"{watch.first} is gone: nothing answers at {address}", tell=False)

    libc = ctypes.CDLL(None)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    say_when_aborted.handler = kind(handle)  # type: ignore[attr-defined] # must outlive the process's last thread
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, say_when_aborted.handler)  # type: ignore[attr-defined]


def line_of(error: BaseException) -> str:
    """What an error says, in one line that is not too long."""
    return " ".join(str(error).split())[:200]
