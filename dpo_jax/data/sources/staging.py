"""Files that may lie in a bucket (gs:// and the like), through etils; and local copies of them."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_jax.errors import InputError, first_line


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether `place` lies in a bucket."""
    return "://" in os.fspath(place)


def as_path(place: str | os.PathLike[str]) -> Any:
    """A local `pathlib.Path`, or the path of etils for a bucket."""
    if not is_remote(place):
        return Path(place).expanduser()
    from etils import epath

    return epath.Path(place)


@contextmanager
def reaching(place: object) -> Iterator[None]:
    """Turn what the libraries of buckets raise into one `InputError` that names `place`."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{place}: {first_line(error)}; install it (pip install gcsfs for gs://)") from error
    except Exception as error:  # every such library has errors of its own: no network, no rights, no such bucket
        raise InputError(f"{place}: cannot be reached ({type(error).__name__}: {first_line(error)})") from error


def cache_folder() -> Path:
    """Where copies are kept: $XDG_CACHE_HOME/dpo_jax/stores, or the like in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo_jax" / "stores"


def local_copies(paths: Sequence[Any]) -> list[Any]:
    """Where the files `paths`, all of one folder, can be opened as local files: themselves, or copies of them.

    A copy is kept, under a name that says folder, size and time of change of all of them, and used again.
    Raises `InputError`.
    """
    if not is_remote(paths[0]):
        return list(paths)
    with reaching(paths[0].parent):
        stats = [path.stat() for path in paths]
        known = [[os.fspath(path), stat.length, stat.mtime] for path, stat in zip(paths, stats, strict=True)]
        folder = cache_folder() / hashlib.sha256(repr(known).encode()).hexdigest()[:32]
        copies = [folder / path.name for path in paths]
        folder.mkdir(parents=True, exist_ok=True)
        for path, copy, stat in zip(paths, copies, stats, strict=True):
            if copy.exists() and copy.stat().st_size == stat.length:
                continue
            part = copy.with_name(f".{copy.name}.{os.getpid()}")  # processes that begin together do not mix
            with path.open("rb") as read, part.open("wb") as write:
                shutil.copyfileobj(read, write, 2**20)
            part.replace(copy)
    return copies


@contextmanager
def upload(scratch: Path, to: str) -> Iterator[None]:
    """When the block ends well, copy all files of `scratch` to the new folder `to` in a bucket.

    The files called dataset_info.json come last: without them nobody takes the folder for a whole data set.
    Raises `InputError`, before the block where `to` is taken.
    """
    target = as_path(to)
    with reaching(to):
        if target.exists():
            raise InputError(f"{to}: exists already; name a new folder, or remove this one first")
    yield
    files = sorted(path for path in scratch.rglob("*") if path.is_file())
    with reaching(to):
        for path in sorted(files, key=lambda path: path.name == "dataset_info.json"):
            place = target / path.relative_to(scratch).as_posix()
            place.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as read, place.open("wb") as write:
                shutil.copyfileobj(read, write, 2**20)
