"""`dpo-jax win-rate`: how often one file of answers beats another, raw and at equal length."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.commands.judge import judge as put
from dpo_jax.config import FilesConfig, JudgeRun, WinRateRun
from dpo_jax.data.rows.cells import absent, as_number
from dpo_jax.data.sources.files import read_rows
from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_atomically, write_json
from dpo_jax.files.jsonl import read_lines, write_lines
from dpo_jax.files.log import say
from dpo_jax.headers import mended, told
from dpo_jax.judge.asked.judge_reward import PREFIX, read_judge
from dpo_jax.judge.loading import check_output
from dpo_jax.report import html, terminal
from dpo_jax.report.win_rates import controlled_figures, raw_figures

_COLUMNS = (("instruction", "output"), ("prompt", "response"))
_SAMPLE = "several responses to one prompt are no two models' answers; keep one"


class _Answers(NamedTuple):
    """Of a file of answers: instruction -> answer, and instruction -> prompt as it stands there, a text or messages.

    generator: what its rows call their model, or else the file's name.
    """

    texts: dict[str, str]
    prompts: dict[str, Any]
    generator: str


def _answers(source: str) -> _Answers:
    """The answers in AlpacaEval's outputs or in what `dpo-jax generate` writes. Raises `InputError`.

    Halves of surrogate pairs become U+FFFD, here and in verdicts: no judge can be told of them.
    """
    texts: dict[str, str] = {}
    prompts: dict[str, Any] = {}
    generators = set[str]()
    for number, row in read_rows(source):
        where = f"{source}: row {number}"
        columns = next((pair for pair in _COLUMNS if all(name in row for name in pair)), None)
        if columns is None:
            raise InputError(f"{where}: has neither `instruction` and `output` nor `prompt` and `response`")
        prompt, said = row[columns[0]], row[columns[1]]
        if not isinstance(prompt, str | list) or not isinstance(said, str):
            raise InputError(f"{where}: {columns[0]} and {columns[1]} are to be texts")
        asked = mended(prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False))
        if asked in texts:
            raise InputError(f"{where}: {columns[0]} {told(asked)} stands in an earlier row; {_SAMPLE}")
        texts[asked] = mended(said)
        prompts[asked] = asked if isinstance(prompt, str) else json.loads(asked)
        generators |= {row["generator"]} if isinstance(row.get("generator"), str) else set()
    return _Answers(texts, prompts, mended(generators.pop()) if len(generators) == 1 else Path(source).stem)


def _share(row: Mapping[str, Any], where: str) -> float | None:
    """Chance in [0, 1] that output_2 is better; None: no verdict."""
    if absent(value := row.get("preference")):
        return None
    found = as_number(value)
    if found is None or not (found == 0 or 1 <= found <= 2):
        raise InputError(f"{where}: preference = {told(value)} is none of 1 to 2, 0 and null")
    return 0.5 if found == 0 else found - 1


def _verdicts(run: WinRateRun, answers: dict[str, str], against: dict[str, str]) -> tuple[dict[str, list[float]], int]:
    """Instruction -> chances that the answer won, one a verdict; and how many rows hold none. Raises `InputError`."""
    found: dict[str, list[float]] = {}
    without = 0
    for number, row in read_rows(run.judgments):
        where = f"{run.judgments}: row {number}"
        texts = [row.get(name) for name in ("instruction", "output_1", "output_2")]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{where}: `instruction`, `output_1` and `output_2` are to be texts")
        asked, first, second = (mended(str(text)) for text in texts)
        if asked not in answers:
            raise InputError(
                f"{where}: instruction {told(asked)} is not in {run.answers}; give the files that were judged"
            )
        pair = (answers[asked], against[asked])
        if (second, first) == pair:
            swapped = False
        elif (first, second) == pair:
            swapped = True
        else:
            raise InputError(f"{where}: judges other texts than the answers in {run.answers} and {run.against}")
        share = _share(row, where)
        if share is None:
            without += 1
        else:
            found.setdefault(asked, []).append(1 - share if swapped else share)
    return found, without


def _judged(run: WinRateRun, ours: _Answers, against: _Answers) -> None:
    """Put the pairs to `run.judge`, and write its verdicts to `run.judgments`. Raises `InputError`."""
    out = check_output(Path(run.judgments).expanduser(), run.answers, run.against)
    pairs, verdicts = (out.with_name(f"{out.name}.{name}.jsonl") for name in ("pairs", "verdicts"))
    if out.exists() and not verdicts.exists():
        raise InputError(
            f"{out}: is there, and not of this command: leave --judge out to read it, or name another file"
        )
    judge = str(run.judge)
    answers = ours.texts
    rows = [{"prompt": ours.prompts[asked], "responses": [answers[asked], against.texts[asked]]} for asked in answers]
    settings: dict[str, Any] = {"data": FilesConfig(str(pairs)), "out": str(verdicts)}
    if judge.startswith(PREFIX):
        asked = dataclasses.replace(read_judge(judge, "--judge"), **settings)
    else:
        asked = JudgeRun(**settings, function=judge)
    write_lines(pairs, rows)
    said = put(asked)
    preferences = {"a": 2.0, "b": 1.0, "tie": 1.5, None: None}
    found = [
        {
            "instruction": instruction,
            "output_1": against.texts[instruction],
            "generator_1": against.generator,
            "output_2": answers[instruction],
            "generator_2": ours.generator,
            "annotator": judge,
            "preference": preferences[row["verdict"]],
        }
        for instruction, row in zip(answers, read_lines(said), strict=True)
    ]
    if out.suffix == ".jsonl":
        write_lines(out, found)
    else:
        write_json(out, found, ensure_ascii=False, indent=1)


def win_rate(run: WinRateRun) -> dict[str, Any]:
    """Print and return the figures: those of `report/win_rates.py` under `raw` and `length_controlled` (None, with the
    reason under `not_controlled`, where it cannot be), mean lengths, and what was left out. Raises `InputError`."""
    out = None if run.out is None else check_output(run.out, run.answers, run.against, run.judgments)
    ours, theirs = _answers(run.answers), _answers(run.against)
    answers, against = ours.texts, theirs.texts
    for some, others, names in (
        (answers, against, (run.answers, run.against)),
        (against, answers, (run.against, run.answers)),
    ):
        missing = next((asked for asked in some if asked not in others), None)
        if missing is not None:
            raise InputError(
                f"{names[1]}: has no answer to {told(missing)}, which {names[0]} has; give both the same prompts"
            )
    if run.judge is not None:
        _judged(run, ours, theirs)
    found, without = _verdicts(run, answers, against)
    if not found:
        raise InputError(f"{run.judgments}: none of its {without} rows holds a verdict")
    verdicts = np.asarray([np.mean(values) for values in found.values()])
    lengths = np.asarray([len(answers[asked]) for asked in found], np.float64)
    others = np.asarray([len(against[asked]) for asked in found], np.float64)
    result: dict[str, Any] = {
        "raw": raw_figures(verdicts, seed=run.seed),
        "length_controlled": None,
        "mean_length": {"answers": float(lengths.mean()), "against": float(others.mean())},
        "left_out": {"no_verdict": without, "not_judged": len(answers) - len(found)},
    }
    try:
        result["length_controlled"] = controlled_figures(verdicts, lengths, others, seed=run.seed)
    except ValueError as reason:
        result["not_controlled"] = str(reason)
    text = json.dumps(result, indent=1)
    print(text) if run.json else _show(result)
    if out is not None:
        write_atomically(Path(out), text + "\n")
        say(f"{out}: written")
    return result


def _show(result: Mapping[str, Any]) -> None:
    raw, length, left = result["raw"], result["mean_length"], result["left_out"]
    cells = [
        (name, f"{row['win_rate']:.1%}", "{:.1%} to {:.1%}".format(*row["interval"]))
        for name, key in (("all verdicts", "raw"), ("at equal length", "length_controlled"))
        if (row := result[key]) is not None
    ]
    why = [f"No rate at equal length: {result['not_controlled']}."] if "not_controlled" in result else []
    terminal.show(
        terminal.table(f"{raw['n']} pairs", html.Table(("", "win rate", "95 %"), cells), left=1),
        *why,
        f"{raw['wins']} wins, {raw['losses']} losses, {raw['ties']} ties; mean length {length['answers']:.0f} against"
        f" {length['against']:.0f} characters; left out: {left['no_verdict']} without a verdict,"
        f" {left['not_judged']} not judged",
    )
