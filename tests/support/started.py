"""`python -m dpo_jax WORDS...` as a process of its own that need not read the modules: a fork of one that has.

    started.start(["dpo", "--model", ...], environment) -> Started, which is used as a `subprocess.Popen`

Half of what a tiny run costs is imports. For each set of variables that count while modules are read (JAX's, Python's)
there is one process that has read them and has not begun to compute; it forks a keeper for each start, and the keeper
forks the run, tells its number, waits, and tells how it ended. The run ends as any Python program does.
"""

import atexit
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_READ_BY_MODULES = ("JAX_", "PYTHON", "TF_", "HF_", "TRANSFORMERS_", "OMP_", "LD_")
_LOCK = threading.Lock()


class Started:
    """A run: `pid`, `stdout`, `stderr`, `returncode` and methods as those of `subprocess.Popen`, in text mode."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], folder: Path | None, both: bool):
        self.args = list(words)
        self.returncode: int | None = None
        out, err = os.pipe(), None if both else os.pipe()
        ends = [out[1], out[1] if err is None else err[1]]
        here, there = socket.socketpair()
        request = {"words": self.args, "environment": dict(environment), "folder": str(folder or Path.cwd())}
        with _LOCK:
            _server(*_counting(environment)).send(request, [there.fileno(), *ends])
        there.close()
        for end in set(ends):
            os.close(end)
        self._told = here.makefile("r")
        here.close()
        self.pid = int(self._told.readline())
        self.stdout: IO[str] = os.fdopen(out[0], errors="backslashreplace")
        self.stderr: IO[str] | None = None if err is None else os.fdopen(err[0], errors="backslashreplace")
        self._ended = threading.Event()
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        self.returncode = int(self._told.readline())
        self._told.close()
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it says from here on, to its end."""
        until = None if timeout is None else time.monotonic() + timeout
        said = ["", ""]

        def read(i: int, stream: IO[str]) -> None:
            said[i] = stream.read()
            stream.close()

        streams = [stream for stream in (self.stdout, self.stderr) if stream is not None]
        readers = [threading.Thread(target=read, args=one, daemon=True) for one in enumerate(streams)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if until is None else max(until - time.monotonic(), 0))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if until is None else max(until - time.monotonic(), 0))
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def start(
    words: Sequence[str], environment: Mapping[str, str], *, folder: Path | None = None, both: bool = False
) -> Started:
    """`dpo-jax` with these words and variables. folder: where it works; both: what it says on stderr is in stdout."""
    return Started(words, environment, folder, both)


def _counting(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The variables that modules read while they are imported."""
    return tuple(sorted(item for item in environment.items() if item[0].startswith(_READ_BY_MODULES)))


class _Server:
    """This side of the process that has read the modules."""

    def __init__(self, variables: Mapping[str, str]):
        here, there = socket.socketpair()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_READ_BY_MODULES)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(there.fileno())], env={**kept, **variables}, pass_fds=[there.fileno()]
        )
        there.close()
        self._here = here
        atexit.register(self.close)

    def send(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        data = json.dumps(request).encode()
        socket.send_fds(self._here, [len(data).to_bytes(4, "big")], list(descriptors))
        self._here.sendall(data)

    def close(self) -> None:
        self._here.close()
        self.process.wait()


@functools.cache
def _server(*variables: tuple[str, str]) -> _Server:
    return _Server(dict(variables))


# ---- the other side ------------------------------------------------------------------------------------------------


def _asked(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next request and its descriptors (to tell on, stdout, stderr); None at the end."""
    head, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    if not head:
        return None
    with connection.makefile("rb", buffering=0) as file:
        left, data = int.from_bytes(head, "big"), b""
        while len(data) < left:
            data += file.read(left - len(data))
    return json.loads(data), descriptors


def _forked(connection: socket.socket) -> dict[str, Any] | None:
    """In a run, what was asked for; None in the server, at its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    while (asked := _asked(connection)) is not None:
        request, descriptors = asked
        # Read here, once; a command that there is not says so itself.
        from dpo_jax.config.command_line.words import COMMANDS

        command = COMMANDS.get(" ".join(request["words"][:2])) or COMMANDS.get(request["words"][0])
        if command is not None:
            importlib.import_module("dpo_jax.commands." + command.function.partition(":")[0])
        if os.fork():
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        tell, out, err = descriptors
        connection.close()
        run = os.fork()
        if not run:
            os.close(tell)
            os.dup2(out, 1)
            os.dup2(err, 2)
            for end in {out, err}:
                os.close(end)
            return request
        for end in {out, err, 0, 1, 2}:
            os.close(end)
        os.write(tell, f"{run}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(run, 0)[1])
        os.write(tell, f"{code}\n".encode())
        os._exit(0)
    return None


def main(descriptor: int) -> int:
    from dpo_jax import cli

    request = _forked(socket.socket(fileno=descriptor))
    if request is None:
        return 0
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.stdout = os.fdopen(1, "w", closefd=False)  # the server's may have been files, in which one can seek
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.argv = ["dpo-jax", *request["words"]]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
