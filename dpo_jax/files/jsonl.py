"""Results row by row in a JSON-lines file that is there whole or not at all, and whose making can be interrupted.

While it grows it is called NAME.part: a first line with the settings that decide its rows, then the rows done so far.
With the same settings a new start goes on behind the last whole line; with others it starts afresh.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from dpo_jax.errors import InputError
from dpo_jax.files.folder import close_after, write_atomically, writing
from dpo_jax.processes import distributed

Row = dict[str, Any]


def read_lines(path: Path) -> list[Row]:
    """The rows of a JSON-lines file of ours; what stands after the last whole line (a killed process) is left out.

    Raises `InputError` for a line that is whole and no row.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: a {type(row).__name__}, and no row; restore or remove the file")
        rows.append(row)
    return rows


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    # Half of a surrogate pair becomes \ud83d, JSON's own spelling of it.
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole JSON-lines file at once. Raises `InputError` when the disk is full or not writable."""
    write_atomically(path, _lines(rows))


def check_own(path: Path, own: Callable[[Row], bool], what: str) -> None:
    """Refuse to write over a file that is there and whose rows are not all `own`: no `what`. Raises `InputError`."""
    if path.exists() and not ((rows := read_lines(path)) and all(map(own, rows))):
        raise InputError(f"{path}: is there, and holds no {what}; remove it, or name another file")


class RowsFile:
    """The file `path`, to be written from its first row to its last. Process 0 writes it; the others keep the rows.

    Attributes:
      rows: what is done so far, in order; on opening, what an interrupted run with the same settings left.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """Args:
        path: the file, on a file system that all processes share.
        settings: JSON-able; all that decides the rows.
        """
        self.path = path
        self._writes = distributed.is_main()
        self.part = _part(path)
        self.rows: list[Row] = []
        header = json.loads(json.dumps({"settings": settings}))
        found = read_lines(self.part) if self.part.exists() else []
        if found and found[0] == header:
            self.rows = found[1:]
        if not self._writes:
            return
        with writing(self.part):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.part, _lines([header, *self.rows]))
            self._file = open(self.part, "ab")  # noqa: SIM115 - closed by `__exit__`

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._writes:
            close_after(self._file, self.part, error)

    def append(self, rows: Iterable[Row]) -> None:
        """Write some more rows, at once on the disk."""
        rows = list(rows)
        self.rows.extend(rows)
        if not self._writes:
            return
        with writing(self.part):
            self._file.write(_lines(rows))
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(
        self, *, order: Callable[[Row], Any] | None = None, form: Callable[[list[Row]], Iterable[Row]] | None = None
    ) -> list[Row]:
        """All rows are there: sort them by `order`, where it is given, and give the file its name. Returns the rows.

        form: what the whole file holds, made of the rows that it grew by.
        """
        if order is not None:
            self.rows.sort(key=order)
        if self._writes:
            write_lines(self.path, self.rows if form is None else form(self.rows))
            self._file.close()
            self.part.unlink()
        distributed.barrier(str(self.path))
        return self.rows


def write_once(path: Path, settings: Callable[[], Mapping[str, Any]], work: Callable[[RowsFile], Any]) -> list[Row]:
    """The rows of the file `path`: read where it is there, else made by `work`, which appends those that are missing.

    `settings` and `work` are called only where there is something to make.
    """
    if distributed.flag_from_main(path.exists()):
        if distributed.is_main():
            with writing(path):
                _part(path).unlink(missing_ok=True)  # of a process that was killed before it did so
        return read_lines(path)
    with RowsFile(path, settings()) as file:
        work(file)
        return file.finish()
