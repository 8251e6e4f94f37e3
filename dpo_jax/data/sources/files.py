"""Files of rows: JSONL, JSON, Parquet and CSV, plain, gzip or zstd; folders; the hub; stores.

What a file is, its first bytes say (gzip, zstd, Parquet, a JSON list, JSON objects of several lines each, else JSON
lines), not its name; but that a text is CSV or TSV its name says. A file of a single JSON object that holds a list of
objects under a name such as "data", and no field of a row, holds the rows of that list, unless it is called .jsonl.
Rows stream: only a JSON list, such an object and a compressed Parquet file are held in memory whole.
"""

import contextlib
import csv
import glob
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sources.hub import fetch, names_hub, read_metadata
from dpo_jax.data.sources.json_lines import MAX_LINE, checked, json_line, json_lines, loaded
from dpo_jax.data.sources.parquet import read_parquet
from dpo_jax.data.sources.splits import SUFFIXES, choose, data_files, default_config, in_folder
from dpo_jax.data.sources.store import names_store, open_store
from dpo_jax.errors import InputError, exists, nearest
from dpo_jax.headers import told

Row = dict[str, Any]

BOMB_RATIO, BOMB_FLOOR = 200, 256 * 2**20
"""A gzip or zstd file that unpacks to more than both BOMB_FLOOR bytes and BOMB_RATIO times its size is refused."""

_FORMATS = "JSONL, JSON, Parquet or CSV, plain, .gz or .zst"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_OTHER = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zX": "xz"}
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_HOLD_ROWS = ("data", "rows", "examples", "instances")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev")
_OF_A_ROW = frozenset(
    "prompt messages chosen rejected response responses completion completions conversations conversation dialogue"
    " instruction instructions question input output answer text id task_id".split()
)
"""Where an object has one of these fields it is a row, whatever lists it has beside it."""
_MARKS = {";": "semicolons", "\t": "tabs", ",": "commas"}

log = logging.getLogger(__name__)


def read_rows(source: str) -> Iterator[tuple[int, Row]]:
    """Yield (number, row) for every row of `source`.

    That is a file; a folder, or FOLDER:SPLIT (see `splits.py`); a pattern of files (`part-*.jsonl`); the id of a hub
    data set, `owner/name`, `owner/name:split`, `owner/name@revision:config/split`; or a store (see `store.py`). Numbers
    start at 1. In a JSON-lines file they are line numbers (blank lines hold no row); over several files they run on.

    Raises:
      InputError: absent, unreadable or empty file, broken compression, unknown format, no network, or a row that is
        not an object.
    """
    for number, row in read_rows_or_problems(source):
        if isinstance(row, BadRow):
            raise row
        yield number, row


def read_rows_or_problems(source: str) -> Iterator[tuple[int, Row | BadRow]]:
    """`read_rows`, with a `BadRow` in place of each row that is not JSON or not an object."""
    if names_store(source):
        yield from open_store(source).rows()
        return
    base = number = 0
    for path in resolve(source):
        try:
            for line, row in read_file(path):
                number = base + line
                yield number, row
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        base = number
    if number == 0:
        raise InputError(f"{source}: holds no rows; give a file of {_FORMATS}")


def sizes(source: str) -> dict[Path, int]:
    """The files of this machine that `source` names -> bytes; none of what lies elsewhere, or is not there.

    (A store names what it misses when it is opened.)
    """
    if names_store(source) or (names_hub(source) and not exists(source)):
        return {}
    with contextlib.suppress(InputError, OSError):
        return {path: path.stat().st_size for path in resolve(source)}
    return {}


def resolve(source: str) -> list[Path]:
    """The files that `source` names: a file, a folder or FOLDER:SPLIT, a pattern, or a data set of the hub."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _in_folder(path, None)
    folder, colon, split = source.rpartition(":")
    if colon and Path(folder).expanduser().is_dir():
        return _in_folder(Path(folder).expanduser(), split)
    if any(mark in source for mark in "*?["):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not files:
            raise InputError(f"{source}: no file matches this pattern")
        return files
    if names_hub(source) and not source.partition(":")[0].endswith(SUFFIXES):
        return fetch(source)
    raise InputError(
        f"{source}: no such file{nearest(source)}; give a file of {_FORMATS}, or a hub data set as owner/name"
    )


def _in_folder(folder: Path, split: str | None) -> list[Path]:
    """The files of one split in a folder, as in a hub data set that was downloaded."""
    metadata = read_metadata(folder / "README.md")
    files = data_files(in_folder(folder), metadata)
    if not files:
        raise InputError(f"{folder}: the folder holds no file of {_FORMATS}, by their names")
    return [folder / path for path in choose(files, split, default_config(files, metadata), str(folder))]


class _Unpacked(io.RawIOBase):
    """A packed file as a raw stream that stops with a clear error when it is broken or grows beyond all measure."""

    def __init__(self, path: Path, format: str):
        """`format`: gzip or zstd."""
        self._path, self._format = path, format
        self._limit = max(BOMB_FLOOR, BOMB_RATIO * path.stat().st_size)
        self._read = 0
        if format == "zstd":
            import pyarrow as pa

            self._stream = pa.CompressedInputStream(pa.OSFile(str(path), "rb"), "zstd")
        else:
            self._stream = gzip.GzipFile(path, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            piece = self._stream.read(len(buffer))
        except (EOFError, zlib.error, OSError) as error:  # a BadGzipFile is an OSError, and all that Arrow raises
            raise InputError(f"{self._path}: the {self._format} file is damaged or cut short ({error})") from error
        self._read += len(piece)
        if self._read > self._limit:
            raise InputError(
                f"{self._path}: unpacks to more than {BOMB_RATIO} times its size, which no text does; "
                "unpack it yourself if that is right"
            )
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_bytes(path: Path) -> io.BufferedReader:
    """The content of a file as a stream, unpacked where it is gzip or zstd. Raises `InputError` for other formats."""
    with path.open("rb") as raw:
        magic = raw.read(4)
    for start, name in _OTHER.items():
        if magic.startswith(start):
            raise InputError(f"{path}: is compressed with {name}; unpack it, or use gzip or zstd")
    packed = next((name for start, name in ((_GZIP, "gzip"), (_ZSTD, "zstd")) if magic.startswith(start)), None)
    return path.open("rb") if packed is None else io.BufferedReader(_Unpacked(path, packed), 2**16)


def read_file(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    """(number, row) of the rows of one file: `read_rows` says of what kinds."""
    with open_bytes(path) as reader:
        packed = isinstance(reader.raw, _Unpacked)
        form, separator = _form(path, reader)
        stream = cast(BinaryIO, reader)
        if form == "parquet":
            yield from read_parquet(path, io.BytesIO(stream.read()) if packed else stream)
        elif form == "list":
            yield from _json_list(path, stream.read())
        elif form == "object":
            yield from _json_object(path, stream.read())
        elif form == "objects":
            yield from _rows_within(path, _json_objects(path, stream))
        elif form == "table":
            yield from _table(path, stream, separator)
        else:
            yield from _rows_within(path, json_lines(path, stream))


def _form(path: Path, reader: io.BufferedReader) -> tuple[str, str]:
    """What a file is by its first bytes, and of a table what stands between its cells."""
    head = reader.peek(2**12)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"PAR1"):
        return "parquet", ""
    if start.startswith(b"["):
        return "list", ""
    if re.match(rb'\{\s*"(%s)"\s*:\s*\[' % "|".join((*_HOLD_ROWS, *_SPLITS)).encode(), start):
        return "object", ""
    if re.match(rb"\{[ \t]*\r?\n", start):
        return "objects", ""
    if (separator := _separator(path, start)) and not start.startswith(b"{"):
        return "table", separator
    return "lines", ""


def plain_lines(path: Path) -> bool:
    """Whether a file is JSON lines, not packed: one that can be read from the middle on."""
    with open_bytes(path) as reader:
        return not isinstance(reader.raw, _Unpacked) and _form(path, reader)[0] == "lines"


def _json_list(path: Path, text: bytes) -> Iterator[tuple[int, Row | BadRow]]:
    try:
        rows = loaded(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: malformed JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: malformed JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        yield number, checked(row, f"{path}, element {number},")


def _json_object(path: Path, text: bytes) -> Iterator[tuple[int, Row | BadRow]]:
    """A file that begins as one object around its rows, of any size; as lines or objects where it is not one alone."""
    try:
        whole = loaded(text.decode("utf-8-sig"))
    except (UnicodeDecodeError, RecursionError, ValueError):
        stream = io.BytesIO(text)
        several = _json_objects if re.match(rb"\s*\{[ \t]*\r?\n", text.removeprefix(b"\xef\xbb\xbf")) else json_lines
        yield from several(path, stream)
        return
    yield from _rows_within(path, iter([(1, whole)]))


def _rows_within(path: Path, rows: Iterator[tuple[int, Row | BadRow]]) -> Iterator[tuple[int, Row | BadRow]]:
    """The rows themselves; or of a single object that holds a list of objects beside what is told of it, that list's.

    A list of {"row_idx": ..., "row": {...}}, as the hub's viewer gives it, is one of the rows inside; a row whose cells
    the viewer has cut is bad. Raises `InputError` where it is not plain which list is meant.
    """
    first, second = next(rows, None), next(rows, None)
    if first is None:
        return
    number, row = first
    lists: list[str] = []
    lines = path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".jsonl")
    if second is None and isinstance(row, dict) and not lines and not _OF_A_ROW & row.keys():
        held = {name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)}
        lists = [name for name in (*_HOLD_ROWS, *_SPLITS) if name in held]
        if len(lists) > 1:
            named = ", ".join(map(repr, lists))
            raise InputError(
                f"{path}: is one object whose rows stand in {named}; write each list to a file of its own, such as"
                f" {lists[0]}.json"
            )
    if not lists:
        yield number, row
        if second is not None:
            yield second
        yield from rows
        return
    assert isinstance(row, dict)
    log.info("%s: one object; its rows are those of %r", path, lists[0])
    whole, given = row.get("num_rows_total"), len(row[lists[0]])
    if isinstance(whole, int) and whole > given:
        log.warning("%s: holds %s rows of the %s that the set has, as it says", path, f"{given:,}", f"{whole:,}")
    for at, inside in enumerate(row[lists[0]], 1):
        where = f"{path}, element {at} of {lists[0]!r},"
        if isinstance(inside, dict) and "row_idx" in inside and isinstance(inside.get("row"), dict):
            if cut := inside.get("truncated_cells"):
                detail = f"{where} says so of {told(cut)}; give the data set itself, by its id or its files"
                yield at, BadRow("texts that the hub's viewer has cut", detail)
                continue
            inside = inside["row"]
        yield at, checked(inside, where)


def _json_objects(path: Path, stream: BinaryIO) -> Iterator[tuple[int, Row | BadRow]]:
    """Objects of several lines each, one after another, as `json.dumps(row, indent=2)` and jq print them.

    An object ends with a line that is a closing brace alone.
    """
    number, begun, piece = 0, 1, b""
    for line, read in enumerate(iter(partial(stream.readline, MAX_LINE + 1), b""), 1):
        if not piece.strip():
            begun, piece = line, b""
        piece += read.removeprefix(b"\xef\xbb\xbf") if line == 1 else read
        if len(piece) > MAX_LINE:
            raise InputError(f"{path}:{begun}: one object is longer than {MAX_LINE >> 20} MiB; write a row a line")
        if read.rstrip() == b"}" and not read.startswith((b" ", b"\t")):
            number += 1
            yield number, json_line(piece, f"{path}:{begun}")
            piece = b""
    if piece.strip():
        detail = f"{path}:{begun}: no line that is a closing brace alone ends what begins here"
        yield number + 1, BadRow("malformed JSON", detail)


def _separator(path: Path, start: bytes) -> str | None:
    """What stands between the cells of a CSV or TSV file; None where the name is of another.

    That is what its name says, or where that is not in its first line, outside of quotes, a semicolon, tab or comma
    that is.
    """
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    usual = next((mark for suffix, mark in _SEPARATORS.items() if name.endswith(suffix)), None)
    if usual is None:
        return None
    first = b"".join(start.partition(b"\n")[0].split(b'"')[::2])
    other = max(_MARKS, key=lambda mark: first.count(mark.encode()))
    if usual.encode() in first or other.encode() not in first:
        return usual
    log.warning("%s: %s stand between its cells, as in its first line", path, _MARKS[other])
    return other


def _table(path: Path, stream: BinaryIO, separator: str) -> Iterator[tuple[int, Row | BadRow]]:
    """Rows of CSV (RFC 4180): the first record names the columns; a cell is text, and absent where it is empty."""
    csv.field_size_limit(MAX_LINE)
    records = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=separator, strict=True)
    number = 0
    try:
        names = next(records, [])
        if repeated := [name for name in names if name and names.count(name) > 1]:
            raise InputError(f"{path}: its first line names the column {repeated[0]!r} twice; it must name each column")
        for cells in records:
            if not cells:
                continue
            number += 1
            if len(cells) == len(names):
                yield number, {name: cell or None for name, cell in zip(names, cells, strict=True)}
            else:
                detail = f"{path}, line {records.line_num}: {len(cells)}, and the first line names {len(names)} columns"
                yield number, BadRow("wrong number of cells", f"{detail}; is a quote or a separator missing?")
    except csv.Error as error:
        raise InputError(f"{path}, line {records.line_num}: not readable as CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: row {number + 1} or one soon after is not UTF-8; save the file as UTF-8") from error
