"""TensorBoard events, written by whoever logs: `tensorboardX`'s own writer does it in a thread, where a full disk is
an exception that nobody catches, and after it every further figure waits for good.
"""

import itertools
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Imports go on as if the package `name` were not installed, where nothing has imported it."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # pyright: ignore[reportArgumentType] - what Python reads as "cannot be imported"
    try:
        yield
    finally:
        del sys.modules[name]


with _hidden("torch"):  # it would be imported, seconds and 200 MB, for the sake of one type
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.record_writer import masked_crc32c
    from tensorboardX.summary import scalar


class EventFile:
    """A new file of events in `folder`. Every method may raise `OSError`.

    Args:
      folder: made where it is not there.
      purge_from: TensorBoard is to forget what earlier files say of this step and later ones (of a resumed run).
    """

    def __init__(self, folder: Path, *, purge_from: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        names = (f"{stem}.{i}" for i in itertools.count())
        self._file = next(folder / name for name in names if not (folder / name).exists()).open("xb")
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_from is not None:
            started = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=purge_from, session_log=started))

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of a step, each as a scalar."""
        for name, value in figures.items():
            self._write(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._file.flush()

    def sync(self) -> None:
        """Make sure that all is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        """One TFRecord: length, its checksum, the event, its checksum."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        self._file.write(length + checksums[0] + data + checksums[1])
