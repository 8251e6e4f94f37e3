"""Writing a store: shards of records, split by a hash of the prompt, and the TFDS metadata beside them.

A row's split depends on its prompt alone. The prompt is normalised (NFKC, case folded, every run of white space one
space), hashed with BLAKE2b to 64 bits, and the hash, as a share of 2^64, falls into one of the splits in the order in
which they are named. So a row keeps its split when others are added, and equal prompts share one.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.data.sources.duplicates import plain
from dpo_jax.data.sources.store_schema import FORMAT, Kind, features
from dpo_jax.errors import InputError

VERSION = "1.0.0"
"""The TFDS version of what `dpo-jax prepare` writes, and the name of the folder in which it stands."""
REPORT = "report.json"
"""What `dpo-jax prepare` says of a data set that is whole, beside its data."""
SHARD_BYTES = 256 * 2**20
"""A shard is closed when its records reach this many bytes (before compression)."""

# One record a chunk: what random access needs. The lightest zstd is twice as fast as TFDS's default, and as small.
_OPTIONS = "group_size:1,zstd:1"


def normalised(prompt: Sequence[tuple[str, str]]) -> str:
    """The turns (role, text) as `role: text`, without what a copy may differ in: NFKC, case, runs of white space."""
    return plain("\n".join(f"{role}: {said}" for role, said in prompt))


def prompt_hash(text: str) -> int:
    """64 bits that say which prompt it is: BLAKE2b of the normalised text. Stable for all time."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Splits:
    """Named shares of all rows, and which of them a hash falls into."""

    def __init__(self, shares: Mapping[str, float]):
        """`shares`: name -> share of the rows, in order; they sum to 1."""
        self.names = tuple(shares)
        self._ends = [round(end * 2**64) for end in np.cumsum(list(shares.values())).tolist()]
        self._ends[-1] = 2**64

    def of(self, value: int) -> int:
        """The position of the split of a hash."""
        return next(i for i, end in enumerate(self._ends) if value < end)


def dataset_name(folder: Path) -> str:
    """A name as TFDS wants it (lower case, letters, digits, underscores), from that of the folder."""
    name = re.sub(r"\W+", "_", folder.name.lower(), flags=re.ASCII).strip("_")
    return name if re.match(r"[a-z]", name) else f"data_{name}".rstrip("_")


@dataclass(frozen=True)
class Written:
    """The shards of one split that stand in one folder, not yet under their final names.

    Attributes:
      files: in order.
      lengths: rows of each.
      bytes: of their records, before compression.
      digest: of the records in their order.
    """

    files: list[str]
    lengths: list[int]
    bytes: int
    digest: str


class SplitWriter:
    """Writes the records of one split into shards `STEM-00000`, `STEM-00001` ..."""

    def __init__(self, folder: Path, stem: str):
        """`folder`: where no file of that name stands."""
        from array_record.python.array_record_module import ArrayRecordWriter

        self._new: Any = ArrayRecordWriter
        self._folder, self._stem = folder, stem
        self._writer: Any = None
        self._room = 0
        self._lengths: list[int] = []
        self._bytes = 0
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, record: bytes) -> None:
        """Append a record (see `store_schema.serialise`). Raises `InputError`."""
        try:
            if self._writer is None:
                self._writer = self._new(str(self._folder / self._name(len(self._lengths))), _OPTIONS)
                self._lengths.append(0)
                self._room = SHARD_BYTES
            self._writer.write(record)
        except RuntimeError as error:
            raise _cannot_write(self._folder, error) from error
        self._lengths[-1] += 1
        self._bytes += len(record)
        self._digest.update(record)
        self._room -= len(record)
        if self._room <= 0:
            self._close()

    def _name(self, index: int) -> str:
        return f"{self._stem}-{index:05d}"

    def _close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except RuntimeError as error:
            raise _cannot_write(self._folder, error) from error
        self._writer = None

    def finish(self) -> Written:
        """Close the last shard. All of them are on the disk when this returns."""
        self._close()
        names = [self._name(index) for index in range(len(self._lengths))]
        for name in names:
            with open(self._folder / name, "rb") as file:
                os.fsync(file.fileno())
        return Written(names, self._lengths, self._bytes, self._digest.hexdigest())


def _cannot_write(folder: Path, error: RuntimeError) -> InputError:
    reason = str(error).partition(";")[0]
    return InputError(f"{folder}: cannot be written ({reason}); free some space or choose another folder")


def assemble(
    folder: Path, *, name: str, kind: Kind, splits: Mapping[str, Sequence[tuple[Path, Written]]], description: str
) -> dict[str, dict[str, int]]:
    """Make a store of shards in `folder`; returns rows, shards and bytes (before compression) of each split.

    Without its dataset_info.json, which is written last, the folder is no data set to anyone. Called again after it was
    interrupted, it goes on.

    Args:
      folder: that of the version.
      name: of the data set.
      kind: of its rows.
      splits: name -> (where they stand, what was written there), in order; the shards move to `folder`.
      description: for dataset_info.json.
    """
    import tensorflow_datasets as tfds
    from etils import epath
    from tensorflow_datasets.core.dataset_info import DatasetIdentity
    from tensorflow_datasets.core.splits import SplitDict

    found: dict[str, tuple[list[int], int]] = {}
    digests: dict[str, str] = {}
    for split, parts in splits.items():
        shards = [place / file for place, part in parts for file in part.files]
        if not shards:
            continue
        for index, shard in enumerate(shards):
            final = folder / f"{name}-{split}.array_record-{index:05d}-of-{len(shards):05d}"
            if not final.exists():
                shard.rename(final)
        found[split] = [n for _, part in parts for n in part.lengths], sum(part.bytes for _, part in parts)
        digests[split] = hashlib.blake2b("".join(p.digest for _, p in parts).encode(), digest_size=16).hexdigest()
    identity = DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name="dpo_jax"
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=features(kind),
        description=description,
        disable_shuffling=True,
        metadata=tfds.core.MetadataDict(dpo_jax={"format": FORMAT, "kind": kind, "digests": digests}),
    )
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder), dataset_name=name, filetype_suffix="array_record"
    )
    info.set_splits(
        SplitDict(
            [
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=lengths,
                    num_bytes=size,
                    filename_template=template.replace(split=split),
                )
                for split, (lengths, size) in found.items()
            ]
        )
    )
    info.write_to_directory(folder)
    return {
        split: {"rows": sum(lengths), "shards": len(lengths), "bytes": size} for split, (lengths, size) in found.items()
    }


def write_report(folder: Path, report: Mapping[str, Any], markdown: str) -> None:
    """report.json and report.md beside the data."""
    (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown, encoding="utf-8")
