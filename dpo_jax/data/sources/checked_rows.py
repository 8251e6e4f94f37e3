"""The rows of a source, parsed in chunks; what cannot be used is counted, and refused or left out at the end."""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import numpy as np

from dpo_jax.data.rows.messages import keys_beside
from dpo_jax.data.rows.problems import BadRow, Tally
from dpo_jax.data.rows.ratings import Evidence
from dpo_jax.data.rows.readable import (
    Readable,
    check_named,
    column_of,
    is_vote,
    parse_columns,
    renamed,
    sources,
    together,
)
from dpo_jax.data.sources.files import read_rows_or_problems
from dpo_jax.errors import InputError

CHUNK, CHUNK_CHARACTERS = 256, 2**22
"""Rows tokenised in one call, and characters of texts: enough for the tokenizer's threads, little memory."""

OnBadRows = Literal["refuse", "skip"]
"""refuse: read the whole file, then raise one error that counts the bad rows by reason. skip: leave them out."""

Parsed = TypeVar("Parsed")
Made = TypeVar("Made")
Numbered = list[tuple[int, Parsed]]
"""Rows of a chunk: number, and what was parsed."""

log = logging.getLogger(__name__)


class CheckedRows:
    """One pass over the rows of a source.

    Attributes:
      source: see `files.read_rows`.
      rows_read: how many rows were read.
      columns: every column that occurred, with something in it.
      keys: column -> keys that its messages had beside role and content.
      sources: those columns that stand for one of the readers' names (see `layouts.py`) -> that name.
      tally: the rows that cannot be used. Whoever finds one later adds it.
    """

    def __init__(
        self,
        source: str,
        limit: int | None,
        *,
        columns: str | None = None,
        compared: bool = False,
        read: Callable[[str], Iterable[tuple[int, dict[str, Any] | BadRow]]] = read_rows_or_problems,
    ):
        """Args:
        source: see above.
        limit: at most how many of its rows to read, or None.
        columns: `--data.columns`.
        compared: responses are to be compared, so rows with one scored response each are put together.
        read: what reads the source.
        """
        self.source, self._limit, self._compared, self._read_rows = source, limit, compared, read
        self._renamed = parse_columns(columns)
        self.rows_read = 0
        self.columns: set[str] = set()
        self.keys: dict[str, set[str]] = {}
        self.sources: dict[str, str] = {}
        self._unusable: Counter[str] = Counter()
        self._usable: set[str] = set()
        self.tally = Tally()

    def read(self, parse: Callable[[dict[str, Any]], Parsed], on_bad_rows: OnBadRows = "refuse") -> list[Parsed]:
        """What `parse` makes of each row; it may raise `BadRow`. Raises `InputError`: see `collect`."""
        return self.collect(parse, lambda chunk: [parsed for _, parsed in chunk], on_bad_rows)[0]

    def collect(
        self,
        parse: Callable[[dict[str, Any]], Parsed],
        encode: Callable[[Numbered[Parsed]], Iterable[Made | BadRow]],
        on_bad_rows: OnBadRows,
    ) -> tuple[list[Made], dict[str, Any]]:
        """All rows that can be used, and what `sets.tokenised.Tokenised` tells of how they were read.

        Args:
          parse: a row -> what it holds; it may raise `BadRow`.
          encode: what the rows of a chunk hold -> what is made of each, or why it cannot be used.
          on_bad_rows: see `OnBadRows`.

        What was left out is logged. Raises `InputError` where rows are refused, or none can be used.
        """
        made: list[Made] = []
        numbers: list[int] = []
        for chunk in self._chunks(parse):
            for (number, _), item in zip(chunk, encode(chunk), strict=True):
                if isinstance(item, BadRow):
                    self.tally.add(number, item)
                else:
                    made.append(item)
                    numbers.append(number)
        check_named(self.source, self._renamed, self.columns, self.rows_read)
        told = settled(self.tally, self.source, self.rows_read, on_bad_rows, any_left=bool(made))
        return made, {"row_numbers": np.asarray(numbers, np.int32), **told}

    def _chunks(self, parse: Callable[[dict[str, Any]], Parsed]) -> Iterator[Numbered[Parsed]]:
        chunk: Numbered[Parsed] = []
        for number, row in self.together():
            try:
                if isinstance(row, BadRow):
                    raise row
                chunk.append((number, parse(row)))
            except BadRow as problem:
                self.tally.add(number, problem)
            if len(chunk) == CHUNK or sum(len(p) for _, p in chunk if isinstance(p, str)) >= CHUNK_CHARACTERS:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def together(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """(row number, row) with columns renamed and rows put together, or what is wrong with it."""
        if not self._compared:
            yield from self._noted()
            return
        for number, row in together(self._noted()):
            if isinstance(row, Readable):  # put together: what were single answers is a list now
                self.sources.update({column_of(place): name for name, where in row.sources.items() for place in where})
            yield number, row

    def _noted(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """The rows as they stand, counted, and what they hold."""
        for number, row in itertools.islice(self._read_rows(self.source), self._limit):
            self.rows_read += 1
            if isinstance(row, BadRow):
                yield number, row
                continue
            self.columns.update(str(name) for name, value in row.items() if value is not None)
            for name, value in row.items():
                if isinstance(value, list | dict) and (keys := keys_beside(value)):
                    self.keys.setdefault(str(name), set()).update(keys)
            try:
                named = renamed(row, self._renamed) if self._renamed else row
            except BadRow as problem:
                yield number, problem
                continue
            self.sources.update(sources(named))
            yield number, named

    def usable(self, evidence: Mapping[str, Evidence]) -> dict[str, Any]:
        """What of it can be used; the rest is counted, to be named by `unused`."""
        found = {name: value for name, value in evidence.items() if not isinstance(value, BadRow)}
        self._unusable.update(evidence.keys() - found.keys())
        self._usable.update(found)
        return found

    def unused(
        self, known: Collection[str], *, rendered: Collection[str], writes: Callable[[str], bool]
    ) -> tuple[str, ...]:
        """Columns, keys of messages (as "column: key"), and values, that nothing reads.

        Args: the names that the reader of the rows knows; those of them whose messages the template sees whole; whether
        it writes a key.
        """
        left = self.columns - self._read(known).keys() - ({"tools"} if writes("tools") else set())
        keys = {
            f"{column}: {key}"
            for column, found in self.keys.items()
            if column in known or column in self.sources
            for key in found
            if self.sources.get(column, column) not in rendered or not writes(key)
        }
        spelled = {name: column for column, name in self._read(known).items()}
        values = {
            spelled.get(name, name) + ("" if self._never(name) else f" of {count} rows")
            for name, count in self._unusable.items()
        }
        return tuple(sorted(left | keys | values))

    def used(self, known: Collection[str]) -> tuple[str, ...]:
        """The columns that are read, in words: "prompt", "human_ref_A as responses"."""
        read = self._read(known)
        names = sorted(name for name in read if not self._never(read[name]))
        return tuple(name if read[name] == name else f"{name} as {read[name]}" for name in names)

    def _never(self, name: str) -> bool:
        """Whether no row's value of the reader's `name` could be used."""
        return name in self._unusable and name not in self._usable

    def _read(self, known: Collection[str]) -> dict[str, str]:
        """The columns that are read -> the readers' names for what they hold."""
        own = {name: name for name in self.columns if name in known or is_vote(name)}
        named = {column_of(place): name for name, place in self._renamed.items()}
        kept = {name: value for name, value in own.items() if name not in self._renamed}
        return {name: value for name, value in (kept | self.sources | named).items() if name in self.columns}


def settled(tally: Tally, source: str, rows: int, on_bad_rows: OnBadRows, *, any_left: bool) -> dict[str, Any]:
    """What `sets.tokenised.Tokenised` tells of how the `rows` of a source were read, but for their numbers.

    What was left out is logged. Raises `InputError` where rows are refused, or none can be used.
    """
    if on_bad_rows == "refuse":
        tally.refuse(source, rows)
    if not any_left:
        raise tally.nothing_left(source, rows)
    for line in tally.left_out(rows):
        log.warning("%s: left out %s", source, line)
    return {
        "dropped": tally.dropped,
        "rows_read": rows,
        "source": source,
        "problems": tally.describe(tally.dropped),
    }


def check_ids(largest: int, vocab_size: int, number: int) -> None:
    """Raise `InputError` where the `largest` id of row `number` lies beyond the model's embedding."""
    if largest >= vocab_size:
        raise InputError(
            f"row {number}: the tokenizer gives the id {largest}, and the model's embedding has {vocab_size} rows; "
            "use the model's own tokenizer"
        )
