"""What the benchmarks share: contenders in processes of their own, each in its own Python environment, taking turns.

A contender is the benchmark's own script, started with `--worker NAME`. It holds its weights all the time, does one
turn for each line of JSON on its stdin, and answers with one line of JSON. While one works the others wait for their
line and use no processor.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
REST = 0.3
"""Seconds before a turn, in which the threads of the one before go to sleep."""


def use_cores(count: int) -> None:
    """Keep this process and those that it starts on `count` of its cores, and off accelerators."""
    here = sorted(os.sched_getaffinity(0))
    if len(here) < count:
        raise SystemExit(f"--cores {count}: this process has {len(here)}")
    os.sched_setaffinity(0, here[:count])
    os.environ["JAX_PLATFORMS"], os.environ["CUDA_VISIBLE_DEVICES"] = "cpu", ""


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that this environment has."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_gib() -> float:
    """The most memory that this process ever had resident. (`ru_maxrss` begins at what its parent had.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 2**20


def _machine_seconds() -> float:
    """Processor seconds that the machine has spent on anything, all cores together."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Stopwatch:
    """Wall and processor time since it was made."""

    def __init__(self) -> None:
        self._wall, self._own, self._machine = time.perf_counter(), time.process_time(), _machine_seconds()

    def read(self) -> Figures:
        """Seconds; share of its cores that this process used; cores that everything else on the machine used."""
        wall, own = time.perf_counter() - self._wall, time.process_time() - self._own
        others = max(0.0, _machine_seconds() - self._machine - own) / wall
        return {"seconds": wall, "cpu_share": own / wall / len(os.sched_getaffinity(0)), "other_cores": others}


# ---------------------------------------------------------------- the worker's side


class Desk:
    """A worker's stdin and stdout. What libraries print goes to stderr, so that it is not taken for an answer."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def answer(self, figures: Figures) -> None:
        """One line."""
        print(json.dumps(figures), file=self._answers)

    def requests(self) -> Iterator[Any]:
        """What is asked for, turn by turn, until no more is."""
        for line in sys.stdin:
            yield json.loads(line)


# ---------------------------------------------------------------- the side of the one who asks


class Worker:
    """A contender's process. It ends with the `with` block."""

    def __init__(self, name: str, python: str | Path, script: str | Path, arguments: Sequence[str]):
        self.name = name
        command = [str(python), str(script), *arguments, "--worker", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready: Figures = {}

    def __enter__(self) -> "Worker":
        self.ready = self._read()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> Figures:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self._process.wait()}")
        return json.loads(line)

    def turn(self, request: Any = None) -> Figures:
        """One turn; its figures."""
        assert self._process.stdin is not None
        time.sleep(REST)
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()
