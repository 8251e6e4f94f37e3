"""Rows of different lengths in two flat arrays."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
        starts = np.concatenate([self.starts, self.starts[-1] + other.starts[1:]])
        return Ragged(np.concatenate([self.values, other.values]), starts)

    def take(self, items: Iterable[int]) -> "Ragged":
        """The sequences at these positions, in that order."""
        return Ragged.of([self[i] for i in items], self.values.dtype)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.starts[i] : self.starts[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [len]."""
        return np.diff(self.starts)
