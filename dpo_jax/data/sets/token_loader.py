"""Batches of token windows in a deterministic order (of several processes: see `loader.py`)."""

import bisect
import functools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Unpack

import numpy as np

from dpo_jax.data.sets.packing import WindowBatch, WindowPlan, collate, plan_windows
from dpo_jax.data.sets.row_mixture import mixture_identity
from dpo_jax.data.sets.segment_views import LOOKED_AT, SegmentViews
from dpo_jax.data.sets.sequences import SequenceDataset
from dpo_jax.data.sets.steps_loader import RunOptions, StepsLoader, check_seed
from dpo_jax.types import TokenBatch


@dataclass(frozen=True)
class IndexedWindows:
    """Batches that say which sequences they hold. Iterating, again and again, yields (indices int [B, S], batch).

    `indices` are positions in the data set, -1 where a window holds fewer than S, to put results back in row order.
    """

    dataset: SequenceDataset
    plan: WindowPlan
    batch_size: int
    many: list[WindowBatch]

    def __len__(self) -> int:
        return len(self.many)

    def __iter__(self) -> Iterator[tuple[np.ndarray, TokenBatch]]:
        for batch in self.many:
            indices = np.full((self.batch_size, self.plan.sequences), -1)
            for b, window in enumerate(batch.windows):
                indices[b, : len(window)] = window
            yield indices, collate(self.dataset, batch, batch_size=self.batch_size, sequences=self.plan.sequences)


class TokenLoader(StepsLoader[TokenBatch]):
    """Iterator over the `TokenBatch`es (NumPy, global) of a whole run. See `StepsLoader` for positions."""

    def __init__(
        self,
        dataset: SequenceDataset,
        *,
        batch_size: int,
        seed: int,
        window: int | None,
        shuffle: bool = True,
        buckets: int = 4,
        multiple: int = 16,
        views: int | None = None,
        **run: Unpack[RunOptions],
    ):
        """Args: see `RunOptions`, and:
        dataset: the sequences.
        batch_size: windows a batch, over all devices and processes.
        seed: of the shuffle, at least 0.
        window: tokens of a window to pack sequences into; None: one sequence a window, in `buckets` sizes. Of sources
          with weights every epoch packs what is drawn for it, so that epochs may differ by a few windows.
        shuffle: a new order every epoch, and new company in the windows; else the same in all.
        buckets, multiple: see `packing.plan_windows`.
        views: U of `segment_views.py`: attention is to see each sequence apart; None: by segments.

        Raises `InputError` where a sequence is longer than the window.
        """
        check_seed(seed)
        self._dataset, self._batch_size, self._mixture = dataset, batch_size, dataset.mixture
        redrawn = window is not None and self._mixture is not None and self._mixture.weights is not None

        def drawn(epoch: int) -> np.ndarray | None:
            return None if self._mixture is None else self._mixture.epoch(epoch, seed=seed, shuffle=shuffle)

        def plan_of(epoch: int) -> WindowPlan:
            if epoch and not redrawn:
                return plan
            lengths = dataset.lengths[drawn(epoch)] if redrawn else dataset.lengths
            return plan_windows(lengths, window=window, batch_size=batch_size, buckets=buckets, multiple=multiple)

        def windows_of(epoch: int) -> list[WindowBatch]:
            return self._plan(epoch).epoch(seed, epoch, shuffle=shuffle, order=drawn(epoch))

        self.plan = plan = plan_of(0)
        # Plans of other draws may hold more sequences a window, and a run has batches of one shape.
        self._sequences = plan.sizes[0] // int(dataset.lengths.min()) if redrawn else plan.sequences
        self._plan = functools.lru_cache(maxsize=2)(plan_of)
        self._epoch = functools.lru_cache(maxsize=2)(windows_of)
        self._ends, self._lock = [plan.steps], threading.Lock()
        epochs = run.get("epochs")
        if redrawn and run.get("steps") is None:
            whole, part = divmod(1 if epochs is None else epochs, 1)
            rest = math.ceil(part * self._plan(int(whole)).steps) if part else 0
            run["epochs"], run["steps"] = None, self._until(int(whole)) + rest
        super().__init__(
            self._batch_of,
            holds=self._holds,
            steps_per_epoch=plan.steps,
            identity={
                "data": dataset.fingerprint,
                "batch_size": batch_size,
                "seed": seed,
                "shuffle": shuffle,
                "packed": window is not None,
                "windows": list(plan.sizes),
                **mixture_identity(self._mixture),
            },
            **run,
        )
        self._views = None if views is None else SegmentViews.of_batches(self._first_batches(), views)

    def _first_batches(self) -> Iterator[TokenBatch]:
        """Without views."""
        return map(self._windows_batch, range(min(LOOKED_AT, self.total_steps)))

    def _until(self, epoch: int) -> int:
        """The steps of all epochs before this one."""
        with self._lock:
            while len(self._ends) < epoch:
                self._ends.append(self._ends[-1] + self._plan(len(self._ends)).steps)
        return self._ends[epoch - 1] if epoch else 0

    def _place(self, step: int) -> tuple[int, int]:
        """(epoch, steps of it before this one)."""
        while self._ends[-1] < step:
            self._until(len(self._ends) + 1)
        epoch = bisect.bisect_right(self._ends, step)
        return epoch, step - self._until(epoch)

    def _windows_of(self, step: int) -> WindowBatch:
        epoch, index = self._place(step)
        return self._epoch(epoch)[index]

    def _batch_of(self, step: int) -> TokenBatch:
        batch = self._windows_batch(step)
        return batch if self._views is None else self._views.seen(batch)

    def _windows_batch(self, step: int) -> TokenBatch:
        return collate(self._dataset, self._windows_of(step), batch_size=self._batch_size, sequences=self._sequences)

    def _holds(self, step: int) -> str:
        return f"rows {self._dataset.row_numbers[np.concatenate(self._windows_of(step).windows)].tolist()}"

    def summary(self) -> str:
        """For the log: window sizes and padding; of several sources, what the run takes of each."""
        sizes = ", ".join(map(str, self.plan.sizes))
        line = (
            f"{self.steps_per_epoch} steps an epoch, {self.total_steps} in all; windows of {sizes} tokens with at most "
            f"{self.plan.sequences} sequence{'s' * (self.plan.sequences > 1)}; "
            f"{self.plan.padding:.2f} tokens with padding for each real one"
        )
        return "\n".join([line, *(f"{name}: {told}" for name, told in self.told())])

    def told(self) -> list[tuple[str, str]]:
        """(source, what the run takes of it), where there are several."""
        if self._mixture is None:
            return []
        epoch, rest = self._place(self.total_steps)
        epochs = epoch + (rest / self._plan(epoch).steps if rest else 0)
        return self._mixture.told(round(epochs * len(self._dataset)))


def eval_windows(
    dataset: SequenceDataset, *, batch_size: int, window: int | None, buckets: int = 4, multiple: int = 16
) -> IndexedWindows:
    """Every sequence once, in a fixed order; the arguments are those of `TokenLoader`."""
    plan = plan_windows(dataset.lengths, window=window, batch_size=batch_size, buckets=buckets, multiple=multiple)
    return IndexedWindows(dataset, plan, batch_size, plan.epoch(0, 0, shuffle=False))
