"""What `dpo-jax prepare` makes of one piece of a source: shards of records, prompts to be counted, and what it found.

All of it stands in one folder, which gets its name when it is whole: so a piece is done or not, whatever ends the
process, and what it holds depends on the piece alone.
"""

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.rows.problems import BadRow, Tally
from dpo_jax.data.rows.readable import Readable, column_of, parse_columns, renamed, sources, together
from dpo_jax.data.sets.documents import rows_of
from dpo_jax.data.sets.ids_writer import IdsPlan, IdsWriter
from dpo_jax.data.sets.pieces import Piece, PieceRows
from dpo_jax.data.sources import duplicates, store_schema
from dpo_jax.data.sources.store_schema import Kind, Parsed
from dpo_jax.data.sources.store_writer import Splits, SplitWriter, Written, normalised, prompt_hash

CHUNK = 1024
"""Rows whose prompts are hashed, and texts tokenised, in one call."""
_PROMPTS, _FOUND = "prompts", "found.json"

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What to make of every piece.

    Attributes:
      source, separator: see `documents.rows_of`.
      limit: at most how many rows of the (only) piece are read.
      columns: `--data.columns`.
      kind: of the rows; None: no row says it.
      joined: neighbours that score one answer each to a prompt are one row.
      splits: name -> share.
    """

    source: str
    separator: str | None
    limit: int | None
    columns: str | None
    kind: Kind | None
    joined: bool
    splits: dict[str, float]

    @cached_property
    def renamed(self) -> dict[str, str]:
        """The reader's names -> places, of `columns`."""
        return parse_columns(self.columns)

    def belong(self, rows: list[Row | BadRow]) -> bool:
        """Whether two rows are read as one."""
        try:
            named = [row if isinstance(row, BadRow) else renamed(row, self.renamed) for row in rows]
        except BadRow:
            return False
        return self.joined and len(list(together(enumerate(named)))) == 1


def job_of(
    source: str,
    separator: str | None,
    *,
    kind: Kind | None,
    columns: str | None,
    limit: int | None,
    splits: dict[str, float],
) -> Job:
    """How to read a source, by its first rows: of which kind they are (`kind`: all must be), and what is one row."""
    job = Job(source, separator, limit, columns, kind, kind == "preferences", splits)
    if kind is not None:
        return job
    found = Found()
    rows = found.noted(itertools.islice(rows_of(source, separator), limit), job)
    head = list(itertools.islice(rows, 2))
    joined = len(head) == 2 and len(list(together(head))) == 1
    rows = itertools.chain(head, rows)
    for _, row in together(rows) if joined else rows:
        if not isinstance(row, BadRow):
            try:
                return Job(source, separator, limit, columns, store_schema.kind_of(row), joined, splits)
            except BadRow:
                continue
    return Job(source, separator, limit, columns, None, joined, splits)


@dataclass
class Found:
    """What the rows of one piece, or of several, held.

    Attributes:
      read, written: rows.
      numbers: see `PieceRows`.
      seen: columns that the source has; columns: those under the readers' names, keys of answers that are lost too.
      kept: columns that became others.
      unusable: column -> rows whose value is none of its type.
      lengths: what -> length -> how many parts have it.
      tally: rows that cannot be used.
    """

    read: int = 0
    written: int = 0
    numbers: int = 0
    seen: set[str] = field(default_factory=set)
    columns: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    unusable: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)

    def noted(self, rows: Iterable[tuple[int, Row | BadRow]], job: Job) -> Iterator[tuple[int, Row | BadRow]]:
        """The rows under the names that `--data.columns` gives, counted, and what columns they have."""
        for number, row in rows:
            self.read += 1
            if isinstance(row, BadRow):
                yield number, row
                continue
            try:
                self.seen.update(name for name, value in row.items() if value is not None)
                named = renamed(row, job.renamed) if job.renamed else row
                self.columns.update(named.keys() - job.renamed.keys() - sources(named).keys())
                yield number, named
            except BadRow as problem:
                yield number, problem

    def rows(self, rows: Iterable[tuple[int, Row | BadRow]], job: Job) -> Iterator[tuple[int, Row | BadRow]]:
        """The same; where answers are compared, neighbours that score one answer each to a prompt as one."""
        if not job.joined:
            yield from self.noted(rows, job)
            return
        for number, row in together(self.noted(rows, job)):
            if isinstance(row, Readable):
                self.kept.update(column_of(place) for places in row.sources.values() for place in places)
            yield number, row

    def measure(self, chunk: list[Parsed], tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Count the lengths of the parts of rows, in characters and, with a tokenizer, in tokens."""
        for name in dict.fromkeys(name for row in chunk for name in row.parts):
            texts = [row.parts[name] for row in chunk if name in row.parts]
            self.lengths.setdefault(f"{name}, characters", Counter()).update(map(len, texts))
            if tokenizer is not None:
                ids: Any = tokenizer(texts, add_special_tokens=False)["input_ids"]
                self.lengths.setdefault(f"{name}, tokens", Counter()).update(map(len, ids))

    def state(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        return {
            **{name: getattr(self, name) for name in ("read", "written", "numbers", "unusable")},
            **{name: sorted(getattr(self, name)) for name in ("seen", "columns", "kept")},
            "lengths": {name: sorted(counts.items()) for name, counts in self.lengths.items()},
            "tally": self.tally.state(),
        }

    def take(self, state: dict[str, Any]) -> None:
        """Add what the next piece held."""
        self.tally.take(state["tally"], self.numbers)
        for name in ("read", "written", "numbers"):
            setattr(self, name, getattr(self, name) + state[name])
        for name in ("seen", "columns", "kept", "unusable"):
            getattr(self, name).update(state[name])
        for name, counts in state["lengths"].items():
            own = self.lengths.setdefault(name, Counter())
            for length, count in counts:
                own[length] += count


def piece_folder(folder: Path, index: int) -> Path:
    """Where the piece of that number is, once it is done."""
    return folder / f"{index:06d}"


def prepare_piece(
    job: Job,
    piece: Piece,
    folder: Path,
    index: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ids: IdsPlan | None = None,
) -> None:
    """Make `piece_folder(folder, index)`. `tokenizer`: to measure lengths in tokens too; `ids`: to store them.

    Raises `InputError`, `OSError`.
    """
    final = piece_folder(folder, index)
    scratch = folder / f"{final.name}.{os.getpid()}"  # another's, of a command that was killed, may still be there
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    splits, found = Splits(job.splits), Found()
    writers = [SplitWriter(scratch, name) for name in splits.names]
    rows = PieceRows(piece, job.separator)
    stored = None
    if ids is not None and tokenizer is not None and job.kind is not None:
        stored = IdsWriter(scratch, splits.names, job.kind, tokenizer, ids)
    with (scratch / _PROMPTS).open("wb") as prompts:
        for chunk in _chunks(found, rows, job):
            assert job.kind is not None
            texts = [normalised(row.prompt) for _, row in chunk]
            hashes = [prompt_hash(text) for text in texts]
            into = [splits.of(value) for value in hashes]
            for (_, row), split in zip(chunk, into, strict=True):
                writers[split].add(store_schema.serialise(row.columns, job.kind))
            said = [text.partition(": ")[2] for text in texts]  # without the first role, which all have
            prompts.write(duplicates.records(said, hashes, into, [number for number, _ in chunk]).tobytes())
            found.measure([row for _, row in chunk], tokenizer)
            if stored is not None:
                stored.add([row for _, row in chunk], into)
            found.written += len(chunk)
    found.numbers = rows.numbers
    written = {name: asdict(writer.finish()) for name, writer in zip(splits.names, writers, strict=True)}
    with (scratch / _FOUND).open("w", encoding="utf-8") as file:
        told = None if stored is None else stored.finish()
        json.dump({"found": found.state(), "splits": written, "ids": told}, file)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(final)


def _chunks(found: Found, rows: Iterable[tuple[int, Row | BadRow]], job: Job) -> Iterator[list[tuple[int, Parsed]]]:
    """The rows that can be used, with their numbers, `CHUNK` at a time."""
    chunk: list[tuple[int, Parsed]] = []
    for number, row in found.rows(itertools.islice(rows, job.limit), job):
        try:
            if isinstance(row, BadRow):
                raise row
            found.columns.update(store_schema.keys_lost(row))
            parsed = store_schema.parse(row, job.kind or store_schema.kind_of(row))
            found.unusable.update(parsed.unusable)
            chunk.append((number, parsed))
        except BadRow as problem:
            found.tally.add(number, problem)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@dataclass(frozen=True)
class Made:
    """What several pieces came to, in order.

    Attributes:
      found: of all together.
      prompts: files of `duplicates.RECORD`s, and what is added to the numbers of their rows.
      splits: name -> where its shards stand, and what was written there.
      ids: where the ids of each stand, and what `IdsWriter.finish` said of them; None of pieces without.
    """

    found: Found
    prompts: list[tuple[Path, int]]
    splits: dict[str, list[tuple[Path, Written]]]
    ids: list[tuple[Path, Any]]


def gather(job: Job, folder: Path, count: int) -> Made:
    """What the pieces 0 to `count` - 1, all of them done, came to."""
    made = Made(Found(), [], {name: [] for name in job.splits}, [])
    for index in range(count):
        place = piece_folder(folder, index)
        told = json.loads((place / _FOUND).read_text(encoding="utf-8"))
        made.prompts.append((place / _PROMPTS, made.found.numbers))
        made.found.take(told["found"])
        made.ids.append((place, told["ids"]))
        for name, written in told["splits"].items():
            made.splits[name].append((place, Written(**written)))
    return made


def summary_of(counts: Counter[int], percentiles: tuple[int, ...]) -> dict[str, float]:
    """min, percentiles, max and mean of lengths that occur so often."""
    lengths = np.array(sorted(counts), np.int64)
    often = np.array([counts[length] for length in lengths.tolist()], np.int64)
    ends = np.cumsum(often)
    places = np.array(percentiles) / 100 * (ends[-1] - 1)
    below, above = (lengths[np.searchsorted(ends, at(places), side="right")] for at in (np.floor, np.ceil))
    values = below + (above - below) * (places - np.floor(places))
    found = {"min": int(lengths[0])} | {
        f"p{p}": round(value, 1) for p, value in zip(percentiles, values.tolist(), strict=True)
    }
    return found | {"max": int(lengths[-1]), "mean": round(float(lengths @ often / ends[-1]), 1)}
