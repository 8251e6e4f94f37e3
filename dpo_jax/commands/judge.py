"""`dpo-jax judge`: what a judge says of the responses of a file, one JSON object a row; and whether people agree."""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpo_jax.complete.asking.answers import Asker, open_asker, weights_of
from dpo_jax.complete.asking.chat_client import ChatClient
from dpo_jax.complete.asking.local_model import LocalModel
from dpo_jax.config import JudgeRun
from dpo_jax.data.rows.comparisons import Comparison
from dpo_jax.data.sets.comparison_sets import parse_responses
from dpo_jax.data.sets.prompts import other_columns, same_columns
from dpo_jax.data.sources.checked_rows import CheckedRows
from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_atomically, write_json
from dpo_jax.files.jsonl import Row, RowsFile, check_own, read_lines, write_lines
from dpo_jax.files.log import say
from dpo_jax.headers import mended
from dpo_jax.judge.asked import sheet
from dpo_jax.judge.asked.judge_prompts import JudgePrompt
from dpo_jax.judge.asked.judge_reward import prompt_of
from dpo_jax.judge.asked.judging import Item, Judgement, contestants, judge as put, one_score, warn_of_family
from dpo_jax.judge.figures.agreement import PairVerdict, figures, pairs_of
from dpo_jax.judge.figures.reward_bench import by_subset
from dpo_jax.judge.loading import check_output
from dpo_jax.judge.rewards.file_of_judgements import as_row, by_function, deciding, prompt_of_item, write_judgements
from dpo_jax.judge.rewards.functions import ModelReward, RewardFunction, check_reward, try_out
from dpo_jax.mesh import make_mesh

log = logging.getLogger(__name__)


class _Rows:
    """The rows of the data: items, people's places of their responses, and row -> `subset` where there is one."""

    def __init__(self, run: JudgeRun):
        self.models: set[str] = set()
        rows = CheckedRows(run.data.files, None, columns=run.data.columns)

        def parse(row: dict[str, Any]) -> tuple[Comparison, str | None, str | None, dict[str, Any]]:
            found = parse_responses(row)
            self.models |= contestants(row)
            reference, subset = row.get("reference"), row.get("subset")
            return (
                found,
                mended(reference) if isinstance(reference, str) else None,
                subset if isinstance(subset, str) else None,
                {} if run.function is None else other_columns(row),
            )

        found, _ = rows.collect(parse, list, run.on_bad_rows)
        columns = same_columns([own for _, (*_, own) in found])
        self.items = [
            Item(n, one.messages, one.responses, reference, own)
            for (n, (one, reference, *_)), own in zip(found, columns, strict=True)
        ]
        self.places = [one.places for _, (one, *_) in found]
        self.subsets = {n: subset for n, (_, _, subset, _) in found if subset is not None}


@contextmanager
def _naming_function(name: str | None) -> Iterator[None]:
    """Errors by the option's name here: to itself a function of texts is a --reward."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(f"--reward {name}: ", f"--function {name}: ")) from error


def judge(run: JudgeRun) -> Path:
    """Write `run.out`: `row`, `scores`, of two responses `verdict` and `flipped`, `unparsed` and `replies`.

    What could not be parsed is null, counted and said. Returns the path. Raises `InputError`.
    """
    out = check_output(str(run.sheet or run.out), run.data.files, run.prompts, *run.read)
    if out.exists() and run.sheet is not None and not sheet.is_page(out):
        raise InputError(f"{out}: is there, and is no page of --sheet; remove it, or name another file")
    if out.exists() and run.read and not _is_by_people(out):
        raise InputError(f"{out}: is there, and not written by --read; remove it, or name another file")
    if run.sheet is None and not run.read:
        check_own(out, lambda row: row.keys() >= {"row", "scores", "unparsed"}, "judgements")
    rows = _Rows(run)
    if run.sheet is not None:
        write_atomically(out, sheet.page(rows.items, run.seed))
        say(f"{out}: {len(rows.items):,} pairs for people; `dpo-jax judge --read` with the same --data and --seed")
        return out
    if run.read:
        return _by_people(run, out, rows)
    prompt = None if run.function is not None else prompt_of(run)
    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    asker: ChatClient | LocalModel | None = None
    function: RewardFunction | None = None
    if run.function is None:
        asker = open_asker(run, Path(run.cache or f"{run.out}.replies").expanduser(), mesh)
        warn_of_family(str(run.endpoint.model or run.model), rows.models)
    else:
        with _naming_function(run.function):
            function = check_reward(run.function, run)
            if function is None:
                function = ModelReward(run.function, raw=False, mesh=mesh, batch_size=run.batch_size, dtype=run.dtype)
            numbers = np.asarray([item.number for item in rows.items])
            try_out(function, list(map(prompt_of_item, rows.items)), numbers, run.function, needed=True)
    settings = deciding(run, prompt, rows.items, function=function, weights=weights_of(asker))

    def judged(some: Sequence[Item]) -> list[Judgement]:
        if function is not None:
            with _naming_function(run.function):
                return by_function(some, function, str(run.function))
        assert prompt is not None
        assert asker is not None
        return put(some, prompt, asker, seed=run.seed, criteria=run.criteria)

    with RowsFile(out, settings) as file:
        write_judgements(file, rows.items, judged, "judged")
        done = file.finish()
    _summary(out, done, prompt, asker)
    if run.agreement:
        _agreement(run, out, done, rows, prompt)
    return out


def _is_by_people(out: Path) -> bool:
    """Whether a file was written by `_by_people`, which may write it anew."""
    replies = [reply for row in read_lines(out) for reply in row.get("replies", [None])]
    return bool(replies) and all(isinstance(reply, dict) and "rater" in reply for reply in replies)


def _by_people(run: JudgeRun, out: Path, rows: _Rows) -> Path:
    """Write what most of them say, and show how far they agree."""
    verdicts = sheet.read_verdicts(run.read, rows.items, run.seed)
    found = sheet.judgements(verdicts)
    write_lines(out, map(as_row, rows.items, found))
    done = read_lines(out)
    raters = sorted({rater for said in verdicts for rater in said})
    without = sum(not said for said in verdicts)
    say(f"{out}: {len(done):,} rows, {without} of them judged by nobody; raters: {', '.join(raters)}")
    table = Table("rater", "rater", "items", "agreement", "Cohen's kappa", "Gwet's AC1", title="Between people")
    for one, other, items, *shares in sheet.rater_agreement(verdicts):
        table.add_row(escape(one), escape(other), str(items), *map(_figure, shares))
    if len(raters) > 1:
        Console().print(table)
    if run.agreement:
        _agreement(run, out, done, rows, None)
    return out


def _figure(value: float) -> str:
    """A share, or a dash where it is not defined: kappa of raters who always say the same."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def _summary(out: Path, done: Sequence[Row], prompt: JudgePrompt | None, asker: Asker | None) -> None:
    scores = [score for row in done for score in row["scores"]]
    unparsed = sum(row["unparsed"] for row in done)
    verdicts = Counter(row["verdict"] for row in done if row.get("verdict"))
    told = [f"{len(done):,} rows", f"{unparsed} questions unparsed"]
    if verdicts and prompt is not None and prompt.ask == "pair":
        told.append(", ".join(f"{name} {count}" for name, count in sorted(verdicts.items())))
    if isinstance(asker, ChatClient):
        told.append(f"{asker.asked} requests, {asker.cached} from the disk")
        told.append(f"{asker.prompt_tokens:,} + {asker.completion_tokens:,} tokens, cost {asker.cost:.4f}")
    if prompt is not None:
        kind = (
            "published prompt, unchanged"
            if prompt.published
            else "this project's prompt: not comparable with published"
        )
        told.append(f"prompt {prompt.name} ({kind})")
    say(f"{out}: {'; '.join(told)}")
    if (same := one_score(scores)) and not (prompt is not None and prompt.ask == "pair"):
        log.warning("%.0f %% of the scores are %g: this judge tells responses hardly apart", 100 * same[1], same[0])


def _agreement(run: JudgeRun, out: Path, done: Sequence[Row], rows: _Rows, prompt: JudgePrompt | None) -> None:
    """Figures against people, shown and written."""
    pairs: list[PairVerdict] = []
    for row, place in zip(done, rows.places, strict=True):
        if place is not None and len(place) > 1:
            pairs += pairs_of(row["row"], place, row["scores"], row.get("flipped"))
    if not pairs:
        raise InputError(f"{run.data.files}: no row says which response is better; --agreement needs people's verdicts")
    found = figures(pairs, run.seed)
    told = [pair for pair in pairs if pair.row in rows.subsets]
    bench = by_subset(told, [rows.subsets[pair.row] for pair in told])
    path = out.with_name(f"{out.name}.agreement.json")
    name = "none" if prompt is None else prompt.name
    published = prompt is not None and prompt.published
    write_json(path, {"prompt": name, "comparable": published, **found} | (bench if told else {}))
    judge_name = run.function or run.model or run.endpoint.model or ", ".join(run.read)
    table = Table(title=escape(f"{judge_name} on {run.data.files}; prompt: {name}"))
    for head in ("figure", "value", "95 % interval"):
        table.add_column(head)
    for figure, value in found.items():
        if isinstance(value, tuple):
            table.add_row(figure, f"{value[0]:.3f}", f"{value[1]:.3f} to {value[2]:.3f}")
        else:
            table.add_row(figure, str(value), "")
    Console().print(table)
    if told:
        _show_subsets(bench)


def _show_subsets(bench: dict[str, Any]) -> None:
    """RewardBench's table."""
    table = Table("subset", "pairs", "ties", "unparsed", "accuracy", "95 % interval", title="Ties count half")
    for name, one in bench["subsets"].items():
        counts = (str(one[key]) for key in ("pairs", "ties", "unparsed"))
        table.add_row(escape(name), *counts, f"{one['accuracy']:.3f}", f"{one['low']:.3f} to {one['high']:.3f}")
    for name, one in bench["sections"].items():
        table.add_row(f"section {name}", str(one["pairs"]), "", "", f"{one['accuracy']:.3f}", "")
    if bench["overall"] is not None:
        table.add_row("mean of the sections", "", "", "", f"{bench['overall']:.3f}", "")
    Console().print(table)
