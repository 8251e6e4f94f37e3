"""DPO with LoRA on a base in float32, int8 and nf4: the same rows and seeds, how each learns, what each takes.

    python benchmarks/qlora.py --data ../shared/data/hh_harmless --out runs/qlora

Each arm is one `dpo-jax dpo` in a process of its own, one after the other; what stands in --out is not run again.
Writes --out/qlora.json after each arm and prints the table: the loss over the steps, held-out loss and accuracy at
the end, seconds a step (median, without the steps that compile), the process's peak memory. Options that are not known
here go to every arm.

With SmolLM2-135M as it stands here (60 steps of 8 pairs of at most 512 tokens, float32, rank 16) some two hours on two
CPU cores: guessed, not measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_jax.files.folder import write_json
from dpo_jax.files.log import read_metrics

BASES = ("float32", "int8", "nf4")


def words(base: str, given: argparse.Namespace, more: Sequence[str]) -> list[str]:
    """The command of an arm."""
    options = {
        "--model": given.model,
        "--data": given.data,
        "--out": str(Path(given.out) / base),
        "--holdout": "0.1",
        "--lora.rank": "16",
        "--optimizer.learning_rate": "1e-4",
        "--train.frozen_dtype": base,
        "--train.steps": str(given.steps),
        "--train.batch_size": "8",
        "--data.max_length": "512",
        "--data.limit": str(given.rows),
    }
    return ["dpo", *(x for pair in options.items() for x in pair), *more]


def arm(base: str, given: argparse.Namespace, more: Sequence[str]) -> dict[str, Any]:
    """Run it, unless it stands there, and what it came to."""
    out = Path(given.out) / base
    kept = out.with_suffix(".json")
    if kept.exists():
        return json.loads(kept.read_text())
    process = subprocess.Popen([sys.executable, "-m", "dpo_jax", *words(base, given, more)])
    _, status, used = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(code)
    rows = read_metrics(out / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    seconds = [row["seconds_per_step"] for row in steps if "seconds_per_step" in row]
    told = {
        "base": base,
        "losses": [row["loss"] for row in steps],
        "seconds a step": statistics.median(seconds),
        "peak GB": used.ru_maxrss * 1024 / 1e9,
        **{name: value for name, value in rows[-1].items() if name.startswith("eval_")},
    }
    write_json(kept, told)
    return told


def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=540)
    given, more = parser.parse_known_args(argv)
    Path(given.out).mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for base in BASES:
        found.append(arm(base, given, more))
        write_json(Path(given.out) / "qlora.json", found)
    print("| base | loss, first and last tenth | held-out loss | accuracy | s/step | of float32 | peak GB |")
    print("|---|---|---|---|---|---|---|")
    for one in found:
        losses, tenth = one["losses"], max(1, len(one["losses"]) // 10)
        first, last = (statistics.fmean(x) for x in (losses[:tenth], losses[-tenth:]))
        took, accuracy = one["seconds a step"], one["eval_rewards/accuracies"]
        print(
            f"| {one['base']} | {first:.4f}, {last:.4f} | {one['eval_loss']:.4f} | {accuracy:.3f} | {took:.2f} |"
            f" {took / found[0]['seconds a step']:.2f} | {one['peak GB']:.2f} |"
        )


if __name__ == "__main__":
    main()
