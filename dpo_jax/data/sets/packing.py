"""Which sequences share a window of tokens, which windows share a batch, in which order.

Packed: windows of one size T that hold several whole sequences each. Best fit decreasing: the longest sequence first,
each into the fullest window that still has room. Lengths are rounded up to a grid, so that many sequences are of equal
length, and which of them meet in a window is drawn anew in every epoch. How many of which length meet, and with it the
number of windows, is the same in all epochs (unless a mixture draws other sequences: see `loader.py`).

Padded: one sequence a window, in few window sizes (see `batches.py`).

Either way a sequence is never split, comes exactly once an epoch, and the last batch is completed by empty windows. All
of it is a pure function of the lengths, the seed and the epoch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.sets.batches import BucketPlan, permutation, plan_buckets
from dpo_jax.data.sets.sequences import SequenceDataset
from dpo_jax.errors import InputError
from dpo_jax.types import TokenBatch

_GRID = 0.02  # step of the grid / mean length: half of it, 1 %, is padding, the price of the shuffle


class WindowBatch(NamedTuple):
    """One batch to be: windows of `size` tokens; `windows[b]` int [s] are the sequences of window b, in order."""

    size: int
    windows: list[np.ndarray]

    @property
    def indices(self) -> np.ndarray:
        """All its sequences."""
        return np.concatenate(self.windows)


@dataclass(frozen=True)
class WindowPlan(ABC):
    """How the sequences of a data set are laid out in batches of windows, epoch by epoch.

    Attributes:
      batch_size: windows a batch.
      steps: batches an epoch, the same in each.
      sizes: window sizes that occur, in tokens: one shape of batch each.
      sequences: S, most sequences that a window holds.
      padding: tokens of an epoch's windows / real tokens, at least 1.
      slots: columns of the batches' `rows`, at least S.
    """

    batch_size: int
    steps: int
    sizes: tuple[int, ...]
    sequences: int
    padding: float
    slots: int

    def summary(self) -> str:
        """Window sizes and padding, for the log."""
        return (
            f"windows of {', '.join(map(str, self.sizes))} tokens with at most {self.sequences} "
            f"sequence{'s' * (self.sequences > 1)}; {self.padding:.2f} tokens with padding for each real one"
        )

    @abstractmethod
    def epoch(self, seed: int, epoch: int, *, shuffle: bool, order: np.ndarray | None = None) -> list[WindowBatch]:
        """The batches of an epoch, in order; without `shuffle` the same in all.

        `order`: int64 [N], the sequences that a mixture draws for this epoch (see `row_mixture.py`).
        """

    def batch(
        self, dataset: SequenceDataset, one: WindowBatch, own: np.ndarray | None = None
    ) -> tuple[np.ndarray, TokenBatch]:
        """(its sequences int [B, slots], -1 where a window holds fewer; the batch). `own`: see `collate`."""
        indices = np.full((self.batch_size, self.slots), -1)
        for b, window in enumerate(one.windows):
            indices[b, : len(window)] = window
        return indices, collate(dataset, one, batch_size=self.batch_size, sequences=self.slots, own=own)


@dataclass(frozen=True)
class PackedPlan(WindowPlan):
    """Windows of one size that several sequences share.

    Attributes:
      classes: int [N], the length of each sequence in steps of the grid.
      order: int [N]: slots, window after window; slot i stands for the i-th longest sequence.
      starts: int [W + 1]: the slots of window w are `order[starts[w] : starts[w + 1]]`.
    """

    classes: np.ndarray
    order: np.ndarray
    starts: np.ndarray

    def epoch(self, seed: int, epoch: int, *, shuffle: bool, order: np.ndarray | None = None) -> list[WindowBatch]:
        if order is not None:  # sequence i of this plan, which was made for the lengths of such a draw, is order[i]
            windows = self.epoch(seed, epoch, shuffle=shuffle)
            return [WindowBatch(size, [order[window] for window in many]) for size, many in windows]
        n, count = len(self.classes), len(self.starts) - 1
        order = permutation(n, seed, epoch, 0) if shuffle else np.arange(n)
        longest_first = order[np.argsort(-self.classes[order], kind="stable")]
        windows = np.split(longest_first[self.order], self.starts[1:-1])
        if shuffle:
            windows = [windows[i] for i in permutation(count, seed, epoch, 1)]
        else:
            windows.sort(key=lambda window: int(window.min()))
        parts = (windows[at : at + self.batch_size] for at in range(0, count, self.batch_size))
        return [WindowBatch(self.sizes[0], part) for part in parts]


@dataclass(frozen=True)
class PaddedPlan(WindowPlan):
    """One sequence a window."""

    buckets: BucketPlan

    def epoch(self, seed: int, epoch: int, *, shuffle: bool, order: np.ndarray | None = None) -> list[WindowBatch]:
        batches = self.buckets.epoch(seed, epoch, shuffle=shuffle, order=order)
        return [WindowBatch(self.sizes[bucket], list(rows[:, None])) for bucket, rows in batches]


def plan_windows(
    lengths: np.ndarray,
    *,
    window: int | None,
    batch_size: int,
    buckets: int = 4,
    multiple: int = 16,
    slots: int | None = None,
) -> WindowPlan:
    """Lay out sequences of these lengths.

    Args:
      lengths: int [N], each at least 1.
      window: tokens of a window to pack sequences into, rounded up to `multiple`; None: one sequence a window.
      batch_size: windows a batch.
      buckets: most window sizes where sequences are not packed.
      multiple: window sizes are multiples of this.
      slots: see `WindowPlan`, of packed windows; None: S.

    Raises:
      InputError: a sequence is longer than the window.
    """
    if window is None:
        nothing = np.zeros((len(lengths), 0), int)
        plan = plan_buckets(lengths, nothing, buckets=buckets, batch_size=batch_size, multiple=multiple)
        return PaddedPlan(batch_size, plan.steps, tuple(size for size, _ in plan.shapes), 1, plan.padding, 1, plan)
    if lengths.max() > window:
        raise InputError(
            f"a sequence of {lengths.max()} tokens does not fit into a window of {window}; take a larger one"
        )
    size = -(-window // multiple) * multiple
    step = max(1, int(_GRID * lengths.mean()))
    capacity = size // step
    classes = np.minimum(-(-lengths // step), capacity)  # one that needs the last part of a step too is alone
    where = best_fit(np.sort(classes)[::-1], capacity)
    order = np.argsort(where, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(where))])
    steps = math.ceil((len(starts) - 1) / batch_size)
    padding = float(steps * batch_size * size / lengths.sum())
    most = int(np.diff(starts).max())
    return PackedPlan(batch_size, steps, (size,), most, padding, slots or most, classes, order, starts)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """int [N]: the bin of each of `lengths` (in 1..capacity), in the order given, by best fit.

    Each goes into the fullest bin that still has room, of several such into the newest, or else into a new one.
    """
    bins: list[list[int]] = [[] for _ in range(capacity)]  # by the room that they have left
    some = 0  # bit r is set where bins[r] holds one
    where = np.zeros(len(lengths), np.int64)
    count = 0
    for i, length in enumerate(lengths.tolist()):
        fitting = some >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            here = bins[room].pop()
            some ^= (not bins[room]) << room
        else:
            room, here, count = capacity, count, count + 1
        bins[room - length].append(here)
        some |= 1 << (room - length)
        where[i] = here
    return where


def collate(
    dataset: SequenceDataset,
    batch: WindowBatch,
    *,
    batch_size: int,
    sequences: int,
    own: np.ndarray | None = None,
) -> TokenBatch:
    """The windows of `batch` as NumPy arrays [B, T], completed to `batch_size` by empty windows.

    Args:
      sequences: S, columns of `rows`.
      own: bool [B], the windows whose ids are copied (`mesh.own_rows`); those of the others are 0. None: all.
    """

    def of(window: np.ndarray, *, read: bool) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        for i in window:
            targets = dataset.targets[i]
            yield dataset.tokens[i] if read else no_ids(len(targets)), targets, int(dataset.row_numbers[i])

    made = Windows(batch_size, batch.size, sequences)
    for b, window in enumerate(batch.windows):
        made.fill(b, of(window, read=own is None or bool(own[b])))
    return made.batch()


def no_ids(count: int) -> np.ndarray:
    """int32 [count]: zeros in the place of ids that are not read."""
    return np.broadcast_to(np.int32(0), (count,))


class Windows:
    """B windows of T places in the making; empty ones hold no targets."""

    def __init__(self, batch_size: int, length: int, slots: int, *, joined: bool = False):
        """`slots`: S, the most sequences that a window may get. `joined`: all that a window gets is one sequence."""
        shape = (batch_size, length)
        self._tokens, self._segments, self._positions = (np.zeros(shape, np.int32) for _ in range(3))
        self._targets = np.zeros(shape, bool)
        self._rows = np.full((batch_size, slots), -1, np.int32)
        self._joined = joined

    def fill(self, row: int, sequences: Iterable[tuple[np.ndarray, np.ndarray | bool, int]]) -> None:
        """Write sequences (ids, targets, row number) into window `row`, from its beginning."""
        at = 0
        for slot, (ids, targets, number) in enumerate(sequences):
            end = at + len(ids)
            self._tokens[row, at:end] = ids
            self._segments[row, at:end] = 1 if self._joined else slot + 1
            self._positions[row, at:end] = np.arange(at, end) if self._joined else np.arange(len(ids))
            self._targets[row, at:end] = targets
            self._rows[row, slot] = number
            at = end

    def batch(self) -> TokenBatch:
        """The batch. The first token of a sequence is never a target."""
        arrays: dict[str, Any] = {
            "tokens": self._tokens,
            "segments": self._segments,
            "positions": self._positions,
            "targets": self._targets & (self._positions > 0),
            "rows": self._rows,
        }
        return TokenBatch(**arrays)
