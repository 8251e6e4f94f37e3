"""Rows under the names that the readers know: by the table of `layouts.py`, and by what `--data.columns` says."""

import contextlib
import difflib
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from dpo_jax.data.rows import rebuilt_rows as rebuilt
from dpo_jax.data.rows.layouts import ANSWERS, JUDGED, LAYOUTS, NAMES, PROMPT_PLACES, PROMPTS, Layout, Row
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.errors import InputError

_TWO = re.compile(r"(?P<kind>response|answer|completion|output)(?P<mark>_?(?:[abAB]|[0-2]))")
_SPELLED_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:""")
_VOTE = re.compile(r"annotator_?\d+")


class Renamed(Row):
    """A row of which `--data.columns` says what some columns hold: `named`, by the readers' names."""

    def __init__(self, row: Row, named: Iterable[str]):
        super().__init__(row)
        self.named = frozenset(named)


class NoSuchColumn(InputError):
    """`--data.columns` names a column that a source does not have."""


class Readable(Row):
    """A row under the readers' names, without nulls.

    Attributes:
      sources: for each name that stands elsewhere in the row as it was, the places, in words.
      named: see `Renamed`.
      nulls: the columns that were null.
    """

    def __init__(
        self,
        row: Row,
        sources: Mapping[str, tuple[str, ...]],
        named: frozenset[str] = frozenset(),
        nulls: frozenset[str] = frozenset(),
    ):
        super().__init__(row)
        self.sources, self.named, self.nulls = dict(sources), named, nulls

    def of(self, row: Row) -> "Readable":
        """Another row, whose names stand where those of this one do."""
        return Readable(row, self.sources, nulls=self.nulls)

    def called(self, name: str, index: int | None = None) -> str:
        """What the row itself calls `name`, or (with `index`) one entry of its list."""
        places = self.sources.get(name, (name,))
        return places[index] if index is not None and len(places) > 1 else next(iter(places))

    @property
    def counts_from_one(self) -> bool:
        """Whether the columns of two responses are numbered 1 and 2."""
        return [place[-1:] for place in self.sources.get("responses", ())] == ["1", "2"]


def parse_columns(text: str | None) -> dict[str, str]:
    """`--data.columns` as reader's name -> place. Raises `InputError` for a name that no reader knows."""
    if text is None:
        return {}
    found: dict[str, str] = {}
    for part in text.split(","):
        name, _, place = part.strip().partition("=")
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            guess = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(NAMES))}"
            raise InputError(f"--data.columns {text}: nothing reads {name!r}{guess}")
        if name in found:
            raise InputError(f"--data.columns {text}: gives {name!r} twice")
        found[name] = place
    return found


def check_named(source: str, columns: Mapping[str, str], there: Collection[str], rows: int) -> None:
    """Raise `NoSuchColumn` where none of the `rows` read has a column of those that `columns` names."""
    for name, place in columns.items():
        if rows and column_of(place) not in there:
            raise NoSuchColumn(
                f"{source}: no row has a column {column_of(place)!r} (--data.columns {name}={place}); there are "
                f"{', '.join(sorted(there))}"
            )


def renamed(row: Row, columns: Mapping[str, str]) -> Renamed:
    """`row` with what stands at the places `columns` under the readers' names, and no longer under its own.

    Raises `BadRow` where a place lies inside a column that is no object.
    """
    moved = {name: _at(row, place) for name, place in columns.items()}
    taken = {column_of(place) for place in columns.values()}
    rest = {name: value for name, value in row.items() if name not in taken and name not in moved}
    there = {name: value for name, value in moved.items() if value is not None or column_of(columns[name]) in row}
    return Renamed(rest | there, columns)


def readable(row: Row) -> Readable:
    """`row` as the readers know it. Raises `BadRow` where a place in the table holds something else in this row."""
    if isinstance(row, Readable):
        return row
    there = {name: _unspelled(value, name) for name, value in row.items() if value is not None}
    places, make = _places(there)
    moved: Row = {}
    told: rebuilt.Places = {}
    for target, where in places.items():
        values = [] if make else [_at(there, place) for place in where]
        moved[target] = values[0] if len(values) == 1 else values
    if make:
        moved, told = make(there)
    taken = {column_of(place) for where in places.values() for place in where}
    rest = {name: value for name, value in there.items() if name not in taken}
    named = row.named if isinstance(row, Renamed) else frozenset[str]()
    nulls = frozenset(str(name) for name, value in row.items() if value is None)
    values = {name: value for name, value in moved.items() if value is not None}
    return Readable(rest | values, places | told, named, nulls)


def missing(row: Row, name: str, detail: str) -> BadRow:
    """What to raise where a row has no `name`, told apart from one that has it and is null."""
    if isinstance(row, Readable) and name in row.nulls:
        return BadRow(f"'{name}' is null", "or its cell of a table is empty; give it a value, or remove the row")
    return BadRow(f"missing field '{name}'", detail)


def sources(row: Row) -> dict[str, str]:
    """The columns of `row` that stand for readers' names -> those names."""
    there = {name: value for name, value in row.items() if value is not None}
    return {column_of(place): target for target, where in _places(there)[0].items() for place in where}


def is_vote(column: str) -> bool:
    """Whether `column` is a vote of an annotator."""
    return _VOTE.fullmatch(column) is not None


# ---------------------------------------------------------------- one response a row


def together(rows: Iterable[tuple[int, Row | BadRow]]) -> Iterator[tuple[int, Row | BadRow]]:
    """(number, row) of `rows`; neighbours that score one answer each to the same prompt become one, a list of them."""
    for _, group in itertools.groupby(_keyed(rows), lambda keyed: keyed[0]):
        (key, number, first), *others = group
        if isinstance(key, int) or isinstance(first, BadRow):
            yield number, first
            continue
        found = [readable(first), *(readable(row) for _, _, row in others if not isinstance(row, BadRow))]
        name = next(name for name in ANSWERS if name in found[0])
        shared = {column: value for column, value in found[0].items() if column in (*_ASKED, "source")}
        lists = {"responses": [row.get(name) for row in found], "scores": [row["score"] for row in found]}
        places = {"responses": (name,), "scores": (found[0].called("score"),)}
        yield number, Readable(shared | lists, {**found[0].sources, **places})


_ASKED = (*PROMPTS, "input", "system", "system_prompt", "history")


def _keyed(rows: Iterable[tuple[int, Row | BadRow]]) -> Iterator[tuple[str | int, int, Row | BadRow]]:
    """With what tells groups apart: the prompt of a scored answer, and of other rows their number."""
    for number, row in rows:
        key: str | int = number
        if isinstance(row, dict) and {*row} & {"score", "helpfulness"}:
            with contextlib.suppress(BadRow):  # whoever reads it will say so
                found = readable(row)
                alone = not {*found} & {*JUDGED, "label"} and sum(name in found for name in ANSWERS) == 1
                if alone and isinstance(found.get("score"), int | float | str):
                    key = repr([found.get(name) for name in _ASKED])
        yield key, number, row


# ---------------------------------------------------------------- which layout a row has


def _places(row: Row) -> tuple[rebuilt.Places, Callable[[Row], rebuilt.Rebuilt] | None]:
    """Reader's name -> its places in `row`, of those that do not stand under their own names; what makes the values."""
    candidates, two = _candidates(frozenset(row))
    found: rebuilt.Places = {}
    for layout, places in candidates:
        if layout.where is None or layout.where(row):
            if layout.make is not None:
                return places, layout.make
            found = dict(places)
            break
    else:
        found = dict(two)
    taken = {column_of(place) for where in found.values() for place in where}
    if not (found.keys() | (row.keys() - taken)).intersection(PROMPTS) and not _holds_prompt(row.get("chosen")):
        other = next((name for name in PROMPT_PLACES if name not in taken and isinstance(row.get(name), str)), None)
        if other is not None:
            found["prompt"] = (other,)
    asked = any(name in row and name not in taken for name in ("instruction", "question"))
    if asked and isinstance(row.get("context"), str) and "context" not in taken and not row.get("input"):
        found["input"] = ("context",)  # as Dolly has it
    return found, None


def _holds_prompt(chosen: object) -> bool:
    """Whether a chosen answer comes with its prompt inside."""
    return (isinstance(chosen, list) and len(chosen) > 1) or (isinstance(chosen, str) and "\n\nAssistant:" in chosen)


@lru_cache(maxsize=256)
def _candidates(
    names: frozenset[str],
) -> tuple[tuple[tuple[Layout, dict[str, tuple[str, ...]]], ...], dict[str, tuple[str, ...]]]:
    """The layouts that rows with these columns may have, and the places of two numbered responses."""
    fitting = []
    for layout in LAYOUTS:
        own = {column_of(place) for places in layout.columns.values() for place in places.split()}
        wanted = {name: tuple(p.split()) for name, p in layout.columns.items() if not _given(name, names - own)}
        fits = bool(wanted) and all(column_of(place) in names for where in wanted.values() for place in where)
        if fits and not (layout.columns.keys() & set(JUDGED) and not wanted.keys() & set(JUDGED)):
            extra = {name: tuple(places.split()) for name, places in layout.optional.items() if name not in names}
            wanted |= {n: where for n, where in extra.items() if all(column_of(place) in names for place in where)}
            fitting.append((layout, wanted))
    return tuple(fitting), _two_responses(names)


def _given(name: str, names: frozenset[str]) -> bool:
    """Whether rows with the columns `names` have the reader's `name`, or another for the same thing."""
    if name in ("completion", "messages"):
        return bool(names.intersection((*ANSWERS, *JUDGED, "messages", "conversations")))
    return name in names or (name == "responses" and bool(names.intersection(("chosen", "rejected"))))


def _two_responses(names: frozenset[str]) -> dict[str, tuple[str, ...]]:
    """Of `response_a`, `response_b` (response1, answer_0, ...) and their scores: places of responses and scores."""
    if names.intersection(JUDGED):
        return {}
    found = sorted(name for name in names if _TWO.fullmatch(name))
    if len(found) != 2:
        return {}
    places = {"responses": tuple(found)}
    marks = [name.removeprefix(match["kind"]) for name in found if (match := _TWO.fullmatch(name))]
    scores = [next((s for s in (f"score_{m.strip('_')}", f"score{m.strip('_')}") if s in names), None) for m in marks]
    if any(scores) and "scores" not in names:
        absent = [f"score_{mark.strip('_')}" for mark in marks]
        places["scores"] = tuple(score or other for score, other in zip(scores, absent, strict=True))
    return places


# ---------------------------------------------------------------- places


def _unspelled(value: Any, name: str) -> Any:
    """`value`; the messages, where it is a text that spells a list of them, as tables write what they cannot hold.

    Raises `BadRow` where they are spelled otherwise than as JSON: as Python or NumPy print them.
    """
    if not isinstance(value, str) or not _SPELLED_MESSAGES.match(value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        detail = "save the rows as JSONL or Parquet, or spell the list as JSON (json.dumps)"
        raise BadRow(f"'{name}' spells messages, and not as JSON", detail) from error


@lru_cache(maxsize=4096)
def column_of(place: str) -> str:
    """The column in which `place` lies."""
    return re.split(r"[.\[]", place, maxsplit=1)[0]


def _at(row: Row, place: str) -> Any:
    """What stands at `place`; None where nothing does. Raises `BadRow`."""
    column = column_of(place)
    value = row.get(column)
    rest = place.removeprefix(column)
    if rest.startswith("."):
        for key in rest[1:].split("."):
            if value is not None and not isinstance(value, dict):
                raise BadRow(f"'{column}' is no object", f"it holds {str(value)[:40]!r}; '{place}' was to be read")
            value = None if value is None else value.get(key)
    elif rest:
        if not isinstance(value, list) or not value:
            raise BadRow(f"'{column}' is not a list of messages", f"it holds {str(value)[:40]!r}")
        value = value[:-1] if rest == "[:-1]" else value[-1:]
    return value
