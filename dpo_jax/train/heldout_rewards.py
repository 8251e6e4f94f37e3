"""Figures of a reward model on held-out comparisons, during training: the same names as in training, and by group."""

from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from dpo_jax.align import reward
from dpo_jax.config import RewardConfig
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.judge import reward_figures as reward_judgement
from dpo_jax.state import TrainState
from dpo_jax.train.heldout import rows_of

GROUPS = ("rating", "agreement", "source")
"""Columns whose values get an accuracy of their own in the log."""


def evaluator(
    dataset: PreferenceDataset, *, config: RewardConfig, mesh: Mesh, batch_size: int, buckets: int
) -> Callable[[TrainState], dict[str, float]]:
    """A function from a state to its figures on the whole of `dataset`, for `loop.fit`.

    Returns loss, ranking_loss, accuracy, margin, mean_reward, rewards/{chosen,rejected,margins,accuracies};
    accuracy/COLUMN/VALUE for each value of `GROUPS`; NAME/accuracy and NAME/recall/CLASS of auxiliary heads. All are
    means over rows.
    """
    step = reward.jit_eval_step(config, mesh)

    def evaluate(state: TrainState) -> dict[str, float]:
        rows = rows_of(step, state, dataset, mesh=mesh, batch_size=batch_size, buckets=buckets)
        return figures(rows, dataset, config)

    return evaluate


def figures(rows: dict[str, np.ndarray], dataset: PreferenceDataset, config: RewardConfig) -> dict[str, float]:
    """Means of what `reward.eval_step` gives for every row, in the order of the data set."""
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
