"""Whether a judge is any good: its verdicts on pairs against people's. Plain numbers in, figures with intervals out."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.report.statistics import RESAMPLES, cohen_kappa, gwet_ac1, table

Sides = ("a", "b", "tie")


class PairVerdict(NamedTuple):
    """Two responses of row `row`: what people say (0: the first is better, 1: the second, 2: a tie), what the judge
    says (likewise; -1: unparsed), and whether its verdict flips with the order (None: not known)."""

    row: int
    people: int
    judge: int
    flipped: bool | None


def figures(pairs: Sequence[PairVerdict], seed: int = 0) -> dict[str, tuple[float, float, float] | int]:
    """Figures of a judge: name -> (value, low, high), a 95 % bootstrap interval over rows, or a count.

    pairs, decided (by people), unparsed; accuracy (of decided pairs with a verdict: the judge names people's side; its
    ties are wrong), accuracy_ties_half (they count half), kappa and ac1 (three kinds: a, b, tie; each
    pair in both orders), tie_rate, flip_share (verdicts that contradict each other in the two orders).
    """
    rows = np.asarray([pair.row for pair in pairs])
    people, judge = np.asarray([p.people for p in pairs], int), np.asarray([p.judge for p in pairs], int)
    flipped = np.asarray([np.nan if p.flipped is None else float(p.flipped) for p in pairs])

    def of(at: np.ndarray) -> dict[str, float]:
        said = at[judge[at] >= 0]
        decided = said[people[said] < 2]
        # Each pair in both orders: some files hold the better response first, always.
        swap = np.asarray([1, 0, 2])
        shares = (table(people[said], judge[said], 3) + table(swap[people[said]], swap[judge[said]], 3)) / 2
        right, tie = judge[decided] == people[decided], judge[decided] == 2
        flips = flipped[at][~np.isnan(flipped[at])]
        return {
            "accuracy": _mean(right),
            "accuracy_ties_half": _mean(right + 0.5 * tie),
            "kappa": cohen_kappa(shares) if len(said) else float("nan"),
            "ac1": gwet_ac1(shares) if len(said) else float("nan"),
            "tie_rate": _mean(judge[said] == 2),
            "flip_share": _mean(flips),
        }

    _, of_row = np.unique(rows, return_inverse=True)
    members = [np.flatnonzero(of_row == i) for i in range(of_row.max() + 1)]
    rng, found = np.random.default_rng(seed), of(np.arange(len(rows)))
    draws = [
        of(np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))]))
        for _ in range(min(RESAMPLES, 1000))
    ]
    values: dict[str, tuple[float, float, float] | int] = {
        "pairs": len(pairs),
        "decided": int((people < 2).sum()),
        "unparsed": int((judge < 0).sum()),
    }
    for name, value in found.items():
        if not np.isnan(value):
            each = np.asarray([draw[name] for draw in draws])
            low, high = np.nanquantile(each, (0.025, 0.975))
            values[name] = (value, float(low), float(high))
    return values


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def pairs_of(
    row: int, places: Sequence[int], scores: Sequence[float | None], flipped: bool | None
) -> list[PairVerdict]:
    """All pairs of a row's responses: people's places (0 the best, equal for ties) beside the judge's scores."""
    found = []
    for i in range(len(places)):
        for j in range(i + 1, len(places)):
            people = 2 if places[i] == places[j] else int(places[i] > places[j])
            a, b = scores[i], scores[j]
            judge = -1 if a is None or b is None else 2 if a == b else int(a < b)
            found.append(PairVerdict(row, people, judge, flipped))
    return found
