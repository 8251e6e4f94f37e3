"""Zephyr's four arms (Tunstall et al. 2023, arXiv 2310.16944, table 3) at the size of SmolLM2-135M:

    python benchmarks/zephyr_arms.py --data ../shared/data --out runs/zephyr_arms

dDPO, no dSFT    distilled DPO on the model as it is
dSFT             distilled SFT
dSFT twice       distilled SFT, and again on the preferred responses of the pairs
dSFT, dDPO       distilled SFT, then distilled DPO

The paper's model is a base model. SmolLM2-135M-Instruct is the only real one that comes without a hub, so that the arm
without dSFT begins from a model that answers already; `--model` takes a base model where there is one. All speak under
Zephyr's template, which SmolLM2 was not taught.

Dialogues for dSFT: `dpo_en`, the chosen sides, packed, the loss on all tokens, as in the paper. Feedback: `scored4_en`,
four models' answers with GPT-4's scores to Vicuna's 80 questions, made into pairs by the paper's rule (`dpo-jax pairs
--rule zephyr`, drawn by the seed); learnt for two epochs (three in the paper) at the paper's beta, with LoRA and a
learning rate for it. Responses are cut at `--max_length` with their prompts.

Named prompts: `--prompts` of PandaLM's instructions (those of at most 300 characters, drawn with seed 0), which nothing
else here holds. Named judge: a reward model trained here from SmolLM2-135M on the pairs of PandaLM's other
instructions, as people judged them; how often it agrees with people on the named prompts stands under the table. An
arm's answers are compared, prompt by prompt, with those of the model as it is and with those of dSFT of the same seed,
drawn with the same random numbers; an empty answer loses to any other. KL and accuracy on people's pairs are of
`dpo-jax eval`, against the model as it is.

Each stage is a file or a run folder under `--out`: the same command goes on where it stopped. After each arm it writes
results.json, table.md (means over the seeds with Student's intervals; each seed with an interval over the prompts) and
zephyr_arms.png.
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reward_models as sources

from dpo_jax import config as c

Row = dict[str, Any]
SHORT = 300
"""Characters of a named prompt, at most."""
EVALUATED = 16
"""Named prompts whose pair, and a new answer, `dpo-jax eval` reads for accuracy and KL."""
JUDGE = "reward model from SmolLM2-135M on PandaLM's other instructions"


@dataclass(frozen=True)
class Arm:
    """published: MT-Bench in the paper. after: the arm that it goes on from; None: the model as it is."""

    published: float
    after: str | None
    preferences: bool
    """Whether it learns from pairs by DPO, or from texts."""


ARMS = {
    "dDPO, no dSFT": Arm(4.76, None, True),
    "dSFT": Arm(6.64, None, False),
    "dSFT twice": Arm(6.19, "dSFT", False),
    "dSFT, dDPO": Arm(7.00, "dSFT", True),
}
START = "as it is"
SHOWN = {
    "win_rate": "wins against the model as it is",
    "win_rate_dsft": "against dSFT",
    "equal_length": "against the model as it is, at equal length",
    "tokens": "tokens",
    "finished": "finished",
    "repetition": "repetition",
    "kl": "KL, nats an answer",
    "accuracy": "accuracy on people's pairs",
}
"""Columns of the table, by the names of figures."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with pandalm, dpo_en, scored4_en")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=64, help="named prompts")
    parser.add_argument("--judge_steps", type=int, default=60, help="of the judge, of 8 pairs each")
    parser.add_argument("--sft_steps", type=int, default=40, help="of dSFT, of 4 windows each")
    parser.add_argument("--epochs", type=float, default=2.0, help="of what is learnt from the feedback")
    parser.add_argument("--max_length", type=int, default=192, help="tokens of what is learnt, and of a window")
    parser.add_argument("--new_tokens", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    return parser.parse_args()


class Arms:
    """All stages, in one folder."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.out = options, options.out.resolve()
        self.files = self.out / "data"
        self.judge = self.out / "judge"
        self.lora = c.LoraConfig(rank=options.rank)
        self.sample = c.SampleConfig(max_new_tokens=options.new_tokens, temperature=0.7)

    # ---------------------------------------------------------------- data

    def write_data(self) -> None:
        """judge.jsonl, held_out.jsonl: PandaLM's pairs by prompt. prompts.jsonl: the named ones."""
        options = self.options
        pairs = list(sources.pandalm(options.data))
        asked = sorted({row["prompt"] for row in pairs if len(row["prompt"]) <= SHORT})
        random.Random(0).shuffle(asked)
        named = set(asked[: options.prompts])
        learnt = [row for row in pairs if row["prompt"] not in named]
        if not learnt:
            sys.exit(f"--prompts {options.prompts}: no pair is left to train the judge on")
        sources.write(self.files / "judge.jsonl", learnt)
        held = [row for row in pairs if row["prompt"] in named]
        sources.write(self.files / "held_out.jsonl", held)
        first = {row["prompt"]: row for row in reversed(held)}
        sources.write(self.files / "evaluated.jsonl", list(first.values())[:EVALUATED])
        sources.write(self.files / "prompts.jsonl", [{"prompt": text} for text in sorted(named)])
        seen = {row["prompt"].strip() for row in sources.lines(self.scored)}
        for row in sources.lines(self.dialogues):
            seen |= {turn["value"].strip() for turn in row["conversations"]}
        if both := seen & {text.strip() for text in named}:
            sys.exit(f"a named prompt is learnt from, too: {sorted(both)[0]}")

    @property
    def scored(self) -> Path:
        return self.options.data / "scored4_en" / "vicuna_eval.jsonl"

    @property
    def dialogues(self) -> Path:
        return self.options.data / "dpo_en" / "pairs.jsonl"

    def pairs(self, seed: int) -> Path:
        from dpo_jax.commands.pairs import pairs

        path = self.files / f"pairs-{seed}.jsonl"
        return once(path, lambda: pairs(c.PairsRun(data=c.FilesConfig(str(self.scored)), out=str(path), seed=seed)))

    # ---------------------------------------------------------------- training

    def optimizer(self, rate: float, schedule: Any) -> c.OptimizerConfig:
        return c.OptimizerConfig(learning_rate=rate, schedule=schedule, warmup_ratio=0.1)

    def limits(self, template: str | None) -> dict[str, Any]:
        length = self.options.max_length
        return {"template": template, "max_length": length, "max_prompt_length": length // 2, "buckets": 1}

    def train_judge(self) -> None:
        from dpo_jax.commands.reward import train

        train(
            c.RewardRun(
                model=self.options.model,
                out=str(self.judge),
                lora=self.lora,
                optimizer=self.optimizer(2e-4, "cosine"),
                data=c.DataConfig(str(self.files / "judge.jsonl"), **self.limits(None)),
                train=c.TrainConfig(batch_size=8, steps=self.options.judge_steps),
                checkpoint=c.CheckpointConfig(every=20, keep=1),
            )
        )

    def train(self, name: str, seed: int) -> Path:
        """The run folder of an arm."""
        from dpo_jax.commands import dpo, sft

        arm, out = ARMS[name], self.folder(name, seed)
        told: dict[str, Any] = {
            "model": self.model(arm.after, seed),
            "out": str(out),
            "lora": self.lora,
            "checkpoint": c.CheckpointConfig(every=10, keep=1),
        }
        epochs = self.options.epochs
        if arm.preferences:
            dpo.train(
                c.DPORun(
                    **told,
                    dpo=c.DPOLossConfig(beta=0.1),
                    optimizer=self.optimizer(2e-4, "linear"),
                    data=c.DataConfig(str(self.pairs(seed)), **self.limits("zephyr")),
                    train=c.TrainConfig(batch_size=8, epochs=epochs, seed=seed),
                )
            )
            return out
        again = arm.after is not None
        source = self.pairs(seed) if again else self.dialogues
        length = c.TrainConfig(batch_size=4, epochs=epochs, seed=seed) if again else None
        packed = {"template": "zephyr", "max_length": self.options.max_length, "packing": True, "train_on": "all"}
        sft.train(
            c.SFTRun(
                **told,
                optimizer=self.optimizer(2e-4, "cosine"),
                data=c.SFTDataConfig(str(source), **packed),
                train=length or c.TrainConfig(batch_size=4, steps=self.options.sft_steps, seed=seed),
            )
        )
        return out

    def folder(self, name: str, seed: int) -> Path:
        return self.out / f"seed{seed}" / name.replace(", ", "_").replace(" ", "_")

    def model(self, name: str | None, seed: int) -> str:
        return self.options.model if name is None else str(self.folder(name, seed))

    # ---------------------------------------------------------------- figures

    def answers(self, name: str, seed: int) -> tuple[list[Row], list[float]]:
        """The answers to the named prompts, and what the judge gives them; to an empty one less than to any other."""
        from dpo_jax.commands.generate import generate
        from dpo_jax.commands.score import score

        folder = self.folder(name, seed)
        texts, scores = (folder.with_name(f"{folder.name}.{what}.jsonl") for what in ("answers", "scores"))
        run = c.GenerateRun(
            model=self.model(None if name == START else name, seed),
            prompts=str(self.files / "prompts.jsonl"),
            out=str(texts),
            template="zephyr",
            batch_size=32,
            seed=seed,
            sample=self.sample,
        )
        once(texts, lambda: generate(run))
        data = c.DataConfig(str(texts), **self.limits(None) | {"max_length": 2 * self.options.max_length})
        once(scores, lambda: score(c.ScoreRun(model=str(self.judge), data=data, out=str(scores), batch_size=16)))
        rows, given = list(sources.lines(texts)), {row["row"]: row["reward"] for row in sources.lines(scores)}
        lost = [row["row"] for row in rows if row["response"].strip() and row["row"] not in given]
        assert not lost, f"{scores}: rows {lost} have no score"
        return rows, [given.get(row["row"], -math.inf) for row in rows]

    def wins(self, name: str, other: str, seed: int) -> Row:
        """What `dpo-jax win-rate` says of two arms' answers under the judge's scores."""
        from dpo_jax.commands.win_rate import win_rate

        folder, against = self.folder(name, seed), self.folder(other, seed)
        path = folder.with_name(f"{folder.name}.against_{against.name}.jsonl")
        answers = [str(one.with_name(f"{one.name}.answers.jsonl")) for one in (folder, against)]
        run = c.WinRateRun(
            answers=answers[0],
            against=answers[1],
            judgments=str(path),
            out=str(path.with_suffix(".json")),
            seed=seed,
        )

        def judged() -> None:
            (rows, given), (others, theirs) = self.answers(name, seed), self.answers(other, seed)
            verdicts = [
                {
                    "instruction": row["prompt"],
                    "output_1": old["response"],
                    "output_2": row["response"],
                    "annotator": JUDGE,
                    "preference": 1.5 if mine == its else 1 + (mine > its),
                }
                for row, old, mine, its in zip(rows, others, given, theirs, strict=True)
            ]
            sources.write(path, verdicts)
            win_rate(run)

        return read(once(path.with_suffix(".json"), judged))

    def evaluated(self, name: str, seed: int) -> Row:
        from dpo_jax.commands.eval import evaluate

        folder = self.folder(name, seed)
        out = folder.with_name(f"{folder.name}.eval.json")
        run = c.EvalRun(
            model=str(folder),
            reference=self.options.model,
            data=c.DataConfig(str(self.files / "evaluated.jsonl"), **self.limits("zephyr")),
            out=str(out),
            samples=min(EVALUATED, self.options.prompts),
            seed=seed,
            sample=self.sample,
            batch_size=EVALUATED,
        )
        return read(once(out, lambda: evaluate(run)))

    def agreement(self) -> Row:
        """The judge beside people, on the named prompts."""
        from dpo_jax.commands.judge import judge

        out = self.out / "judge_on_people.jsonl"
        found = out.with_name(f"{out.name}.agreement.json")
        data = c.FilesConfig(str(self.files / "held_out.jsonl"))
        run = c.JudgeRun(data=data, out=str(out), function=str(self.judge), agreement=True, batch_size=16)
        return read(once(found, lambda: judge(run)))

    def figures(self, name: str, seed: int) -> Row:
        """Of one arm and seed; of the model as it is without what compares with it."""
        from dpo_jax.report.text_health import health
        from dpo_jax.weights.tokenizer import load_tokenizer

        rows, given = self.answers(name, seed)
        tokenizer = load_tokenizer(self.options.model)
        texts = health([tokenizer(row["response"], add_special_tokens=False)["input_ids"] for row in rows])
        found: Row = {
            "tokens": texts["length"],
            "repetition": texts["repetition_4"],
            "finished": sum(row["finish_reason"] == "stop" for row in rows) / len(rows),
            "score": statistics.fmean(score for score in given if score > -math.inf),
        }
        if name == START:
            return found
        against, of_eval = self.wins(name, START, seed), self.evaluated(name, seed)
        found |= {"win_rate": against["raw"]["win_rate"], "interval": against["raw"]["interval"]}
        if against["length_controlled"] is not None:
            found["equal_length"] = against["length_controlled"]["win_rate"]
        found |= {"kl": of_eval["eval_kl"], "accuracy": of_eval["eval_rewards/accuracies"]}
        if name != "dSFT":
            raw = self.wins(name, "dSFT", seed)["raw"]
            found |= {"win_rate_dsft": raw["win_rate"], "interval_dsft": raw["interval"]}
        return found


def once(path: Path, work: Callable[[], Any]) -> Path:
    """`path`, made by `work` where it is not there; what is there is whole."""
    if not path.exists():
        work()
    return path


def read(path: Path) -> Row:
    return json.loads(path.read_text(encoding="utf-8"))


def keep_options(options: argparse.Namespace, out: Path) -> None:
    """A folder holds one experiment, of which seeds may be added."""
    told = {name: value for name, value in vars(options).items() if name not in ("data", "out", "seeds")}
    path = out / "options.json"
    if path.exists() and (before := read(path)) != told:
        differs = [name for name in told if told[name] != before.get(name)]
        sys.exit(f"{out}: was begun with other values of --{' --'.join(differs)}; choose another --out")
    sources.write(path, [told])


def cell(values: list[float]) -> str:
    """Mean over the seeds, with the half of its 95 % interval."""
    mean, half = sources.interval(values)
    return f"{mean:.3f}" + ("" if half is None else f" ± {half:.3f}")


def table(results: dict[str, dict[int, Row]], agreement: Row) -> str:
    """Means over the seeds that are done; below, every seed with its interval over the prompts."""
    lines = [f"| arm | MT-Bench in the paper | {' | '.join(SHOWN.values())} |", "|---" * (2 + len(SHOWN)) + "|"]
    for name, found in results.items():
        published = "" if name == START else f"{ARMS[name].published:.2f}"
        columns = ([row[key] for row in found.values() if key in row] for key in SHOWN)
        cells = [cell(values) if values else "" for values in columns]
        lines.append(f"| {name} | {published} | {' | '.join(cells)} |")
    lines += ["", "| arm | seed | against the model as it is | against dSFT |", "|---|---|---|---|"]
    for name, found in results.items():
        for seed, row in found.items():
            sides = [
                f"{row[key]:.3f} ({row[ends][0]:.3f} to {row[ends][1]:.3f})" if key in row else ""
                for key, ends in (("win_rate", "interval"), ("win_rate_dsft", "interval_dsft"))
            ]
            if any(sides):
                lines.append(f"| {name} | {seed} | {sides[0]} | {sides[1]} |")
    mean, low, high = agreement["accuracy"]
    lines += [
        "",
        f"Judge: {JUDGE}; on {agreement['pairs']} pairs of answers to the named prompts it says what people say",
    ]
    lines[-1] += f" in {mean:.3f} ({low:.3f} to {high:.3f})."
    return "\n".join(lines) + "\n"


def draw(results: dict[str, dict[int, Row]], file: Path) -> None:
    """The paper's scores; win rates, a point a seed with its interval over the prompts; KL."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = [name for name in ARMS if results[name]]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    axes[0].bar(range(len(names)), [ARMS[name].published for name in names], color="lightgray")
    axes[0].set_ylabel("MT-Bench of Zephyr 7B, published")
    for at, name in enumerate(names):
        found = list(results[name].values())
        for i, row in enumerate(found):
            place, rate = at + (i - (len(found) - 1) / 2) * 0.15, row["win_rate"]
            ends = [[rate - row["interval"][0]], [row["interval"][1] - rate]]
            axes[1].errorbar(place, rate, yerr=ends, fmt="o", color="tab:blue", markersize=4, capsize=2)
            axes[2].plot(place, row["kl"], "o", color="tab:orange", markersize=5)
    axes[1].axhline(0.5, color="gray", linewidth=0.8)
    axes[1].set_ylabel("win rate against the model as it is")
    axes[2].set_ylabel("KL from the model as it is, nats an answer")
    for axis in axes:
        axis.set_xticks(range(len(names)), names, rotation=15)
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(file, dpi=100)


def main() -> None:
    """Train, answer, judge and tabulate, arm by arm and seed by seed."""
    import jax

    options = arguments()
    arms = Arms(options)
    keep_options(options, arms.out)
    jax.config.update("jax_compilation_cache_dir", str(arms.out / "compiled"))
    arms.write_data()
    arms.train_judge()
    agreement = arms.agreement()
    results: dict[str, dict[int, Row]] = {name: {} for name in (START, *ARMS)}
    for seed in options.seeds:
        results[START][seed] = arms.figures(START, seed)
        for name in sorted(ARMS, key=lambda name: name != "dSFT"):
            arms.train(name, seed)
            results[name][seed] = arms.figures(name, seed)
            told = {"options": vars(options) | {"data": str(options.data), "out": str(options.out)}, "judge": agreement}
            sources.write(arms.out / "results.json", [told | {"arms": results}])
            (arms.out / "table.md").write_text(table(results, agreement), encoding="utf-8")
            draw(results, arms.out / "zephyr_arms.png")
    print(table(results, agreement))


if __name__ == "__main__":
    main()
