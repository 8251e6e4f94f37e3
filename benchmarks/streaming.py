"""Large data: how fast `dpo-jax prepare` is, how much memory it takes, how soon a run on what it wrote takes a step.

    python benchmarks/streaming.py --kind preferences --rows 10000 100000 1000000 --processes 2
    python benchmarks/streaming.py --kind text --rows 10000 100000 1000000 10000000 --processes 2
    python benchmarks/streaming.py --kind preferences --rows 1000000 --part 0.1 --start

Makes synthetic rows (2 kB of preferences, or documents of about 150 characters; of unequal lengths, 1 in 50 a copy of
another and 1 in 50 nearly one) in a scratch folder, and runs the command on them. A line for each size: rows a second
of wall time, and of processor time; the peak of resident memory of the command and of its largest worker.

`--start` stores ids, too (`--store_ids`, of a tiny model that is made here), and then times `dpo-jax dpo` or `sft`
from the command to its first step.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


def write_rows(path: Path, rows: int, kind: str = "preferences", seed: int = 0, *, part: float = 1.0) -> int:
    """Write `rows` JSON lines, of `part` of their usual length. Returns the size of the file in bytes."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    words = ["".join(rng.choices(letters, weights=range(26, 0, -1), k=rng.randint(2, 9))) for _ in range(20_000)]
    pool = " ".join(rng.choices(words, k=1_000_000))

    def said(usual: int) -> str:
        mean = max(1, int(part * usual))
        at = int(rng.random() * (len(pool) - 30 * mean))
        return pool[at : at + 8 + min(int(rng.expovariate(1 / mean)), 29 * mean)]

    prompts: list[str] = [said(300)]  # the last few, to repeat or change a little
    with path.open("w") as file:
        for i in range(rows):
            lot = rng.random()
            if lot < 0.02:
                prompt = rng.choice(prompts)
            elif lot < 0.04:
                prompt = f"{rng.choice(prompts)} {rng.choice(words)}"
            else:
                prompt = f"{i} {said(300 if kind == 'preferences' else 150)}"
            prompts = [*prompts[-99:], prompt] if i % 10 == 0 else prompts
            row: dict[str, object] = {"text": prompt}
            if kind == "preferences":
                row = {"prompt": prompt, "chosen": said(800), "rejected": said(800)}
                row |= {"margin": rng.random(), "source": f"s{i % 7}"}
            file.write(json.dumps(row) + "\n")
    return path.stat().st_size


class Measured(NamedTuple):
    """What a command took.

    peak, worker: the most resident memory of the command itself, and of the largest process that it started, in MB.
    """

    seconds: float
    cpu_seconds: float
    peak: float
    worker: float


def measure(*words: str) -> Measured:
    """Run `dpo-jax` with these words, and look at its memory, and that of its processes, every tenth of a second."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    started, before = time.monotonic(), _cpu_seconds()
    command = subprocess.Popen([sys.executable, "-m", "dpo_jax", *words], env=environment, stdout=subprocess.DEVNULL)
    peaks: dict[int, float] = {}
    while command.poll() is None:
        for process in [command.pid, *_children(command.pid)]:
            peaks[process] = max(peaks.get(process, 0.0), _peak(process))
        time.sleep(0.1)
    if command.returncode:
        raise SystemExit(f"{' '.join(words)} failed")
    own = peaks.pop(command.pid)
    seconds = time.monotonic() - started
    return Measured(seconds, _cpu_seconds() - before, own / 1e6, max(peaks.values(), default=0.0) / 1e6)


def _cpu_seconds() -> float:
    """Of all processes that were started here and have ended, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _children(process: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def _peak(process: int) -> float:
    """The most resident memory so far, in bytes (VmHWM); 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return 1024.0 * next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def prepare(source: Path, target: Path, *options: str) -> tuple[Measured, int]:
    """(what `dpo-jax prepare` took, rows written)."""
    took = measure("prepare", "--data", str(source), "--to", str(target), *options)
    return took, json.loads((target / "1.0.0" / "report.json").read_text())["rows_written"]


def tiny_model(folder: Path) -> None:
    """A Llama of two small layers, with a tokenizer."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import tiny

    tiny.folder(folder)


def start(store: Path, model: Path, kind: str, out: Path) -> tuple[Measured, float]:
    """(what a run of one step took, seconds of wall time to the first step's metrics)."""
    words = ["--model", str(model), "--data", f"tfds:{store}:train", "--out", str(out), "--train.steps", "1"]
    words += ["--data.max_length", "256", "--train.batch_size", "8"]
    words = (
        ["dpo", *words, "--dpo.reference", "live"] if kind == "preferences" else ["sft", *words, "--data.kind", kind]
    )
    began = time.time()
    took = measure(*words)
    return took, (out / "metrics.jsonl").stat().st_mtime - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("preferences", "text"), default="preferences")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--splits", default="train=0.98,test=0.02")
    parser.add_argument("--start", action="store_true", help="store ids, and time the start of a run")
    parser.add_argument("--part", type=float, default=1.0, help="rows of this part of their usual length")
    parser.add_argument("--work", type=Path, help="where to make a scratch folder (default: among temporary files)")
    options = parser.parse_args()
    print(
        f"{'rows':>10}{'MB':>7}{'s':>8}{'rows/s':>8}{'CPU s':>8}{'rows/CPU s':>11}{'MB peak':>9}{'worker':>8}",
        flush=True,
    )
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.work) as scratch:
            folder = Path(scratch)
            size = write_rows(folder / "rows.jsonl", rows, options.kind, part=options.part)
            words = ["--splits", options.splits, "--processes", str(options.processes)]
            if options.start:
                tiny_model(folder / "model")
                words += ["--store_ids", "--tokenizer", str(folder / "model")]
            took, written = prepare(folder / "rows.jsonl", folder / "store", *words)
            (folder / "rows.jsonl").unlink()
            print(
                f"{written:10}{size / 1e6:7.0f}{took.seconds:8.1f}{written / took.seconds:8.0f}{took.cpu_seconds:8.1f}"
                f"{written / took.cpu_seconds:11.0f}{took.peak:9.0f}{took.worker:8.0f}",
                flush=True,
            )
            if options.start:
                took, first = start(folder / "store", folder / "model", options.kind, folder / "run")
                print(
                    f"{'':10} a run's first step after {first:.1f} s ({took.cpu_seconds:.1f} s of processor time to its"
                    f" end); {took.peak:.0f} MB",
                    flush=True,
                )
            shutil.rmtree(folder / "store")


if __name__ == "__main__":
    main()
