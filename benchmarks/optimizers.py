"""Convergence of the optimizers with less memory beside AdamW's: SFT, then DPO, the same rows, order and seeds.

    zcat hh.jsonl.gz | head -300 > rows.jsonl
    python benchmarks/optimizers.py --model smollm2 --data rows.jsonl --folder DIR --steps 60 --batch_size 2

Each arm is `dpo-jax sft` on the chosen dialogues of --data, and `dpo-jax dpo` on its pairs from where AdamW's first SFT
ended; all weights, a process each, so that its peak memory is its own. AdamW's learning rate for all but Adafactor,
which has no first moment and no bias correction: --adafactor times it (of its own arm: steps relative to the weights).
Written into DIR after each run: `optimizers.md` (held-out loss before and after, bytes of optimizer state, the median
step's time against AdamW's, peak memory of the process), `optimizers.json` with every curve, `optimizers.png`. A run
that stands in the folder is not made again. The command above takes some 2.5 hours on two CPU cores: guessed, not
measured.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax

from dpo_jax import state as states
from dpo_jax.config import OptimizerConfig
from dpo_jax.files.folder import is_finished, write_atomically, write_json
from dpo_jax.files.log import read_metrics
from dpo_jax.model import llama, variables
from dpo_jax.report import html
from dpo_jax.weights.pretrained import read_shape

ROOT = Path(__file__).resolve().parents[1]
RATES = {"sft": 5e-4, "dpo": 2e-5}
"""Word -> AdamW's learning rate."""
ARMS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw, bfloat16 m": {"mu_dtype": "bfloat16"},
    "adamw_8bit": {"name": "adamw_8bit"},
    "adafactor": {"name": "adafactor"},
    "adafactor, relative": {"name": "adafactor", "parameter_scale": True},
    "rmsprop": {"name": "rmsprop"},
}
COMMON = """--holdout 0.1 --data.max_length 256 --data.template raw --optimizer.warmup_ratio 0.1
--optimizer.schedule linear --checkpoint.every 100000 --quiet""".split()

Found = dict[str, Any]


def rate_of(word: str, arm: str, adafactor: float, relative: float) -> float:
    """The learning rate of an arm."""
    if arm == "adafactor, relative":
        return relative
    return RATES[word] * (adafactor if arm == "adafactor" else 1)


def train(words: Sequence[str], out: Path) -> float | None:
    """One run, unless it is there: peak GiB of its process (Linux counts KiB)."""
    if is_finished(out):
        return None
    process = subprocess.Popen([sys.executable, "-m", "dpo_jax", *words], env=os.environ | {"PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{out}: {words[0]} has failed")
    return usage.ru_maxrss / 2**20


def state_bytes(model: str, options: dict[str, Any]) -> int:
    """Of the optimizer, all weights trained."""
    shapes = variables.abstract_variables(llama.Llama(read_shape(model)))
    state = jax.eval_shape(states.make_optimizer(OptimizerConfig(**options)).tx.init, {"params": shapes["params"]})
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def read(out: Path, word: str, seed: int, arm: str, rate: float, held: int, peak: float | None) -> Found:
    """What a run came to; `held`: bytes of its optimizer's state."""
    rows = read_metrics(out / "metrics.jsonl")
    curve = {
        name: [(row["step"], row[name]) for row in rows if name in row]
        for name in ("loss", "eval_loss", "eval_rewards/accuracies")
    }
    seconds = [row["seconds_per_step"] for row in rows if "seconds_per_step" in row][2:]
    told = {"word": word, "seed": seed, "arm": arm, "rate": rate, "state_bytes": held, "peak_gib": peak}
    return told | {"seconds_per_step": median(seconds), "curves": curve}


def table(found: Sequence[Found]) -> str:
    """In Markdown."""
    plain = {(one["word"], one["seed"]): one for one in found if one["arm"] == "adamw"}
    lines = [
        "| | seed | optimizer | learning rate | held-out loss, before and after | less AdamW's | accuracy after "
        "| state, MB | step's time, AdamW's 1 | peak, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        beside, losses = plain[one["word"], one["seed"]], [y for _, y in one["curves"]["eval_loss"]]
        right = [y for _, y in one["curves"]["eval_rewards/accuracies"]]
        cells = [one["word"], str(one["seed"]), one["arm"], f"{one['rate']:.3g}", f"{losses[0]:.4f}, {losses[-1]:.4f}"]
        cells += [f"{losses[-1] - beside['curves']['eval_loss'][-1][1]:+.4f}", f"{right[-1]:.3f}" if right else ""]
        cells += [f"{one['state_bytes'] / 1e6:,.1f}", f"{one['seconds_per_step'] / beside['seconds_per_step']:.2f}"]
        lines.append(f"| {' | '.join([*cells, '' if one['peak_gib'] is None else format(one['peak_gib'], '.2f')])} |")
    return "\n".join(lines) + "\n"


def draw(found: Sequence[Found], path: Path) -> None:
    """The first seed's held-out curves, a panel a word."""
    plots = []
    for word in RATES:
        runs = [one for one in found if one["word"] == word and one["seed"] == 0]
        series = (html.Series(one["arm"], *zip(*one["curves"]["eval_loss"], strict=True)) for one in runs)
        plots += [html.Plot(f"{word}: held-out loss", tuple(series))] if runs else []
    path.write_bytes(html.png_of(plots))


def main(words: Sequence[str] | None = None) -> None:
    """Make the runs, and write what they came to after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", required=True, help="pairs")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], default=[*ARMS])
    parser.add_argument("--adafactor", type=float, default=0.3, help="times AdamW's learning rate")
    parser.add_argument("--relative", type=float, default=1e-3, help="rate of relative steps")
    options = parser.parse_args(words)
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "optimizers.json"
    before = {(o["word"], o["seed"], o["arm"]): o for o in (json.loads(kept.read_text()) if kept.exists() else [])}
    arms = ["adamw", *(arm for arm in options.arms if arm != "adamw")]
    found: list[Found] = []
    for word in RATES:
        start = options.model if word == "sft" else str(folder / "sft-0-adamw" / "model")
        for seed in range(options.seeds):
            for arm in arms:
                out = folder / f"{word}-{seed}-{arm.replace(', ', '-').replace(' ', '-')}"
                rate = rate_of(word, arm, options.adafactor, options.relative)
                line = [word, "--model", start, "--data", options.data, "--out", str(out), *COMMON]
                line += ["--train.steps", str(options.steps), "--train.eval_every", str(max(1, options.steps // 5))]
                line += ["--train.batch_size", str(options.batch_size), "--train.seed", str(seed)]
                line += [x for k, v in ARMS[arm].items() for x in (f"--optimizer.{k}", str(v))]
                peak = train([*line, "--optimizer.learning_rate", str(rate)], out)
                peak = before.get((word, seed, arm), {}).get("peak_gib") if peak is None else peak
                found.append(read(out, word, seed, arm, rate, state_bytes(options.model, ARMS[arm]), peak))
                write_json(kept, found)
                write_atomically(folder / "optimizers.md", table(found))
                draw(found, folder / "optimizers.png")
    print(table(found))


if __name__ == "__main__":
    main()
