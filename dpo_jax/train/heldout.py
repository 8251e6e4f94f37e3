"""Figures on held-out data during training, under the names of training: of policies, reward models, language models.

`of_rows` and `of_language_model` give a function from a state to its figures on all of the data, for `loop.fit`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.align import sft
from dpo_jax.config import RewardConfig, SFTConfig
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.group_packing import Packing
from dpo_jax.data.sets.loader import eval_batches
from dpo_jax.files.log import ProgressBar
from dpo_jax.judge.figures import rewards as reward_judgement
from dpo_jax.processes import distributed
from dpo_jax.state import TrainState
from dpo_jax.types import PreferenceBatch, TokenBatch

GROUPS = ("rating", "agreement", "source", "safety")
"""Columns whose values get an accuracy of their own in the log."""
Evaluator = Callable[[TrainState], dict[str, float]]


class Windows(Protocol):
    """Batches that can be gone through again and again."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[TokenBatch]: ...


def of_rows(
    step: Callable[[TrainState, PreferenceBatch], Mapping[str, jax.Array]],
    figures: Callable[[dict[str, np.ndarray]], dict[str, float]],
    dataset: PreferenceDataset,
    *,
    mesh: Mesh,
    batch_size: int,
    buckets: int,
    packing: Packing | None = None,
    own: np.ndarray | None = None,
) -> Evaluator:
    """`figures`, such as `policy_figures`, of what a jitted `eval_step` gives for every row of `dataset`.

    `batch_size`, `buckets`, `packing`, `own`: see `PreferenceLoader`.
    """
    batches = eval_batches(dataset, batch_size, buckets, packing=packing, own=own)

    def evaluate(state: TrainState) -> dict[str, float]:
        parts = list(_evaluated(partial(step, state), batches, mesh, len(dataset)))
        order = np.argsort(np.concatenate([indices[indices >= 0] for indices, _ in parts]))
        return figures(
            {
                name: np.concatenate([np.asarray(values[name], np.float64)[at >= 0] for at, values in parts])[order]
                for name in parts[0][1]
            }
        )

    return evaluate


def of_language_model(windows: Windows, *, config: SFTConfig, mesh: Mesh) -> Evaluator:
    """loss (nats a target token, always exact), perplexity (its exponential), mean_token_accuracy and entropy; means
    over all target tokens, not over windows or batches.
    """
    step = sft.jit_eval_step(config, mesh)

    def evaluate(state: TrainState) -> dict[str, float]:
        totals: dict[str, float] = {}
        numbered = ((np.asarray([i]), batch) for i, batch in enumerate(windows))
        for _, sums in _evaluated(partial(step, state), numbered, mesh, len(windows)):
            for name, values in sums.items():
                totals[name] = totals.get(name, 0.0) + float(np.sum(values, dtype=np.float64))
        return token_figures(totals)

    return evaluate


def _evaluated(
    compute: Callable[[Any], Any], batches: Iterable[tuple[np.ndarray, Any]], mesh: Mesh, total: int
) -> Iterator[tuple[np.ndarray, Any]]:
    """`mesh.one_ahead`, with a progress bar of `total` indices."""
    done = 0
    with ProgressBar("evaluation", total, shown=distributed.is_main(), transient=True) as bar:
        for indices, values in meshes.one_ahead(compute, batches, mesh):
            yield indices, values
            done += int((indices >= 0).sum())
            bar.update(done)


# ---------------------------------------------------------------- figures


def policy_figures(rows: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over the rows (not over batches) of what `dpo.eval_step` gives, [N] each, of those that have the response:
    loss (and loss/NAME of several), rewards/{chosen,rejected,margins,accuracies}, logps/{chosen,rejected}.
    """
    chosen, rejected = rows["lengths/chosen"] > 0, rows["lengths/rejected"] > 0
    pairs = chosen & rejected
    wins = rows["rewards/chosen"] > rows["rewards/rejected"]
    found = {name: float(values.mean()) for name, values in rows.items() if name.partition("/")[0] == "loss"}
    for name, present in (("chosen", chosen), ("rejected", rejected)):
        if present.any():
            found[f"rewards/{name}"] = float(rows[f"rewards/{name}"][present].mean())
            found[f"logps/{name}"] = float(rows[f"logps/{name}"][present].mean())
    if chosen.any() and rejected.any():
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    if pairs.any():
        found["rewards/accuracies"] = float(wins[pairs].mean())
    return found


def reward_figures(rows: dict[str, np.ndarray], dataset: PreferenceDataset, config: RewardConfig) -> dict[str, float]:
    """Means over rows of what `reward.eval_step` gives, in the order of the data set: loss, ranking_loss, accuracy,
    margin, mean_reward, rewards/{chosen,rejected,margins,accuracies}; accuracy/COLUMN/VALUE for each value of `GROUPS`;
    NAME/accuracy and NAME/recall/CLASS of auxiliary heads.
    """
    found = {name: float(rows[name].mean()) for name in ("loss", "ranking_loss", "accuracy")}
    found |= {name: float(rows[name].mean()) for name in ("rewards/chosen", "rewards/rejected")}
    found["margin"] = found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    found["rewards/accuracies"] = found["accuracy"]
    found["mean_reward"] = float(rows["scores"][dataset.response_lengths > 0].mean())
    groups = {name: dataset.extras[name] for name in GROUPS if name in dataset.extras}
    tables = reward_judgement.tables(rows["scores"], dataset.response_lengths, dataset.ranks, groups)
    for column, table in tables.items():
        for group in table:
            found[f"accuracy/{column}/{reward_judgement.metric_name(group['value'])}"] = group["accuracy"]
    for head in config.heads:
        assert dataset.labels is not None, "the data were loaded for these heads"
        of_head = reward_judgement.head_figures(rows[f"{head.name}/predicted"], dataset.labels[head.name], head.classes)
        found |= {f"{head.name}/{name}": value for name, value in of_head.items()}
    return found


def token_figures(totals: dict[str, float]) -> dict[str, float]:
    """Means from the sums that `sft.eval_step` gives, added up over windows and batches."""
    count = totals["target_tokens"]
    loss = totals["nll"] / count
    return {
        "loss": loss,
        # e^709 is the largest that a float holds; a model as bad as that is told by its loss.
        "perplexity": math.exp(min(loss, 709.0)),
        "mean_token_accuracy": totals["correct"] / count,
        "entropy": totals["entropy"] / count,
    }
