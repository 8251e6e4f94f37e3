"""`dpo-jax mt-bench show`: FastChat's judgement files as means, win rates, tables and plots."""

import json
import logging
from pathlib import Path
from typing import Any

from dpo_jax.config import MTBenchShowRun
from dpo_jax.data.sources.questions import read_questions
from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_json, writing
from dpo_jax.files.log import say
from dpo_jax.report import mt_bench as report
from dpo_jax.report.judgements import chosen, read_judgements, summary, swap_consistency

log = logging.getLogger(__name__)


def show(run: MTBenchShowRun) -> dict[str, Any]:
    """Print what the judgements say, as tables or as JSON; with --out, plots too. Returns the JSON object.

    `kind` (single, pair), `judges`, `judgments` (those that count), `left_out` (unparsed, error), `repeated`, `models`
    (see `report/judgements.py`), and of pairs `swap_consistency`. Raises `InputError`.
    """
    questions = None if run.questions is None else read_questions(run.questions)
    found = read_judgements(run.judgments, questions)
    rows, left_out, without = chosen(found, run.models, run.baseline)
    result: dict[str, Any] = {
        "kind": found.kind,
        "judges": list(found.judges),
        "judgments": len(rows),
        "left_out": left_out,
        "repeated": found.repeated,
        **({"swap_consistency": swap_consistency(rows)} if found.kind == "pair" else {}),
        "models": summary(found.kind, rows, run.models),
    }
    if without:
        log.warning("%s: no judgement of %s counts: not in the table", run.judgments, ", ".join(without))
    turns = (
        {name: model["counts"]["turns"] for name, model in result["models"].items()} if found.kind == "single" else {}
    )
    if any(counts != next(iter(turns.values())) for counts in turns.values()):
        told = "; ".join(
            f"{name} {', '.join(f'{n} of turn {t}' for t, n in own.items())}" for name, own in turns.items()
        )
        log.warning("%s: means over unequal sets of questions: %s", run.judgments, told)
    if found.repeated:
        say(f"{run.judgments}: {found.repeated} rows judge again what an earlier row has judged; all count")
    if run.json:
        print(json.dumps(result, ensure_ascii=False, indent=1))
    else:
        report.show(result)
    if run.out is not None:
        folder = Path(run.out).expanduser()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{run.out}: is a file; --out names a folder")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "summary.json", result, ensure_ascii=False, indent=1)
        report.write_plots(folder, result)
        say(f"{folder}: radar.png, bars.png, summary.json")
    return result
