"""GRPO's family on a task that SmolLM2-135M can learn: adding two numbers of two digits, held-out problems.

    python benchmarks/arithmetic.py --out OUT                one run after another: minutes each on two CPU cores
    python benchmarks/arithmetic.py --out OUT --jobs 9       all at once, on one GPU
    python benchmarks/arithmetic.py --out OUT --only grpo    those arms whose names begin so
    python benchmarks/arithmetic.py --out OUT --kills 1      a short run that is killed, and one that is not

A short SFT (20 steps of 16 problems) first teaches the format: the number and nothing else. Each arm then is
`dpo-jax grpo` with `--reward exact:answer`, which differs from the others in its preset, its seed or what its sampler
reads. The 8,100 problems are shuffled once: 256 are held out, 768 are for the SFT, the others for the arms. Held-out
accuracy is of one answer a problem at temperature 1, the same draws each time, with a 95 % bootstrap interval.

Killed (`--kills`): eight iterations with a checkpoint every third, ended by SIGKILL after a seeded number of seconds
and begun again; compared bit for bit with a run that was left alone: metrics but times, samples, held-out samples,
weights.

What is finished is not run again. OUT gets results.json (each arm's held-out figures by step, seconds, the device) and
arithmetic.png.
"""

import argparse
import hashlib
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT, TAUGHT = 256, 768
SFT = """--train.batch_size 16 --train.steps 20 --optimizer.learning_rate 2e-5 --optimizer.schedule linear
--optimizer.warmup_steps 4 --data.max_length 128 --checkpoint.every 20"""
RUN = """--reward exact:answer --eval_pass 1 --train.batch_size 64 --sample.max_new_tokens 8
--optimizer.learning_rate 1e-5 --optimizer.warmup_steps 5 --train.eval_every 20 --checkpoint.every 40"""
SEEDS = {f"grpo, seed {seed}": f"--ppo.preset grpo --train.seed {seed}" for seed in range(3)}
OTHERS = {f"{name}, seed 0": f"--ppo.preset {name} --ppo.group_size 8" for name in ("dr_grpo", "dapo", "gspo", "rloo")}
NARROW = {
    "int8 sampler": "--ppo.preset grpo --sample.weights int8",
    "int8 sampler, corrected": "--ppo.preset grpo --sample.weights int8 --ppo.sampler_correction token_truncate",
}
ARMS = SEEDS | OTHERS | NARROW
SHORT = RUN.replace("--train.eval_every 20 --checkpoint.every 40", "--train.eval_every 4 --checkpoint.every 3")
TIMES = ("seconds", "tokens_per_second", "tflops", "mfu", "memory")
"""Of metrics that a clock or the machine decides, parts of their names."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=60, help="iterations of 64 answers, 8 to each of 8 problems")
    parser.add_argument("--jobs", type=int, default=1, help="arms at once")
    parser.add_argument("--only", default="", help="arms whose names begin with this")
    parser.add_argument("--common", default="", help="options of every command, such as '--train.dtype bfloat16'")
    parser.add_argument("--kills", type=int, default=0, help="only this: a short run, killed so often")
    options = parser.parse_args()
    out = options.out.resolve()
    write_problems(out)
    sft = f"sft --model {options.model} --data {out}/taught.jsonl --out {out}/sft {SFT} {options.common}"
    run(sft, out / "sft.log")
    if options.kills:
        killed(out, options.kills, options.common)
        return
    wanted = {name: told for name, told in ARMS.items() if name.startswith(options.only)}

    def arm(name: str) -> None:
        folder = out / name.replace(", ", "_").replace(" ", "_")
        data = f"--data {out}/train.jsonl --eval_data {out}/held_out.jsonl --train.steps {options.steps}"
        words = f"grpo --model {out}/sft --out {folder} {data} {RUN} {wanted[name]} {options.common}"
        run(words, folder.with_suffix(".log"))
        results[name] = figures(folder) | {"options": wanted[name]}

    results: dict[str, Any] = {}
    started = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in [pool.submit(arm, name) for name in wanted]:
            done.result()
    told = {"device": device(), "jobs": options.jobs, "steps": options.steps, "seconds": time.monotonic() - started}
    results = {name: results[name] for name in wanted}
    (out / "results.json").write_text(json.dumps(told | {"arms": results}, indent=1) + "\n")
    draw(results, out / "arithmetic.png")
    print(table(results))
    print(f"{told['seconds']:.0f} s on {told['device']}, {options.jobs} at a time")


def write_problems(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    rows = [(f"What is {a} + {b}? Reply with the number only.", str(a + b)) for a, b in pairs]
    dialogues = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in rows[HELD_OUT : HELD_OUT + TAUGHT]
    ]
    problems = [{"prompt": asked, "answer": answer} for asked, answer in rows]
    files = {"held_out": problems[:HELD_OUT], "taught": dialogues, "train": problems[HELD_OUT + TAUGHT :]}
    for name, content in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def run(words: str, log: Path) -> None:
    """One command, its output in `log`; ends this program where it fails."""
    here = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    with log.open("a") as file:
        command = [sys.executable, "-m", "dpo_jax", *shlex.split(words)]
        done = subprocess.run(command, env=os.environ | here, stdout=file, stderr=file, check=False)
    if done.returncode:
        sys.exit(f"dpo-jax {words}\n{log.read_text()[-2000:]}")


def killed(out: Path, kills: int, common: str) -> None:
    """Print what differs between a short run that was killed and one that was not; exit code 1 where anything does."""
    data = f"--data {out}/train.jsonl --eval_data {out}/held_out.jsonl --train.steps 8"
    words = f"grpo --model {out}/sft {data} {SHORT} --ppo.preset grpo {common}"
    for name in ("whole", "killed"):
        shutil.rmtree(out / name, ignore_errors=True)
    start = time.monotonic()
    run(f"{words} --out {out}/whole", out / "whole.log")
    seconds, draws, left = time.monotonic() - start, random.Random(0), kills
    command = [sys.executable, "-m", "dpo_jax", *shlex.split(f"{words} --out {out}/killed")]
    here = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    while True:
        with (out / "killed.log").open("a") as log:
            process = subprocess.Popen(command, env=here, stdout=log, stderr=log)
            try:
                code = process.wait(draws.uniform(0.4, 0.9) * seconds if left else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                left -= 1
                continue
        if code:
            sys.exit((out / "killed.log").read_text()[-2000:])
        break
    sides = [compared(out / name) for name in ("whole", "killed")]
    different = [name for name in sides[0] | sides[1] if sides[0].get(name) != sides[1].get(name)]
    print(f"{kills - left} kills; {len(sides[0])} things compared, {len(different)} differ {different or ''}")
    sys.exit(bool(different))


def compared(folder: Path) -> dict[str, Any]:
    """What two runs must agree in: each row of metrics without times, the files of samples, the weights."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {
        f"row {i}": {name: value for name, value in row.items() if not any(part in name for part in TIMES)}
        for i, row in enumerate(rows)
    }
    files = ["samples.jsonl", "model/model.safetensors", *(f"eval_samples/{step}.jsonl" for step in (0, 4, 8))]
    return found | {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}


def figures(folder: Path) -> dict[str, Any]:
    """Of a finished run: its figures over training, and the held-out ones by step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held = {
        row["step"]: {
            name.removeprefix("eval_"): row[name]
            for name in ("eval_pass@1", "eval_pass@1_low", "eval_pass@1_high", "eval_kl", "eval_kl_low", "eval_kl_high")
        }
        for row in rows
        if "eval_pass@1" in row
    }
    training = [row for row in rows if "seconds_per_step" in row]
    names = ("reward", "objective/kl", "sampling/sampling_logp_difference/mean", "frac_reward_zero_std")
    return {
        "held out": held,
        "training": {name: [row.get(name) for row in training] for name in names},
        "seconds": sum(row["seconds_per_step"] for row in training),
    }


def device() -> str:
    """In a process of its own, so that this one holds no memory of it."""
    told = "import jax; print(jax.devices()[0].device_kind, 'jax', jax.__version__)"
    return subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout.strip()


def table(results: dict[str, Any]) -> str:
    lines = ["| arm | accuracy before | after | KL, nats an answer | s |", "|---|---|---|---|---|"]
    for name, found in results.items():
        steps = sorted(found["held out"])
        first, last = (found["held out"][step] for step in (steps[0], steps[-1]))
        sides = [f"{x['pass@1']:.3f} ({x['pass@1_low']:.3f} to {x['pass@1_high']:.3f})" for x in (first, last)]
        lines.append(f"| {name} | {sides[0]} | {sides[1]} | {last['kl']:.3f} | {found['seconds']:.0f} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], file: Path) -> None:
    """Held-out accuracy of all arms; beside it KL divergence, sampled with the weights as they are and in int8."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    panels = [({name: found for name, found in results.items() if name not in NARROW}, "pass@1")]
    if any(name in NARROW for name in results):
        narrow = {name: found for name, found in results.items() if name in NARROW or name == "grpo, seed 0"}
        panels += [(narrow, "pass@1"), (narrow, "kl")]
    size = (1.5 + 4 * len(panels), 4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, constrained_layout=True, squeeze=False)
    for axis, (arms, what) in zip(axes[0], panels, strict=True):
        for name, found in arms.items():
            steps = sorted(found["held out"])
            middle, low, high = ([found["held out"][s][what + end] for s in steps] for end in ("", "_low", "_high"))
            (line,) = axis.plot(steps, middle, marker="o", markersize=3, label=name)
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.12)
        axis.set_xlabel("iteration")
        axis.set_ylabel("held-out accuracy" if what == "pass@1" else "KL divergence, nats an answer")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
