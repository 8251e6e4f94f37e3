"""Whether the files of a folder still are what was written: `files.json` in it holds size and CRC-32 of each.

Arrays whose bytes were zeroed or swapped on a disk mostly decode without an error, to other weights; so the bytes are
checked before anything is made of them. A CRC finds accidents, not someone who alters file and sum.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

FILES = "files.json"
_UNKNOWN = f"{FILES} is missing or unreadable"
_CHUNK = 1 << 22
_THREADS = 4


def write_digests(folder: Path) -> None:
    """Record the files in the subfolders of `folder`, at any depth; those directly in it are left out.

    One process calls it, once all of them have been written. Raises `OSError`.
    """
    paths = [path for path in sorted(folder.glob("*/**/*")) if path.is_file()]
    with ThreadPoolExecutor(_THREADS) as pool:  # zlib lets go of the interpreter's lock
        digests = {
            str(path.relative_to(folder)): [path.stat().st_size, crc]
            for path, crc in zip(paths, pool.map(_crc, paths), strict=True)
        }
    (folder / FILES).write_text(json.dumps(digests))


def damage(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> str | None:
    """What is wrong with the files of `folder`, in words that name one of them; None where all are as they were.

    Every process calls it: each reads a share of the contents, and all get the same answer.

    Args:
      folder: it holds `files.json`. One of an earlier version holds sizes without sums, and those are compared.
      wanted: whether the contents of a file, by its name in `files.json`, are read; of the others only the size counts.
    """
    known = _known(folder)
    if everywhere(known is None) >= 0 or known is None:
        return _UNKNOWN
    names = sorted(known)
    mine = names[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(_THREADS) as pool:
        reasons = list(pool.map(lambda name: _changed(folder / name, *known[name], read=wanted(name)), mine))
    first = next((names.index(name) for name, reason in zip(mine, reasons, strict=True) if reason), None)
    found = everywhere(first is not None, first or 0)
    if found < 0:
        return None
    own = dict(zip(mine, reasons, strict=True)).get(names[found])
    return f"{names[found]} {own or 'is not what was written'}"


def damage_seen_here(folder: Path) -> str | None:
    """As `damage`, by one process that reads everything, asks no other, and starts no backend of JAX."""
    known = _known(folder)
    if known is None:
        return _UNKNOWN
    with ThreadPoolExecutor(_THREADS) as pool:
        reasons = pool.map(lambda name: (name, _changed(folder / name, *known[name], read=True)), sorted(known))
        return next((f"{name} {reason}" for name, reason in reasons if reason), None)


def _known(folder: Path) -> dict[str, tuple[int, int | None]] | None:
    """Size and sum of each file, as they were written; None where that cannot be read."""
    try:
        return {name: _record(entry) for name, entry in json.loads((folder / FILES).read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _record(entry: object) -> tuple[int, int | None]:
    size, crc = entry if isinstance(entry, list) else (entry, None)
    if type(size) is not int or not (crc is None or type(crc) is int):
        raise ValueError("neither a size nor a size and a sum")
    return size, crc


def _changed(path: Path, size: int, crc: int | None, *, read: bool) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != size:
            return f"has {path.stat().st_size} of {size} bytes"
        if read and crc is not None and _crc(path) != crc:
            return "is not what was written (its checksum differs)"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def everywhere(found: bool, value: int = 0) -> int:
    """The `value` of the first process that has `found` something, in every process; -1 where none has."""
    own = value if found else -1
    if jax.process_count() == 1:
        return own
    values: Sequence[int] = multihost_utils.process_allgather(np.asarray(own, np.int32)).tolist()
    return next((value for value in values if value >= 0), -1)
