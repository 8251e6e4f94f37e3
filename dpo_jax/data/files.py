"""Files of rows: JSONL, JSON (a list of objects) and Parquet, plain or gzip-compressed; data sets of the hub; stores.

What a file is, its first bytes say (gzip, Parquet, a JSON list, else JSON lines), not its name. Rows stream: only a
JSON list and a compressed Parquet file are held in memory whole.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from dpo_jax.data.problems import BadRow
from dpo_jax.data.store import names_store, open_store
from dpo_jax.errors import InputError

Row = dict[str, Any]

MAX_LINE = 64 * 2**20
"""Longest line of a JSONL file, in bytes."""
BOMB_RATIO, BOMB_FLOOR = 200, 256 * 2**20
"""A gzip file that unpacks to more than both BOMB_FLOOR bytes and BOMB_RATIO times its size is refused."""

_FORMATS = "JSONL, JSON or Parquet, plain or .gz"
_SUFFIXES = (".jsonl", ".json", ".parquet", ".ndjson", ".gz")
_OTHER = {b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zX": "xz"}
_HUB_PATTERNS = tuple(f"*{suffix}{gz}" for suffix in (".jsonl", ".json", ".parquet") for gz in ("", ".gz"))
_HUB_IGNORED = ("dataset_info*.json", "*/dataset_info*.json", ".*", "state.json", "*/state.json")


def read_rows(source: str) -> Iterator[tuple[int, Row]]:
    """Yield (number, row) for every row of `source`: a file, the id of a hub data set, or a store (see `store.py`).

    A hub id is `owner/name`, or `owner/name:split` where there are several splits. Numbers start at 1. In a JSON-lines
    file they are line numbers (blank lines hold no row); over the several files of a hub data set they run on.

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
    for path in _resolve(source):
        try:
            for line, row in _read_file(path):
                number = base + line
                yield number, row
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        base = number
    if number == 0:
        raise InputError(f"{source}: holds no rows; give a file of {_FORMATS}")


def _resolve(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise InputError(f"{source}: is a folder; name one file in it ({_FORMATS})")
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w./-]+))?", source)
    if match is None or source.endswith(_SUFFIXES):
        raise InputError(f"{source}: no such file; give a file of {_FORMATS}, or a hub data set as owner/name")
    return _download(match[1], match[2])


def _download(repository: str, split: str | None) -> list[Path]:
    """The files of one split of a hub data set, in order. Only data files are fetched, never code."""
    from huggingface_hub import snapshot_download

    patterns = [p if split is None else f"*{split}{p}" for p in _HUB_PATTERNS]
    try:
        folder = Path(
            snapshot_download(
                repository, repo_type="dataset", allow_patterns=patterns, ignore_patterns=list(_HUB_IGNORED)
            )
        )
    except (OSError, ValueError) as error:  # every error of the hub and of the network derives from one of the two
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{repository}: no such file here, and the hub data set of that name cannot be fetched ({reason}); "
            "check the name and the network, or download a file and give its path"
        ) from error
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name.endswith(_SUFFIXES)]
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_name(file.relative_to(folder)), []).append(file)
    if split is not None:
        splits = {name: paths for name, paths in splits.items() if name == split or name.endswith("/" + split)}
    if len(splits) == 1:
        return next(iter(splits.values()))
    if not splits:
        which = f"no split {split!r}" if split else "no JSON, JSONL or Parquet files"
        raise InputError(
            f"{repository}: the hub data set has {which}; look at its files and name one as owner/name:split"
        )
    names = " ".join(sorted(splits))
    raise InputError(
        f"{repository}: the hub data set has several splits ({names}); name one, e.g. {repository}:{min(splits)}"
    )


def _split_name(path: Path) -> str:
    """`data/train-00000-of-00004.parquet` -> `data/train`: the file without its shard number and suffixes."""
    name = re.sub(r"(\.jsonl|\.json|\.parquet)(\.gz)?$", "", path.as_posix())
    return re.sub(r"-\d+-of-\d+$", "", name)


class _Unpacked(io.RawIOBase):
    """A gzip file as a raw stream that stops with a clear error when it is broken or grows beyond all measure."""

    def __init__(self, path: Path):
        self._path = path
        self._limit = max(BOMB_FLOOR, BOMB_RATIO * path.stat().st_size)
        self._read = 0
        self._stream = gzip.GzipFile(path, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            piece = self._stream.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{self._path}: the gzip file is damaged or cut short ({error})") from error
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
    """The content of a file as a stream, unpacked where it is gzip. Raises `InputError` for other compressions."""
    with path.open("rb") as raw:
        magic = raw.read(4)
    for start, name in _OTHER.items():
        if magic.startswith(start):
            raise InputError(f"{path}: is compressed with {name}; unpack it, or use gzip")
    return io.BufferedReader(_Unpacked(path), 2**16) if magic.startswith(b"\x1f\x8b") else path.open("rb")


def _read_file(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    with open_bytes(path) as reader:
        packed = isinstance(reader.raw, _Unpacked)
        head = reader.peek(2**12)
        stream = cast(BinaryIO, reader)
        if head.startswith(b"PAR1"):
            yield from _parquet(path, io.BytesIO(stream.read()) if packed else stream)
        elif head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _json_list(path, stream.read())
        else:
            yield from _json_lines(path, stream)


def _checked(row: object, where: str) -> Row | BadRow:
    if isinstance(row, dict):
        return row
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    kind = "null" if row is None else names[type(row)]
    return BadRow("row is not an object", f'{where} holds {kind}; write {{"field": value, ...}}')


def _json_lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, Row | BadRow]]:
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise InputError(f"{path}:{number}: the line is longer than {MAX_LINE >> 20} MiB; is this a JSONL file?")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, _json_line(line, f"{path}:{number}")


def _json_line(line: bytes, where: str) -> Row | BadRow:
    try:
        return _checked(json.loads(line.decode("utf-8")), where)
    except UnicodeDecodeError as error:
        return BadRow("invalid UTF-8", f"{where}: byte {error.start + 1} of the line; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return BadRow("malformed JSON", f"{where}: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:  # nested too deeply; an integer of thousands of digits
        return BadRow("malformed JSON", f"{where}: {error}")


def _json_list(path: Path, text: bytes) -> Iterator[tuple[int, Row | BadRow]]:
    try:
        rows = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: malformed JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: malformed JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        yield number, _checked(row, f"{path}, element {number},")


def _parquet(path: Path, stream: BinaryIO) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a readable Parquet file ({reason}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: row {number + 1} or one soon after holds text that is not UTF-8") from error
