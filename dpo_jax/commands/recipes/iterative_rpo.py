"""`dpo-jax recipe iterative_rpo`: rounds of DPO with an NLL term on right answers against wrong ones.

Pang et al. 2024 (arXiv 2404.19733):

for t = 1 ... T, M0 the model that was given:
    round-{t}/answers.jsonl   M(t-1) answers every problem N times
    round-{t}/pairs.jsonl     right against wrong, at most --pairs_per_prompt of a problem; counts.json
    round-{t}/dpo/            M(t): from M(t-1), which is the reference, too
heldout-{t}.jsonl             what M(t) answers to the held-out problems, greedily
summary.json, report.html
"""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from dpo_jax.commands import dpo
from dpo_jax.commands.recipes.chain import answer, perform, trained
from dpo_jax.config import IterativeRPORun
from dpo_jax.data.rows.dialogues import CUT
from dpo_jax.data.rows.preferences import pair_row, parse_prompt
from dpo_jax.data.sources.files import read_rows
from dpo_jax.errors import InputError, naming
from dpo_jax.files.folder import write_json
from dpo_jax.files.jsonl import Row, read_lines, write_lines
from dpo_jax.files.stages import Figures, Stage, last_figures
from dpo_jax.judge.rewards.right_answers import draw_pairs, known_answer, open_matcher
from dpo_jax.report import iterative_rpo as report
from dpo_jax.report.statistics import share_interval

log = logging.getLogger(__name__)

COUNTS = ("problems", *report.REASONS, "used", "pairs", "cut")
"""Of a round's problems, in the order in which they are told; those between the first and "pairs" add up to the first.
"cut": answers that ended at their longest."""


def recipe(run: IterativeRPORun) -> Path:
    """The `recipe iterative_rpo` command; returns its folder. See the module. Raises `InputError`."""
    return perform("iterative_rpo", run, lambda run, out: IterativeRPO(run, out).stages(), report.show)


class IterativeRPO:
    """The stages."""

    def __init__(self, run: IterativeRPORun, out: Path):
        """Raises `InputError` for problems without a right answer, and for a judge that is not there."""
        self._run, self._out = run, out
        self._is_right = open_matcher(run.match, run.answer_pattern)
        self._prompts: dict[str, list[str]] = {}
        self._known = {source: self._read(source) for source in (run.prompts, run.eval_prompts) if source is not None}
        if run.eval_prompts is not None:
            learnt, held = set(self._prompts[run.prompts]), self._prompts[run.eval_prompts]
            if both := sum(prompt in learnt for prompt in held):
                log.warning("%d of the %d problems of %s are learnt from, too", both, len(held), run.eval_prompts)

    def _read(self, source: str) -> dict[int, str]:
        """Row -> its right answer."""
        found = {}
        self._prompts[source] = []
        for number, row in read_rows(source):
            with naming(f"{source}: row {number}"):
                self._prompts[source].append(repr(parse_prompt(row)[0]))
            try:
                known = known_answer(row.get(self._run.answer), self._run.answer_pattern)
            except InputError as error:
                raise InputError(f"{source}: row {number}: --answer {self._run.answer} {error}") from error
            if known is None:
                raise InputError(
                    f"{source}: row {number}: --answer {self._run.answer} holds no answer (a number or a text); name"
                    f" the column, of {', '.join(row)}"
                )
            found[number] = known
        if not found:
            raise InputError(f"{source}: has no row; give it problems")
        return found

    def stages(self) -> list[Stage]:
        """All of them, in order."""
        run, stages = self._run, list[Stage]()
        for t in range(run.rounds + 1):
            if t:
                folder = self._out / f"round-{t}"
                answers, pairs, before = folder / "answers.jsonl", folder / "pairs.jsonl", self._model(t - 1)
                work = partial(self._answer, t)
                stages.append(Stage(f"M{t - 1} answers", (before, run.prompts), answers, work))
                work = partial(self._pair, t)
                stages.append(Stage(f"pairs of round {t}", (answers, run.prompts), pairs, work))
                stages.append(Stage(f"M{t}: DPO", (before, pairs), folder / "dpo", partial(self._train, t)))
            if run.eval_prompts is not None:
                inputs, work = (self._model(t), run.eval_prompts), partial(self._hold, t)
                stages.append(Stage(f"accuracy of M{t}", inputs, self._heldout(t), work))
        counts = [self._out / f"round-{t}" / "pairs.jsonl" for t in range(1, run.rounds + 1)]
        texts = [self._heldout(t) for t in range(run.rounds + 1)] if run.eval_prompts is not None else []
        stages.append(Stage("table", (*counts, *texts), self._out / "summary.json", self._table))
        return stages

    def _model(self, t: int) -> str | Path:
        return self._out / f"round-{t}" / "dpo" if t else self._run.model

    def _heldout(self, t: int) -> Path:
        return self._out / f"heldout-{t}.jsonl"

    # ---------------------------------------------------------------- what a model answers

    def _rights(self, rows: list[Row], source: str) -> list[bool]:
        return [self._is_right(row["response"], self._known[source][row["row"]]) for row in rows]

    def _answer(self, t: int) -> Figures:
        run = self._run
        told = {"batch_size": run.batch_size, "samples": run.samples, "seed": run.seed + t}
        sample = dataclasses.replace(run.sample, temperature=run.temperature(t))
        path = self._out / f"round-{t}" / "answers.jsonl"
        return answer(path, self._model(t - 1), run.prompts, run.dpo, sample=sample, **told)

    def _hold(self, t: int) -> Figures:
        """The held-out problems, by each model alike: greedy answers, so that only the weights tell them apart."""
        run = self._run
        assert run.eval_prompts is not None
        if not self._heldout(t).exists():
            part = self._out / f"heldout-{t}-answers.jsonl"
            greedy = dataclasses.replace(run.sample, temperature=0.0, top_k=None, top_p=None, min_p=None)
            answer(part, self._model(t), run.eval_prompts, run.dpo, sample=greedy, batch_size=run.batch_size, seed=0)
            rows = read_lines(part)
            marks = self._rights(rows, run.eval_prompts)
            write_lines(self._heldout(t), [row | {"right": right} for row, right in zip(rows, marks, strict=True)])
        return self._accuracy(t)

    def _accuracy(self, t: int) -> dict[str, float]:
        marks = [row["right"] for row in read_lines(self._heldout(t))]
        low, high = share_interval(float(np.mean(marks)), len(marks))
        return {"accuracy": float(np.mean(marks)), "low": low, "high": high, "heldout": len(marks)}

    # ---------------------------------------------------------------- a round

    def _pair(self, t: int) -> Figures:
        """Right against wrong answers of each problem.

        An answer that was cut at its longest takes no part: an end would be learnt, or unlearnt, where there is none.
        """
        run, counts = self._run, Counter[str]()
        rows = read_lines(self._out / f"round-{t}" / "answers.jsonl")
        marks = dict(zip(map(_place, rows), self._rights(rows, run.prompts), strict=True))
        pairs: list[Row] = []
        problems: dict[int, list[Row]] = {}
        for row in rows:
            problems.setdefault(row["row"], []).append(row)
        for number, group in problems.items():
            reason, winners, losers = sides(group, [marks[_place(row)] for row in group])
            counts[reason] += 1
            if reason == "used":
                rng = np.random.default_rng([run.seed, t, number])
                drawn = draw_pairs(winners, losers, run.pairs_per_prompt, rng)
                pairs += [{"row": number, **pair_row(group[0]["prompt"], *both)} for both in drawn]
        told = {name: counts[name] for name in COUNTS} | {"problems": counts.total(), "pairs": len(pairs)}
        told["cut"] = sum(row["finish_reason"] == CUT for row in rows)
        if not pairs:
            why = ", ".join(f"{told[reason]} {reason}" for reason in report.REASONS)
            raise InputError(
                f"{run.prompts}: M{t - 1} gives no problem a right and a wrong answer that end ({why}; {told['cut']} of"
                f" {len(rows)} answers are cut); give other problems, more --samples, or a larger"
                " --sample.max_new_tokens"
            )
        right = sum(marks.values()) / len(marks)
        write_json(self._counts(t), told | {"share right": right})
        write_lines(self._out / f"round-{t}" / "pairs.jsonl", pairs)
        return told | {"share right": right}

    def _counts(self, t: int) -> Path:
        return self._out / f"round-{t}" / "counts.json"

    def _train(self, t: int) -> Figures:
        """The reference is `model` itself, where none is named."""
        pairs, before = self._out / f"round-{t}" / "pairs.jsonl", str(self._model(t - 1))
        return trained(dpo.train, self._run.dpo, pairs, Path(self._model(t)), report.TRAINED, model=before)

    # ---------------------------------------------------------------- the table

    def _table(self) -> Figures:
        run, rows = self._run, list[Row]()
        for t in range(run.rounds + 1):
            row: Row = {"model": f"M{t}"}
            if t:
                row |= json.loads(self._counts(t).read_text()) | {"temperature": run.temperature(t)}
                row |= last_figures(Path(self._model(t)), report.TRAINED)
            rows.append(row | (self._accuracy(t) if run.eval_prompts is not None else {}))
        summary = {"model": run.model, "prompts": run.prompts, "match": run.match, "seed": run.seed, "rounds": rows}
        report.write(self._out, summary, [Path(self._model(t)) for t in range(1, run.rounds + 1)])
        write_json(self._out / "summary.json", summary)
        if run.eval_prompts is None:
            return {f"pairs of round {t}": rows[t]["pairs"] for t in range(1, run.rounds + 1)}
        return {f"accuracy of {row['model']}": row["accuracy"] for row in rows}


def sides(group: Sequence[Row], marks: Sequence[bool]) -> tuple[str, list[str], list[str]]:
    """(reason, right, wrong): the different whole answers to a problem, and "used", or why there is no pair of them.

    marks: which of the rows `group` are right. Those that are cut or blank have no side.
    """
    right = [row for row, mark in zip(group, marks, strict=True) if mark]
    wrong = [row for row, mark in zip(group, marks, strict=True) if not mark]
    winners, losers = (
        list(dict.fromkeys(row["response"] for row in side if row["finish_reason"] != CUT and row["response"].strip()))
        for side in (right, wrong)
    )
    all_right, all_wrong, no_winner, no_loser = report.REASONS
    if not right:
        reason = all_wrong
    elif not wrong:
        reason = all_right
    else:
        reason = no_winner if not winners else no_loser if not losers else "used"
    return reason, winners, losers


def _place(row: Row) -> tuple[int, int]:
    return row["row"], row["sample"]
