"""When a run ends early, and which weights it exports then: both follow from the rows of its log, so a run that goes on
decides as one that was never interrupted.
"""

from collections.abc import Callable, Sequence

import numpy as np

from dpo_jax.errors import InputError
from dpo_jax.files.log import Row
from dpo_jax.processes.distributed import from_main
from dpo_jax.state import TrainState
from dpo_jax.weights.orbax.checkpoint import Checkpoints, smaller_is_better


def without_gain(rows: Sequence[Row], metric: str) -> int:
    """Evaluations since the one that was better than all before it. One before the first step does not count."""
    values = [row[metric] for row in rows if row["step"] and metric in row]
    better = min if smaller_is_better(metric) else max
    return len(values) - 1 - values.index(better(values)) if values else 0


def best_step(rows: Sequence[Row], metric: str, kept: Sequence[int]) -> int:
    """The step of the best evaluation of which a checkpoint is kept; of equals the newest, as there. -1: none."""
    sign = -1 if smaller_is_better(metric) else 1
    values = {int(row["step"]): sign * row[metric] for row in rows if row["step"] in kept and metric in row}
    return max(values, key=lambda step: (values[step], step), default=-1)


def best_state(
    state: TrainState, step: int, checkpoints: Checkpoints, rows: Sequence[Row], metric: str, say: Callable[[str], None]
) -> tuple[TrainState, int]:
    """The state of the evaluation with the best `metric` in the log's `rows`, those of process 0; and its step.

    `state`: the last one, of `step`; freed where another is better. Raises `InputError` where that cannot be read.
    """
    best = int(from_main(np.asarray(best_step(rows, metric, checkpoints.steps()))))
    if best == step:
        return state, step
    restored = checkpoints.restore(state, only=best) if best > 0 else None
    if restored is None:
        raise InputError(f"{checkpoints.folder}: no checkpoint of an evaluation is left; choose another --out")
    say(f"the weights of step {best} are exported, where {metric} was best")
    return restored.state, best
