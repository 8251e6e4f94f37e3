"""Folders that appear whole or not at all."""

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_jax.errors import InputError

# What a model folder of ours consists of; a folder that holds nothing else may be replaced by a newer one.
_OURS = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|heads\.safetensors|base\.json|adapter_config\.json|adapter_model\.safetensors|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.json|merges\.txt|tokenizer\.model|chat_template\.(jinja|json)|README\.md|training\.png"
)

_STEP = re.compile(r"0|[1-9][0-9]{0,17}")


def is_ours(path: Path) -> bool:
    """Whether `path` is, by its name, a file of a model folder of ours."""
    return _OURS.fullmatch(path.name) is not None and path.is_file()


def check_free(path: Path, *, replace: bool) -> None:
    """Raise `InputError` unless `path` is absent, an empty folder, or (with `replace`) an earlier model folder."""
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path}: is a file; name a folder that does not exist yet")
    entries = list(path.iterdir())
    if entries and not (replace and all(map(is_ours, entries))):
        raise InputError(f"{path}: is not empty; name a new folder, or remove this one first")


@contextmanager
def new_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place when the block ends, and vanishes if it fails.

    An earlier model folder at `path` is replaced (with `replace`); anything else there is refused. An unwritable or
    full disk is an `InputError`.
    """
    path = path.absolute()
    scratch, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    try:
        check_free(path, replace=replace)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
        scratch.mkdir()
        try:
            yield scratch
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            scratch.rename(path)
        except BaseException:
            _remove(scratch)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot be written ({reason}); free some space or choose another folder") from error


def write_beside(folder: Path, files: Mapping[str, bytes] | None) -> None:
    """Write further files of a model folder, by name. Raises `OSError`."""
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as the files of a model folder hold it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _remove(folder: Path) -> None:
    """Delete a folder in which threads of orbax may still be writing, after one of their files has failed.

    They may make it again, so it has to stay away for a while.
    """
    gone = 0
    for _ in range(100):
        gone = 0 if folder.exists() else gone + 1
        if gone > 10:
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a run's `checkpoints/`, in order; what else lies there does not count.

    A checkpoint is a folder whose name is a number in plain digits. `str.isdigit` would take other alphabets' too.
    """
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if is_step(path))


def is_step(path: Path) -> bool:
    """Whether `path` is, by its name, a checkpoint's folder."""
    return _STEP.fullmatch(path.name) is not None and path.is_dir()
