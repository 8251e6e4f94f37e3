"""`dpo-jax prepare`: rows of any layout as a TFDS data set, split, validated and counted, in one pass over them."""

import itertools
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from dpo_jax.config import PrepareRun
from dpo_jax.config.commands.rows import split_shares
from dpo_jax.data.rows.problems import BadRow, Tally
from dpo_jax.data.rows.readable import Readable, check_named, column_of, parse_columns, renamed, sources, together
from dpo_jax.data.sets.documents import is_text, rows_of
from dpo_jax.data.sources import duplicates, store_schema
from dpo_jax.data.sources.staging import is_remote, upload
from dpo_jax.data.sources.store_schema import Kind, Parsed
from dpo_jax.data.sources.store_writer import (
    VERSION,
    Splits,
    StoreWriter,
    dataset_name,
    normalised,
    prompt_hash,
    write_report,
)
from dpo_jax.errors import InputError
from dpo_jax.files.folder import writing
from dpo_jax.files.log import say
from dpo_jax.report import html, terminal
from dpo_jax.weights.integrity.folder import new_folder

CHUNK = 1024
"""Rows whose prompts are hashed, and texts tokenised, in one call."""
SECONDS = 10.0
"""How often to say how far it is."""
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def prepare(run: PrepareRun) -> None:
    """Write the data set `run.to` and its report. Raises `InputError`; then nothing is left behind."""
    if run.data.columns is not None and is_text(run.data.files):
        raise InputError(f"--data.columns has no effect: {run.data.files} is text, and has no columns")
    if run.separator is not None and not is_text(run.data.files):
        raise InputError(f"--separator has no effect: {run.data.files} holds rows, and each is one document")
    lengths = Lengths(run.tokenizer)
    with _target(run.to) as folder:
        started = time.monotonic()
        data = folder / VERSION
        data.mkdir()
        report = _Pass(run, data, lengths).report()
        report["seconds"] = round(time.monotonic() - started, 3)
        report["rows_per_second"] = round(report["rows_read"] / report["seconds"], 1)
        tables = _tables(report)
        write_report(data, report, _markdown(report, tables))
    for title, (head, *rows) in tables:
        table = terminal.table(title, html.Table(tuple(head), rows), left=1)
        table.title_justify = "left"
        terminal.show(table)
    say(
        f"{run.to}: {report['rows_written']} of {report['rows_read']} rows in {report['seconds']:.1f} s "
        f"({report['rows_per_second']:.0f} rows/s); read it with --data tfds:{run.to}"
    )


@contextmanager
def _target(to: str) -> Iterator[Path]:
    """A folder to write into, that becomes `to` when all is done. Raises `InputError` where `to` is taken."""
    if not is_remote(to):
        with new_folder(Path(to).expanduser(), replace=False) as folder:
            yield folder
        return
    with writing(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix="dpo-jax-") as name, upload(Path(name), to):
        yield Path(name)


class Lengths:
    """Lengths of the parts of rows, in characters and, with a tokenizer, in tokens: 4 bytes a row each."""

    def __init__(self, tokenizer: str | None):
        """`tokenizer`: the checkpoint to take it from."""
        self._tokenizer = None
        self._found: dict[str, array[int]] = {}
        if tokenizer is not None:
            from dpo_jax.weights.tokenizer import load_tokenizer  # here, for it may import PyTorch, which takes seconds

            self._tokenizer = load_tokenizer(tokenizer)

    def add(self, chunk: list[Parsed]) -> None:
        """The parts of some more rows."""
        names = dict.fromkeys(name for row in chunk for name in row.parts)
        for name in names:
            texts = [row.parts[name] for row in chunk if name in row.parts]
            self._extend(f"{name}, characters", [len(text) for text in texts])
            if self._tokenizer is not None:
                ids = cast(list[list[int]], self._tokenizer(texts, add_special_tokens=False)["input_ids"])
                self._extend(f"{name}, tokens", [len(row) for row in ids])

    def _extend(self, name: str, lengths: list[int]) -> None:
        self._found.setdefault(name, array("I")).extend(lengths)

    def summary(self) -> dict[str, dict[str, float]]:
        """name -> min, percentiles, max, mean."""
        found = {}
        for name, values in self._found.items():
            of = np.array(values, np.int64)
            at = np.percentile(of, PERCENTILES).tolist()
            found[name] = {"min": int(of.min())} | {f"p{p}": round(v, 1) for p, v in zip(PERCENTILES, at, strict=True)}
            found[name] |= {"max": int(of.max()), "mean": round(float(of.mean()), 1)}
        return found


class _Pass:
    """One pass over the source: parse, split, write, count."""

    def __init__(self, run: PrepareRun, folder: Path, lengths: Lengths):
        self.run, self.folder, self.lengths = run, folder, lengths
        self.shares = split_shares(run.splits)
        self.splits = Splits(self.shares)
        self.kind: Kind | None = None if run.kind == "auto" else run.kind
        self.tally = Tally()
        self.renamed = parse_columns(run.data.columns)
        self.seen: set[str] = set()
        self.columns: set[str] = set()
        self.kept: set[str] = set()
        self.unusable: Counter[str] = Counter()
        self.read = self.written = 0
        self.writer: StoreWriter | None = None
        self.index = duplicates.PromptIndex(folder / "signatures")
        self._said = time.monotonic()

    def report(self) -> dict[str, Any]:
        """Do it all; returns what report.json holds."""
        run = self.run
        chunk: list[tuple[int, Parsed]] = []
        for number, row in self._rows():
            try:
                if isinstance(row, BadRow):
                    raise row
                self.columns.update(store_schema.keys_lost(row))
                if self.kind is None:
                    self.kind = store_schema.kind_of(row)
                parsed = store_schema.parse(row, self.kind)
                self.unusable.update(parsed.unusable)
                chunk.append((number, parsed))
            except BadRow as problem:
                self.tally.add(number, problem)
            if len(chunk) == CHUNK:
                self._write(chunk)
                chunk = []
        if chunk:
            self._write(chunk)
        check_named(run.data.files, self.renamed, self.seen, self.read)
        if run.on_bad_rows == "refuse":
            self.tally.refuse(run.data.files, self.read)
        if self.writer is None or self.kind is None:
            raise self.tally.nothing_left(run.data.files, self.read)
        say(f"{run.to}: {self.written} rows written; counting equal and nearly equal prompts")
        counts = self.index.count(len(self.splits.names))
        written = self.writer.finish(f"{self.kind} from {run.data.files}, written by dpo-jax prepare")
        return {
            "data": run.data.files,
            "kind": self.kind,
            "format": store_schema.FORMAT,
            "rows_read": self.read,
            "rows_written": self.written,
            "dropped": dict(self.tally.dropped.most_common()),
            "problems": self.tally.describe(self.tally.dropped),
            "columns_not_kept": [
                *sorted(self.columns - self.kept - store_schema.columns_read(self.kind)),
                *(f"{name} of {count} rows" for name, count in sorted(self.unusable.items())),
            ],
            "splits": self._splits(counts, written),
            "between_splits": self._between(counts),
            "lengths": self.lengths.summary(),
            "how": {
                "split": "BLAKE2b, 64 bits, of the prompt (or document): NFKC, case folded, white space runs as one",
                "near_duplicates": f"MinHash estimate of the Jaccard similarity of {duplicates.SHINGLE}-character "
                f"shingles of the first {duplicates.LOOKED_AT} characters >= {duplicates.SIMILAR}; equal prompts are "
                "not counted again",
            },
        }

    def _rows(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """The rows; where answers are compared, neighbours that score one answer each to a prompt as one."""
        rows = self._noted()
        head = list(itertools.islice(rows, 2))
        compared = self.kind is None and len(head) == 2 and len(list(together(head))) == 1
        rows = itertools.chain(head, rows)
        if not (compared or self.kind == "preferences"):
            yield from rows
            return
        for number, row in together(rows):
            if isinstance(row, Readable):
                self.kept.update(column_of(place) for places in row.sources.values() for place in places)
            yield number, row

    def _noted(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """The rows under the names that `--data.columns` gives, counted, and what columns they have."""
        for number, row in itertools.islice(rows_of(self.run.data.files, self.run.separator), self.run.limit):
            self.read += 1
            if isinstance(row, BadRow):
                yield number, row
                continue
            try:
                self.seen.update(name for name, value in row.items() if value is not None)
                named = renamed(row, self.renamed) if self.renamed else row
                self.columns.update(named.keys() - self.renamed.keys() - sources(named).keys())
                yield number, named
            except BadRow as problem:
                yield number, problem

    def _write(self, chunk: list[tuple[int, Parsed]]) -> None:
        assert self.kind is not None
        if self.writer is None:
            name = dataset_name(Path(self.run.to.rstrip("/")))
            self.writer = StoreWriter(self.folder, name=name, kind=self.kind, splits=self.splits.names)
        texts = [normalised(row.prompt) for _, row in chunk]
        hashes = [prompt_hash(text) for text in texts]
        splits = [self.splits.of(value) for value in hashes]
        for (_, row), split in zip(chunk, splits, strict=True):
            self.writer.add(store_schema.serialise(row.columns, self.kind), split)
        said = [text.partition(": ")[2] for text in texts]  # without the first role, which all have
        with writing(self.run.to):
            self.index.add(said, hashes, splits, [number for number, _ in chunk])
        self.lengths.add([row for _, row in chunk])
        self.written += len(chunk)
        if time.monotonic() - self._said >= SECONDS:
            self._said = time.monotonic()
            say(f"{self.run.to}: {self.written} rows written")

    def _splits(self, counts: duplicates.Counts, written: dict[str, dict[str, int]]) -> dict[str, dict[str, Any]]:
        return {
            name: {
                "share": share,
                "rows": counts.rows[i],
                "distinct_prompts": counts.distinct[i],
                "repeated_prompts": counts.rows[i] - counts.distinct[i],
                "near_duplicate_prompts": counts.near[i, i].count,
                "shards": written.get(name, {}).get("shards", 0),
                "bytes": written.get(name, {}).get("bytes", 0),
            }
            for i, (name, share) in enumerate(self.shares.items())
        }

    def _between(self, counts: duplicates.Counts) -> list[dict[str, Any]]:
        names = self.splits.names
        return [
            {
                "splits": [names[a], names[b]],
                "shared_prompts": shared,
                f"near_duplicates_of_{names[b]}_in_{names[a]}": counts.near[a, b].count,
                f"near_duplicates_of_{names[a]}_in_{names[b]}": counts.near[b, a].count,
                "examples": [
                    {"rows": [row, other], "similarity": round(similarity, 3)}
                    for row, other, similarity in counts.near[a, b].examples
                ],
            }
            for (a, b), shared in counts.shared.items()
        ]


# ---------------------------------------------------------------- the report as tables

Cells = tuple[str, list[list[str]]]
"""Title, and rows of cells, the first of them the heading."""


def _tables(report: dict[str, Any]) -> list[Cells]:
    splits = [["split", "rows", "distinct prompts", "repeated", "nearly equal to another", "shards"]]
    for name, split in report["splits"].items():
        figures = ("rows", "distinct_prompts", "repeated_prompts", "near_duplicate_prompts", "shards")
        splits.append([name, *(str(split[figure]) for figure in figures)])
    tables: list[Cells] = [(f"{report['kind']}: {report['rows_written']} of {report['rows_read']} rows", splits)]
    if report["between_splits"]:
        between = [["splits", "prompts in both", "nearly equal", "for example rows"]]
        for pair in report["between_splits"]:
            (a, b), near = pair["splits"], [value for key, value in pair.items() if key.startswith("near_")]
            rows = "; ".join(" and ".join(map(str, example["rows"])) for example in pair["examples"][:3])
            between.append(
                [f"{a}, {b}", str(pair["shared_prompts"]), f"{near[0]} of {a}, {near[1]} of {b}", rows or "none"]
            )
        tables.append(("Between splits", between))
    if report["dropped"]:
        tables.append(
            ("Left out", [["reason", "rows"], *([reason, str(n)] for reason, n in report["dropped"].items())])
        )
    heads = ["min", *(f"p{p}" for p in PERCENTILES), "max", "mean"]
    lengths = [[name, *(f"{of[head]:.0f}" for head in heads)] for name, of in report["lengths"].items()]
    tables.append(("Lengths", [["", *heads], *lengths]))
    return tables


def _markdown(report: dict[str, Any], tables: list[Cells]) -> str:
    lines = [f"# {report['data']}", ""]
    for title, rows in tables:
        head, *body = (["\\|".join(cell.split("|")) for cell in row] for row in rows)
        lines += [f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        lines += [f"| {' | '.join(row)} |" for row in body] + [""]
    if report["columns_not_kept"]:
        lines += [f"Columns not kept: {', '.join(report['columns_not_kept'])}.", ""]
    lines += [f"{name}: {text}." for name, text in report["how"].items()]
    return "\n".join(lines) + "\n"
