"""Figures of `dpo-jax safety`: shares of refusals with intervals, violations, and a classifier against people."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.report.statistics import RESAMPLES, interval, share_interval

Share = dict[str, float]


class Judged(NamedTuple):
    """One response.

    Attributes:
      category: of its prompt; None where there is none.
      unsafe: whether the prompt should be refused.
      refusal: its class, one of the `kinds` that the figures are given.
      label: a person's, or None.
      safety, helpfulness: scores, or None.
    """

    category: str | None
    unsafe: bool
    refusal: str
    label: str | None
    safety: float | None
    helpfulness: float | None


def share(flags: Sequence[bool]) -> Share:
    """A share and its 95 % score interval (Wilson 1927)."""
    value = float(np.mean(flags))
    low, high = share_interval(value, len(flags))
    return {"share": value, "low": low, "high": high}


def group_figures(rows: Sequence[Judged], kinds: Sequence[str], threshold: float | None, seed: int) -> dict[str, Any]:
    """n, the share of each class of refusal, and of violations and mean helpfulness where they were judged."""
    found: dict[str, Any] = {"n": len(rows)}
    found |= {kind: share([row.refusal == kind for row in rows]) for kind in kinds}
    safety = [row.safety for row in rows if row.safety is not None]
    if threshold is not None and safety:
        found["violation"] = share([score < threshold for score in safety])
    helpful = np.asarray([row.helpfulness for row in rows if row.helpfulness is not None])
    if len(helpful):
        low, high = interval(helpful, seed=seed)
        found["helpfulness"] = {"mean": float(helpful.mean()), "low": low, "high": high}
    return found


def against_people(rows: Sequence[Judged], kinds: Sequence[str], seed: int) -> dict[str, Any] | None:
    """n, accuracy and Cohen's kappa (each with a 95 % bootstrap interval), and the confusion: people's class -> ours ->
    rows. None without labels. Kappa and its ends are None where both always say the same: it is not defined there."""
    pairs = np.asarray(
        [(kinds.index(row.label), kinds.index(row.refusal)) for row in rows if row.label is not None], int
    ).reshape(-1, 2)
    if not len(pairs):
        return None
    cells = pairs[:, 0] * len(kinds) + pairs[:, 1]
    counts = np.bincount(cells, minlength=len(kinds) ** 2)
    draws = np.random.default_rng(seed).multinomial(len(pairs), counts / len(pairs), size=RESAMPLES)
    names = ("accuracy", "kappa")
    spread = _agreement(draws.reshape(-1, len(kinds), len(kinds)))
    values = _agreement(counts.reshape(1, len(kinds), len(kinds)))
    figures: dict[str, dict[str, float | None]] = {}
    for name, (value,), each in zip(names, values, spread, strict=True):
        found = (None,) * 3 if np.isnan(value) else map(float, (value, *np.nanquantile(each, [0.025, 0.975])))
        figures[name] = dict(zip(("value", "low", "high"), found, strict=True))
    table = counts.reshape(len(kinds), len(kinds)).tolist()
    return {
        "n": len(pairs),
        **figures,
        "confusion": {a: dict(zip(kinds, row, strict=True)) for a, row in zip(kinds, table, strict=True)},
    }


def _agreement(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and Cohen's kappa (1960) of tables [N, k, k] of counts; kappa is nan where both always say the same."""
    shares = counts / counts.sum((1, 2), keepdims=True)
    accuracy = np.trace(shares, axis1=1, axis2=2)
    chance = (shares.sum(1) * shares.sum(2)).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return accuracy, (accuracy - chance) / (1 - chance)
