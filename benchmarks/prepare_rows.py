"""How fast `dpo-jax prepare` is, and how much memory it takes: `python benchmarks/prepare_rows.py --rows 1000000`.

Makes synthetic preference rows (unequal lengths, some prompts repeated, some nearly so) in a scratch folder, runs the
command on them in a process of its own, and prints rows a second and the peak of its resident memory.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write_rows(path: Path, rows: int, seed: int = 0) -> int:
    """Write `rows` JSON lines: prompts of about 30 words, responses of about 60. Returns the size of the file."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    words = ["".join(rng.choices(letters, weights=range(26, 0, -1), k=rng.randint(2, 9))) for _ in range(20_000)]

    def said(mean: int) -> str:
        return " ".join(rng.choices(words, k=max(3, int(rng.expovariate(1 / mean)))))

    prompts: list[str] = []  # the last few, to repeat or change a little
    with path.open("w") as file:
        for i in range(rows):
            lot = rng.random()
            if lot < 0.02 and prompts:
                prompt = rng.choice(prompts)
            elif lot < 0.04 and prompts:
                prompt = rng.choice(prompts) + " " + rng.choice(words)
            else:
                prompt = said(30)
            prompts = [*prompts[-99:], prompt]
            row = {
                "prompt": prompt,
                "chosen": said(60),
                "rejected": said(60),
                "margin": rng.random(),
                "source": f"s{i % 7}",
            }
            file.write(json.dumps(row) + "\n")
    return path.stat().st_size


# Runs the command and says on its last line how much memory the process had at most, in KiB. Not by `ru_maxrss`, which
# on Linux begins at what the process that started this one had.
RUN = """
import sys
from pathlib import Path
from dpo_jax import cli
code = cli.main(sys.argv[1:])
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")))
sys.exit(code)
"""


def measure(source: Path, target: Path, options: list[str]) -> dict[str, float]:
    """Run `dpo-jax prepare` in a process of its own: its time, speed, peak memory in MB and the size of the result."""
    words = ["prepare", "--data", str(source), "--to", str(target), *options]
    started, before = time.monotonic(), _cpu_seconds()
    done = subprocess.run([sys.executable, "-c", RUN, *words], stdout=subprocess.PIPE, text=True, check=True)
    seconds, cpu = time.monotonic() - started, _cpu_seconds() - before
    report = json.loads((target / "1.0.0" / "report.json").read_text())
    size = sum(path.stat().st_size for path in (target / "1.0.0").iterdir())
    return {
        "rows": report["rows_written"],
        "seconds": seconds,
        "cpu_seconds": cpu,
        "rows_per_second": report["rows_per_second"],
        "peak_megabytes": int(done.stdout.split()[-1]) * 1024 / 1e6,
        "megabytes_written": size / 1e6,
    }


def _cpu_seconds() -> float:
    """Of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--splits", default="train=0.98,test=0.02")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        size = write_rows(source, options.rows)
        print(f"{options.rows} rows, {size / 1e6:.0f} MB of JSON lines", flush=True)
        found = measure(source, Path(folder) / "store", ["--splits", options.splits])
    print(
        f"{found['rows']} rows in {found['seconds']:.1f} s with start-up ({found['cpu_seconds']:.1f} s of CPU time); "
        f"{found['rows_per_second']:.0f} rows/s; "
        f"peak memory {found['peak_megabytes']:.0f} MB; {found['megabytes_written']:.0f} MB written"
    )


if __name__ == "__main__":
    main()
