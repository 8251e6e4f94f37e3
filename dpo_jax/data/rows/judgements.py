"""Which of its responses a row calls better: by scores, ranks, votes, a choice, or a degree of preference.

A judgement stands in the entries of the list of responses (`{"response": ..., "overall_score": 7.5}`) or beside it.
Larger `overall_score`, `score`, `rating` and `pm_score` are better; the smallest `rank` is the best (Nectar counts from
1, OpenAssistant from 0). `layouts.py` says what else there is. Without any, the best response of a list stands first;
but not where something that looks like a judgement (by its name, or as a number or yes or no for each response) is
there and cannot be read, nor in a column that holds samples, for then the order of the list may mean nothing.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.data.rows.layouts import BESIDE
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.rows.ratings import majority, number_of, votes_of
from dpo_jax.data.rows.readable import Readable, is_vote

IN_ENTRIES = {"overall_score": -1, "score": -1, "rating": -1, "pm_score": -1, "rank": 1}
"""Keys of an entry that judge it: -1 the larger the better, 1 the smaller the better."""
_LISTS_ALWAYS = ("scores", "ranks")

_LOOKS_LIKE_ONE = re.compile(
    r"(?:^|[^a-z])(?:(?:rank|rat|grad)(?:e|ed|es|ing|ings|s)?|scor(?:e|es|ed|ing)|annotations?|preferences?|prefer|"
    r"preferred|rewards?|votes?|winner|wins?|better|best|judge?ments?|judged?|choice|elo)(?:[^a-z]|$)",
    re.IGNORECASE,
)
_NO_JUDGEMENT = re.compile(
    r"(?:^|[^a-z])(?:ids?|ind(?:ex|ices)|idx|position|order|seeds?|temperatures?|top_[kp]|len(?:gths?)?|(?:num|n)_.*|"
    r"tokens?|chars|words|counts?|turns?|times?|timestamps?|dates?|created.*)$",
    re.IGNORECASE,
)
_FIRST, _SECOND, _TIE = (0, 1), (1, 0), (0, 0)


class Judged(NamedTuple):
    """How responses compare.

    Attributes:
      places: of each, 0 the best, equal for ties.
      scores: where there are some, larger is better.
      evidence: what the judgement itself tells of its strength: `score_gap`, `agreement`, `rating`.
    """

    places: tuple[int, ...]
    scores: tuple[float, ...]
    evidence: Mapping[str, float]


def looks_like_one(name: str) -> bool:
    """Whether a column or key is named like a judgement: `fine-grained_score`, `preference`, `ranking`."""
    return _LOOKS_LIKE_ONE.search(name) is not None


def judged(row: Readable, column: str, known: frozenset[str]) -> Judged | BadRow:
    """How the responses in the list `column` of `row` compare; a `BadRow`, not raised, where that is not known.

    `known`: columns of the row that mean something else. Raises `BadRow` where judgements are incomplete, are none, or
    contradict each other.
    """
    responses = row[column]
    k = len(responses)
    scores, evidence = (), {}
    found: dict[str, tuple[int, ...]] = {}
    for name, keys in _numbers(row, column, k).items():
        found[name] = _places(keys)
        if (BESIDE | IN_ENTRIES)[name.rpartition(": ")[2]] < 0 and not scores:
            scores = tuple(-key for key in keys)
    if k == 2:
        found |= _of_two(row, evidence)
        if scores:
            evidence["score_gap"] = abs(scores[0] - scores[1])
    if not found:
        entries = [entry if isinstance(entry, dict) else {} for entry in responses]
        unread = _unread(row, entries, known | {column})
        if column in row.sources and unread is None:
            detail = "give scores (score_a, score_b), votes (annotator1 ...), or the better one's number in 'better'"
            return BadRow("nothing says which response is better", detail)
        return Judged(tuple(range(k)), (), {}) if unread is None else _not_read(row.called(column), unread)
    (first, places), *others = found.items()
    for name, different in others:
        if different == places:
            continue
        if "votes" in (first, name):
            raise BadRow("scores and votes compare the responses twice", "keep one of them")
        twice = f"'{row.called(first)}' and '{row.called(name)}' rank the replies twice, and differently"
        raise BadRow(twice, "keep one of them")
    return Judged(places, scores, evidence)


def _numbers(row: Readable, column: str, k: int) -> dict[str, list[float]]:
    """Judgements with a number a response, the smaller the better: in the entries, and beside them."""
    entries = [entry if isinstance(entry, dict) else {} for entry in row[column]]
    found: dict[str, list[float]] = {}
    for name, sign in IN_ENTRIES.items():
        given = [entry[name] for entry in entries if entry.get(name) is not None]
        if len(given) not in (0, k):
            raise BadRow(f"some entries of '{column}' have a {name.replace('_', ' ')}", "give all of them one, or none")
        if given:
            found[f"{column}: {name}"] = [sign * number_of(value, name) for value in given]
    for name, sign in BESIDE.items():
        value = row.get(name)
        if isinstance(value, list) and len(value) == k:
            if None in value:
                there = next((row.called(name, i) for i, each in enumerate(value) if each is not None), name)
                raise BadRow("a score of one response only", f"'{there}'; give all a score")
            found[name] = [sign * number_of(each, row.called(name, i)) for i, each in enumerate(value)]
        elif name in _LISTS_ALWAYS and value is not None:
            raise BadRow(f"'{name}' does not fit the replies", f"it must be a list of {k} numbers, one a reply")
    return found


def _places(keys: Sequence[float]) -> tuple[int, ...]:
    order = sorted(set(keys))
    return tuple(order.index(key) for key in keys)


def _of_two(row: Readable, evidence: dict[str, float]) -> dict[str, tuple[int, ...]]:
    """Places of two responses by what is said of two only; what it tells of its strength goes into `evidence`."""
    found: dict[str, tuple[int, ...]] = {}
    if votes := votes_of(row):
        winner, evidence["agreement"] = majority(votes)
        found["votes"] = (_TIE, _FIRST, _SECOND)[winner]
    for name, places in (("better", (_FIRST, _SECOND, _TIE)), ("worse", (_SECOND, _FIRST, _TIE))):
        if name in row:
            found[name] = places[_choice(row[name], row.called(name), row.counts_from_one)]
    if "preference" in row:
        degree = number_of(row["preference"], row.called("preference"))
        told = "preference" in row.sources or "preference" in row.named
        if row.counts_from_one and degree in (1, 2) and not told:
            detail = "say which it is: --data.columns better=preference, or preference=preference (below 0: the first)"
            raise BadRow("'preference' may be a number of a response, or how much the second is better", detail)
        found["preference"] = _FIRST if degree < 0 else _SECOND if degree > 0 else _TIE
        if abs(degree) in (1, 2, 3):  # slightly better, better, much better: the scale of Llama 2's ratings
            evidence["rating"] = abs(degree)
    return found


def _choice(value: object, name: str, from_one: bool) -> int:
    """0 the first, 1 the second, 2 a tie; `from_one`: numbers are 1 and 2. Raises `BadRow`."""
    text = str(value).strip().lower()
    if not isinstance(value, bool) and re.fullmatch(r"[12](\.0)?" if from_one else r"[01](\.0)?", text):
        return int(text[0]) - from_one
    if isinstance(value, str) and re.fullmatch(r"(.*[ _-])?[ab]", text):
        return "ab".index(text[-1])
    if isinstance(value, str) and text.startswith("tie"):
        return 2
    numbers = "1 or 2" if from_one else "0 or 1"
    detail = f"it holds {str(value)[:40]!r}; write {numbers} (or model_a, model_b), or tie"
    raise BadRow(f"'{name}' does not name one of the two responses", detail)


def _unread(row: Readable, entries: Sequence[dict[str, Any]], known: frozenset[str]) -> str | None:
    """What looks like a judgement, in the entries or beside the list."""
    keys = {str(key): [] for entry in entries for key, value in entry.items() if value is not None}
    for entry in entries:
        for key, value in entry.items():
            keys.get(str(key), []).append(value)
    inside = [key for key, held in keys.items() if key not in IN_ENTRIES and (looks_like_one(key) or _judge(key, held))]
    beside = [name for name in row if looks_like_one(name) and not (name in known or is_vote(name))]
    beside += [name for name, value in row.items() if _judge(name, value) and len(value) == len(entries)]
    lists = [name for name in BESIDE if isinstance(row.get(name), list)]  # of another length
    return next(iter([*inside, *beside, *lists]), None)


def _judge(name: str, values: Any) -> bool:
    """Whether `values` may judge the responses: a number, or yes or no, for each; and not a measure of something."""
    numbers = isinstance(values, list) and bool(values) and all(isinstance(v, int | float) for v in values)
    return numbers and _NO_JUDGEMENT.search(name) is None


def _not_read(column: str, name: str) -> BadRow:
    return BadRow(
        f"'{name}' may say which entry of '{column}' is better, and is not read",
        "name it (--data.columns scores=, ranks= or better=COLUMN), or remove it if the best stands first",
    )
