"""`dpo-jax prepare`: rows of any layout as a TFDS data set, split, validated and counted, piece by piece."""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

from dpo_jax.config import PrepareRun
from dpo_jax.config.commands.rows import split_shares
from dpo_jax.data.rows.readable import check_named
from dpo_jax.data.sets.documents import is_text
from dpo_jax.data.sets.ids_writer import IdsPlan, assemble_ids
from dpo_jax.data.sets.pieces import Piece, pieces_of
from dpo_jax.data.sets.prepare_piece import Job, gather, job_of, piece_folder, prepare_piece, summary_of
from dpo_jax.data.sources import duplicates, store_schema
from dpo_jax.data.sources.staging import is_remote, upload
from dpo_jax.data.sources.store import open_store
from dpo_jax.data.sources.store_writer import REPORT, VERSION, assemble, dataset_name, write_report
from dpo_jax.data.tokens.templates import today
from dpo_jax.errors import InputError
from dpo_jax.files.folder import writing
from dpo_jax.files.log import say
from dpo_jax.report import html, terminal
from dpo_jax.weights.integrity.folder import check_free

SECONDS = 10.0
"""How often to say how far it is."""
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_LAYOUT = 2
"""Counts the changes after which what an earlier version left unfinished is not gone on with."""


def prepare(run: PrepareRun) -> None:
    """Write the data set `run.to` and its report; or go on where the same command was killed.

    Raises `InputError`; then nothing is left behind.
    """
    if run.data.columns is not None and is_text(run.data.files):
        raise InputError(f"--data.columns has no effect: {run.data.files} is text, and has no columns")
    if run.separator is not None and not is_text(run.data.files):
        raise InputError(f"--separator has no effect: {run.data.files} holds rows, and each is one document")
    started = time.monotonic()
    with _scratch(run.to) as folder:
        report = _made(run, folder)
        tables = _tables(report)
        write_report(folder / _WHOLE / VERSION, report, _markdown(report, tables))
    seconds = time.monotonic() - started
    for title, (head, *rows) in tables:
        table = terminal.table(title, html.Table(tuple(head), rows), left=1)
        table.title_justify = "left"
        terminal.show(table)
    say(
        f"{run.to}: {report['rows_written']} of {report['rows_read']} rows in {seconds:.1f} s "
        f"({report['rows_read'] / seconds:.0f} rows/s); read it with --data tfds:{run.to}"
    )


# ---------------------------------------------------------------- where it is made

_PIECES, _WHOLE, _PLAN = "pieces", "whole", "plan.json"
"""In the folder of what is unfinished: the pieces, the data set that is made of them, and what they are pieces of."""


@contextmanager
def _scratch(to: str) -> Iterator[Path]:
    """A folder whose `whole` becomes `to` when all is done. Raises `InputError` where `to` is taken.

    It stands beside `to`, and stays if the process is killed. A bucket's stands among temporary files, and does not.
    """
    if is_remote(to):
        temporary = tempfile.TemporaryDirectory(prefix="dpo-jax-")
        with writing(tempfile.gettempdir()), temporary as name, upload(Path(name) / _WHOLE, to):
            yield Path(name)
        return
    target = Path(to).expanduser().absolute()
    scratch = target.with_name(f".{target.name}.partial")
    with writing(to):
        try:
            check_free(target, replace=False)
        except InputError:
            if (target / VERSION / REPORT).is_file():
                _remove_left(scratch)
            raise
        scratch.mkdir(parents=True, exist_ok=True)
        with (scratch / "lock").open("w") as lock:
            if not _locked(lock):
                raise InputError(f"{to}: another dpo-jax prepare is writing it; wait for it, or end it")
            try:
                yield scratch
                if target.exists():
                    target.rmdir()
                (scratch / _WHOLE).rename(target)
            except KeyboardInterrupt:
                if all("." in path.name for path in (scratch / _PIECES).glob("*")):  # none is done
                    shutil.rmtree(scratch)
                raise
            except BaseException:
                shutil.rmtree(scratch)
                raise
            shutil.rmtree(scratch)


def _locked(lock: IO[str]) -> bool:
    """Whether no other command holds `lock`; then this one does, until it is closed."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_left(scratch: Path) -> None:
    """Remove what a command left that was killed when its data set was whole, and this was all it had to do."""
    if scratch.is_dir():
        with (scratch / "lock").open("w") as lock:
            if _locked(lock):
                shutil.rmtree(scratch)


def _made(run: PrepareRun, folder: Path) -> dict[str, Any]:
    """Make the data set in `folder`; what report.json holds."""
    source, shares = run.data.files, split_shares(run.splits)
    job = job_of(
        source,
        run.separator,
        kind=None if run.kind == "auto" else run.kind,
        columns=run.data.columns,
        limit=run.limit,
        splits=shares,
    )
    pieces = pieces_of(source, job.belong, whole=run.limit is not None)
    date = run.date or today()
    ids = IdsPlan(run.tokenizer, run.template, date) if run.store_ids and run.tokenizer is not None else None
    plan = {"layout": _LAYOUT, "job": asdict(job), "tokenizer": run.tokenizer, "ids": ids, "pieces": _told(pieces)}
    _go_on(folder, plan, run.to)
    processes = min(len(pieces), run.processes or os.cpu_count() or 1)
    with Workers(processes) as workers:
        _work(workers, job, pieces, folder / _PIECES, run, ids)
        made = gather(job, folder / _PIECES, len(pieces))
        found = made.found
        check_named(source, job.renamed, found.seen, found.read)
        if run.on_bad_rows == "refuse":
            found.tally.refuse(source, found.read)
        if job.kind is None or not found.written:
            raise found.tally.nothing_left(source, found.read)
        say(f"{run.to}: {found.written} rows written; counting equal and nearly equal prompts")
        counting = folder / "counting"
        shutil.rmtree(counting, ignore_errors=True)
        counting.mkdir()
        counts = duplicates.count_prompts(made.prompts, len(shares), counting, workers.map)
    whole = folder / _WHOLE / VERSION
    whole.mkdir(parents=True, exist_ok=True)
    if ids is not None:
        assemble_ids(whole, job.kind, list(shares), made.ids)
    written = assemble(
        whole,
        name=dataset_name(Path(run.to.rstrip("/"))),
        kind=job.kind,
        splits=made.splits,
        description=f"{job.kind} from {source}, written by dpo-jax prepare",
    )
    return {
        "data": source,
        "kind": job.kind,
        "format": store_schema.FORMAT,
        "rows_read": found.read,
        "rows_written": found.written,
        "dropped": dict(found.tally.dropped.most_common()),
        "problems": found.tally.describe(found.tally.dropped),
        "columns_not_kept": [
            *sorted(found.columns - found.kept - store_schema.columns_read(job.kind)),
            *(f"{name} of {count} rows" for name, count in sorted(found.unusable.items())),
        ],
        "splits": _splits(shares, counts, written),
        "between_splits": _between(list(shares), counts),
        "lengths": {name: summary_of(lengths, PERCENTILES) for name, lengths in found.lengths.items()},
        "how": {
            "split": "BLAKE2b, 64 bits, of the prompt (or document): NFKC, case folded, white space runs as one",
            "near_duplicates": f"MinHash estimate of the Jaccard similarity of {duplicates.SHINGLE}-character "
            f"shingles of the first {duplicates.LOOKED_AT} characters >= {duplicates.SIMILAR}; equal prompts are "
            "not counted again",
        },
    }


def _told(pieces: list[Piece]) -> list[Any]:
    """The pieces as JSON gives them back, with what says that their files are still the same."""
    stats = {span.place: os.stat(span.place) for piece in pieces for span in piece if Path(span.place).is_file()}
    files = [[place, stat.st_size, stat.st_mtime_ns] for place, stat in stats.items()]
    stores = sorted({span.place for piece in pieces for span in piece} - stats.keys())
    return [*files, *([store, open_store(store).fingerprint] for store in stores), json.loads(json.dumps(pieces))]


def _go_on(folder: Path, plan: dict[str, Any], to: str) -> None:
    """Make `folder` ready for the pieces of `plan`, with those that are done already; of another plan none are."""
    path, pieces = folder / _PLAN, folder / _PIECES
    plan = json.loads(json.dumps(plan))
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) == plan:
        for left in pieces.iterdir():
            if "." in left.name:
                shutil.rmtree(left)
        say(f"{to}: {len(list(pieces.iterdir()))} of {len(plan['pieces'][-1])} pieces are done already; going on")
        return
    for name in (_PIECES, _WHOLE):
        shutil.rmtree(folder / name, ignore_errors=True)
    pieces.mkdir(parents=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(plan), encoding="utf-8")
    new.replace(path)


# ---------------------------------------------------------------- several processes


class Workers:
    """`map`, in this process where there is to be one alone, or over several. A context manager."""

    def __init__(self, processes: int):
        """`processes`: how many."""
        self._pool = None
        if processes > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """What `function` makes of each, in order. Raises `InputError` where a process is killed."""
        if self._pool is None:
            yield from map(function, items)
            return
        try:
            yield from self._pool.map(function, items)
        except BrokenProcessPool as error:
            raise InputError(
                "a process of dpo-jax prepare was killed, perhaps for want of memory; try fewer --processes"
            ) from error


def _end_with_parent() -> None:
    """In a worker: end when the command does, however it ends, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _work(workers: Workers, job: Job, pieces: list[Piece], folder: Path, run: PrepareRun, ids: IdsPlan | None) -> None:
    """Do the pieces that are not done yet."""
    waiting = [i for i in range(len(pieces)) if not piece_folder(folder, i).exists()]
    said, done = time.monotonic(), len(pieces) - len(waiting)
    one = partial(_piece, job, folder, run.tokenizer, ids)
    for _ in workers.map(one, [(i, pieces[i]) for i in waiting]):
        done += 1
        if time.monotonic() - said >= SECONDS:
            said = time.monotonic()
            say(f"{run.to}: {done} of {len(pieces)} pieces are done")


def _piece(job: Job, folder: Path, tokenizer: str | None, ids: IdsPlan | None, piece: tuple[int, Piece]) -> None:
    prepare_piece(job, piece[1], folder, piece[0], None if tokenizer is None else _tokenizer(tokenizer), ids)


@cache
def _tokenizer(source: str) -> Any:
    from dpo_jax.weights.tokenizer import load_tokenizer  # here, for it may import PyTorch, which takes seconds

    return load_tokenizer(source)


# ---------------------------------------------------------------- the report


def _splits(
    shares: dict[str, float], counts: duplicates.Counts, written: dict[str, dict[str, int]]
) -> dict[str, dict[str, Any]]:
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
        for i, (name, share) in enumerate(shares.items())
    }


def _between(names: list[str], counts: duplicates.Counts) -> list[dict[str, Any]]:
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
