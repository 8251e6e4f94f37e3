"""Three claims about preference training, each one command on two CPU cores with SmolLM2-135M-Instruct.

    python benchmarks/claims.py chosen  --out OUT                        what DPO does to the chosen response
    python benchmarks/claims.py endings --out OUT --data pairs.jsonl     texts that loop, or never end
    python benchmarks/claims.py rounds  --out OUT                        two on-policy rounds against one

chosen: DPO, DPO with an NLL term, and DPOP (Pal et al. 2024) on right solutions against themselves with one number
changed (`dpo-jax pairs --rule corrupt`): sums of two numbers of two digits, after a short SFT on such solutions. Told:
how the log-probability of held-out chosen and rejected responses moved, in nats a token. With --data on those pairs,
too (the arms of `endings` that are so trained).

endings: full DPO and four remedies: an NLL term, LoRA, masked format tokens (Llama 3), all three. Told: held-out
accuracy, what became of the chosen response, and the share of answers to held-out prompts that loop (more than half of
their 4-grams are repeats), or do not end within --tokens.

rounds: Iterative RPO (Pang et al. 2024) on those sums, answered with a number alone. Two rounds against one, with as
many steps and pairs a step: all pairs of the one come from the first model. Told: greedy held-out accuracy with its
95 % interval (Wilson), and how many different pairs there were.

What is finished is not made again. OUT gets CLAIM.json and CLAIM.md.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import arithmetic

Row = dict[str, Any]
SHORT = "--data.max_length 128 --checkpoint.every 1000"
SFT = f"--train.batch_size 16 --train.steps 20 --optimizer.learning_rate 2e-5 --optimizer.schedule linear {SHORT}"
DPO = "--optimizer.warmup_ratio 0.1 --optimizer.schedule linear --dpo.beta 0.1"
LORA = "--lora.rank 16"
NLL, MASK, DPOP = "--dpo.nll_coefficient 0.2", "--dpo.mask_format_tokens", "--dpo.loss dpop --dpo.dpop_lambda 50"
LOSSES = {"DPO": "", "DPO + NLL": NLL, "DPOP": DPOP}
REMEDIES = {"DPO": "", "+ NLL": NLL, "LoRA": LORA, "+ format mask": MASK, "all three": f"{LORA} {NLL} {MASK}"}
LORA_RATE = 5
"""Times the learning rate of full fine-tuning."""
HELD_OUT = 40
"""Pairs of --data."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=("chosen", "endings", "rounds"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="preference pairs; of `endings`, and of `chosen` if given")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seeds", type=int, default=3, help="of `chosen` on sums, and of `rounds`")
    parser.add_argument("--steps", type=int, default=40, help="of a DPO run (of both rounds together)")
    parser.add_argument("--rate", type=float, default=1e-5, help="learning rate of DPO, of LoRA five times that")
    parser.add_argument("--pairs", type=int, default=8, help="a step, of sums")
    parser.add_argument("--rows", type=int, default=4, help="pairs a step, of --data")
    parser.add_argument("--tokens", type=int, default=192, help="longest answer of `endings`")
    parser.add_argument("--problems", type=int, default=320, help="of a round")
    options = parser.parse_args()
    if options.claim == "endings" and options.data is None:
        parser.error("endings: give --data")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    rows = {"chosen": chosen, "endings": endings, "rounds": rounds}[options.claim](options)
    seconds = time.monotonic() - started
    told = {"device": arithmetic.device(), "seconds": seconds, "rows": rows}
    (options.out / f"{options.claim}.json").write_text(json.dumps(told, indent=1) + "\n")
    text = table(rows)
    (options.out / f"{options.claim}.md").write_text(text + "\n")
    print(f"{text}\n\n{seconds:.0f} s on {told['device']}")


def command(words: str, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    arithmetic.run(words, log)


# ---------------------------------------------------------------- the chosen response


def chosen(options: argparse.Namespace) -> list[Row]:
    """A row a loss, a set and a seed."""
    out, rows = options.out / "sums", list[Row]()
    write_solutions(out)
    command(f"sft --model {options.model} --data {out}/taught.jsonl --out {out}/sft {SFT}", out / "sft.log")
    for name in ("train", "held_out"):
        if not (out / f"{name}.pairs.jsonl").exists():
            words = f"pairs --rule corrupt --data {out}/{name}.jsonl --out {out}/{name}.pairs.jsonl"
            command(words, out / f"{name}.log")
    for seed in range(options.seeds):
        for name, told in LOSSES.items():
            folder = out / f"{plain(name)}-{seed}"
            words = f"{told} --train.batch_size {options.pairs} --train.seed {seed} {SHORT}"
            model = f"{out}/sft"
            found = trained(options, folder, model, out / "train.pairs.jsonl", words)
            found = judged(found, model, out / "held_out.pairs.jsonl", "--data.max_length 128")
            rows.append({"pairs": "one number changed", "loss": name, "seed": seed, **moved(found)})
    if options.data is not None:
        for name, told in LOSSES.items():
            rows.append({"pairs": options.data.stem, "loss": name, "seed": 0, **moved(on_pairs(options, name, told))})
    return rows


def write_solutions(out: Path) -> None:
    """Files of dialogues: `taught`, `train`, `held_out`."""
    out.mkdir(parents=True, exist_ok=True)
    sums = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(sums)

    def row(a: int, b: int) -> Row:
        tens, ones = 10 * (a // 10 + b // 10), a % 10 + b % 10
        steps = f"The tens give {tens}. The ones give {ones}. Together they are {tens + ones}."
        said = [("user", f"What is {a} + {b}? Show your steps."), ("assistant", steps)]
        return {"messages": [{"role": role, "content": content} for role, content in said]}

    parts = {"held_out": sums[:128], "taught": sums[128:896], "train": sums[896:3000]}
    for name, part in parts.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row(*two)) + "\n" for two in part))


def trained(options: argparse.Namespace, folder: Path, model: str, data: Path, words: str) -> Path:
    """The folder, with a finished DPO run in it."""
    rate = options.rate * (LORA_RATE if LORA in words else 1)
    told = f"dpo --model {model} --data {data} --out {folder} --train.steps {options.steps} {DPO} {words}"
    told += f" --optimizer.learning_rate {rate:g}"
    command(told, folder.with_suffix(".log"))
    return folder


def judged(folder: Path, model: str, data: Path, words: str) -> Row:
    """What `dpo-jax eval` says of the run in `folder`."""
    result = folder.with_suffix(".json")
    if not result.exists():
        told = f"eval --model {folder} --reference {model} --data {data} --out {result} {words}"
        command(told, folder.with_suffix(".log"))
    return json.loads(result.read_text())


def moved(found: Row) -> Row:
    sides = {f"{side}, nats": round(found[f"eval_log_ratio/{side}"], 2) for side in ("chosen", "rejected")}
    return sides | {"accuracy": round(found["eval_rewards/accuracies"], 3)}


# ---------------------------------------------------------------- texts that loop, or never end


def endings(options: argparse.Namespace) -> list[Row]:
    """A row for the model as it was and one for each remedy."""
    rows = [{"arm": "before", **ended(before(options))}]
    for name, told in REMEDIES.items():
        found = on_pairs(options, name, told)
        rows.append({"arm": name, **moved(found), **ended(found)})
    return rows


def ended(found: Row) -> Row:
    texts = found["samples"]
    return {
        "loop": round(texts["looping"], 3),
        "never end": round(1 - texts["finished"], 3),
        "4-grams repeated": round(texts["repetition_4"], 3),
        "tokens": round(texts["length"], 1),
        "texts": texts["texts"],
    }


def split(options: argparse.Namespace) -> tuple[Path, Path]:
    """Files of the pairs of --data that are learnt from, and of those that are held out."""
    files = options.out / "pairs.train.jsonl", options.out / "pairs.held_out.jsonl"
    rows = options.data.read_text(encoding="utf-8").splitlines(keepends=True)
    random.Random(0).shuffle(rows)
    for file, part in zip(files, (rows[HELD_OUT:], rows[:HELD_OUT]), strict=True):
        file.write_text("".join(part), encoding="utf-8")
    return files


def on_pairs(options: argparse.Namespace, name: str, told: str) -> Row:
    """A run on --data and what `eval` says of it."""
    train, held_out = split(options)
    lengths = "--data.max_length 256 --data.max_prompt_length 128"
    folder = options.out / "pairs" / plain(name)
    trained(options, folder, options.model, train, f"{told} --train.batch_size {options.rows} {lengths}")
    return judged(folder, options.model, held_out, f"{lengths} {texts_of(options)}")


def before(options: argparse.Namespace) -> Row:
    """What `eval` says of the model as it was."""
    result, held_out = options.out / "pairs" / "before.json", split(options)[1]
    if not result.exists():
        words = f"eval --model {options.model} --data {held_out} --out {result} --data.max_length 256"
        command(f"{words} --data.max_prompt_length 128 {texts_of(options)}", result.with_suffix(".log"))
    return json.loads(result.read_text())


def texts_of(options: argparse.Namespace) -> str:
    """Greedy answers, the same prompts for every model."""
    return f"--samples {HELD_OUT} --batch_size 20 --sample.temperature 0 --sample.max_new_tokens {options.tokens}"


# ---------------------------------------------------------------- rounds


def rounds(options: argparse.Namespace) -> list[Row]:
    """A row a seed, a model and a way."""
    out, rows = options.out / "rounds", list[Row]()
    arithmetic.write_problems(out)
    command(f"sft --model {options.model} --data {out}/taught.jsonl --out {out}/sft {SFT}", out / "sft.log")
    problems = out / "problems.jsonl"
    lines = (out / "train.jsonl").read_text().splitlines(keepends=True)
    problems.write_text("".join(lines[: options.problems]))
    ways = {"two rounds": (2, 8, 5), "one round": (1, 16, 10)}
    for seed in range(options.seeds):
        for name, (count, samples, pairs) in ways.items():
            folder = out / f"{plain(name)}-{seed}"
            words = (
                f"recipe iterative_rpo --model {out}/sft --prompts {problems} --eval_prompts {out}/held_out.jsonl --out"
                f" {folder} --rounds {count} --samples {samples} --pairs_per_prompt {pairs} --temperatures 1.0 --seed"
                f" {seed} --sample.max_new_tokens 8 --batch_size 64 --dpo.train.steps {options.steps // count}"
                f" --dpo.train.batch_size {2 * options.pairs} --dpo.train.seed {seed} --dpo.data.max_length 128"
                " --dpo.optimizer.learning_rate 1e-5 --dpo.optimizer.warmup_ratio 0.1 --dpo.dpo.nll_coefficient 1"
                " --dpo.checkpoint.every 1000"
            )
            command(words, folder.with_suffix(".log"))
            for model in json.loads((folder / "summary.json").read_text())["rounds"]:
                interval = f"{model['accuracy']:.3f} ({model['low']:.3f} to {model['high']:.3f})"
                told = {"way": name, "seed": seed, "model": model["model"], "accuracy": interval}
                rows.append(told | {"pairs": model.get("pairs", ""), "problems used": model.get("used", "")})
    return rows


# ---------------------------------------------------------------- what comes out


def plain(name: str) -> str:
    """Of an arm, as the name of a folder."""
    return "_".join(name.lower().replace("+", "and").split())


def table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return "\n".join([*lines, *(f"| {' | '.join(str(row.get(name, '')) for name in names)} |" for row in rows)])


if __name__ == "__main__":
    main()
