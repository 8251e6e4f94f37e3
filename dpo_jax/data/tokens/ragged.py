"""Rows of different lengths in flat arrays, in memory or on the disk."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """Sequences of unequal length in one flat array; item i is `values[starts[i] : starts[i + 1]]`."""

    values: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, items: Sequence[np.ndarray], dtype: Any) -> "Ragged":
        """Join `items`, 1-D arrays."""
        starts = np.zeros(len(items) + 1, np.int64)
        np.cumsum([len(item) for item in items], out=starts[1:])
        return cls(np.concatenate([np.zeros(0, dtype), *items]).astype(dtype, copy=False), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __add__(self, other: "Ragged") -> "Ragged":
        """The sequences of both."""
        if isinstance(other, StoredRagged):
            return StoredRagged.of_ragged(self) + other
        starts = np.concatenate([self.starts, self.starts[-1] + other.starts[1:]])
        return Ragged(np.concatenate([self.values, other.values]), starts)

    def take(self, items: Iterable[int]) -> "Ragged":
        """The sequences at these positions, in that order."""
        return Ragged.of([self[i] for i in items], self.values.dtype)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.starts[i] : self.starts[i + 1]]

    def part(self, i: int, start: int, stop: int) -> np.ndarray:
        """`self[i][start:stop]`."""
        return self[i][start:stop]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [len]."""
        return np.diff(self.starts)

    @property
    def last(self) -> np.ndarray:
        """int [len]: the last value of each sequence; of an empty one, any."""
        return self.values[np.maximum(self.starts[1:] - 1, 0)]

    @property
    def told(self) -> tuple[np.ndarray, ...]:
        """Arrays that say which sequences these are, for a fingerprint."""
        return self.values, self.starts


@dataclass(frozen=True)
class StoredRagged(Ragged):
    """Sequences of ids that stand in files, cut; what is not asked for is not read.

    `values` and `starts` are those of the first file, and nobody's business; of sequence i:

    Attributes:
      files: 1-D arrays, mapped from the disk.
      digests: of each file, what its maker says that it holds.
      which: uint8 [len], the file in which it stands.
      begins, whole: int64 [len], where it begins there, and how long it is.
      kept: int64 [len], how much of it is left.
      ends: the end of a longer one is kept, behind its first id where that is `lead`; else the beginning.
      lasts: int64 [len], the last id of the whole one; None where nobody knows.
    """

    files: tuple[np.ndarray, ...] = ()
    digests: tuple[str, ...] = ()
    which: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    begins: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    whole: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    ends: bool = False
    lead: int | None = None
    lasts: np.ndarray | None = None

    @classmethod
    def stored(
        cls,
        file: np.ndarray,
        digest: str,
        whole: np.ndarray,
        kept: np.ndarray,
        *,
        ends: bool = False,
        lead: int | None = None,
        lasts: np.ndarray | None = None,
    ) -> "StoredRagged":
        """The sequences of one file, which stand one after another in it."""
        starts = np.concatenate([[0], np.cumsum(whole, dtype=np.int64)])
        which = np.zeros(len(whole), np.uint8)
        return cls(file, starts, (file,), (digest,), which, starts[:-1], whole, kept, ends, lead, lasts)

    @classmethod
    def of_ragged(cls, ragged: Ragged) -> "StoredRagged":
        """The same sequences, all of them whole."""
        if isinstance(ragged, StoredRagged):
            return ragged
        digest = hashlib.sha256(np.ascontiguousarray(ragged.values).data).hexdigest()
        lengths = ragged.lengths
        return cls.stored(ragged.values, digest, lengths, lengths, lasts=ragged.last.astype(np.int64))

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, i: int) -> np.ndarray:
        file, begin, whole, kept = self.files[self.which[i]], self.begins[i], self.whole[i], self.kept[i]
        if kept == whole or not self.ends:
            return np.asarray(file[begin : begin + kept], np.int32)
        if kept > 1 and file[begin] == self.lead:
            ends = np.asarray(file[begin + whole - kept + 1 : begin + whole], np.int32)
            return np.concatenate([np.asarray(file[begin : begin + 1], np.int32), ends])
        return np.asarray(file[begin + whole - kept : begin + whole], np.int32)

    def part(self, i: int, start: int, stop: int) -> np.ndarray:
        if self.ends and self.kept[i] != self.whole[i]:
            return self[i][start:stop]
        begin, stop = self.begins[i], min(stop, int(self.kept[i]))
        return np.asarray(self.files[self.which[i]][begin + start : begin + stop], np.int32)

    def __add__(self, other: Ragged) -> "StoredRagged":
        right = StoredRagged.of_ragged(other)
        if (self.kept != self.whole).any() and (right.kept != right.whole).any():
            assert (self.ends, self.lead) == (right.ends, right.lead), "both are cut in one run"
        cut = self if (self.kept != self.whole).any() else right
        both = {
            name: np.concatenate([getattr(self, name), getattr(right, name)]) for name in ("begins", "whole", "kept")
        }
        lasts = None
        if self.lasts is not None and right.lasts is not None:
            lasts = np.concatenate([self.lasts, right.lasts])
        return replace(
            self,
            files=self.files + right.files,
            digests=self.digests + right.digests,
            which=np.concatenate([self.which, right.which + np.uint8(len(self.files))]),
            ends=cut.ends,
            lead=cut.lead,
            lasts=lasts,
            **both,
        )

    def take(self, items: Iterable[int]) -> "StoredRagged":
        """The sequences at these positions, in that order."""
        at = np.fromiter(items, np.int64)
        of = {name: getattr(self, name)[at] for name in ("which", "begins", "whole", "kept")}
        return replace(self, lasts=None if self.lasts is None else self.lasts[at], **of)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [len]."""
        return self.kept

    @property
    def last(self) -> np.ndarray:
        """int64 [len]: the last id of each sequence; of an empty one, any. Of those that are cut one id is read."""
        cut = np.arange(len(self)) if self.lasts is None else np.flatnonzero(self.kept != self.whole)
        found = np.zeros(len(self), np.int64) if self.lasts is None else self.lasts.copy()
        for i in cut.tolist():
            end = self.begins[i] + (self.whole[i] if self.ends else self.kept[i])
            found[i] = self.files[self.which[i]][end - 1] if self.kept[i] else 0
        return found

    @property
    def told(self) -> tuple[np.ndarray, ...]:
        """Arrays that say which sequences these are, for a fingerprint: no id is read for it."""
        digests = np.frombuffer("".join(self.digests).encode(), np.uint8)
        return digests, self.which, self.begins, self.whole, self.kept
