"""`dpo-jax recipe llama3`: the rounds of Llama 3's post-training (Llama 3 report 2024, section 4.1), in stages.

    given/                    --preferences, some prompts held out
    sft/                      V0: the pre-trained model, fine-tuned on --sft_data
    for r = 1 ... R:
        v{r-1}/               V(r-1) answers the prompts; the judge scores its answers; graded pairs of them
        round-{r}/reward/     a reward model from the pre-trained one, on all comparisons so far, without a margin
        round-{r}/rejection/  K answers a prompt of the best model so far; SFT of the pre-trained model on the bests
        round-{r}/dpo/        DPO on the newest pairs that are better or significantly better; dpo-2 ...: --average_over
        round-{r}/average/    V(r): their average; without --average_over V(r) is round-{r}/dpo
    v{R}/                     what the last version answers
    summary.json, report.html

With `--stages dpo` V0 is the model that was given, and each round is DPO from the best model so far.
"""

import dataclasses
import shutil
from functools import cached_property, partial
from pathlib import Path

from dpo_jax.commands import dpo, rejection, reward, sft
from dpo_jax.commands.average import average
from dpo_jax.commands.recipes import heldout_comparisons as comparisons
from dpo_jax.commands.recipes.chain import answer, perform, trained
from dpo_jax.commands.recipes.judged_answers import judge_answers, read_prompts
from dpo_jax.config import AverageRun, DPORun, Llama3Run
from dpo_jax.data.rows.dialogues import CUT
from dpo_jax.data.rows.ratings import RATINGS
from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.data.sources.files import read_rows
from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_json
from dpo_jax.files.jsonl import Row, read_lines, write_lines
from dpo_jax.files.log import say
from dpo_jax.files.stages import Figures, Stage, last_figures
from dpo_jax.judge.rewards.continuations import make_pairs
from dpo_jax.judge.rewards.functions import check_reward
from dpo_jax.report import llama3 as report
from dpo_jax.report.statistics import interval, per_prompt

_TAUGHT = RATINGS[2:]
"""Grades of the pairs that DPO learns: better, significantly better."""


def recipe(run: Llama3Run) -> Path:
    """The `recipe llama3` command; returns its folder. See the module for the stages. Raises `InputError`."""
    return perform("llama3", run, lambda run, out: Llama3(run, out).stages(), report.show)


class Llama3:
    """The stages."""

    def __init__(self, run: Llama3Run, out: Path):
        self._run, self._out, self._whole = run, out, run.stages == "all"
        if not run.average_over:
            say("--average_over names no other model: one model a round, and no averaging")
        check_reward(run.judge, dataclasses.replace(run.rejection, out=run.out))

    def stages(self) -> list[Stage]:
        """All of them, in order."""
        run, stages = self._run, list[Stage]()
        if run.preferences is not None:
            stages.append(Stage("given", (run.preferences,), self._out / "given" / "heldout.jsonl", self._given))
        if run.sft_data is not None:
            stages.append(Stage("V0: SFT", (run.model, run.sft_data), self._out / "sft", self._sft))
        for r in range(1, run.rounds + 1):
            stages += [*self._answers(r - 1), *self._round(r)]
        stages += self._answers(run.rounds)
        judged = tuple(self._judged(v) for v in range(run.rounds + 1))
        stages.append(Stage("table", judged, self._out / "summary.json", self._table))
        return stages

    def _round(self, r: int) -> list[Stage]:
        run, folder, newest = self._run, self._folder(r), self._out / f"v{r - 1}"
        judged = tuple(self._judged(v) for v in range(r))
        pairs = newest / "heldout.jsonl"
        stages = [Stage(f"V{r - 1} pairs", (judged[-1],), pairs, partial(self._pairs, r - 1))]
        before: tuple[str | Path, ...] = (*map(str, map(self._model, range(r))), *judged)
        if self._whole:
            read = (run.model, *(self._out / name / "learnt.jsonl" for name in self._sets(r)))
            stages.append(Stage(f"reward model {r}", read, folder / "reward", partial(self._reward, r)))
            read = (*before, run.model, run.prompts, folder / "reward")
            work = partial(self._reject, r)
            stages.append(Stage(f"round {r}: SFT on the bests", read, folder / "rejection", work))
            before = (folder / "rejection",)
        for i, (options, every) in enumerate(self._variants):
            sets = [f"v{v}" for v in (range(r) if every else (r - 1,))]
            read = (*before, *(self._out / name / "taught.jsonl" for name in sets))
            name = f"round {r}: DPO" + (f", {run.average_over[i - 1]}" if i else "")
            stages.append(Stage(name, read, self._dpo_out(r, i), partial(self._dpo, r, i, options, sets)))
        if run.average_over:
            made = tuple(self._dpo_out(r, i) for i in range(len(self._variants)))
            stages.append(Stage(f"V{r}: average", made, folder / "average" / "average.json", partial(self._mean, r)))
        return stages

    # ---------------------------------------------------------------- where things are

    @cached_property
    def _variants(self) -> list[tuple[DPORun, bool]]:
        """The DPO stage itself, and those that are averaged with it."""
        return [(self._run.dpo, False), *map(self._run.variant, self._run.average_over)]

    def _folder(self, r: int) -> Path:
        return self._out / f"round-{r}"

    def _dpo_out(self, r: int, i: int) -> Path:
        return self._folder(r) / (f"dpo-{i + 1}" if i else "dpo")

    def _model(self, version: int) -> str | Path:
        if version:
            return self._folder(version) / ("average" if self._run.average_over else "dpo")
        return self._out / "sft" if self._whole else self._run.model

    def _judged(self, version: int) -> Path:
        return self._out / f"v{version}" / "judged.jsonl"

    def _sets(self, r: int) -> list[str]:
        """The sets of comparisons that reward model r learns from."""
        return [*(["given"] if self._run.preferences is not None else []), *(f"v{v}" for v in range(r))]

    def _best(self, r: int) -> int:
        """The version before round r whose answers the judge likes best; the newest of equals."""
        return max(range(r), key=lambda v: (self._score(v)["score"], v))

    # ---------------------------------------------------------------- what was given, and V0

    def _given(self) -> Figures:
        assert self._run.preferences is not None
        rows = [ranked(row, self._run.preferences, number) for number, row in read_rows(self._run.preferences)]
        learnt, heldout = comparisons.parted(rows, self._run.heldout, self._run.seed)
        write_lines(self._out / "given" / "learnt.jsonl", learnt)
        write_lines(self._out / "given" / "heldout.jsonl", heldout)
        return {"comparisons": len(learnt), "held out": len(heldout), "edited": sum("responses" in row for row in rows)}

    def _sft(self) -> Figures:
        run = self._run
        assert run.sft_data is not None
        return trained(sft.train, run.sft, run.sft_data, self._out / "sft", {"loss": "loss"}, model=run.model)

    # ---------------------------------------------------------------- what the newest model writes

    @cached_property
    def _prompts(self) -> dict[int, Prompt]:
        return read_prompts(self._run.prompts)

    def _answers(self, version: int) -> list[Stage]:
        run, model, path = self._run, self._model(version), self._out / f"v{version}" / "answers.jsonl"
        sample = dataclasses.replace(run.rejection.sample, temperature=run.pair_temperature)
        setting = {"samples": run.pair_samples, "batch_size": run.batch_size, "seed": run.seed + version}
        work = partial(answer, path, model, run.prompts, run.rejection, sample=sample, **setting)
        judge = partial(self._judge, version)
        return [
            Stage(f"V{version} answers", (model, run.prompts), path, work),
            Stage(f"V{version} judged", (path, run.prompts, run.judge), self._judged(version), judge),
        ]

    def _judge(self, version: int) -> Figures:
        rows = read_lines(self._out / f"v{version}" / "answers.jsonl")
        judged = judge_answers(rows, self._prompts, self._run.judge, self._run.rejection, self._run.out)
        write_lines(self._judged(version), judged)
        return self._score(version) | {"no score": len(rows) - len(judged)}

    def _score(self, version: int) -> dict[str, float]:
        """Mean over prompts of the score of a version's answers, with its 95 % interval."""
        values = per_prompt(read_lines(self._judged(version)))
        low, high = interval(values, seed=self._run.seed)
        return {"score": float(values.mean()), "low": low, "high": high}

    def _pairs(self, version: int) -> Figures:
        """Best against worst, graded by quarters of the judge's gaps.

        An answer that was cut at its longest takes no part: an end would be learnt where there is none.
        """
        judged = read_lines(self._judged(version))
        whole = [row for row in judged if row["finish_reason"] != CUT]
        cut = len(judged) - len(whole)
        pairs = comparisons.rated(make_pairs(whole))
        learnt, heldout = comparisons.parted(pairs, self._run.heldout, self._run.seed)
        taught = [row for row in learnt if row["rating"] in _TAUGHT]
        if not taught or not heldout:
            raise InputError(
                f"V{version}: the judge {self._run.judge} tells answers apart for {len(pairs)} prompts, of which"
                f" {len(heldout)} are held out and {len(taught)} better or significantly better ({cut} of {len(judged)}"
                " answers are cut); give more prompts, another --heldout, or a larger --rejection.sample.max_new_tokens"
            )
        folder = self._out / f"v{version}"
        for name, rows in (("learnt", learnt), ("taught", taught), ("heldout", heldout)):
            write_lines(folder / f"{name}.jsonl", rows)
        found = {"pairs": len(pairs), "better or significantly better": len(taught), "held out": len(heldout)}
        return found | {"answers cut": cut}

    # ---------------------------------------------------------------- a round

    def _reward(self, r: int) -> Figures:
        """From the pre-trained model, on everything that there is to compare so far."""
        run, folder = self._run, self._folder(r)
        rows = [row for name in self._sets(r) for row in read_lines(self._out / name / "learnt.jsonl")]
        material, names = folder / "comparisons.jsonl", {"accuracy on the newest": "eval_accuracy"}
        write_lines(material, rows)
        told = {"model": run.model, "eval_data": str(self._out / f"v{r - 1}" / "heldout.jsonl")}
        figures = trained(reward.train, run.reward, material, folder / "reward", names, **told)
        return {"comparisons": len(rows), **figures}

    def _reject(self, r: int) -> Figures:
        """The best model so far writes, the pre-trained one learns."""
        run, folder, best = self._run, self._folder(r), self._best(r)
        figures = trained(
            rejection.train,
            run.rejection,
            run.prompts,
            folder / "rejection",
            {"reward of all": "rewards/mean", "of the best": "rewards/best"},
            model=str(self._model(best)),
            rejection=dataclasses.replace(run.rejection.rejection, student=run.model),
            reward=str(folder / "reward"),
        )
        return {"written by": f"V{best}", **figures}

    def _dpo(self, r: int, i: int, options: DPORun, sets: list[str]) -> Figures:
        out = self._dpo_out(r, i)
        source = self._folder(r) / f"{out.name}.jsonl"
        rows = [row for name in sets for row in read_lines(self._out / name / "taught.jsonl")]
        write_lines(source, rows)
        start = self._folder(r) / "rejection" if self._whole else self._model(self._best(r))
        names = {"loss": "loss", "chosen logp": "logps/chosen"}
        return {"pairs": len(rows), **trained(dpo.train, options, source, out, names, model=str(start))}

    def _mean(self, r: int) -> Figures:
        models = tuple(str(self._dpo_out(r, i) / "model") for i in range(len(self._variants)))
        # One that is there was written, whole, just before a kill: from the same models, whose stages are done.
        shutil.rmtree(self._folder(r) / "average", ignore_errors=True)
        average(AverageRun(models=models, to=str(self._folder(r) / "average")))
        return {"models": len(models)}

    # ---------------------------------------------------------------- the table

    def _table(self) -> Figures:
        versions: list[Row] = []
        for v in range(self._run.rounds + 1):
            row: Row = {"version": v, **self._score(v)}
            if v:
                row["pairs"] = len(read_lines(self._out / f"v{v - 1}" / "taught.jsonl"))
                row["written_by"] = self._best(v)
                if self._whole:
                    row |= last_figures(self._folder(v) / "reward", {"accuracy": "eval_accuracy"})
            versions.append(row)
        best = self._best(self._run.rounds + 1)
        summary = {
            "model": self._run.model,
            "judge": self._run.judge,
            "stages": self._run.stages,
            "averaged": len(self._variants),
            "best": best,
            "best_model": str(self._model(best)),
            "versions": versions,
        }
        runs = [self._dpo_out(r, 0) for r in range(1, self._run.rounds + 1)]
        report.write(self._out, summary, runs)
        write_json(self._out / "summary.json", summary)
        return {f"V{row['version']}": row["score"] for row in versions}


def ranked(row: Row, source: str, number: int) -> Row:
    """A comparison with an edit as a list, the best first: edited, chosen, rejected. Others as they are.

    Raises `InputError` for an edit whose row is no prompt with two texts.
    """
    if row.get("edited") is None:
        return {name: value for name, value in row.items() if name != "edited"}
    texts = [row.get(name) for name in ("edited", "chosen", "rejected")]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{source}: row {number}: 'edited' stands beside 'chosen' and 'rejected', all of them texts")
    head = {name: row[name] for name in ("prompt", "messages", "system") if name in row}
    return head | {"responses": texts}
