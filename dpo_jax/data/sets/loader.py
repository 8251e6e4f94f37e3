"""Preference batches in a deterministic order.

Every process yields the same *global* batch as NumPy arrays, and `mesh.put_batch` copies from it only the rows that the
process's own devices hold. Token ids are small (a batch of 64 pairs of 1,024 tokens is half a megabyte, the activations
of one layer a thousand times that), so sharding the rows by process would save nothing, and it would make a batch, and
with it a run's numbers, depend on the number of processes.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Unpack

import numpy as np

from dpo_jax.data.sets.batches import BucketPlan, RowBatch, collate, completed, epoch_batches, plan_buckets
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.group_windows import Packing, WindowPlan, plan_windows
from dpo_jax.data.sets.row_mixture import mixture_identity
from dpo_jax.data.sets.steps_loader import RunOptions, StepsLoader, check_seed
from dpo_jax.types import PreferenceBatch


@dataclass(frozen=True)
class IndexedBatches:
    """Batches that say which rows they hold. Iterating, again and again, yields (indices int [B], batch).

    `indices` are positions in the data set, -1 for filler rows, to put results back in row order.
    """

    dataset: PreferenceDataset
    plan: BucketPlan | WindowPlan
    batch_size: int
    many: list[RowBatch]

    def of(self, rows: np.ndarray) -> "IndexedBatches":
        """Batches of some rows of the data set (positions), in the shapes of this plan."""
        if isinstance(self.plan, WindowPlan):
            return replace(self, many=[RowBatch(0, some) for some in self.plan.epoch(0, 0, shuffle=False, order=rows)])
        many = [
            RowBatch(bucket, part)
            for bucket in range(len(self.plan.shapes))
            for members in [rows[self.plan.rows[rows] == bucket]]
            for part in np.split(members, range(self.batch_size, len(members), self.batch_size))
            if len(part)
        ]
        return replace(self, many=many)

    @property
    def rows(self) -> np.ndarray:
        """int [M]: positions in the data set of all rows that occur."""
        return np.concatenate([rows for _, rows in self.many])

    def __iter__(self) -> Iterator[tuple[np.ndarray, PreferenceBatch]]:
        for one in self.many:
            yield _batch(self.dataset, self.plan, one, self.batch_size)


def _batch(
    dataset: PreferenceDataset, plan: BucketPlan | WindowPlan, one: RowBatch, batch_size: int
) -> tuple[np.ndarray, PreferenceBatch]:
    """(indices int [B], -1 for filler rows; the batch)."""
    if isinstance(plan, BucketPlan):
        batch = collate(dataset, one.indices, plan.shapes[one.bucket], batch_size)
        return completed(one.indices, batch_size), batch
    rows = plan.arranged(one.indices)
    batch = collate(dataset, rows, (plan.prompt, plan.response), batch_size)
    return rows, replace(batch, windows=plan.pack(rows))


class PreferenceLoader(StepsLoader[PreferenceBatch]):
    """Iterator over the `PreferenceBatch`es (NumPy, global) of a whole run. See `StepsLoader` for positions."""

    def __init__(
        self,
        dataset: PreferenceDataset,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        buckets: int = 4,
        multiple: int = 16,
        packing: Packing | None = None,
        **run: Unpack[RunOptions],
    ):
        """Args: see `RunOptions`, and:
        dataset: the rows.
        batch_size: rows a batch, over all devices and processes.
        seed: of the shuffle, at least 0.
        shuffle: a new order every epoch; else rows keep theirs (in buckets, within each).
        buckets, multiple: see `batches.plan_buckets`.
        packing: in windows of real tokens (see `group_windows.py`), of which which rows share a batch does not depend
          on how many there are; None: rows of like lengths share a batch, each in the places of the longest.
        """
        check_seed(seed)
        self._dataset, self._batch_size, self._mixture = dataset, batch_size, dataset.mixture

        def drawn(epoch: int) -> np.ndarray | None:
            return None if self._mixture is None else self._mixture.epoch(epoch, seed=seed, shuffle=shuffle)

        lengths = dataset.prompt_lengths, dataset.response_lengths
        plan: BucketPlan | WindowPlan
        if packing is None:
            plan = plan_buckets(*lengths, buckets=buckets, batch_size=batch_size, multiple=multiple)
        else:
            how = {"seed": seed, "shuffle": shuffle, "dealt": shuffle, "buckets": buckets, "drawn": drawn}
            plan = plan_windows(*lengths, batch_size=batch_size, packing=packing, **how)
        self.plan = plan

        def batches_of(epoch: int) -> list[RowBatch]:
            if isinstance(plan, WindowPlan):
                return [RowBatch(0, rows) for rows in plan.epoch(seed, epoch, shuffle=shuffle, order=drawn(epoch))]
            return epoch_batches(plan, batch_size, seed=seed, epoch=epoch, shuffle=shuffle, order=drawn(epoch))

        self._epoch = functools.lru_cache(maxsize=2)(batches_of)
        steps_per_epoch = math.ceil(len(dataset) / batch_size)
        super().__init__(
            self._batch_of,
            holds=lambda step: f"rows {dataset.row_numbers[self._rows_of(step).indices].tolist()}",
            steps_per_epoch=steps_per_epoch,
            identity={
                "data": dataset.fingerprint,
                "batch_size": batch_size,
                "seed": seed,
                "shuffle": shuffle,
                "shapes": "windows" if isinstance(plan, WindowPlan) else [list(shape) for shape in plan.shapes],
                **mixture_identity(self._mixture),
            },
            **run,
        )

    def _rows_of(self, step: int) -> RowBatch:
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[index]

    def _batch_of(self, step: int) -> PreferenceBatch:
        return _batch(self._dataset, self.plan, self._rows_of(step), self._batch_size)[1]

    def every_row(self) -> IndexedBatches:
        """Batches of each row that the run will ever see, once: those of its first epoch, where that holds them."""
        if self._mixture is not None and self._mixture.weights is not None:
            seen = np.zeros(len(self._dataset), bool)
            for step in range(self.total_steps):
                seen[self._rows_of(step).indices] = True
            nothing = IndexedBatches(self._dataset, self.plan, self._batch_size, [])
            return nothing.of(np.flatnonzero(seen))
        steps = min(self.total_steps, self.steps_per_epoch)
        many = [self._rows_of(step) for step in range(steps)]
        return IndexedBatches(self._dataset, self.plan, self._batch_size, many)

    def summary(self) -> str:
        """One line for the log: batch shapes and padding."""
        steps = f"{self.steps_per_epoch} steps an epoch, {self.total_steps} in all"
        return "\n".join([f"{steps}; {self.plan.summary()}", *(f"{name}: {told}" for name, told in self.told())])

    def told(self) -> list[tuple[str, str]]:
        """(source, what the run takes of it), where there are several."""
        rows = round(self.total_steps * len(self._dataset) / self.steps_per_epoch)
        return [] if self._mixture is None else self._mixture.told(rows)


def eval_batches(
    dataset: PreferenceDataset, batch_size: int, buckets: int, *, multiple: int = 16, packing: Packing | None = None
) -> IndexedBatches:
    """Every row once, in a fixed order; the arguments are those of `PreferenceLoader`."""
    if packing is not None:
        lengths = dataset.prompt_lengths, dataset.response_lengths
        windows = plan_windows(*lengths, batch_size=batch_size, packing=packing, buckets=buckets)
        many = [RowBatch(0, rows) for rows in windows.epoch(0, 0, shuffle=False)]
        return IndexedBatches(dataset, windows, batch_size, many)
    plan = plan_buckets(
        dataset.prompt_lengths, dataset.response_lengths, buckets=buckets, batch_size=batch_size, multiple=multiple
    )
    return IndexedBatches(dataset, plan, batch_size, epoch_batches(plan, batch_size, seed=0, epoch=0, shuffle=False))
