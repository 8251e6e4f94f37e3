"""Data sets of the Hugging Face hub: their files are listed first, and only those of one split are fetched."""

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from dpo_jax.data.sources.splits import choose, data_files, default_config, in_folder, whole
from dpo_jax.errors import InputError, first_line, nearest

_NAME = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?(?::(?P<part>[^:]+))?")


def names_hub(source: str) -> bool:
    """Whether `source` is written like a data set of the hub: OWNER/NAME[@REVISION][:PART] (see `splits.py`)."""
    return _NAME.fullmatch(source) is not None


def fetch(source: str) -> list[Path]:
    """The files of one split of a hub data set, in order. Only data files are fetched, never code.

    Without a network the files of an earlier call will do, where they are sure to be all.

    Raises `InputError`: no network, no such data set, revision or split, several splits, or no files that are read.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    found = _NAME.fullmatch(source)
    assert found is not None, "names_hub says so"
    repository, place = found["id"], source.partition(":")[0]
    where: dict[str, Any] = {"repo_type": "dataset", "revision": found["revision"]}
    # Every error of the hub and of the network derives from one of these (httpx's do not from OSError).
    failures = cast(tuple[type[Exception], ...], (OSError, ValueError, *HfHubHTTPError.__bases__))
    try:
        paths = huggingface_hub.HfApi().list_repo_files(repository, **where)
        card = "README.md" in paths and huggingface_hub.hf_hub_download(repository, "README.md", **where)
    except failures as error:
        return _kept(found, place, where, error)
    chosen = _chosen(place, paths, read_metadata(Path(card)) if card else {}, found["part"])
    try:
        patterns = [glob.escape(path) for path in chosen]
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, **where))
    except failures as error:
        raise _unreachable(place, error) from error
    return [folder / path for path in chosen]


def read_metadata(card: Path) -> Mapping[str, Any]:
    """The YAML head of a README.md; empty where there is none. Raises `InputError` for one that cannot be read."""
    from huggingface_hub import metadata_load

    if not card.is_file():
        return {}
    try:
        return metadata_load(card) or {}
    except Exception as error:  # a YAMLError derives from nothing narrower
        raise InputError(f"{card}: its YAML head cannot be read ({first_line(error)})") from error


def _chosen(place: str, paths: list[str], metadata: Mapping[str, Any], part: str | None) -> list[str]:
    files = data_files(paths, metadata)
    if not files:
        shown = " ".join(sorted(path for path in paths if not path.startswith("."))[:8])
        raise InputError(
            f"{place}: the hub data set has no JSON, JSONL, Parquet or CSV files (it has {shown or 'none'}); the hub "
            f"keeps many as Parquet: try {place.partition('@')[0]}@refs/convert/parquet"
        )
    return choose(files, part, default_config(files, metadata), place)


def _kept(found: re.Match[str], place: str, where: dict[str, Any], error: Exception) -> list[Path]:
    """The files of one split that an earlier call has fetched, where nothing can be listed."""
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(found["id"], local_files_only=True, **where))
    except (OSError, ValueError):
        raise _unreachable(place, error) from error
    chosen = _chosen(place, in_folder(folder), read_metadata(folder / "README.md"), found["part"])
    if not whole(chosen):
        raise _unreachable(place, error) from error
    return [folder / path for path in chosen]


def _unreachable(place: str, error: Exception) -> InputError:
    return InputError(
        f"{place}: no such file here{nearest(place)}, and the hub data set of that name cannot be fetched "
        f"({first_line(error)}); check the name and the network, or download a file and give its path"
    )
