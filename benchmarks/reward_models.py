"""Two reward models from SmolLM2-135M on real comparisons: helpfulness and safety, with and without margins.

    python benchmarks/reward_models.py --data ../shared/data --out runs/reward_models --steps 300 --seeds 0 1 2

helpfulness          PandaLM's pairs with three annotators' votes each, and Vicuna's pairs with GPT-4's scores
helpfulness_xstest   the same, and XSTest's safe prompts: compliance against a refusal or a partial refusal
safety               Anthropic's harmless pairs, and XSTest's unsafe prompts: a refusal against a partial refusal or
                     compliance

Of each source a tenth is held out, whole prompts at a time (another tenth for each seed). Every run is a run folder
under `--out`, resumable: the same command goes on where it stopped. Reported, as mean and 95 % interval over the seeds
(Student's t): held-out accuracy overall, by source and by rating, beside two baselines on the same pairs, the longer
answer and VADER's compound score; and the AUC of XSTest refusals against compliances: of the safety model on held-out
unsafe prompts, of the helpfulness models for compliance on safe prompts, held out where some were trained on. How
often one answer of a pair begins with a refusal and the other does not is counted in the training data: what the pairs
themselves say of refusing.

Ratings are made from what the sources tell: of three votes, all three = significantly better, two = slightly better; a
gap of scores of at least 3, 2, 1 = significantly better, better, slightly better, and less = negligibly better; in
XSTest a full refusal beside full compliance = significantly better, a partial refusal beside either = slightly better;
Anthropic's pairs tell nothing (unsure). `--margin` is the table that turns them into margins.

`--balance` repeats the rows of the smaller sources until each has as many as the largest: XSTest has few.
"""

import argparse
import csv
import gzip
import json
import math
import random
import re
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from dpo_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalRun,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    RewardLossConfig,
    RewardRun,
    TrainConfig,
)

Row = dict[str, Any]
HELPFULNESS, HELPFULNESS_XSTEST, SAFETY = "helpfulness", "helpfulness_xstest", "safety"
REFUSES = re.compile(
    r"I'm sorry|I am sorry|I apologi[sz]e|As an AI|I can(no|')t|(not|un)[- ]?able to|I don't have|not appropriate", re.I
)
"""Said within the first 150 characters of what XSTest's annotators call a refusal three times in four; of compliance,
once in twenty."""
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with pandalm, vicuna_reviews, ...")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--models", nargs="+", choices=tuple(SOURCES), default=[HELPFULNESS, SAFETY])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--margin", choices=("none", "small", "large"), default="small", help="beside none")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--lora", type=int, default=16, help="rank; 0 trains all weights")
    parser.add_argument("--max_length", type=int, default=384)
    parser.add_argument("--xstest", type=int, default=None, help="draw so many of its held-out prompts for the AUC")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="computes in it")
    parser.add_argument("--balance", action="store_true", help="as many rows of each source, by repetition")
    parser.add_argument("--rows", type=int, default=None, help="use so many rows of each source only")
    return parser.parse_args()


# ---------------------------------------------------------------- the sources, as rated pairs


def lines(path: Path) -> Iterator[Row]:
    raw = path.read_bytes()
    yield from map(json.loads, (gzip.decompress(raw) if path.suffix == ".gz" else raw).splitlines())


def usable(answers: Sequence[Any]) -> bool:
    """Two different texts, neither blank."""
    return all(isinstance(text, str) and text.strip() for text in answers) and answers[0] != answers[1]


def pandalm(data: Path) -> Iterator[Row]:
    for row in lines(data / "pandalm" / "pairs.jsonl"):
        votes = [row[f"annotator{i}"] for i in (1, 2, 3)]
        winner = max((1, 2), key=votes.count)
        share, answers = votes.count(winner), (row["response1"], row["response2"])
        if share < 2 or not usable(answers):
            continue
        prompt = "\n".join(filter(None, (row["instruction"], row["input"])))
        rating = "significantly better" if share == 3 else "slightly better"
        yield pair("pandalm", prompt, answers[winner - 1], answers[2 - winner], rating)


def vicuna(data: Path) -> Iterator[Row]:
    for row in lines(data / "vicuna_reviews" / "pairs.jsonl"):
        gap = row["score_a"] - row["score_b"]
        better, worse = ("a", "b") if gap > 0 else ("b", "a")
        answers = [row[f"response_{side}"] for side in (better, worse)]
        if gap and usable(answers):
            names = ("negligibly better", "slightly better", "better", "significantly better")
            yield pair("vicuna", row["prompt"], *answers, names[min(3, int(abs(gap)))])


def harmless(data: Path) -> Iterator[Row]:
    mark = "\n\nAssistant:"
    for row in lines(data / "hh_harmless" / "train.jsonl.gz"):
        prompts, answers = zip(*(row[side].rsplit(mark, 1) for side in ("chosen", "rejected")), strict=True)
        answers = [text.strip() for text in answers]
        if prompts[0] == prompts[1] and prompts[0].strip() and usable(answers):
            yield pair("hh_harmless", prompts[0] + mark, *answers, "unsure")


def xstest(data: Path) -> list[Row]:
    """Each completion: prompt, whether it is unsafe, text, and 1 (compliance), 2 (refusal) or 3 (partial refusal)."""
    found = []
    for path in sorted((data / "xstest").glob("xstest_v2_completions_*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                unsafe, label = row["type"].startswith("contrast_"), row["final_label"][:1]
                if row["completion"].strip() and label in "123":
                    found.append(
                        {"prompt": row["prompt"], "unsafe": unsafe, "text": row["completion"].strip(), "label": label}
                    )
    return found


def xstest_pairs(data: Path, unsafe: bool) -> Iterator[Row]:
    """On unsafe prompts each refusal against all else, on safe ones each compliance."""
    wanted, opposite = ("2", "1") if unsafe else ("1", "2")
    by_prompt: dict[str, list[Row]] = {}
    for row in xstest(data):
        if row["unsafe"] == unsafe:
            by_prompt.setdefault(row["prompt"], []).append(row)
    for prompt, rows in by_prompt.items():
        for better in (r for r in rows if r["label"] == wanted):
            for other in (r for r in rows if r["label"] != wanted):
                rating = "significantly better" if other["label"] == opposite else "slightly better"
                yield pair("xstest", prompt, better["text"], other["text"], rating)


def pair(source: str, prompt: str, chosen: str, rejected: str, rating: str) -> Row:
    return {"source": source, "prompt": prompt, "chosen": chosen, "rejected": rejected, "rating": rating}


SOURCES = {
    HELPFULNESS: (pandalm, vicuna),
    HELPFULNESS_XSTEST: (pandalm, vicuna, partial(xstest_pairs, unsafe=False)),
    SAFETY: (harmless, partial(xstest_pairs, unsafe=True)),
}


def refusing(rows: list[Row]) -> dict[str, float]:
    """How many pairs have one answer that begins with a refusal, by whether it is the chosen or the rejected one."""
    begins = [[REFUSES.search(row[side][:150]) is not None for side in ("chosen", "rejected")] for row in rows]
    return {
        "training pairs whose chosen answer alone refuses": begins.count([True, False]),
        "training pairs whose rejected answer alone refuses": begins.count([False, True]),
    }


def balanced(sources: list[list[Row]]) -> list[list[Row]]:
    """Each source repeated to the size of the largest."""
    most = max(map(len, sources))
    return [list(islice(cycle(rows), most)) for rows in sources]


def split(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """(to train on, held out): a tenth of the prompts, at least one."""
    prompts = sorted({row["prompt"] for row in rows})
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: max(1, round(0.1 * len(prompts)))])
    return [r for r in rows if r["prompt"] not in held], [r for r in rows if r["prompt"] in held]


def write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---------------------------------------------------------------- one run


def run(options: argparse.Namespace, name: str, margin: str, seed: int) -> dict[str, float]:
    """Train one model, or find it trained; its held-out figures and baselines."""
    from dpo_jax.commands.reward import train
    from dpo_jax.judge.reward_eval import evaluate

    parts = [split(list(read(options.data))[: options.rows], seed) for read in SOURCES[name]]
    kept, held = [part[0] for part in parts], [row for part in parts for row in part[1]]
    training = [row for rows in (balanced(kept) if options.balance else kept) for row in rows]
    files = options.out / "data" / f"{name}-{seed}"
    sources = write(files / "train.jsonl", training), write(files / "held.jsonl", held)
    folder = options.out / f"{name}-{margin}-{seed}"
    limits = {"max_length": options.max_length, "max_prompt_length": options.max_length // 2}
    train(
        RewardRun(
            model=options.model,
            out=str(folder),
            reward=RewardLossConfig(margin=margin),
            lora=LoraConfig(rank=options.lora),
            optimizer=OptimizerConfig(
                learning_rate=options.learning_rate, schedule="cosine", warmup_ratio=0.05, floor=0.1
            ),
            data=DataConfig(str(sources[0]), **limits),
            train=TrainConfig(batch_size=options.batch_size, steps=options.steps, seed=seed, dtype=options.dtype),
            checkpoint=CheckpointConfig(every=20, keep=1),
        )
    )
    result = evaluate(
        EvalRun(
            model=str(folder),
            out=str(folder / "held_out.json"),
            report=str(folder / "held_out.html"),
            batch_size=options.batch_size,
            dtype=options.dtype,
            data=DataConfig(str(sources[1]), **limits),
            mesh=MeshConfig(),
        )
    )
    figures = {"accuracy": result["eval_accuracy"], "ece": result["eval_ece"]}
    figures["correlation with length"] = result["eval_length_correlation"]
    for column in ("source", "rating"):
        for group in result["tables"].get(column, []):
            figures[f"accuracy, {group['value']}"] = group["accuracy"]
    figures |= refusing([row for rows in kept for row in rows])
    figures["baseline: longer answer"] = result["eval_lengths/accuracies"]
    figures["baseline: VADER"] = vader(held)
    figures |= separation(options, name, str(folder), {row["prompt"] for row in held}, seed)
    return figures


def vader(rows: list[Row]) -> float:
    """Accuracy of preferring the answer of the higher compound score, a tie counting half."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    judge = SentimentIntensityAnalyzer()
    gaps = [
        judge.polarity_scores(r["chosen"])["compound"] - judge.polarity_scores(r["rejected"])["compound"] for r in rows
    ]
    return statistics.mean(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps)


def separation(options: argparse.Namespace, name: str, folder: str, held: set[str], seed: int) -> dict[str, float]:
    """AUC on XSTest: refusals above compliances on held-out unsafe prompts, or the other way round on safe ones."""
    import numpy as np

    from dpo_jax.data.rows.messages import Message
    from dpo_jax.data.sets.prompts import Prompt
    from dpo_jax.judge.rewards.functions import ModelReward
    from dpo_jax.report.statistics import auc

    wanted, other = ("2", "1") if name == SAFETY else ("1", "2")
    rows = [r for r in xstest(options.data) if r["unsafe"] == (name == SAFETY) and r["label"] in "12"]
    rows = [r for r in rows if name == HELPFULNESS or r["prompt"] in held]
    prompts = sorted({row["prompt"] for row in rows})
    drawn = set(random.Random(seed).sample(prompts, min(len(prompts), options.xstest or len(prompts))))
    rows = [r for r in rows if r["prompt"] in drawn]
    if {row["label"] for row in rows} != {"1", "2"}:
        return {}
    score = ModelReward(folder, raw=False, batch_size=options.batch_size, dtype=options.dtype)
    asked = [Prompt((Message("user", row["prompt"]),), row["prompt"]) for row in rows]
    scores = score(asked, [row["text"] for row in rows])
    groups = {label: scores[[row["label"] == label for row in rows]] for label in (wanted, other)}
    lengths = {label: [len(r["text"]) for r in rows if r["label"] == label] for label in (wanted, other)}
    kind = "refusal, unsafe prompts" if name == SAFETY else "compliance, safe prompts"
    by_length = auc(*(np.asarray(lengths[label], float) for label in (wanted, other)))
    return {f"AUC of {kind}": auc(groups[wanted], groups[other]), f"baseline AUC by length, {kind}": by_length}


# ---------------------------------------------------------------- all runs


def interval(values: list[float]) -> tuple[float, float | None]:
    """(mean, half of the 95 % interval; None from a single value)."""
    n = len(values)
    if n < 2:
        return values[0], None
    return statistics.mean(values), STUDENT.get(n - 1, 1.96) * statistics.stdev(values) / math.sqrt(n)


def main() -> None:
    options = arguments()
    found: dict[str, Any] = {}
    for name in options.models:
        for margin in dict.fromkeys(("none", options.margin)):
            runs = [run(options, name, margin, seed) for seed in options.seeds]
            figures = sorted({figure for of_run in runs for figure in of_run})
            found[f"{name}, margin {margin}"] = {
                figure: interval([r[figure] for r in runs if figure in r]) for figure in figures
            }
            write(
                options.out / "results.json",
                [{"seeds": options.seeds, "steps": options.steps, "dtype": options.dtype, **found}],
            )
    for title, figures in found.items():
        print(f"\n{title} ({len(options.seeds)} seeds)\n")
        print("| figure | mean | 95 % interval |\n|---|---|---|")
        for figure, (mean, half) in figures.items():
            print(f"| {figure} | {mean:.3f} | {'' if half is None else f'± {half:.3f}'} |")


if __name__ == "__main__":
    main()
