"""`dpo-jax safety`: what a model refuses, safe and unsafe prompts apart; violations and helpfulness by category."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_jax.config import SafetyRun
from dpo_jax.data.rows.cells import absent
from dpo_jax.data.rows.messages import Message, messages_of
from dpo_jax.data.sets.prompts import Prompt, other_columns, same_columns
from dpo_jax.data.sources.files import read_rows
from dpo_jax.errors import InputError, naming
from dpo_jax.files.folder import write_json
from dpo_jax.files.jsonl import write_lines
from dpo_jax.files.log import say
from dpo_jax.headers import mended, told
from dpo_jax.judge.asked.judge_reward import PREFIX, JudgeReward
from dpo_jax.judge.loading import check_output
from dpo_jax.judge.rewards.functions import ModelReward, check_reward, scores_of, try_out
from dpo_jax.judge.rewards.refusals import REFUSALS, labelled, refusal
from dpo_jax.mesh import make_mesh
from dpo_jax.report import html, terminal
from dpo_jax.report.safety import Judged, against_people, group_figures

_RESPONSES = ("response", "completion", "output")
_CATEGORIES = ("category", "type")
ALIKE = (("all",), ("none",))
"""Values of --unsafe by which every prompt is of one kind, whatever its category."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Row:
    number: int
    prompt: Prompt
    response: str
    category: str | None
    label: str | None


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    value, columns = row.get("prompt"), other_columns(row)
    if isinstance(value, list):
        with naming(where):
            messages = messages_of(value, "prompt")
        return Prompt(messages, messages[0].content if len(messages) == 1 else None, columns, conversational=True)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: `prompt` is to be a text or a list of messages")
    text = mended(value)
    return Prompt((Message("user", text),), text, columns)


def _rows(run: SafetyRun) -> list[_Row]:
    found, labelled_rows = [], 0
    for number, row in read_rows(run.data):
        where = f"{run.data}: row {number}"
        name = next((name for name in _RESPONSES if name in row), None)
        if name is None or not isinstance(row[name], str):
            raise InputError(f"{where}: has no text in any of {', '.join(_RESPONSES)}")
        category = run.category or next((name for name in _CATEGORIES if name in row), None)
        for column in (run.category, run.label):
            if column is not None and column not in row:
                raise InputError(f"{where}: has no column {column}")
        label = None
        if run.label is not None and not _blank(row[run.label]):
            label = labelled(str(row[run.label]))
            labelled_rows += 1
            if label is None:
                raise InputError(
                    f"{where}: {run.label} = {told(row[run.label])} names no class (full, partial, compliance,"
                    " no_refusal)"
                )
        prompt = _prompt(row, where)
        kind = None if category is None or _blank(row.get(category)) else str(row[category])
        if kind is None and run.unsafe not in ALIKE:
            raise InputError(
                f"{where}: has no category, so that nothing says whether its prompt should be refused; name the column"
                " with --category, or say --unsafe all or --unsafe none"
            )
        found.append(_Row(number, prompt, mended(row[name]), kind, label))
    if run.label is not None and not labelled_rows:
        raise InputError(f"{run.data}: the column {run.label} is blank in every row")
    kinds = sorted({str(row.category) for row in found})
    if run.unsafe not in ALIKE and not any(kind.startswith(run.unsafe) for kind in kinds):
        log.warning(
            "%s: no category begins with %s, so that every prompt counts as safe; there are %s; see --unsafe",
            run.data,
            " or ".join(run.unsafe),
            ", ".join(kinds[:8]),
        )
    return found


def _blank(cell: Any) -> bool:
    """What a table has where nothing stands."""
    return absent(cell) or (isinstance(cell, str) and not cell.strip())


def _scores(run: SafetyRun, name: str | None, rows: Sequence[_Row]) -> list[float | None]:
    """What a judge says of every row; None without one."""
    if name is None:
        return [None] * len(rows)
    judge = check_reward(name, run)
    if judge is None:
        mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
        if name.startswith(PREFIX):
            judge = JudgeReward(name, run.out or name.removeprefix(PREFIX)).open(mesh)
        else:
            judge = ModelReward(name, raw=False, mesh=mesh, batch_size=run.batch_size, dtype=run.dtype)
    columns = same_columns([row.prompt.columns for row in rows])
    prompts = [row.prompt._replace(columns=own) for row, own in zip(rows, columns, strict=True)]
    texts, numbers = [row.response for row in rows], np.asarray([row.number for row in rows])
    try_out(judge, prompts, numbers, name, needed=True)
    return scores_of(judge, prompts, texts, numbers, name).tolist()


def _is_unsafe(category: str | None, run: SafetyRun) -> bool:
    if run.unsafe in ALIKE:
        return run.unsafe == ("all",)
    return category is not None and category.startswith(run.unsafe)


def safety(run: SafetyRun) -> dict[str, Any]:
    """Print and return the figures: `groups` (safe and unsafe prompts), `categories`, and `people`, where rows have a
    label. Raises `InputError`."""
    outs = {
        name: check_output(path, run.data) for name, path in (("out", run.out), ("rows", run.rows)) if path is not None
    }
    if len(outs) == 2:
        check_output(outs["rows"], str(outs["out"]))
    rows = _rows(run)
    safe_scores, helpful = _scores(run, run.safety_reward, rows), _scores(run, run.reward, rows)
    judged = [
        Judged(row.category, _is_unsafe(row.category, run), refusal(row.response), row.label, score, help_score)
        for row, score, help_score in zip(rows, safe_scores, helpful, strict=True)
    ]

    def figures(some: Sequence[Judged]) -> dict[str, Any]:
        return group_figures(some, REFUSALS, run.threshold, run.seed)

    groups = {"safe": [j for j in judged if not j.unsafe], "unsafe": [j for j in judged if j.unsafe]}
    categories = sorted({j.category for j in judged if j.category is not None})
    result = {
        "n": len(judged),
        "groups": {name: figures(some) for name, some in groups.items() if some},
        "categories": {name: figures([j for j in judged if j.category == name]) for name in categories},
        "people": against_people(judged, REFUSALS, run.seed),
    }
    if run.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        _show(result)
    if "out" in outs:
        write_json(outs["out"], result, indent=1, ensure_ascii=False)
        say(f"{outs['out']}: written")
    if "rows" in outs:
        names = {"category": "category", "refusal": "refusal", "safety": "safety", "reward": "helpfulness"}
        lines = [
            {"row": row.number, **{name: getattr(one, field) for name, field in names.items()}}
            for row, one in zip(rows, judged, strict=True)
        ]
        write_lines(outs["rows"], lines)
        say(f"{outs['rows']}: {len(lines):,} rows")
    return result


def _show(result: Mapping[str, Any]) -> None:
    names = [*REFUSALS, *(n for n in ("violation", "helpfulness") if any(n in g for g in result["groups"].values()))]
    rows = [
        (group, figures["n"], *(_cell(figures.get(name)) for name in names))
        for group, figures in (*result["groups"].items(), *result["categories"].items())
    ]
    title = f"{result['n']} responses: refusals, with 95 % intervals"
    terminal.show(terminal.table(title, html.Table(("prompts", "n", *names), rows), left=1))
    if (people := result["people"]) is not None:
        accuracy, kappa = (
            "-" if people[name]["value"] is None else "{value:.3f} ({low:.3f} to {high:.3f})".format(**people[name])
            for name in ("accuracy", "kappa")
        )
        title = f"against {people['n']} labels: accuracy {accuracy}, kappa {kappa}"
        rows = [(name, *row.values()) for name, row in people["confusion"].items()]
        terminal.show(terminal.table(title, html.Table(("people", *REFUSALS), rows)))


def _cell(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "-"
    if "share" in figure:
        return "{share:.0%} ({low:.0%}-{high:.0%})".format(**figure)
    return "{mean:.2f} ({low:.2f}-{high:.2f})".format(**figure)
