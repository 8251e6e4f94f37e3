"""What `--train.crossing_dtype bfloat16` does to loss curves: gradients that cross between two slices, rounded or not.

    python benchmarks/crossing.py --data /path/to/hh_harmless/train.jsonl.gz --folder DIR

A small random model learns the dialogues of --data (`sft`), then, from where the first of these runs ended, its pairs
(`dpo`); all weights, on eight CPU devices, `data` 2 x `fsdp` 4. Each seed (which orders the rows) trains three times:

    float32    what crosses is float32
    bfloat16   what crosses is bfloat16
    one slice  nothing crosses (`fsdp` 8): float32 sums in another order, and so how far their rounding leads

Prints a table: the held-out loss before and after, and how far the loss of a step lies from that of `float32`. A run
that stands in the folder is not made again.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}

from dpo_jax import cli
from dpo_jax.files.log import read_metrics

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))
TASKS = {"sft": "2e-3", "dpo": "1e-4"}
"""Word -> learning rate."""
SLICES = ("--mesh.data", "2", "--mesh.fsdp", "4")
ARMS = {
    "float32": SLICES,
    "bfloat16": (*SLICES, "--train.crossing_dtype", "bfloat16"),
    "one slice": ("--mesh.fsdp", "8"),
}

_EVERY = """--train.batch_size 16 --holdout 0.1 --data.max_length 192 --data.template raw --optimizer.warmup_steps 10
--optimizer.schedule linear --checkpoint.every 1000 --quiet""".split()
COMMON = {"sft": (*_EVERY, "--data.packing"), "dpo": (*_EVERY, "--data.buckets", "1")}


def train(word: str, model: Path, data: Path, out: Path, steps: int, seed: int, arm: str) -> None:
    """One run, unless it is there."""
    words = [word, "--model", str(model), "--data", str(data), "--out", str(out), *ARMS[arm], *COMMON[word]]
    words += ["--optimizer.learning_rate", TASKS[word], "--train.seed", str(seed), "--train.steps", str(steps)]
    if cli.main(words):
        raise SystemExit(f"{out}: {word} has failed")


def losses(out: Path) -> np.ndarray:
    """Of each step."""
    return np.asarray([row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row])


def held_out(out: Path) -> float:
    """The last held-out loss."""
    return [row["eval_loss"] for row in read_metrics(out / "metrics.jsonl") if "eval_loss" in row][-1]


def row(task: str, seed: int, runs: dict[str, Path]) -> str:
    """Of the table."""
    curves = {arm: losses(out) for arm, out in runs.items()}
    first, last = (np.mean(curves["float32"][part]) for part in (slice(5), slice(-5, None)))
    cells = [task, str(seed), f"{first:.4f} to {last:.4f}", *(f"{held_out(out):.5f}" for out in runs.values())]
    for arm in ("bfloat16", "one slice"):
        apart = np.abs(curves[arm] - curves["float32"])
        cells.append(f"{apart.max():.2g}, {apart.mean():.2g}")
    return f"| {' | '.join(cells)} |"


def main(words: Sequence[str] | None = None) -> None:
    """Make the runs and print the table."""
    import tiny

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="pairs")
    parser.add_argument("--folder", type=Path, required=True, help="for models and runs")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args(words)
    folder: Path = options.folder
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    start = tiny.folder(folder / "random", layers=2, hidden=64, max_position=512)
    rows = []
    for task in TASKS:
        model = start if task == "sft" else folder / "sft-0-float32" / "model"
        for seed in range(options.seeds):
            runs = {arm: folder / f"{task}-{seed}-{arm.replace(' ', '-')}" for arm in ARMS}
            for arm, out in runs.items():
                train(task, model, options.data, out, options.steps, seed, arm)
            rows.append(row(task, seed, runs))
    print("| | seed | loss of the first and last 5 steps | held-out loss, float32 | bfloat16 | one slice", end="")
    print(" | bfloat16 - float32 a step: largest, mean | one slice - float32: largest, mean |")
    print("|---|---|---|---|---|---|---|---|", *rows, sep="\n")
    print(f"\n{options.steps} steps each; {time.process_time() / 60:.1f} minutes of CPU")


if __name__ == "__main__":
    main()
