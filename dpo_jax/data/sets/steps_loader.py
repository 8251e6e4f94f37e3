"""The batches of a run, prepared ahead of the step, from a position that can be saved and restored.

What a batch holds is the affair of whoever makes it: a function step -> batch, and nothing else, decides it. So the
position is one number, and beside it stands what it is a position in.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Required, SupportsIndex, TypedDict, TypeVar

import grain
import numpy as np

from dpo_jax.errors import InputError

_AHEAD = 4  # batches prepared ahead of the step, for each worker

Batch = TypeVar("Batch")


class RunOptions(TypedDict, total=False):
    """What all loaders take.

    epochs, steps: length of the run; exactly one of them (default: one epoch).
    start_step: where to begin.
    workers: threads that prepare batches ahead; 0 prepares each when it is asked for.
    """

    epochs: float | None
    steps: int | None
    start_step: int
    workers: int


class RowOptions(RunOptions, total=False):
    """What loaders of rows take.

    batch_size: rows (or windows) a batch, over all devices and processes.
    seed: of the shuffle, at least 0.
    shuffle: a new order every epoch; else the same in all.
    own: bool [batch_size], the rows of a batch whose ids this process reads (`mesh.own_rows`); those of the others are
      0. None: all.
    """

    batch_size: Required[int]
    seed: Required[int]
    shuffle: bool
    own: np.ndarray | None


class StepsLoader(Generic[Batch]):
    """Iterator over the batches of a whole run, epoch after epoch.

    `get_state` and `set_state` save and restore the position exactly; the state is a small JSON-able dict that also
    says what it is a position in.
    """

    def __init__(
        self,
        batch_of: Callable[[int], Batch],
        *,
        holds: Callable[[int], str],
        steps_per_epoch: int,
        identity: Mapping[str, Any],
        epochs: float | None = None,
        steps: int | None = None,
        start_step: int = 0,
        workers: int = 2,
    ):
        """Args: see `RunOptions`, and:
        batch_of: the batch of step t (from 0), a pure function; called from several threads.
        holds: what the batch of step t holds, in words, for the message when it cannot be prepared.
        steps_per_epoch: length of an epoch.
        identity: all that decides the batches, as JSON gives it back (lists, not tuples).
        """
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = run_length(steps_per_epoch, epochs=epochs, steps=steps)
        self._identity = dict(identity)
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=_AHEAD * workers)
        self._make, self._holds = batch_of, holds
        self._iterator = iter(grain.MapDataset.source(self).to_iter_dataset(options))
        self._seek(start_step)

    def __len__(self) -> int:
        return self.total_steps

    def __getitem__(self, index: SupportsIndex) -> Batch:
        """The batch of a step, wherever the loader stands."""
        step = int(index)
        try:
            return self._make(step)
        except Exception as error:  # told apart from the end of the data, and with the rows that it struck
            held = self._holds(step)
            raise RuntimeError(f"step {step}: the batch of {held} could not be prepared: {error}") from error

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
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

    def set_state(self, state: Mapping[str, Any]) -> None:
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

    def close(self) -> None:
        """Stop the worker threads."""
        self._iterator.close()


def run_length(steps_per_epoch: int, *, epochs: float | None, steps: int | None) -> int:
    """Steps of a run that is given in epochs or in steps (neither: one epoch)."""
    if epochs is not None and steps is not None:
        raise ValueError("give epochs or steps, not both")
    return math.ceil((1 if epochs is None else epochs) * steps_per_epoch) if steps is None else steps


def check_seed(seed: int) -> int:
    """`seed`, where it is one. Raises `InputError`."""
    if not 0 <= seed < 2**64:
        raise InputError(f"--train.seed {seed} must not be negative, and less than 2^64")
    return seed
