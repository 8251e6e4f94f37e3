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
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.data.sources.duplicates import plain
from dpo_jax.data.sources.store_schema import FORMAT, Kind, features
from dpo_jax.errors import InputError

VERSION = "1.0.0"
"""The TFDS version of what `dpo-jax prepare` writes, and the name of the folder in which it stands."""
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


class _Split:
    """The shards of one split, as they are written. They get their final names once their number is known."""

    def __init__(self, folder: Path, stem: str):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._new: Any = ArrayRecordWriter
        self._folder, self._stem = folder, stem
        self._writer: Any = None
        self._room = 0
        self.lengths: list[int] = []
        self.bytes = 0
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, record: bytes) -> None:
        try:
            if self._writer is None:
                self._writer = self._new(str(self._scratch(len(self.lengths))), _OPTIONS)
                self.lengths.append(0)
                self._room = SHARD_BYTES
            self._writer.write(record)
        except RuntimeError as error:
            raise _cannot_write(self._folder, error) from error
        self.lengths[-1] += 1
        self.bytes += len(record)
        self._digest.update(record)
        self._room -= len(record)
        if self._room <= 0:
            self._close()

    def _scratch(self, index: int) -> Path:
        return self._folder / f"{self._stem}-{index:05d}"

    def _close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except RuntimeError as error:
            raise _cannot_write(self._folder, error) from error
        self._writer = None

    def finish(self) -> str:
        """Close the last shard, name all; returns a digest of the records in their order."""
        self._close()
        for index in range(len(self.lengths)):
            path = self._scratch(index)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            path.rename(f"{path}-of-{len(self.lengths):05d}")
        return self._digest.hexdigest()


def _cannot_write(folder: Path, error: RuntimeError) -> InputError:
    reason = str(error).partition(";")[0]
    return InputError(f"{folder}: cannot be written ({reason}); free some space or choose another folder")


class StoreWriter:
    """A store that is being written to the empty folder `folder` (that of the version).

    Without its dataset_info.json, which `finish` writes last, the folder is no data set to anyone.
    """

    def __init__(self, folder: Path, *, name: str, kind: Kind, splits: Sequence[str]):
        self.folder, self._name = folder, name
        self._kind: Kind = kind
        self._splits = {split: _Split(folder, f"{name}-{split}.array_record") for split in splits}
        self._in_order = list(self._splits.values())

    def add(self, record: bytes, split: int) -> None:
        """Append a record (see `store_schema.serialise`) to the split at that position. Raises `InputError`."""
        self._in_order[split].add(record)

    def finish(self, description: str) -> dict[str, dict[str, int]]:
        """Write the metadata; returns rows, shards and bytes (before compression) of each split that has rows."""
        import tensorflow_datasets as tfds
        from etils import epath
        from tensorflow_datasets.core.dataset_info import DatasetIdentity
        from tensorflow_datasets.core.splits import SplitDict

        written = {name: split for name, split in self._splits.items() if split.lengths}
        digests = {name: split.finish() for name, split in written.items()}
        identity = DatasetIdentity(
            name=self._name, version=tfds.core.Version(VERSION), data_dir=str(self.folder), module_name="dpo_jax"
        )
        ours = {"format": FORMAT, "kind": self._kind, "digests": digests}
        info = tfds.core.DatasetInfo(
            builder=identity,
            features=features(self._kind),
            description=description,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(dpo_jax=ours),
        )
        info.set_file_format("array_record")
        template = tfds.core.ShardedFileTemplate(
            data_dir=epath.Path(self.folder), dataset_name=self._name, filetype_suffix="array_record"
        )
        info.set_splits(
            SplitDict(
                [
                    tfds.core.SplitInfo(
                        name=name,
                        shard_lengths=split.lengths,
                        num_bytes=split.bytes,
                        filename_template=template.replace(split=name),
                    )
                    for name, split in written.items()
                ]
            )
        )
        info.write_to_directory(self.folder)
        return {
            name: {"rows": sum(split.lengths), "shards": len(split.lengths), "bytes": split.bytes}
            for name, split in written.items()
        }


def write_report(folder: Path, report: Mapping[str, Any], markdown: str) -> None:
    """report.json and report.md beside the data."""
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown, encoding="utf-8")
