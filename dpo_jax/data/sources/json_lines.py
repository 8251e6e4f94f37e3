"""JSON lines: a row a line, of a whole file or of a part of it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dpo_jax.data.rows.problems import BadRow
from dpo_jax.errors import InputError

Row = dict[str, Any]

MAX_LINE = 64 * 2**20
"""Longest line of a JSONL file, in bytes."""


def checked(row: object, where: str) -> Row | BadRow:
    """`row`, where it is an object."""
    if isinstance(row, dict):
        return row
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    kind = "null" if row is None else names[type(row)]
    return BadRow("row is not an object", f'{where} holds {kind}; write {{"field": value, ...}}')


def json_lines(
    path: Path, stream: BinaryIO, *, before: int = 0, size: int | None = None
) -> Iterator[tuple[int, Row | BadRow]]:
    """(number of the line, row) of the lines of a file, or of `size` bytes of it, behind which a line begins.

    `before`: lines of the file in front of where `stream` stands. Blank lines hold no row.
    """
    number, end = before, None if size is None else stream.tell() + size
    while (end is None or stream.tell() < end) and (line := stream.readline(MAX_LINE + 1)):
        number += 1
        if len(line) > MAX_LINE:
            raise InputError(f"{path}:{number}: the line is longer than {MAX_LINE >> 20} MiB; is this a JSONL file?")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, json_line(line, f"{path}:{number}")


def loaded(text: str) -> Any:
    """What a JSON text holds; an integer of more digits than Python reads is infinite, for nobody may need it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, parse_int=float)


def json_line(line: bytes, where: str) -> Row | BadRow:
    """The row that one line spells."""
    try:
        row = checked(loaded(line.decode("utf-8")), where)
        if b"\\ud" in line.lower() and (key := _broken_key(row)):
            return BadRow("a name holds broken Unicode", f"{where}: {key!r} is half a character; mend it")
        return row
    except UnicodeDecodeError as error:
        return BadRow("invalid UTF-8", f"{where}: byte {error.start + 1} of the line; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return BadRow("malformed JSON", f"{where}: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:  # nested too deeply
        return BadRow("malformed JSON", f"{where}: {error}")


def _broken_key(row: object) -> str | None:
    """A name somewhere in a row that holds half of a surrogate pair, which nothing can print; None where all are whole.

    Texts are looked at where they are used.
    """
    level: list[Any] = [row] if isinstance(row, dict) else []
    while level:
        objects = [item for item in level if isinstance(item, dict)]
        for key in (key for item in objects for key in item):
            if any("\ud800" <= letter <= "\udfff" for letter in key):
                return key
        inside = [v for item in level for v in (item.values() if isinstance(item, dict) else item)]
        level = [value for value in inside if isinstance(value, dict | list)]
    return None


# ---------------------------------------------------------------- parts of a file


class Part(NamedTuple):
    """Whole lines of a file.

    Attributes:
      start, size: its bytes.
      before: lines of the file in front of it.
      lines: its own lines.
    """

    start: int
    size: int
    before: int
    lines: int


def parts_of(path: Path, size: int, joined: Callable[[list[Row | BadRow]], bool]) -> list[Part]:
    """A file of JSON lines in parts of about `size` bytes each. The file is read once, for its lines are counted.

    `joined`: whether two rows, one after the other, belong together and so into one part.
    """
    parts: list[Part] = []
    total = path.stat().st_size
    with path.open("rb") as file:
        start = before = 0
        while start < total:
            end = _boundary(file, path, min(start + size, total), joined)
            file.seek(start)
            lines = _count(file, end - start)
            parts.append(Part(start, end - start, before, lines))
            start, before = end, before + lines
    return parts


def _boundary(file: BinaryIO, path: Path, at: int, joined: Callable[[list[Row | BadRow]], bool]) -> int:
    """The first place from `at` on where a line begins that does not belong to the one before it."""
    file.seek(at)
    file.readline(MAX_LINE + 1)
    one, end = file.readline(MAX_LINE + 1), file.tell()
    while one and (other := file.readline(MAX_LINE + 1)):
        if not (one.strip() and other.strip() and joined([json_line(line, str(path)) for line in (one, other)])):
            return end
        one, end = other, file.tell()
    return end


def _count(file: BinaryIO, size: int) -> int:
    """Lines of the next `size` bytes."""
    lines, last = 0, b""
    while size and (block := file.read(min(size, 2**20))):
        lines, size, last = lines + block.count(b"\n"), size - len(block), block
    return lines + (not last.endswith(b"\n") and last != b"")
