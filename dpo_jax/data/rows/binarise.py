"""Pairs out of scored lists, by named rules, and UltraFeedback's schema.

zephyr                  best mean score against a random one of strictly lower score (Tunstall et al. 2023, section 3);
                        a tied best is drawn by the seed, a row of equal scores dropped
ultrafeedback_binarized best by `overall_score` against a random one of the others; where they score the same the row is
                        dropped and counted (alignment-handbook, ultrafeedback_binarized)
best_worst              best against worst; a row of equal scores dropped
all                     every pair of different scores, with its gap

`strict` ties drop a row whose best score is shared. Every pair keeps its scores.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from dpo_jax.data.rows.cells import as_number
from dpo_jax.data.rows.problems import BadRow

Rule = Literal["zephyr", "ultrafeedback_binarized", "best_worst", "all"]
REPAIR_LOW, REPAIR_HIGH = 2.0, 4.0
"""Of UltraFeedback's published repair, on the mean of the aspects."""


class Picked(NamedTuple):
    """Indices of the chosen and the rejected response."""

    chosen: int
    rejected: int


def pick(
    scores: Sequence[float], rule: Rule, *, key: str, strict: bool = False, dropped: Counter[str] | None = None
) -> list[Picked]:
    """The pairs of one row.

    Args:
      scores: of its responses, larger is better.
      rule: see the module.
      key: of the draw: the seed and the row.
      strict: drop a row whose best score several responses share.
      dropped: counts why rows give no pair.
    """
    dropped = Counter() if dropped is None else dropped
    rng, count = random.Random(key), len(scores)
    if count < 2:
        dropped["fewer than two scored responses"] += 1
        return []
    best = [i for i in range(count) if scores[i] == max(scores)]
    if len(best) == count:
        dropped["all scores are equal"] += 1
        return []
    if strict and len(best) > 1:
        dropped["the best score is shared"] += 1
        return []
    if rule == "all":
        order = sorted(range(count), key=lambda i: -scores[i])
        return [Picked(i, j) for a, i in enumerate(order) for j in order[a + 1 :] if scores[i] > scores[j]]
    chosen = rng.choice(best)
    if rule == "ultrafeedback_binarized":
        rejected = rng.choice([i for i in range(count) if i != chosen])
        if scores[rejected] == scores[chosen]:
            dropped["the one drawn scores as much as the best"] += 1
            return []
        return [Picked(chosen, rejected)]
    lower = [i for i in range(count) if scores[i] < scores[chosen]]
    if rule == "best_worst":
        lower = [i for i in lower if scores[i] == min(scores)]
    return [Picked(chosen, rng.choice(lower))]


def mean_of_aspects(completion: dict[str, Any]) -> float | None:
    """Mean rating of a completion in UltraFeedback's schema; N/A is no number and leaves the mean. None: no rating.

    Raises `BadRow` for annotations that are of another kind.
    """
    annotations = completion.get("annotations")
    if not isinstance(annotations, dict):
        raise BadRow("'annotations' of a completion is no object", "UltraFeedback's schema has one")
    found = []
    for name, one in annotations.items():
        value = one.get("Rating") if isinstance(one, dict) else None
        if value is None or (isinstance(value, str) and value.strip().lower() in ("n/a", "nan", "")):
            continue
        try:
            number = float(value)
        except (OverflowError, TypeError, ValueError):
            raise BadRow(f"'{name}' has a Rating that is no number", str(value)[:40]) from None
        if math.isinf(number):
            raise BadRow(f"'{name}' has a Rating that is no number", str(value)[:40])
        if not math.isnan(number):  # pandas writes NaN where there is none
            found.append(number)
    return sum(found) / len(found) if found else None


def overall_score(completion: dict[str, Any]) -> float | None:
    """The `overall_score` of a completion in UltraFeedback's schema; None where it has none."""
    value = completion.get("overall_score")
    return None if isinstance(value, str) else as_number(value)


def repaired(completion: dict[str, Any]) -> tuple[float | None, bool, bool]:
    """(`overall_score` after the published repair, whether it contradicts the aspects, whether to judge again).

    OpenBMB/UltraFeedback's README: an overall score of 10 with a poor mean of the aspects was written for 1. A mean of
    at most 2 makes it 1, one above 4 leaves it, and between the two the completion is to be judged again.
    """
    overall, mean = overall_score(completion), mean_of_aspects(completion)
    if overall is None:
        return None, False, False
    if overall != 10 or mean is None or mean > REPAIR_HIGH:
        return overall, False, False
    return (1.0, True, False) if mean <= REPAIR_LOW else (None, True, True)
