"""`dpo-jax recipe zephyr`: Zephyr (Tunstall et al. 2023, arXiv 2310.16944): dSFT, AI feedback, dDPO, in stages.

dsft/                 a teacher's dialogues: a run of `dpo-jax recipe dsft`
sft/                  distilled SFT on them
aif/                  responses of a pool, rated: a run of `dpo-jax recipe aif`
pairs.jsonl           its pairs to learn from; heldout.jsonl, heldout_prompts.jsonl: whole prompts that are held out
dpo/                  distilled DPO from sft/
before.jsonl, after.jsonl    what sft/ and dpo/ answer to the held-out prompts, with the same random numbers
verdicts.jsonl        which answer is better, by the judge
eval.json             accuracy on held-out pairs, KL(dpo, sft), repetition
summary.json, report.html
"""

import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.commands import dpo, sft
from dpo_jax.commands.eval import evaluate
from dpo_jax.commands.recipes import aif, dsft
from dpo_jax.commands.recipes.chain import answer, perform, trained
from dpo_jax.commands.recipes.heldout_comparisons import parted
from dpo_jax.config import AIFRun, DSFTRun, EvalRun, ZephyrRun
from dpo_jax.data.rows.preferences import parse_prompt
from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_json
from dpo_jax.files.jsonl import read_lines, write_lines
from dpo_jax.files.stages import Figures, Stage
from dpo_jax.judge.asked.judging import Item
from dpo_jax.report import zephyr as zephyr_report
from dpo_jax.report.text_health import health
from dpo_jax.report.win_rates import raw_figures
from dpo_jax.weights.tokenizer import load_tokenizer

_SHARE = {"a": 1.0, "b": 0.0, "tie": 0.5}
_OPTION = re.compile(r"(?<![\w/-])--([a-z]\w*)")
_OWN = {"dsft": {"prompts": "seeds", "out": "out"}, "aif": {name: name for name in ("prompts", "pool", "judge", "out")}}
"""Options of a stage's command that this one has under a name of its own."""
_ENDPOINT = re.compile(r"(?<![\w./-])endpoint\.(?=[a-z_])")


def recipe(run: ZephyrRun) -> Path:
    """The `recipe zephyr` command; returns its folder. See the module for the stages. Raises `InputError`."""
    return perform("zephyr", run, lambda run, out: Zephyr(run, out).stages(), zephyr_report.show)


class Zephyr:
    """The stages."""

    def __init__(self, run: ZephyrRun, out: Path):
        """Raises `InputError` for what the teacher, the pool or the judge cannot do, before anything is done."""
        self._run, self._out = run, out
        self._dsft = dataclasses.replace(run.dsft, prompts=run.seeds, out=str(out / "dsft"))
        told = {"prompts": run.prompts, "pool": run.pool, "judge": run.judge}
        self._aif = dataclasses.replace(run.aif, **told, out=str(out / "aif"))
        _named("dsft", lambda: dsft.DSFT(self._dsft, out / "dsft"))
        judge = _named("aif", lambda: aif.AIF(self._aif, out / "aif", later=out / "sft"))
        asked = judge.prompt_to_compare
        self._asked = None if asked is None else {"name": asked.name, "ask": asked.ask, "published": asked.published}

    def stages(self) -> list[Stage]:
        """All of them, in order."""
        run, out = self._run, self._out
        dialogues, pairs, heldout = out / "dsft" / "data.jsonl", out / "pairs.jsonl", out / "heldout.jsonl"
        asked, before, after = (out / f"{name}.jsonl" for name in ("heldout_prompts", "before", "after"))
        judge = run.judge.removeprefix("judge:")
        told: dict[str, Any] = {"sample": run.sample, "batch_size": run.batch_size, "seed": run.seed}
        answers = [
            Stage(f"answers {path.stem}", (model, asked), path, partial(answer, path, model, asked, run.dpo, **told))
            for model, path in ((out / "sft", before), (out / "dpo", after))
        ]
        every = (before, after, out / "verdicts.jsonl", out / "eval.json")
        return [
            Stage("dialogues of the teacher", (run.seeds,), out / "dsft", self._dialogues),
            Stage("dSFT", (run.model, dialogues), out / "sft", self._sft),
            Stage("AI feedback", (run.prompts, run.pool, judge), out / "aif", self._feedback),
            Stage("held out", (out / "aif" / "pairs.jsonl",), asked, self._hold_out),
            Stage("dDPO", (out / "sft", pairs), out / "dpo", self._dpo),
            *answers,
            Stage("verdicts", (before, after, judge), out / "verdicts.jsonl", self._compare),
            Stage("KL and accuracy", (out / "sft", out / "dpo", heldout), out / "eval.json", self._evaluate),
            Stage("report", every, out / "summary.json", self._report),
        ]

    def _dialogues(self) -> Figures:
        _named("dsft", lambda: dsft.recipe(self._dsft))
        return {"dialogues": len(read_lines(self._out / "dsft" / "data.jsonl"))}

    def _sft(self) -> Figures:
        run, out = self._run, self._out
        dialogues = out / "dsft" / "data.jsonl"
        return trained(sft.train, run.sft, dialogues, out / "sft", {"loss": "loss"}, model=run.model)

    def _feedback(self) -> Figures:
        _named("aif", lambda: aif.recipe(self._aif))
        return {"pairs": len(read_lines(self._out / "aif" / "pairs.jsonl"))}

    def _hold_out(self) -> Figures:
        learnt, heldout = parted(read_lines(self._out / "aif" / "pairs.jsonl"), self._run.heldout, self._run.seed)
        if not learnt or not heldout:
            raise InputError(
                f"{self._out}: --heldout {self._run.heldout} holds out {len(heldout)} of {len(learnt) + len(heldout)}"
                " pairs; choose a share that leaves some on both sides"
            )
        prompts = {json.dumps(row["prompt"]): {"prompt": row["prompt"]} for row in heldout}
        write_lines(self._out / "pairs.jsonl", learnt)
        write_lines(self._out / "heldout.jsonl", heldout)
        write_lines(self._out / "heldout_prompts.jsonl", prompts.values())
        return {"pairs": len(learnt), "held out": len(heldout), "their prompts": len(prompts)}

    def _dpo(self) -> Figures:
        out, names = self._out, {"loss": "loss", "held-out accuracy": "eval_rewards/accuracies"}
        told = {"model": str(out / "sft"), "eval_data": str(out / "heldout.jsonl")}
        return trained(dpo.train, self._run.dpo, out / "pairs.jsonl", out / "dpo", names, **told)

    def _compare(self) -> Figures:
        """The answer of dpo/ stands first."""
        before, after = (read_lines(self._out / f"{name}.jsonl") for name in ("before", "after"))
        items = [
            Item(new["row"], parse_prompt({"prompt": new["prompt"]})[0], (new["response"], old["response"]))
            for old, new in zip(before, after, strict=True)
        ]
        judge = aif.AIF(self._aif, self._out / "aif")
        found = judge.compared(items)
        rows = [{"row": item.number, **one.as_row()} for item, one in zip(items, found, strict=True)]
        write_lines(self._out / "verdicts.jsonl", rows)
        return {"verdicts": sum(one.verdict is not None for one in found), "of": len(found)}

    def _evaluate(self) -> Figures:
        run, out = self._run, self._out
        found = evaluate(
            EvalRun(
                model=str(out / "dpo"),
                reference=str(out / "sft"),
                data=dataclasses.replace(run.dpo.data, files=str(out / "heldout.jsonl")),
                out=str(out / "eval.json"),
                samples=len(read_lines(out / "heldout_prompts.jsonl")),
                seed=run.seed,
                sample=run.sample,
                batch_size=run.batch_size,
                dtype=run.dpo.train.dtype,
                mesh=run.dpo.mesh,
            )
        )
        return {name: found[name] for name in ("eval_rewards/accuracies", "eval_kl") if name in found}

    def _report(self) -> Figures:
        run, out = self._run, self._out
        verdicts = read_lines(out / "verdicts.jsonl")
        given = [_SHARE[row["verdict"]] for row in verdicts if row["verdict"] is not None]
        tokenizer = load_tokenizer(str(out / "sft"))
        texts = {name: read_lines(out / f"{name}.jsonl") for name in ("before", "after")}
        figures = json.loads((out / "eval.json").read_text())
        summary = {
            "model": run.model,
            "judge": run.judge,
            "prompt": self._asked,
            "dialogues": len(read_lines(out / "dsft" / "data.jsonl")),
            "pairs": len(read_lines(out / "pairs.jsonl")),
            "held-out prompts": len(verdicts),
            "without a verdict": len(verdicts) - len(given),
            "win_rate": raw_figures(np.asarray(given), seed=run.seed) if given else None,
            "eval": {name: value for name, value in figures.items() if isinstance(value, float)},
            "health": {
                name: health([tokenizer(row["response"], add_special_tokens=False)["input_ids"] for row in rows])
                for name, rows in texts.items()
            },
        }
        feedback = json.loads((out / "aif" / "report.json").read_text())
        zephyr_report.write(out, summary, texts["before"], texts["after"], verdicts, feedback)
        write_json(out / "summary.json", summary)
        return {} if summary["win_rate"] is None else {"win rate": summary["win_rate"]["win_rate"]}


def _named(section: str, work: Callable[[], Any]) -> Any:
    """`work()`, whose messages name options of its own command: they are called as they are in this one.

    What is no option of that command (of a model in the pool, say) stays as it is.
    """
    options = {field.name for field in dataclasses.fields({"dsft": DSFTRun, "aif": AIFRun}[section])}

    def renamed(found: re.Match[str]) -> str:
        name = found[1]
        return f"--{_OWN[section].get(name, f'{section}.{name}')}" if name in options else found[0]

    try:
        return work()
    except InputError as error:
        text = _OPTION.sub(renamed, str(error))
        raise InputError(_ENDPOINT.sub("dsft.endpoint.", text) if section == "dsft" else text) from error
