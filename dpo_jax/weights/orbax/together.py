"""What the processes of a run agree on about their checkpoints. All of them call these together."""

import sys
from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dpo_jax.weights.integrity.digests import everywhere


def agreed(value: bool) -> bool:
    """Process 0's `value`, in every process."""
    return value if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def agreed_reason(reason: str | None) -> str | None:
    """Why a process cannot go on, in all of them; None where no process has a reason."""
    first = everywhere(reason is not None, jax.process_index())
    return None if first < 0 else reason or f"process {first} cannot read it"


def steps_from_main(steps: Sequence[int]) -> list[int]:
    """Process 0's steps, in every process: a host may see a shared folder as it was seconds ago."""
    if jax.process_count() == 1:
        return list(steps)
    count = int(multihost_utils.broadcast_one_to_all(np.asarray(len(steps), np.int32)))
    own = np.resize(np.asarray([*steps, 0], np.int64), count + 1).view(np.int32)  # jax has no 64 bits
    return np.asarray(multihost_utils.broadcast_one_to_all(own), np.int32).view(np.int64)[:count].tolist()


def steps_of_all(steps: Sequence[int], most: int) -> list[int]:
    """The steps that every process has, oldest first; of each its `most` newest count."""
    mine = sorted(steps)[-most:]
    if jax.process_count() == 1:
        return mine
    own = np.full(most, -1, np.int64)
    own[: len(mine)] = mine
    pairs = np.asarray(multihost_utils.process_allgather(own.view(np.int32)), np.int32)
    every = [set(row) for row in np.ascontiguousarray(pairs).view(np.int64).tolist()]
    return sorted(set.intersection(*every) - {-1})


def wait_for_others(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier in the background of a save, which a process whose own part has failed does not enter.

    Orbax lets it wait there, with its exception under way, for the others, who wait for its part: for ten minutes. So
    the exception goes on instead, to `Checkpoints.wait`, and ends the run.
    """
    if (failure := sys.exc_info()[1]) is not None:
        raise failure
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
