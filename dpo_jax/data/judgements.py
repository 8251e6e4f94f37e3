"""What a list of replies, or the row around it, says of their order: scores, ranks, or nothing.

A judgement stands in the entries of the list (`{"response": ..., "overall_score": 7.5}`) or beside it, a list with one
number a reply. Larger `overall_score`, `score` and `rating` are better; the smallest `rank` is the best (Nectar counts
from 1, OpenAssistant from 0). Without any, the best reply stands first; but not where something that looks like a
judgement is there and cannot be read, for then the order of the list may mean nothing.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from dpo_jax.data.problems import BadRow
from dpo_jax.data.ratings import number_of

IN_ENTRIES = {"overall_score": -1, "score": -1, "rating": -1, "rank": 1}
"""Keys of an entry that judge it: -1 the larger the better, 1 the smaller the better."""
BESIDE = {"scores": -1, "overall_scores": -1, "ratings": -1, "rating": -1, "ranks": 1, "rank": 1}
"""Columns that do, as lists with one number a reply."""
COLUMNS = frozenset(BESIDE)
_LISTS_ALWAYS = ("scores", "ranks")

_LOOKS_LIKE_ONE = re.compile(
    r"(?:^|[^a-z])(?:(?:rank|rat|grad)(?:e|ed|es|ing|ings|s)?|scor(?:e|es|ed|ing)|annotations?|preferences?|prefer|"
    r"preferred|rewards?|votes?|winner|wins?|better|best|judge?ments?|judged?|elo)(?:[^a-z]|$)",
    re.IGNORECASE,
)


class Judged(NamedTuple):
    """places: of each reply, 0 the best, equal for ties. scores: where there are some, larger is better."""

    places: tuple[int, ...]
    scores: tuple[float, ...]


def looks_like_one(name: str) -> bool:
    """Whether a column or key is named like a judgement: `fine-grained_score`, `preference`, `ranking`."""
    return _LOOKS_LIKE_ONE.search(name) is not None


def judged(row: dict[str, Any], column: str, known: frozenset[str]) -> Judged | BadRow:
    """How the replies in the list `column` of `row` compare; a `BadRow`, not raised, where that is not known.

    `known`: columns of the row that mean something else. Raises `BadRow` where judgements are incomplete, are no
    numbers, or contradict each other.
    """
    replies = row[column]
    k = len(replies)
    entries = [entry if isinstance(entry, dict) else {} for entry in replies]
    found: dict[str, list[float]] = {}
    for name in IN_ENTRIES:
        given = [entry[name] for entry in entries if entry.get(name) is not None]
        if len(given) not in (0, k):
            raise BadRow(f"some entries of '{column}' have a {name.replace('_', ' ')}", "give all of them one, or none")
        if given:
            found[f"{column}: {name}"] = [IN_ENTRIES[name] * number_of(value, name) for value in given]
    for name, sign in BESIDE.items():
        value = row.get(name)
        if isinstance(value, list) and len(value) == k:
            found[name] = [sign * number_of(each, name) for each in value]
        elif name in _LISTS_ALWAYS and value is not None:
            raise BadRow(f"'{name}' does not fit the replies", f"it must be a list of {k} numbers, one a reply")
    if not found:
        unread = _unread(row, entries, known | {column})
        return Judged(tuple(range(k)), ()) if unread is None else _not_read(column, unread)
    places = {name: _places(keys) for name, keys in found.items()}
    first = next(iter(places))
    for name, others in places.items():
        if others != places[first]:
            raise BadRow(f"'{first}' and '{name}' rank the replies twice, and differently", "keep one of them")
    scored = next((keys for name, keys in found.items() if _sign(name) < 0), [])
    return Judged(places[first], tuple(-key for key in scored))


def _sign(name: str) -> int:
    inner = name.rpartition(": ")[2]
    return BESIDE[name] if name in BESIDE else IN_ENTRIES[inner]


def _places(keys: Sequence[float]) -> tuple[int, ...]:
    order = sorted(set(keys))
    return tuple(order.index(key) for key in keys)


def _unread(row: dict[str, Any], entries: Sequence[dict[str, Any]], known: frozenset[str]) -> str | None:
    """What looks like a judgement, in the entries or beside the list."""
    keys = {str(key): None for entry in entries for key, value in entry.items() if value is not None}
    inside = [key for key in keys if key not in IN_ENTRIES and looks_like_one(key)]
    beside = [name for name in row if name not in known and looks_like_one(name)]
    lists = [name for name in BESIDE if isinstance(row.get(name), list)]  # of another length
    return next(iter([*inside, *beside, *lists]), None)


def _not_read(column: str, name: str) -> BadRow:
    return BadRow(
        f"'{name}' may say which entry of '{column}' is better, and is not read",
        "so their order is not known: give one number a reply in 'scores' (larger is better) or 'ranks' (1 is the "
        f"best), or remove '{name}' if the best stands first",
    )
