"""How good a reward model is, from its scores of compared responses: numpy in, plain numbers out.

A row with several pairs (a ranked list) counts once: each of its pairs weighs 1 / (pairs of the row).
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_jax.report.statistics import auc, correlation, ranked

COLUMNS = ("rating", "agreement", "source", "score_gap")
"""Columns of the data that get a table of their own where they are there."""

MOST_GROUPS = 50
"""A column with more values than this is no grouping, and gets no table."""

LENGTH_EDGES = (-64, -16, 16, 64)
"""Buckets of the difference in tokens, better minus worse response."""

BINS = 10
"""Of the reliability plot."""


@dataclass(frozen=True)
class Pairs:
    """M pairs of N rows.

    Attributes:
      row: int [M].
      weight: [M]; those of a row sum to 1.
      scores: [M, 2], the better response first.
      lengths: int [M, 2], in tokens.
    """

    row: np.ndarray
    weight: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray

    @property
    def margin(self) -> np.ndarray:
        """[M] score of the better minus that of the worse."""
        return self.scores[:, 0] - self.scores[:, 1]

    @property
    def wins(self) -> np.ndarray:
        """[M] 1 where the better response scores strictly higher, else 0."""
        return (self.margin > 0).astype(np.float64)

    def of_rows(self, x: np.ndarray, rows: int) -> np.ndarray:
        """[N] the mean of x [M] over each row's pairs."""
        return np.bincount(self.row, self.weight * x, minlength=rows)


def pairs_of(scores: np.ndarray, lengths: np.ndarray, ranks: np.ndarray | None) -> Pairs:
    """All pairs of a better and a worse response.

    Args:
      scores: [N, K].
      lengths: int [N, K] tokens; 0 = absent.
      ranks: int [N, K], 0 the best; None: in the order given.
    """
    if ranks is None:
        ranks = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    present = lengths > 0
    better = (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]
    row, w, l = np.nonzero(better)
    weight = 1 / np.bincount(row, minlength=len(scores))[row]
    return Pairs(
        row, weight, np.stack([scores[row, w], scores[row, l]], 1), np.stack([lengths[row, w], lengths[row, l]], 1)
    )


def figures(scores: np.ndarray, lengths: np.ndarray, ranks: np.ndarray | None) -> dict[str, float]:
    """The figures of N rows; arguments as for `pairs_of`.

    Returns:
      eval_accuracy (share of pairs whose better response scores strictly higher, each row once) and
      eval_accuracy_error (its standard error over rows), eval_rewards/{chosen,rejected,margins,accuracies},
      eval_{mean,min,max}_reward, eval_loss (-log sigmoid of the margin), eval_auc (chance that a better response of any
      row scores above a worse one of any row), eval_ece (expected calibration error of sigmoid(margin)),
      eval_length_correlation (Pearson's, of score with tokens, over all responses) and
      eval_length_correlation_within (of the differences within pairs), eval_lengths/accuracies (what choosing the
      longer response would score), eval_lengths/chosen_longer.
    """
    pairs, n = pairs_of(scores, lengths, ranks), len(scores)
    rows = pairs.of_rows(pairs.wins, n)
    present = scores[lengths > 0]
    difference = pairs.lengths[:, 0] - pairs.lengths[:, 1]
    longer = float(pairs.of_rows(difference > 0, n).mean())
    chosen, rejected = (float(pairs.of_rows(pairs.scores[:, side], n).mean()) for side in (0, 1))
    accuracy = float(rows.mean())
    return {
        "eval_accuracy": accuracy,
        "eval_accuracy_error": float(rows.std() / np.sqrt(n)),
        "eval_rewards/chosen": chosen,
        "eval_rewards/rejected": rejected,
        "eval_rewards/margins": chosen - rejected,
        "eval_rewards/accuracies": accuracy,
        "eval_mean_reward": float(present.mean()),
        "eval_min_reward": float(present.min()),
        "eval_max_reward": float(present.max()),
        "eval_loss": float(pairs.of_rows(np.logaddexp(0, -pairs.margin), n).mean()),
        "eval_auc": auc(pairs.scores[:, 0], pairs.scores[:, 1]),
        "eval_ece": calibration(pairs).error,
        "eval_length_correlation": correlation(present, lengths[lengths > 0]),
        "eval_length_correlation_within": correlation(pairs.margin, difference),
        "eval_lengths/chosen_longer": longer,
        "eval_lengths/accuracies": longer + 0.5 * float(pairs.of_rows(difference == 0, n).mean()),
    }


@dataclass(frozen=True)
class Calibration:
    """Predicted against observed, by bins of the prediction.

    Attributes:
      predicted: mean sigmoid(|margin|) of each bin that is not empty, in [0.5, 1].
      observed: share of its pairs that the model orders as the data do, a score tie counting half.
      share: of all pairs.
      error: expected calibration error, the mean of |observed - predicted| weighted by the shares (Guo et al. 2017).
    """

    predicted: np.ndarray
    observed: np.ndarray
    share: np.ndarray
    error: float


def calibration(pairs: Pairs) -> Calibration:
    """Whether sigmoid(margin), the model's own chance of being right, is that chance."""
    confidence = 1 / (1 + np.exp(-np.abs(pairs.margin)))
    right = np.where(pairs.margin == 0, 0.5, pairs.wins)
    at = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    weight = np.bincount(at, pairs.weight, BINS)
    used = weight > 0
    predicted, observed = (np.bincount(at, pairs.weight * x, BINS)[used] / weight[used] for x in (confidence, right))
    share = weight[used] / weight.sum()
    return Calibration(predicted, observed, share, float(np.sum(share * np.abs(observed - predicted))))


def tables(
    scores: np.ndarray, lengths: np.ndarray, ranks: np.ndarray | None, extras: Mapping[str, Sequence[Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy and margin by value of each of `COLUMNS` that the rows have, and by difference in length.

    Returns {column: [{value, pairs, accuracy, error, margin}]}; `pairs` counts rows (or parts of rows, where the pairs
    of one row differ). Rows without a value are gathered under None.
    """
    pairs = pairs_of(scores, lengths, ranks)
    found: dict[str, list[dict[str, Any]]] = {}
    for column in COLUMNS:
        values = np.asarray([_label(value) for value in extras.get(column, ())], object)
        kinds = sorted(set(values.tolist()), key=_order)
        if kinds in ([], [None]) or len(kinds) > MOST_GROUPS:
            continue
        found[column] = [_group(kind, pairs, values[pairs.row] == kind) for kind in kinds]
    bucket = np.searchsorted(LENGTH_EDGES, pairs.lengths[:, 0] - pairs.lengths[:, 1], side="right")
    names = [f"< {LENGTH_EDGES[0]}"]
    names += [f"{a} to {b - 1}" for a, b in itertools.pairwise(LENGTH_EDGES)]
    names.append(f">= {LENGTH_EDGES[-1]}")
    by_length = [_group(name, pairs, bucket == i) for i, name in enumerate(names) if (bucket == i).any()]
    return {**found, "length_difference": by_length}


def _group(value: Any, pairs: Pairs, at: np.ndarray) -> dict[str, Any]:
    weight = pairs.weight[at]
    count = float(weight.sum())
    accuracy = float(np.sum(weight * pairs.wins[at]) / count)
    return {
        "value": value,
        "pairs": round(count, 2),
        "accuracy": accuracy,
        "error": float(np.sqrt(accuracy * (1 - accuracy) / count)),
        "margin": float(np.sum(weight * pairs.margin[at]) / count),
    }


def _label(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _order(value: Any) -> tuple[bool, bool, Any]:
    number = isinstance(value, int | float)
    return value is None, not number, value if number else str(value)


def metric_name(value: Any) -> str:
    """A value as a part of a metric's name."""
    text = f"{value:g}" if isinstance(value, int | float) else str(value)
    return re.sub(r"[^\w.-]+", "_", text)


def agreement(
    scores: np.ndarray, others: np.ndarray, lengths: np.ndarray, ranks: np.ndarray | None
) -> dict[str, float]:
    """How far a second judge agrees, on N rows (arguments as for `pairs_of`).

    Returns judge/agreement (share of pairs that both order alike), judge/accuracy (the second judge's own) and
    judge/correlation (Spearman's, of the two margins).
    """
    one, two, n = pairs_of(scores, lengths, ranks), pairs_of(others, lengths, ranks), len(scores)
    alike = np.sign(one.margin) == np.sign(two.margin)
    return {
        "judge/agreement": float(one.of_rows(alike, n).mean()),
        "judge/accuracy": float(two.of_rows(two.wins, n).mean()),
        "judge/correlation": correlation(ranked(one.margin), ranked(two.margin)),
    }


def head_figures(predicted: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Accuracy of an auxiliary head, and the recall of each class (Llama 2, Table 29: of unsafe responses).

    predicted and labels: int [N, K] of exclusive classes, or 0/1 [N, K, C] of overlapping ones; labels -1: unknown.
    What no label says anything about is left out.
    """
    known = labels >= 0
    found = {"accuracy": float((predicted == labels)[known].mean())} if known.any() else {}
    for number, name in enumerate(classes):
        of_class = labels[..., number] == 1 if labels.ndim == 3 else labels == number
        hit = predicted[..., number] == 1 if labels.ndim == 3 else predicted == number
        if of_class.any():
            found[f"recall/{metric_name(name)}"] = float(hit[of_class].mean())
    return found
