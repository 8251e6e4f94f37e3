"""How strongly a comparison prefers: ratings, scores and votes -> margins.

Table 27 of Llama 2 (Touvron et al. 2023) gives the margin m(r) of its four ratings:

                significantly better   better   slightly better   negligibly better / unsure
    small       1                      2/3      1/3               0
    large       3                      2        1                 0

A row names its rating in words, as in the head of the table, or as a number: 3 for significantly better to 0 for
negligibly better.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.data.rows.cells import as_number
from dpo_jax.data.rows.messages import text_of
from dpo_jax.data.rows.problems import BadRow

Evidence = float | str | BadRow
"""What a row tells beside its texts; a `BadRow` in place of what cannot be used."""

TABLES = {"small": (0.0, 1 / 3, 2 / 3, 1.0), "large": (0.0, 1.0, 2.0, 3.0)}
"""Margins by number of the rating."""

RATINGS = ("negligibly better", "slightly better", "better", "significantly better")
_WORDS = {name: number for number, name in enumerate(RATINGS)} | {"unsure": 0, "negligibly better/unsure": 0}


def rating_number(rating: object) -> int:
    """0 (negligibly better) to 3 (significantly better). Raises `BadRow` for a rating outside the table."""
    if isinstance(rating, str):
        words = re.sub(r"\s*/\s*", "/", " ".join(rating.lower().replace("_", " ").split()))
        if words in _WORDS:
            return _WORDS[words]
        rating = float(words) if re.fullmatch(r"[0-3](\.0*)?", words) else rating
    if isinstance(rating, int | float) and not isinstance(rating, bool) and rating in range(4):
        return int(rating)
    known = ", ".join(f"{name} ({number})" for number, name in reversed(list(enumerate(RATINGS))))
    raise BadRow("a 'rating' outside the margin table", f"it is {str(rating)[:40]!r}; known are {known}, and unsure")


def number_of(value: Any, name: str) -> float:
    """A finite number of the field `name`. Raises `BadRow`."""
    if (found := as_number(value)) is None:
        raise BadRow(f"'{name}' is not a finite number", f"it holds {str(value)[:40]!r}")
    return found


def evidence_of(value: object, name: str) -> Evidence:
    """What the field `name` tells of a comparison, or why it cannot be used: to be raised by whoever needs it."""
    try:
        if name == "source" or (name == "rating" and isinstance(value, str)):
            return text_of(value, name)
        return number_of(value, name)
    except BadRow as problem:
        return problem


def votes_of(row: Mapping[str, Any]) -> list[int]:
    """The votes in the columns annotator1, annotator2, ...: 1 the first response, 2 the second, 0 a tie."""
    names = sorted(name for name in row if re.fullmatch(r"annotator_?\d+", name))
    for name in names:
        if isinstance(row[name], bool) or row[name] not in (0, 1, 2):
            raise BadRow(f"'{name}' is no vote", f"it holds {str(row[name])[:40]!r}; write 1, 2, or 0 for a tie")
    return [int(row[name]) for name in names]


def majority(votes: Sequence[int]) -> tuple[int, float]:
    """(the response that most voted for: 1 or 2, or 0 for a tie; the share of the voters who did)."""
    first, second, ties = (votes.count(choice) for choice in (1, 2, 0))
    winner = 1 if first > max(second, ties) else 2 if second > max(first, ties) else 0
    return winner, votes.count(winner) / len(votes)


def margin_of(kind: str, scale: float, evidence: Mapping[str, Any]) -> float:
    """The margin of a pair.

    Args:
      kind: small, large, column, score_gap or agreement, as `--reward.margin`.
      scale: of the last two.
      evidence: what the row gives of `rating`, `margin`, `score_gap` (the better one's score minus the other's) and
        `agreement` (share of the annotators who agree).

    Raises `BadRow` where it lacks what `kind` reads, or the margin would be negative.
    """
    name = {"small": "rating", "large": "rating", "column": "margin"}.get(kind, kind)
    if evidence.get(name) is None:
        needs = {
            "score_gap": "a score of each response",
            "agreement": "'agreement', or votes in 'annotator1', 'annotator2', ...",
        }.get(name, f"the column '{name}'")
        raise BadRow(f"no {name} for --reward.margin {kind}", f"it takes {needs}; add it, or choose another margin")
    if isinstance(problem := evidence[name], BadRow):
        raise problem
    if name == "rating":
        return TABLES[kind][rating_number(evidence["rating"])]
    value = number_of(evidence[name], name)
    if value < 0:
        detail = f"{value:g}: the rejected response is the better one by it; swap them, or remove the row"
        raise BadRow(f"a negative {name.replace('_', ' ')}", detail)
    if name == "agreement" and value > 1:
        raise BadRow("'agreement' is a share of the annotators, in [0, 1]", f"it is {value:g}")
    return value if name == "margin" else scale * value
