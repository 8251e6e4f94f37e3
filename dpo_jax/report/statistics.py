"""Statistics: means by prompt, log-ratios, KL divergences, intervals, correlations, agreement of two raters."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dpo_jax.files.jsonl import Row

Figures = dict[str, float]
RESAMPLES = 10_000
_DRAWN_AT_ONCE = 2**20  # places, 8 bytes each, and as many values; in pieces the numbers are those of one draw
Z = 1.959964
"""Of a two-sided interval of 95 %."""


def by_prompt(rows: Sequence[Row]) -> Iterator[tuple[Any, list[Row]]]:
    """The rows of each prompt, a text or a list of messages, in the order of the prompts."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row["prompt"]), []).append(row)
    for group in groups.values():
        yield group[0]["prompt"], group


def per_prompt(rows: Sequence[Row], column: str = "score") -> np.ndarray:
    """Mean score of each prompt's samples [prompts], in order."""
    return np.asarray([np.mean([row[column] for row in group]) for _, group in by_prompt(rows)])


def log_ratios(rows: Sequence[Row]) -> np.ndarray:
    """log policy - log reference of each text [rows], in nats: its mean over what the policy wrote estimates the KL."""
    return np.asarray([np.sum(row["logps"]) - np.sum(row["reference_logps"]) for row in rows])


def kl_figures(rows: Sequence[Row]) -> dict[str, float]:
    """KL(writer, reference) from what the writer wrote: see `kl_estimates`."""
    width = max(len(row["ids"]) for row in rows)

    def table(name: str) -> np.ndarray:
        return np.asarray([[*row[name], *[0.0] * (width - len(row[name]))] for row in rows])

    mask = np.arange(width) < np.asarray([len(row["ids"]) for row in rows])[:, None]
    return kl_estimates(table("logps"), table("reference_logps"), mask)


def interval(values: np.ndarray, *, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of independent `values` (Efron 1979)."""
    rng, n = np.random.default_rng(seed), len(values)
    at_once = max(_DRAWN_AT_ONCE // n, 1)
    sizes = [min(at_once, RESAMPLES - done) for done in range(0, RESAMPLES, at_once)]
    means = np.concatenate([values[rng.integers(n, size=(size, n))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def moved(low: float, high: float) -> str:
    """What happened to a mean whose change has this interval, in words."""
    return "rose" if low > 0 else "fell" if high < 0 else "did not change beyond chance"


def pass_at(k: int, right: np.ndarray, n: int) -> np.ndarray:
    """Unbiased estimate of pass@k of each prompt: whether one of k responses is right (Chen et al. 2021, Eq. 1).

    1 - C(n - c, k) / C(n, k), as the product of 1 - k / i over i = n - c + 1 ... n: binomials overflow.

    Args:
      k: at most n.
      right: int [prompts], c: how many of the n responses to each are right.
      n: responses to each prompt.

    Returns:
      float64 [prompts].
    """
    i = np.arange(1, n + 1)
    factors = np.where(i > n - np.asarray(right)[:, None], np.maximum(1 - k / i, 0.0), 1.0)
    return 1 - factors.prod(axis=1)


def share_interval(share: float, n: int) -> tuple[float, float]:
    """95 % score interval of a share of `n` (Wilson 1927), which holds near 0 and 1, too."""
    middle, root = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return max(0.0, (middle - root) / scale), min(1.0, (middle + root) / scale)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 where one of them does not vary."""
    x, y = np.asarray(x, np.float64) - np.mean(x), np.asarray(y, np.float64) - np.mean(y)
    scale = np.sqrt(np.sum(x**2) * np.sum(y**2))
    return float(np.sum(x * y) / scale) if scale > 0 else 0.0


def ranked(x: np.ndarray) -> np.ndarray:
    """Rank of each value from 0, ties sharing their mean rank: what Spearman's correlation correlates."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse.reshape(-1)]


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the ROC curve: P(a positive's score > a negative's), ties half (Mann & Whitney 1947)."""
    ranks = ranked(np.concatenate([positive, negative]))
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n - 1) / 2) / (n * m))


def as_matrix(rows: Sequence[Row], prompts: int) -> np.ndarray:
    """float32 [prompts, samples of all temperatures]: the scores, NaN where there is none."""
    scores = [np.nan if row["score"] is None else row["score"] for row in rows]
    return np.asarray(scores, np.float32).reshape(prompts, -1)


def kl_estimates(policy: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> Figures:
    """Estimates of KL(policy, reference) from texts that the policy wrote (Schulman 2020).

    Args:
      policy, reference: [N, T] log-probability of each written token, at the temperature it was drawn at.
      mask: bool [N, T], the tokens that are there.

    Returns:
      eval_kl (nats a response: mean of the summed log-ratio, k1), eval_kl_token (the same per token), and
      eval_kl_token_k3 (mean of e^-d - 1 + d for the log-ratio d: never negative, less noisy for nearby policies).
    """
    ratio = np.where(mask, policy - reference, 0.0)
    tokens = mask.sum()
    return {
        "eval_kl": float(ratio.sum(axis=1).mean()),
        "eval_kl_token": float(ratio.sum() / tokens),
        "eval_kl_token_k3": float(np.where(mask, np.expm1(-ratio) + ratio, 0.0).sum() / tokens),
    }


# ---------------------------------------------------------------- agreement of two raters


def table(one: np.ndarray, other: np.ndarray, kinds: int) -> np.ndarray:
    """[kinds, kinds] shares of what two raters said; one and other: int [N]."""
    found = np.zeros((kinds, kinds))
    np.add.at(found, (one, other), 1)
    return found / max(len(one), 1)


def cohen_kappa(shares: np.ndarray) -> float:
    """Cohen's kappa (1960): (p - e) / (1 - e), e the agreement by chance from both raters' shares; nan if e is 1."""
    chance = float(shares.sum(1) @ shares.sum(0))
    return float((np.trace(shares) - chance) / (1 - chance)) if chance < 1 else float("nan")


def gwet_ac1(shares: np.ndarray) -> float:
    """Gwet's AC1 (2008): as kappa with e = sum q (1 - q) / (kinds - 1), q the mean share of a kind: stable where one
    kind is rare."""
    q = (shares.sum(0) + shares.sum(1)) / 2
    chance = float(np.sum(q * (1 - q)) / (len(q) - 1))
    return float((np.trace(shares) - chance) / (1 - chance))
