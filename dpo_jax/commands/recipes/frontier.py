"""`dpo-jax recipe frontier`: the DPO paper's Figure 2 (left) in small (Rafailov et al. 2023, section 6.1).

    samples.jsonl     the reference goes on with openings of reviews, several times each, and the judge scores them
    pairs.jsonl       of each opening the best and the worst sample; chosen.jsonl: the best alone; openings.jsonl
    unseen.jsonl      what the reference writes to openings that nothing is learnt from: for best-of-n
    dpo-*/, sft/, ppo-*/   runs like any other, all from the reference, with checkpoints along training
    points/*.jsonl    what each of these checkpoints writes to the unseen openings
    results.jsonl, summary.json, frontier.png, report.html

All texts are sampled at one temperature, at which the KL divergence is measured too; the points of the runs are drawn
with the same random numbers.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from dpo_jax.align.rejection import order_statistic
from dpo_jax.commands import dpo, ppo, sft
from dpo_jax.commands.recipes.chain import perform
from dpo_jax.complete.writing.openings import review_openings
from dpo_jax.complete.writing.writer import raw_writer
from dpo_jax.config import (
    CheckpointConfig,
    DataConfig,
    DPOLossConfig,
    DPORun,
    FrontierConfig,
    FrontierRun,
    OptimizerConfig,
    PPOLossConfig,
    PPORun,
    SampleConfig,
    SFTDataConfig,
    SFTRun,
    TrainConfig,
    TrainingRun,
)
from dpo_jax.data.tokens.templates import RAW
from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_json
from dpo_jax.files.jsonl import Row, read_lines, write_lines
from dpo_jax.files.stages import Figures, Stage
from dpo_jax.judge.rewards.continuations import make_pairs, write_judged
from dpo_jax.judge.rewards.functions import RewardFunction, open_reward
from dpo_jax.mesh import make_mesh
from dpo_jax.model.llama import Llama
from dpo_jax.model.variables import abstract_variables
from dpo_jax.report import frontier as frontier_report
from dpo_jax.report.statistics import by_prompt, interval, kl_figures, log_ratios, per_prompt
from dpo_jax.weights.orbax.params import load_trained
from dpo_jax.weights.pretrained import load_pretrained

_PAIRS = 8  # pairs, or chosen texts, in a step
_PROMPT = 128  # most tokens of an opening


@dataclass(frozen=True)
class Method:
    """One training run.

    Attributes:
      name: DPO, PPO or SFT on chosen, as the table has it.
      setting: what sets it apart from the other runs of the method.
      key: of its folder.
      train: the command.
      config: its options.
      reads: file that it learns from.
    """

    name: str
    setting: str
    key: str
    train: Any
    config: TrainingRun
    reads: str

    @property
    def steps(self) -> int:
        """Length of the run."""
        assert self.config.train.steps is not None, "recipes name it"
        return self.config.train.steps


def recipe(run: FrontierRun) -> Path:
    """The `recipe frontier` command; returns its folder. See the module for the stages. Raises `InputError`."""
    resolved = dataclasses.replace(run, recipe=run.sizes)
    return perform(
        "frontier", run, lambda run, out: Frontier(run, out).stages(), frontier_report.show, resolved=resolved
    )


class Frontier:
    """The stages, and what they share: the weights of the reference are read once, when the first stage needs them."""

    def __init__(self, run: FrontierRun, out: Path):
        self._run, self._out, self._sizes = run, out, run.sizes
        openings = review_openings(run.seed)
        seen, unseen = self._sizes.prompts, self._sizes.unseen
        if seen + unseen > len(openings):
            raise InputError(
                f"--recipe.prompts {seen} and --recipe.unseen {unseen}: there are {len(openings)} openings in all"
            )
        self._seen, self._unseen = openings[:seen], openings[seen : seen + unseen]
        self.methods = self._methods()

    def stages(self) -> list[Stage]:
        """All of them, in order."""
        out, model, judge = self._out, self._run.model, self._run.reward
        stages = [
            Stage("samples", (model, judge), out / "samples.jsonl", self._samples),
            Stage("unseen openings", (model, judge), out / "unseen.jsonl", self._reference_texts),
            Stage("pairs", (out / "samples.jsonl",), out / "pairs.jsonl", self._pairs),
        ]
        for method in self.methods:
            folder = out / method.key
            work = functools.partial(self._train, method)
            stages.append(Stage(_title(method), (model, out / method.reads), folder, work))
            for step in self._steps(method):
                points = functools.partial(self._point, method, step)
                stages.append(
                    Stage(f"{_title(method)}, step {step}", (folder, judge), self._texts(method, step), points)
                )
        texts = [self._texts(method, step) for method in self.methods for step in self._steps(method)]
        stages.append(Stage("table", (out / "unseen.jsonl", *texts), out / "summary.json", self._table))
        return stages

    def _texts(self, method: Method, step: int) -> Path:
        return self._out / "points" / f"{method.key}-{step}.jsonl"

    def _steps(self, method: Method) -> range:
        """The checkpoints that are measured."""
        every = method.steps // self._sizes.points
        return range(every, method.steps + 1, every)

    # ---------------------------------------------------------------- the runs

    def _methods(self) -> list[Method]:
        sizes: FrontierConfig = self._sizes
        found = [
            Method("DPO", f"beta {beta:g}", f"dpo-beta-{beta:g}", dpo.train, self._dpo(beta), "pairs.jsonl")
            for beta in self._sizes.dpo_beta
        ]
        found.append(Method("SFT on chosen", "", "sft", sft.train, self._sft(), "chosen.jsonl"))
        for price in self._sizes.ppo_kl_coefficient:
            key = f"ppo-kl-{price:g}"
            config = self._ppo(price, key, sizes.ppo_steps)
            found.append(Method("PPO", f"KL price {price:g}", key, ppo.train, config, "openings.jsonl"))
        return found

    def _shared(self, key: str, steps: int | None, batch_size: int) -> dict[str, Any]:
        assert steps is not None, "sizes are whole"
        return {
            "model": self._run.model,
            "out": str(self._out / key),
            "lora": self._run.lora,
            "train": TrainConfig(steps=steps, batch_size=batch_size, seed=self._run.seed),
            # A stop in between makes one more; those that are to be measured must not make room for it.
            "checkpoint": CheckpointConfig(every=steps // self._sizes.points, keep=steps),
            "mesh": self._run.mesh,
        }

    def _rows(self, name: str) -> str:
        return str(self._out / f"{name}.jsonl")

    @property
    def _data(self) -> dict[str, Any]:
        return {"template": RAW, "max_length": _PROMPT + self._sizes.new_tokens + 1}

    def _optimizer(self, **fields: Any) -> OptimizerConfig:
        return OptimizerConfig(learning_rate=self._sizes.learning_rate, **fields)

    def _dpo(self, beta: float) -> DPORun:
        """The end token counts for nothing, as in `dpo-jax demo`: nearly all samples were cut at `new_tokens`."""
        return DPORun(
            dpo=DPOLossConfig(beta=beta, mask_format_tokens=True),
            data=DataConfig(self._rows("pairs"), max_prompt_length=_PROMPT, buckets=1, **self._data),
            optimizer=self._optimizer(schedule="linear", warmup_ratio=0.1),
            **self._shared(f"dpo-beta-{beta:g}", self._sizes.dpo_steps, _PAIRS),
        )

    def _sft(self) -> SFTRun:
        return SFTRun(
            data=SFTDataConfig(self._rows("chosen"), buckets=1, **self._data),
            optimizer=self._optimizer(schedule="linear", warmup_ratio=0.1),
            **self._shared("sft", self._sizes.sft_steps, _PAIRS),
        )

    def _ppo(self, price: float, key: str, steps: int | None) -> PPORun:
        return PPORun(
            reward=self._run.reward,
            ppo=PPOLossConfig(epochs=2, minibatches=2, kl_coefficient=price, value="stopped"),
            sample=SampleConfig(max_new_tokens=self._sizes.new_tokens, temperature=self._sizes.temperature),
            data=DataConfig(self._rows("openings"), max_prompt_length=_PROMPT, **self._data),
            optimizer=self._optimizer(),
            **self._shared(key, steps, self._sizes.ppo_batch_size),
        )

    def _train(self, method: Method) -> Figures:
        method.train(method.config)
        return {"steps": method.steps}

    # ---------------------------------------------------------------- the texts

    @functools.cached_property
    def _reference(self) -> tuple[Llama, Any]:
        return load_pretrained(self._run.model)

    @functools.cached_property
    def _judge(self) -> RewardFunction:
        mesh = make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
        like = self._ppo(1.0, "ppo", self._sizes.ppo_steps)
        return open_reward(self._run.reward, like, mesh=mesh, batch_size=_PAIRS)

    def _write(
        self, path: Path, label: str, policy: tuple[Llama, Any], openings: Sequence[str], samples: int, **told: Any
    ) -> Figures:
        """What `policy` writes to openings; `told`: seed and reference of `write_judged`."""
        sample = SampleConfig(self._sizes.new_tokens, temperature=self._sizes.temperature)
        writer = raw_writer(self._run.model, policy, sample, self._sizes.batch_size)
        told |= {"judge": self._judge, "name": self._run.reward}
        rows = write_judged(writer, path, label, openings, samples, **told)
        return {"texts": len(rows), "reward": float(per_prompt(rows).mean())}

    def _samples(self) -> Figures:
        path, seed = self._out / "samples.jsonl", self._run.seed
        return self._write(path, "samples", self._reference, self._seen, self._sizes.samples, seed=seed)

    def _reference_texts(self) -> Figures:
        path, seed = self._out / "unseen.jsonl", self._run.seed + 1
        samples = max(self._sizes.best_of, self._sizes.unseen_samples)
        return self._write(path, "reference", self._reference, self._unseen, samples, seed=seed)

    def _pairs(self) -> Figures:
        rows = read_lines(self._out / "samples.jsonl")
        pairs = make_pairs(rows)
        if len(pairs) < _PAIRS:
            raise InputError(
                f"--reward {self._run.reward}: tells best from worst for {len(pairs)} of {len(self._seen)} openings,"
                f" and a step takes {_PAIRS} pairs; raise --recipe.samples or --recipe.prompts"
            )
        ends = {(row["prompt"], row["response"]): row["finish_reason"] for row in rows}
        chosen = [
            {
                "prompt": pair["prompt"],
                "completion": pair["chosen"],
                # One that lost a broken character is not among the samples: it was cut.
                "finish_reason": ends.get((pair["prompt"], pair["chosen"]), "length"),
            }
            for pair in pairs
        ]
        write_lines(self._out / "chosen.jsonl", chosen)
        write_lines(self._out / "openings.jsonl", [{"prompt": opening} for opening in self._seen])
        write_lines(self._out / "pairs.jsonl", pairs)
        return {"pairs": len(pairs), "ties left out": len(self._seen) - len(pairs)}

    def _point(self, method: Method, step: int) -> Figures:
        path = self._texts(method, step)
        if not path.exists():
            policy = self._checkpoint(self._out / method.key / "checkpoints" / str(step))
            label, samples, seed = f"{_title(method)}, step {step}", self._sizes.unseen_samples, self._run.seed + 1
            self._write(path, label, policy, self._unseen, samples, seed=seed, reference=self._reference)
        point = self._measured(method, step)
        return {"reward": point["reward"], "kl": point["kl"]}

    def _checkpoint(self, folder: Path) -> tuple[Llama, Any]:
        """A policy as a run's checkpoint has it: the reference's weights, which are there, and its adapters."""
        reference, variables = self._reference
        model = reference.clone(lora=self._run.lora)
        place = SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=place), abstract_variables(model)["adapters"]
        )
        return model, {"params": variables["params"], **load_trained(folder, {"adapters": target})}

    # ---------------------------------------------------------------- the table

    def _measured(self, method: Method, step: int) -> Row:
        rows = read_lines(self._texts(method, step))
        head = {"method": method.name, "setting": method.setting, "step": step, "n": None}
        return head | measured(rows, seed=self._run.seed)

    def _table(self) -> Figures:
        reference = read_lines(self._out / "unseen.jsonl")
        results = best_of_n(reference, self._sizes.best_of, seed=self._run.seed)
        results += [self._measured(method, step) for method in self.methods for step in self._steps(method)]
        summary = {
            "model": self._run.model,
            "reward": self._run.reward,
            "seed": self._run.seed,
            "unseen_openings": len(self._unseen),
            "new_tokens": self._sizes.new_tokens,
            "temperature": self._sizes.temperature,
            "results": results,
            **frontier_report.comparison(results),
        }
        write_lines(self._out / "results.jsonl", results)
        runs = {self._out / each.key: self._texts(each, each.steps) for each in self.methods}
        frontier_report.write(self._out, summary, runs)
        write_json(self._out / "summary.json", summary)
        return {"points": len(results)}


def _title(method: Method) -> str:
    return f"{method.name} {method.setting}".rstrip()


def measured(rows: Sequence[Row], *, seed: int) -> Row:
    """Reward and KL divergence of texts on several openings, each the mean over openings of their texts' mean.

    The intervals (95 %) are by bootstrap over the openings. The KL divergence is the mean of log policy - log reference
    of what the policy wrote, so it is unbiased, and may come out a little below 0 where the two are one.
    """
    rewards = per_prompt(rows)
    ratios = iter(log_ratios(rows).tolist())
    kl = np.asarray([np.mean([next(ratios) for _ in group]) for _, group in by_prompt(rows)])
    return {
        "reward": float(rewards.mean()),
        "reward_interval": interval(rewards, seed=seed),
        "kl": float(kl.mean()),
        "kl_interval": interval(kl, seed=seed),
        "kl_token": kl_figures(rows)["eval_kl_token"],
        "tokens": float(np.mean([len(row["ids"]) for row in rows])),
        "texts": len(rows),
        "analytic_kl": False,
    }


def best_of_n(rows: Sequence[Row], most: int, *, seed: int) -> list[Row]:
    """Best-of-n for n = 1, 2, 4 ... `most`, from N >= n texts of the reference to each opening.

    The expected best score is the mean over all subsets of n of the N (`align/rejection.py`), so it has no bias.
    """
    ordered = np.stack([np.sort([row["score"] for row in group]) for _, group in by_prompt(rows)])
    length, samples = float(np.mean([len(row["ids"]) for row in rows])), ordered.shape[1]
    results = []
    for n in (2**i for i in range(most.bit_length())):
        rewards = ordered @ np.asarray(order_statistic(samples, n, n))
        head = {"method": "best of n", "setting": f"n {n}", "step": None, "n": n}
        figures = {"reward": float(rewards.mean()), "reward_interval": interval(rewards, seed=seed)}
        kl = {"kl": kl_bound(n), "kl_interval": None, "kl_token": kl_bound(n) / length, "tokens": length}
        results.append(head | figures | kl | {"texts": len(rows), "analytic_kl": True})
    return results


def kl_bound(n: int) -> float:
    """log n - (n-1)/n, in nats: the most that the best of n can be away from the reference.

    Reached where no two texts score alike and each is unlikely (Stiennon et al. 2020, arXiv 2009.01325, App. G.3); an
    upper bound in any case (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n
