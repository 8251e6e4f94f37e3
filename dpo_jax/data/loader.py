"""Batches in a deterministic order, prepared ahead of the step, from a position that can be saved and restored.

Every process yields the same *global* batch as NumPy arrays, and `mesh.put_batch` copies from it only the rows that the
process's own devices hold. Token ids are small (a batch of 64 pairs of 1,024 tokens is half a megabyte, the activations
of one layer a thousand times that), so sharding the rows by process would save nothing, and it would make a batch, and
with it a run's numbers, depend on the number of processes.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, SupportsIndex

import grain
import numpy as np

from dpo_jax.data.batches import BucketPlan, RowBatch, collate, epoch_batches, plan_buckets
from dpo_jax.data.dataset import PreferenceDataset
from dpo_jax.errors import InputError
from dpo_jax.types import PreferenceBatch

_AHEAD = 4  # batches prepared ahead of the step, for each worker


@dataclass(frozen=True)
class IndexedBatches:
    """Batches that say which rows they hold. Iterating, again and again, yields (indices int [B], batch).

    `indices` are positions in the data set, -1 for filler rows, to put results back in row order.
    """

    dataset: PreferenceDataset
    plan: BucketPlan
    batch_size: int
    many: list[RowBatch]

    @property
    def rows(self) -> np.ndarray:
        """int [M]: positions in the data set of all rows that occur."""
        return np.concatenate([rows for _, rows in self.many])

    def __iter__(self) -> Iterator[tuple[np.ndarray, PreferenceBatch]]:
        for bucket, rows in self.many:
            indices = np.concatenate([rows, np.full(self.batch_size - len(rows), -1)])
            yield indices, collate(self.dataset, rows, self.plan.shapes[bucket], self.batch_size)


class _Steps:
    """Random access to the batch of a step: what grain calls a data source."""

    def __init__(
        self, dataset: PreferenceDataset, plan: BucketPlan, batch_size: int, seed: int, shuffle: bool, steps: int
    ):
        self._dataset = dataset
        self._plan = plan
        self._batch_size = batch_size
        self._steps = steps
        self._per_epoch = math.ceil(len(dataset) / batch_size)
        self._epoch = functools.lru_cache(maxsize=2)(
            lambda epoch: epoch_batches(plan, batch_size, seed=seed, epoch=epoch, shuffle=shuffle)
        )

    def __len__(self) -> int:
        return self._steps

    def rows_of(self, step: int) -> RowBatch:
        epoch, index = divmod(step, self._per_epoch)
        return self._epoch(epoch)[index]

    def __getitem__(self, index: SupportsIndex) -> PreferenceBatch:
        step = int(index)
        batch = self.rows_of(step)
        try:
            return collate(self._dataset, batch.indices, self._plan.shapes[batch.bucket], self._batch_size)
        except Exception as error:  # told apart from the end of the data, and with the rows that it struck
            rows = self._dataset.row_numbers[batch.indices].tolist()
            raise RuntimeError(f"step {step}: the batch of rows {rows} could not be prepared: {error}") from error


class PreferenceLoader:
    """Iterator over the `PreferenceBatch`es (NumPy, global) of a whole run, epoch after epoch.

    The batch of step t depends on the data set and the arguments alone. `get_state` and `set_state` save and restore
    the position exactly; the state is a small JSON-able dict that also says what it is a position in.
    """

    def __init__(
        self,
        dataset: PreferenceDataset,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        buckets: int = 4,
        epochs: float | None = None,
        steps: int | None = None,
        start_step: int = 0,
        workers: int = 2,
        multiple: int = 16,
    ):
        """Args:
        dataset: the rows.
        batch_size: rows a batch, over all devices and processes.
        seed: of the shuffle, at least 0.
        shuffle: a new order every epoch; else the same in all.
        buckets, multiple: see `batches.plan_buckets`.
        epochs, steps: length of the run; exactly one of them (default: one epoch).
        start_step: where to begin.
        workers: threads that prepare batches ahead; 0 prepares each when it is asked for.
        """
        if epochs is not None and steps is not None:
            raise ValueError("give epochs or steps, not both")
        if seed < 0:
            raise InputError(f"--train.seed {seed} must not be negative")
        self.plan = plan_buckets(
            dataset.prompt_lengths, dataset.response_lengths, buckets=buckets, batch_size=batch_size, multiple=multiple
        )
        self._dataset, self._batch_size = dataset, batch_size
        self.steps_per_epoch = math.ceil(len(dataset) / batch_size)
        self.total_steps = math.ceil((epochs or 1) * self.steps_per_epoch) if steps is None else steps
        self._identity = {
            "data": dataset.fingerprint,
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
            "shapes": [list(shape) for shape in self.plan.shapes],
        }
        self._steps = _Steps(dataset, self.plan, batch_size, seed, shuffle, self.total_steps)
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=_AHEAD * workers)
        self._iterator = iter(grain.MapDataset.source(self._steps).to_iter_dataset(options))
        self._seek(start_step)

    def __iter__(self) -> Iterator[PreferenceBatch]:
        return self

    def __next__(self) -> PreferenceBatch:
        step = self.step
        try:
            return next(self._iterator)
        except StopIteration:
            raise
        except BaseException:
            self._seek(step)  # the failed step is not skipped, should the caller ask again
            raise

    @property
    def step(self) -> int:
        """The step whose batch comes next."""
        return int(self._iterator.get_state()["next_index"])

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.steps_per_epoch

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able."""
        return {"step": self.step, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a saved position: the next batch is the one that would have come then.

        Raises `InputError` when the state is a position in other data or another order.
        """
        changed = [name for name, value in self._identity.items() if state.get(name) != value]
        if changed:
            raise InputError(
                f"the saved data position does not fit: {', '.join(changed)} changed since; resume with the same data "
                "and --train.batch_size, --train.seed, --data options, or start anew with another --out"
            )
        self._seek(state["step"])

    def _seek(self, step: int) -> None:
        if not 0 <= step <= self.total_steps:
            raise InputError(f"step {step} lies outside this run of {self.total_steps} steps; raise --train.steps")
        self._iterator.set_state({"next_index": step})

    def every_row(self) -> IndexedBatches:
        """The batches of the first epoch, as far as the run goes: each row that it will ever see, once."""
        steps = min(self.total_steps, self.steps_per_epoch)
        many = [self._steps.rows_of(step) for step in range(steps)]
        return IndexedBatches(self._dataset, self.plan, self._batch_size, many)

    def close(self) -> None:
        """Stop the worker threads."""
        self._iterator.close()

    def summary(self) -> str:
        """One line for the log: batch shapes and padding."""
        shapes = ", ".join(f"{p}+{r}" for p, r in self.plan.shapes)
        return (
            f"{self.steps_per_epoch} steps an epoch, {self.total_steps} in all; batch shapes (prompt+response tokens) "
            f"{shapes}; {self.plan.padding:.2f} padded tokens for each real one"
        )


def eval_batches(dataset: PreferenceDataset, batch_size: int, buckets: int, *, multiple: int = 16) -> IndexedBatches:
    """Every row once, in a fixed order."""
    plan = plan_buckets(
        dataset.prompt_lengths, dataset.response_lengths, buckets=buckets, batch_size=batch_size, multiple=multiple
    )
    return IndexedBatches(dataset, plan, batch_size, epoch_batches(plan, batch_size, seed=0, epoch=0, shuffle=False))
