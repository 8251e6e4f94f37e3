"""The exceptions that speak to the user.

Everything that a user can mend (a file, a row, a field, an option, a shape that does not divide) is raised as
`InputError`. The command line prints its message as one line and exits with code 2; any other exception is a bug, but
for `DoesNotFit`, which is the answer of `dpo-jax plan` where it is no, for `Stopped`, which is no error, and for a full
disk (`full_disk`).
"""

import contextlib
import difflib
import errno
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

_FULL = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}

# What stands in errors of the libraries through which devices of several hosts talk, when the other end is gone.
_CONNECTION = re.compile(
    r"gloo|nccl|coordination.?service|connection (reset|closed|refused)|socket closed|heartbeat|barrier"
    r"|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED",
    re.IGNORECASE,
)


BAD_INPUT = 2
"""What the command line exits with after an `InputError` or a full disk."""


class InputError(ValueError):
    """Bad input. The message is one line: what is wrong, where (file, row, field), and how to mend it."""


class SharedError(InputError):
    """Bad input of which all processes of a run hear alike, wherever it stands."""


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Within the block an `InputError` says in front of its text where it was: `file: row 3`, `--option value`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


class DoesNotFit(Exception):
    """A plan that needs more memory than its devices have. The command line prints the one line and exits with 3."""


class Stopped(Exception):
    """A signal stopped a run of which all is saved, and which has said how to go on: so end the stages around it.

    Attributes:
      code: what the command line exits with, as shells have it of a process that a signal ended: 130 after Ctrl-C, 143
        after SIGTERM.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}, all saved")
        self.code = 128 + number


def first_line(error: BaseException) -> str:
    """What `error` says, to stand within a message: its first line, of a very long one the beginning."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def broken_connection(error: BaseException) -> bool:
    """Whether `error` came of another process of the run that is gone. Some of these reach Python as ValueError."""
    return not isinstance(error, InputError) and _CONNECTION.search(str(error)) is not None


def full_disk(error: BaseException) -> str | None:
    """What the system said, such as "No space left on device", where `error` came of a full disk; else None.

    A quota and a limit on the size of files count too. Libraries that write (orbax, safetensors, array_record) raise
    errors of many kinds that have the system's words in their texts; the exceptions that led to `error` are asked too.
    """
    seen: list[BaseException] = []
    chain: list[BaseException | None] = [error]
    while chain:
        current = chain.pop()
        if current is None or current in seen:
            continue
        seen.append(current)
        if isinstance(current, OSError) and current.errno in _FULL:
            return _FULL[current.errno]
        if isinstance(current, Exception):
            text = str(current)
            if words := [words for words in _FULL.values() if words in text]:
                return words[0]
        chain += [current.__cause__, current.__context__]
    return None


def exists(place: str | Path) -> bool:
    """Whether a file or folder of this name is there; a text that cannot be a name (~nobody/x, 300 letters) is none."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        return Path(place).expanduser().exists()
    return False


def nearest(path: str | Path) -> str:
    """`; did you mean PATH?` for a file or folder that is not there and has a neighbour of nearly that name, or ""."""
    sought, known = Path(path), list[str]()
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # no such folder or user, no right, no name of a file
        sought = sought.expanduser()
        known = [one.name for one in sought.parent.iterdir()]
    near = difflib.get_close_matches(sought.name, known, n=1, cutoff=0.75)
    return f"; did you mean {Path(path).parent / near[0]}?" if near else ""
