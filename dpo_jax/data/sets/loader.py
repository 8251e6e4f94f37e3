"""Batches of a data set's rows, preferences or token sequences, in a deterministic order.

Every process yields the same *global* batch as NumPy arrays: lengths, weights, row numbers and windows of all rows are
the same everywhere, so that neither a run's numbers nor its position depend on the number of processes. The ids of a
batch alone are read row by row, by each process those of the rows that its own devices hold (`own`), and
`mesh.put_batch` copies nothing else. Where several processes hold the same row, each reads it.

Which rows share a batch, and in which shape, is the affair of a plan (`batches.py`, `group_windows.py`, `packing.py`).
"""

import bisect
import functools
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, Unpack

import numpy as np

from dpo_jax.data.sets import batches, group_windows, packing
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.group_packing import Packing
from dpo_jax.data.sets.row_mixture import weighted
from dpo_jax.data.sets.segment_views import LOOKED_AT, SegmentViews
from dpo_jax.data.sets.sequences import SequenceDataset
from dpo_jax.data.sets.steps_loader import Batch, RowOptions, RunOptions, StepsLoader, check_seed
from dpo_jax.types import PreferenceBatch, TokenBatch

PairPlan = batches.BucketPlan | group_windows.WindowPlan
Plan = PairPlan | packing.WindowPlan
"""`steps` batches an epoch; `epoch(...)` says what each of them holds, `batch(dataset, one)` makes it."""


@dataclass(frozen=True)
class IndexedBatches(Generic[Batch]):
    """Batches that say which rows they hold. Iterating, again and again, yields (indices, batch).

    `indices` are positions in the data set, to put results back in row order: int [B], -1 for filler rows; of windows
    of sequences int [B, S], -1 where a window holds fewer than S. `own`: see `RowOptions`.
    """

    dataset: Any
    plan: Any
    many: list[Any]
    own: np.ndarray | None = None

    @property
    def rows(self) -> np.ndarray:
        """int [M]: positions in the data set of all rows that occur."""
        return np.concatenate([one.indices for one in self.many])

    def of(self, rows: np.ndarray) -> "IndexedBatches[Batch]":
        """Batches of some rows of the data set (positions), in the shapes of this plan."""
        return replace(self, many=self.plan.of(rows))

    def __len__(self) -> int:
        return len(self.many)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Batch]]:
        return (self.plan.batch(self.dataset, one, self.own) for one in self.many)


class RowLoader(StepsLoader[Batch], ABC):
    """The batches of a run, epoch after epoch: each row once an epoch, or as a mixture of sources draws them.

    Attributes:
      plan: of the first epoch.
    """

    def __init__(
        self,
        dataset: PreferenceDataset | SequenceDataset,
        *,
        redrawn: bool = False,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        own: np.ndarray | None = None,
        **run: Unpack[RunOptions],
    ):
        """Args: see `RowOptions`, and:
        dataset: the rows.
        redrawn: every epoch has a plan of its own, and perhaps another number of batches; else all have the first.
        """
        self._dataset: Any = dataset
        self._batch_size, self._seed, self._shuffle, self._own = batch_size, check_seed(seed), shuffle, own
        self.plan: Any = self._plan_of(0)
        self._plan: Callable[[int], Any] = functools.lru_cache(maxsize=2)(
            lambda epoch: self._plan_of(epoch) if epoch and redrawn else self.plan
        )
        self._epoch = functools.lru_cache(maxsize=2)(self._batches_of)
        self._starts, self._lock = [0, self.plan.steps], threading.Lock()
        if redrawn and run.get("steps") is None:
            epochs = run.get("epochs")
            whole, part = divmod(1 if epochs is None else epochs, 1)
            rest = math.ceil(part * self._plan(int(whole)).steps) if part else 0
            run["epochs"], run["steps"] = None, self._start(int(whole)) + rest
        identity = {"data": dataset.fingerprint, "batch_size": batch_size, "seed": seed, "shuffle": shuffle}
        if weighted(dataset):
            identity["mixture"] = self._dataset.mixture.identity
        super().__init__(
            self._batch_of,
            holds=lambda step: f"rows {dataset.row_numbers[self._held(step).indices].tolist()}",
            steps_per_epoch=self.plan.steps,
            identity={**identity, **self._shapes()},
            **run,
        )

    @abstractmethod
    def _plan_of(self, epoch: int) -> Plan:
        """How the rows of an epoch are dealt."""

    @abstractmethod
    def _shapes(self) -> dict[str, Any]:
        """What of the plan decides the batches."""

    def _drawn(self, epoch: int) -> np.ndarray | None:
        """The rows that a mixture draws for an epoch; None: each once."""
        mixture = self._dataset.mixture
        return None if mixture is None else mixture.epoch(epoch, seed=self._seed, shuffle=self._shuffle)

    def _batches_of(self, epoch: int) -> list[Any]:
        return self._plan(epoch).epoch(self._seed, epoch, shuffle=self._shuffle, order=self._drawn(epoch))

    def _start(self, epoch: int) -> int:
        """The steps of all epochs before this one."""
        with self._lock:
            while len(self._starts) <= epoch:
                self._starts.append(self._starts[-1] + self._plan(len(self._starts) - 1).steps)
        return self._starts[epoch]

    def _place(self, step: int) -> tuple[int, int]:
        """(epoch, steps of it before this one)."""
        while self._starts[-1] < step:
            self._start(len(self._starts))
        epoch = bisect.bisect_right(self._starts, step) - 1
        return epoch, step - self._starts[epoch]

    def _held(self, step: int) -> Any:
        """What the batch of a step holds, as its plan says it."""
        epoch, index = self._place(step)
        return self._epoch(epoch)[index]

    def _batch_of(self, step: int) -> Batch:
        return self.plan.batch(self._dataset, self._held(step), self._own)[1]

    def summary(self) -> str:
        """For the log: batch shapes and padding; of several sources, what the run takes of each."""
        steps = f"{self.steps_per_epoch} steps an epoch, {self.total_steps} in all"
        return "\n".join([f"{steps}; {self.plan.summary()}", *(f"{name}: {told}" for name, told in self.told())])

    def told(self) -> list[tuple[str, str]]:
        """(source, what the run takes of it), where there are several."""
        if self._dataset.mixture is None:
            return []
        epoch, rest = self._place(self.total_steps)
        epochs = epoch + (rest / self._plan(epoch).steps if rest else 0)
        return self._dataset.mixture.told(round(epochs * len(self._dataset)))


# ---------------------------------------------------------------- preferences


class PreferenceLoader(RowLoader[PreferenceBatch]):
    """Iterator over the `PreferenceBatch`es (NumPy, global) of a whole run. See `StepsLoader` for positions."""

    def __init__(
        self,
        dataset: PreferenceDataset,
        *,
        buckets: int = 4,
        multiple: int = 16,
        packing: Packing | None = None,
        **run: Unpack[RowOptions],
    ):
        """Args: see `RowOptions`, and:
        dataset: the rows; without a shuffle they keep their order (in buckets, within each).
        buckets, multiple: see `batches.plan_buckets`.
        packing: in windows of real tokens (see `group_windows.py`), of which which rows share a batch does not depend
          on how many there are; None: rows of like lengths share a batch, each in the places of the longest.
        """
        self._packing, self._sizes = packing, {"buckets": buckets, "multiple": multiple}
        super().__init__(dataset, **run)

    def _plan_of(self, epoch: int) -> PairPlan:
        how = {"seed": self._seed, "shuffle": self._shuffle, "dealt": self._shuffle, "drawn": self._drawn}
        return _pair_plan(self._dataset, self._batch_size, self._packing, **self._sizes, **how)

    def _shapes(self) -> dict[str, Any]:
        return {"shapes": "windows" if self._packing is not None else [list(shape) for shape in self.plan.shapes]}

    def every_row(self) -> IndexedBatches[PreferenceBatch]:
        """Batches of each row that the run will ever see, once: those of its first epoch, where that holds them."""
        if weighted(self._dataset):
            seen = np.zeros(len(self._dataset), bool)
            for step in range(self.total_steps):
                seen[self._held(step).indices] = True
            return IndexedBatches(self._dataset, self.plan, self.plan.of(np.flatnonzero(seen)), self._own)
        steps = min(self.total_steps, self.steps_per_epoch)
        return IndexedBatches(self._dataset, self.plan, [self._held(step) for step in range(steps)], self._own)


def _pair_plan(
    dataset: Any, batch_size: int, packing: Packing | None, *, buckets: int, multiple: int = 16, **how: Any
) -> PairPlan:
    """`how`: of windows, see `group_windows.plan_windows`."""
    lengths = dataset.prompt_lengths, dataset.response_lengths
    if packing is None:
        return batches.plan_buckets(*lengths, buckets=buckets, batch_size=batch_size, multiple=multiple)
    return group_windows.plan_windows(*lengths, batch_size=batch_size, packing=packing, buckets=buckets, **how)


def eval_batches(
    dataset: PreferenceDataset,
    batch_size: int,
    buckets: int,
    *,
    multiple: int = 16,
    packing: Packing | None = None,
    own: np.ndarray | None = None,
) -> IndexedBatches[PreferenceBatch]:
    """Every row once, in a fixed order; the arguments are those of `PreferenceLoader`."""
    plan = _pair_plan(dataset, batch_size, packing, buckets=buckets, multiple=multiple)
    return IndexedBatches(dataset, plan, plan.epoch(0, 0, shuffle=False), own)


# ---------------------------------------------------------------- token sequences


class TokenLoader(RowLoader[TokenBatch]):
    """Iterator over the `TokenBatch`es (NumPy, global) of a whole run. See `StepsLoader` for positions."""

    def __init__(
        self,
        dataset: SequenceDataset,
        *,
        window: int | None,
        buckets: int = 4,
        multiple: int = 16,
        views: int | None = None,
        **run: Unpack[RowOptions],
    ):
        """Args: see `RowOptions`, and:
        dataset: the sequences; with a shuffle they get new company in the windows in every epoch.
        window: tokens of a window to pack sequences into; None: one sequence a window, in `buckets` sizes. Of sources
          with weights every epoch packs what is drawn for it, so that epochs may differ by a few windows.
        buckets, multiple: see `packing.plan_windows`.
        views: U of `segment_views.py`: attention is to see each sequence apart; None: by segments.

        Raises `InputError` where a sequence is longer than the window.
        """
        self._sizes: dict[str, Any] = {"window": window, "buckets": buckets, "multiple": multiple}
        self._views, self._redrawn = None, window is not None and weighted(dataset)
        if window is not None and self._redrawn:
            # Plans of other draws may hold more sequences a window, and a run has batches of one shape.
            self._sizes["slots"] = -(-window // multiple) * multiple // int(dataset.lengths.min())
        super().__init__(dataset, redrawn=self._redrawn, **run)
        if views is not None:
            first = map(self._batch_of, range(min(LOOKED_AT, self.total_steps)))
            self._views = SegmentViews.of_batches(first, views)

    def _plan_of(self, epoch: int) -> packing.WindowPlan:
        lengths = self._dataset.lengths[self._drawn(epoch)] if self._redrawn else self._dataset.lengths
        return packing.plan_windows(lengths, batch_size=self._batch_size, **self._sizes)

    def _shapes(self) -> dict[str, Any]:
        return {"packed": self._sizes["window"] is not None, "windows": list(self.plan.sizes)}

    def _batch_of(self, step: int) -> TokenBatch:
        batch = super()._batch_of(step)
        return batch if self._views is None else self._views.seen(batch)


def eval_windows(
    dataset: SequenceDataset, *, batch_size: int, window: int | None, buckets: int = 4
) -> IndexedBatches[TokenBatch]:
    """Every sequence once, in a fixed order; the arguments are those of `TokenLoader`."""
    plan = packing.plan_windows(dataset.lengths, window=window, batch_size=batch_size, buckets=buckets)
    return IndexedBatches(dataset, plan, plan.epoch(0, 0, shuffle=False))
