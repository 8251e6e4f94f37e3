"""Figures of a policy on held-out pairs, during training: the same names as in training."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.align import dpo
from dpo_jax.config import DPOConfig
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.loader import eval_batches
from dpo_jax.files.log import ProgressBar
from dpo_jax.mesh import put_batch
from dpo_jax.processes import distributed
from dpo_jax.state import TrainState
from dpo_jax.types import PreferenceBatch


def evaluator(
    dataset: PreferenceDataset, *, config: DPOConfig, mesh: Mesh, batch_size: int, buckets: int
) -> Callable[[TrainState], dict[str, float]]:
    """A function from a state to its figures on the whole of `dataset`, for `loop.fit`.

    Returns loss, rewards/{chosen,rejected,margins,accuracies}, logps/{chosen,rejected}; each is a mean over rows (not
    over batches), of those rows that have the response.
    """
    step = dpo.jit_eval_step(config, mesh)

    return lambda state: figures(rows_of(step, state, dataset, mesh=mesh, batch_size=batch_size, buckets=buckets))


def rows_of(
    step: Callable[[TrainState, PreferenceBatch], Mapping[str, jax.Array]],
    state: TrainState,
    dataset: PreferenceDataset,
    *,
    mesh: Mesh,
    batch_size: int,
    buckets: int,
) -> dict[str, np.ndarray]:
    """What a jitted `eval_step` gives for every row of `dataset`: float64 [N, ...] each, in the order of the rows."""
    parts: list[tuple[np.ndarray, Any]] = []
    waiting: tuple[np.ndarray, Any] | None = None
    with ProgressBar("evaluation", len(dataset), shown=distributed.is_main(), transient=True) as bar:
        for indices, batch in eval_batches(dataset, batch_size, buckets):
            running = (np.asarray(indices), step(state, put_batch(mesh, batch)))
            if waiting is not None:  # one behind, so that the devices always have work
                parts.append((waiting[0], jax.device_get(waiting[1])))
                bar.update(sum(int((part[0] >= 0).sum()) for part in parts))
            waiting = running
        assert waiting is not None
        parts.append((waiting[0], jax.device_get(waiting[1])))
        bar.update(len(dataset))
    order = np.argsort(np.concatenate([indices[indices >= 0] for indices, _ in parts]))
    return {
        name: np.concatenate([np.asarray(values[name], np.float64)[at >= 0] for at, values in parts])[order]
        for name in parts[0][1]
    }


def figures(rows: dict[str, np.ndarray]) -> dict[str, float]:
    """Means of the per-row arrays [N] that `dpo.eval_step` gives."""
    chosen, rejected = rows["lengths/chosen"] > 0, rows["lengths/rejected"] > 0
    pairs = chosen & rejected
    wins = rows["rewards/chosen"] > rows["rewards/rejected"]
    found = {"loss": float(rows["loss"].mean())}
    for name, present in (("chosen", chosen), ("rejected", rejected)):
        if present.any():
            found[f"rewards/{name}"] = float(rows[f"rewards/{name}"][present].mean())
            found[f"logps/{name}"] = float(rows[f"logps/{name}"][present].mean())
    if chosen.any() and rejected.any():
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    if pairs.any():
        found["rewards/accuracies"] = float(wins[pairs].mean())
    return found
