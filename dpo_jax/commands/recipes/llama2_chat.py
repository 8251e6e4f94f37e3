"""`dpo-jax recipe llama2_chat`: Llama 2-Chat's training (Touvron et al. 2023, arXiv 2307.09288, section 3), in stages.

    given/                  the comparisons of --helpful_data and --safety_data, some prompts held out
    sft/                    V0: supervised fine-tuning
    for v = 0, 1 ... R:
        v{v}/               the newest model Vv answers the prompts; the judges score its answers; pairs of them
        reward-{v+1}/       reward models from V0, on all comparisons so far
        accuracy-*.json     of every reward model on the held-out comparisons of every distribution
        rejection-{v+1}/    V(v+1): rejection sampling from Vv, its pool carried on      while v < R
        ppo/                V(R+1): PPO from VR                                          at v = R
    v{R+1}/                 what the last version answers
    summary.json, report.html

In the paper people compare the answers of the newest model each week; here a judge does (`--judge`), a function of
texts. The accuracy of reward model r on what V(s) writes shows the shift of distribution: reward model r has learnt
from V0 ... V(r-1), and later versions write what it has not seen.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.commands import ppo, rejection, reward, sft
from dpo_jax.commands.recipes import heldout_comparisons as comparisons
from dpo_jax.commands.recipes.chain import answer, perform, trained
from dpo_jax.commands.recipes.judged_answers import judge_answers, read_prompts
from dpo_jax.config import Llama2ChatRun, RewardRun, TrainingRun
from dpo_jax.data.rows.dialogues import CUT
from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.data.sources.files import read_rows
from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_json
from dpo_jax.files.jsonl import Row, read_lines, write_lines
from dpo_jax.files.stages import Figures, Stage
from dpo_jax.judge.rewards.continuations import make_pairs
from dpo_jax.judge.rewards.functions import check_reward
from dpo_jax.report import llama2_chat as llama2_chat_report

HELPFUL, SAFE = "helpful", "safety"


def recipe(run: Llama2ChatRun) -> Path:
    """The `recipe llama2_chat` command; returns its folder. See the module for the stages. Raises `InputError`."""
    return perform("llama2_chat", run, lambda run, out: Llama2Chat(run, out).stages(), llama2_chat_report.show)


@dataclass(frozen=True)
class Kind:
    """One of the two sorts of comparison.

    Attributes:
      name: helpful or safety.
      source: the comparisons that were given.
      judge: compares the answers of the newest model.
      options: of its reward models.
    """

    name: str
    source: str
    judge: str
    options: RewardRun


class Llama2Chat:
    """The stages."""

    def __init__(self, run: Llama2ChatRun, out: Path):
        self._run, self._out, self._rounds = run, out, run.recipe.rounds
        self._kinds = [Kind(HELPFUL, run.helpful_data, run.judge, run.helpful)]
        if run.safety_data is not None and run.safety_judge is not None:
            self._kinds.append(Kind(SAFE, run.safety_data, run.safety_judge, run.safety))
        for kind in self._kinds:
            check_reward(kind.judge, dataclasses.replace(run.ppo, out=run.out))

    def stages(self) -> list[Stage]:
        """All of them, in order."""
        run, out = self._run, self._out
        stages = [
            Stage(f"given {kind.name}", (kind.source,), self._heldout("given", kind), partial(self._split, kind))
            for kind in self._kinds
        ]
        stages.append(Stage("V0: SFT", (run.model, run.sft_data), out / "sft", self._sft))
        for version in range(self._rounds + 1):
            stages += self._answers(version)
            stages.append(self._pairs_stage(version))
            number = version + 1
            known = self._distributions(version)
            if number > 1:
                # The reward models so far, on what the newest version writes: they have not seen it.
                cells = [(r, f"v{version}") for r in range(1, number)]
                stages.append(self._accuracy_stage(f"accuracy on V{version}", f"accuracy-v{version}.json", cells))
            stages += [self._reward_stage(number, kind) for kind in self._kinds]
            cells = [(number, name) for name in known]
            name = f"accuracy of reward model {number}"
            stages.append(self._accuracy_stage(name, f"accuracy-reward-{number}.json", cells))
            stages.append(self._next_version(number))
        stages += self._answers(self._rounds + 1)
        judged = [out / f"v{version}" / "judged.jsonl" for version in range(self._rounds + 2)]
        stages.append(Stage("table", tuple(judged), out / "summary.json", self._table))
        return stages

    # ---------------------------------------------------------------- where things are

    def _model(self, version: int) -> Path:
        """The run folder of V0, V1 ..."""
        if version == 0:
            return self._out / "sft"
        return self._out / ("ppo" if version > self._rounds else f"rejection-{version}")

    def _distributions(self, version: int) -> list[str]:
        """The sets of comparisons that there are once Vv has answered."""
        return ["given", *(f"v{v}" for v in range(version + 1))]

    def _learnt(self, distribution: str, kind: Kind) -> Path:
        return self._out / distribution / f"{kind.name}.jsonl"

    def _heldout(self, distribution: str, kind: Kind) -> Path:
        return self._out / distribution / f"{kind.name}_heldout.jsonl"

    def _reward(self, number: int, kind: Kind) -> Path:
        return self._out / f"reward-{number}" / kind.name

    def _material(self, number: int, kind: Kind) -> Path:
        """What reward model `number` learns from."""
        return self._out / f"reward-{number}" / f"{kind.name}.jsonl"

    # ---------------------------------------------------------------- what was given, and V0

    def _split(self, kind: Kind) -> Figures:
        rows = (row for _, row in read_rows(kind.source))
        learnt, heldout = comparisons.parted(rows, self._run.recipe.heldout, self._run.seed)
        if not learnt or not heldout:
            raise InputError(
                f"{kind.source}: --recipe.heldout {self._run.recipe.heldout} holds out {len(heldout)} of"
                f" {len(learnt) + len(heldout)} rows; choose a share that leaves some on both sides"
            )
        write_lines(self._learnt("given", kind), learnt)
        write_lines(self._heldout("given", kind), heldout)
        return {"comparisons": len(learnt), "held out": len(heldout)}

    def _sft(self) -> Figures:
        run = self._run
        return trained(sft.train, run.sft, run.sft_data, self._out / "sft", {"loss": "loss"}, model=run.model)

    # ---------------------------------------------------------------- what the newest model writes

    def _answers(self, version: int) -> list[Stage]:
        folder, model = self._out / f"v{version}", self._model(version)
        answers, judged = folder / "answers.jsonl", folder / "judged.jsonl"
        inputs = (answers, self._run.prompts, *(kind.judge for kind in self._kinds))
        return [
            Stage(f"V{version} answers", (model, self._run.prompts), answers, partial(self._answer, version)),
            Stage(f"V{version} judged", inputs, judged, partial(self._judge, version)),
        ]

    def _answer(self, version: int) -> Figures:
        run, options = self._run, self._run.recipe
        return answer(
            self._out / f"v{version}" / "answers.jsonl",
            self._model(version),
            run.prompts,
            run.ppo,
            samples=options.pair_samples,
            sample=dataclasses.replace(run.ppo.sample, temperature=options.pair_temperature),
            batch_size=options.pair_batch_size,
            seed=run.seed + version,
        )

    @cached_property
    def _prompts(self) -> dict[int, Prompt]:
        return read_prompts(self._run.prompts)

    def _judge(self, version: int) -> Figures:
        """Each answer gets the score of the judge that its prompt belongs to."""
        rows = read_lines(self._out / f"v{version}" / "answers.jsonl")
        judged: list[Row] = []
        for kind in self._kinds:
            own = [row for row in rows if self._kind_of(row) == kind.name]
            if not own:
                raise InputError(
                    f"{self._run.prompts}: no prompt is for the {kind.name} judge; tag some, and not all, with"
                    ' "safety": true'
                )
            found = judge_answers(own, self._prompts, kind.judge, self._run.ppo, self._run.out)
            judged += [row | {"judge": kind.name} for row in found]
        write_lines(self._out / f"v{version}" / "judged.jsonl", judged)
        return self._scores(version)

    def _kind_of(self, row: Row) -> str:
        return SAFE if len(self._kinds) > 1 and self._prompts[row["row"]].columns.get("safety") is True else HELPFUL

    def _scores(self, version: int) -> dict[str, float]:
        """Mean score of a version's answers, by each judge."""
        rows = read_lines(self._out / f"v{version}" / "judged.jsonl")
        by_kind = {kind.name: [row["score"] for row in rows if row["judge"] == kind.name] for kind in self._kinds}
        return {f"{name} score": float(np.mean(scores)) for name, scores in by_kind.items()}

    def _pairs_stage(self, version: int) -> Stage:
        judged = self._out / f"v{version}" / "judged.jsonl"
        proof = self._heldout(f"v{version}", self._kinds[-1])
        return Stage(f"V{version} pairs", (judged,), proof, partial(self._pairs, version))

    def _pairs(self, version: int) -> Figures:
        judged = read_lines(self._out / f"v{version}" / "judged.jsonl")
        # What was cut has no end, and would be learnt as one that has.
        rows = [row for row in judged if row["finish_reason"] != CUT]
        figures: dict[str, float] = {"answers cut": len(judged) - len(rows)}
        for kind in self._kinds:
            pairs = comparisons.rated(make_pairs([row for row in rows if row["judge"] == kind.name]))
            parts = comparisons.parted(pairs, self._run.recipe.heldout, self._run.seed)
            if not all(parts):
                raise InputError(
                    f"V{version}: the {kind.name} judge {kind.judge} tells answers apart for {len(pairs)} prompts, of"
                    f" which {len(parts[1])} are held out ({len(judged) - len(rows)} of {len(judged)} answers are cut);"
                    " give more prompts, another --recipe.heldout, or more --ppo.sample.max_new_tokens"
                )
            write_lines(self._learnt(f"v{version}", kind), parts[0])
            write_lines(self._heldout(f"v{version}", kind), parts[1])
            figures |= {f"{kind.name} pairs": len(parts[0]), f"{kind.name} held out": len(parts[1])}
        return figures

    # ---------------------------------------------------------------- reward models

    def _reward_stage(self, number: int, kind: Kind) -> Stage:
        read = self._kinds if kind.options.mix_data is not None else [kind]
        names = self._distributions(number - 1)
        inputs = [self._out / "sft", *(self._learnt(name, each) for each in read for name in names)]
        work = partial(self._train_reward, number, kind)
        return Stage(f"{kind.name} reward model {number}", tuple(inputs), self._reward(number, kind), work)

    def _train_reward(self, number: int, kind: Kind) -> Figures:
        """From V0, on everything that there is to compare so far."""
        for each in self._kinds:  # the safety model mixes helpfulness in
            names = self._distributions(number - 1)
            rows = [row for name in names for row in read_lines(self._learnt(name, each))]
            write_lines(self._material(number, each), rows)
        material, mixes = self._material(number, kind), kind.name == SAFE and kind.options.mix_data is not None
        figures = trained(
            reward.train,
            kind.options,
            material,
            self._reward(number, kind),
            {"accuracy on the newest": "eval_accuracy"},
            model=str(self._out / "sft"),
            mix_data=str(self._material(number, self._kinds[0])) if mixes else None,
            eval_data=str(self._heldout(f"v{number - 1}", kind)),
            holdout=None,
        )
        return {"comparisons": len(read_lines(material)), **figures}

    def _accuracy_stage(self, name: str, file: str, cells: Sequence[tuple[int, str]]) -> Stage:
        rewards = [self._reward(number, kind) for number, _ in cells for kind in self._kinds]
        sets = [self._heldout(distribution, kind) for _, distribution in cells for kind in self._kinds]
        inputs = tuple(dict.fromkeys((*rewards, *sets)))
        return Stage(name, inputs, self._out / file, partial(self._measure, self._out / file, cells))

    def _measure(self, path: Path, cells: Sequence[tuple[int, str]]) -> Figures:
        found = []
        for kind in self._kinds:
            for number in dict.fromkeys(number for number, _ in cells):
                names = [name for other, name in cells if other == number]
                sources = [self._heldout(name, kind) for name in names]
                figures = comparisons.accuracies(self._reward(number, kind), sources, kind.options)
                head = {"kind": kind.name, "reward_model": number}
                found += [head | {"distribution": name} | each for name, each in zip(names, figures, strict=True)]
        write_json(path, found)
        return {f"{row['kind']} {row['reward_model']} on {row['distribution']}": row["accuracy"] for row in found}

    # ---------------------------------------------------------------- policies

    def _next_version(self, number: int) -> Stage:
        rewards = [self._reward(number, kind) for kind in self._kinds]
        before = self._model(number - 1)
        inputs: list[str | Path] = [before, self._run.prompts, *rewards]
        if number > self._rounds:
            return Stage(f"V{number}: PPO", tuple(inputs), self._model(number), partial(self._ppo, number))
        if number > 1:
            inputs.append(before / "pool.jsonl")
        work = partial(self._reject, number)
        return Stage(f"V{number}: rejection sampling", tuple(inputs), self._model(number), work)

    def _version(
        self, number: int, train: Callable[[Any], Path], options: TrainingRun, figures: Mapping[str, str], **told: Any
    ) -> Figures:
        """Train a version: from the one before, by the newest reward models."""
        told |= {"model": str(self._model(number - 1)), "reward": str(self._reward(number, self._kinds[0]))}
        told["safety_reward"] = str(self._reward(number, self._kinds[1])) if len(self._kinds) > 1 else None
        return trained(train, options, self._run.prompts, self._model(number), figures, **told)

    def _reject(self, number: int) -> Figures:
        options = self._run.rejection
        before = str(self._model(number - 1) / "pool.jsonl") if number > 1 else None
        inner = dataclasses.replace(options.rejection, pool_from=before if options.rejection.pool == "all" else None)
        names = {"reward of all": "rewards/mean", "of the best": "rewards/best", "in the pool": "pool/size"}
        return self._version(number, rejection.train, options, names, rejection=inner)

    def _ppo(self, number: int) -> Figures:
        # Two rewards as one are whitened: their mean is 0, and those that it was made of tell more.
        parts = {"helpfulness": "rewards/helpfulness", "safety": "rewards/safety"}
        names = {"reward": "objective/scores", "KL": "objective/kl"}
        return self._version(number, ppo.train, self._run.ppo, names | (parts if len(self._kinds) > 1 else {}))

    # ---------------------------------------------------------------- the table

    def _table(self) -> Figures:
        versions = []
        for version in range(self._rounds + 2):
            how = "SFT" if version == 0 else "PPO" if version > self._rounds else "rejection sampling"
            versions.append({"version": version, "by": how, **self._scores(version)})
        files = sorted(self._out.glob("accuracy-*.json"))
        accuracy = [row for path in files for row in json.loads(path.read_text())]
        accuracy.sort(key=lambda row: (row["kind"], row["reward_model"], self._place(row["distribution"])))
        summary = {"model": self._run.model, "judge": self._run.judge, "versions": versions, "accuracy": accuracy}
        llama2_chat_report.write(self._out, summary, [self._model(version) for version in range(self._rounds + 2)])
        write_json(self._out / "summary.json", summary)
        return {f"V{row['version']}": row[f"{HELPFUL} score"] for row in versions}

    def _place(self, distribution: str) -> int:
        return self._distributions(self._rounds).index(distribution)
