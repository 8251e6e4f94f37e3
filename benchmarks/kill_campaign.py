"""Every command, killed by SIGKILL and begun again: does it end with what an uninterrupted run ends with?

    python benchmarks/kill_campaign.py --kills 100 --out kills.json
    python benchmarks/kill_campaign.py --only dpo 'dpo lora' --seed 3 --kills 20 --work /tmp/kills

Each command (`CAMPAIGN`) runs once to its end, on tiny random models. Then it runs again and again in an empty folder
and is killed once or twice on the way: at a random moment, or at one of Python's file operations in its folder (open,
write, truncate, fsync, rename, mkdir, unlink, rmdir, rmtree), before it, after it, shortly after it, or with half of
the bytes written. The same words are then started until they end by themselves. Compared with the uninterrupted run:
the exit code; the list of all files and folders, so that nothing is left over; metrics, samples and rows (with them the
order of the data), arrays of checkpoints and weights, bit for bit. `BY_DESIGN` names what may differ.

Every start is a fork of one process that has made the imports (`tests/support/killing.py`), and they share what jax
compiles. Where the kills fall follows from --seed and the command, those at random moments up to the clock. Printed: a
line for each kill, and a table by command; --out gets all of it as JSON. Exit code 1 where there is a difference.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import killing  # noqa: E402 - it lies beside the tests
import same_bits  # noqa: E402
from bits_cases import CASES  # noqa: E402

LONGER = "--train.steps 5 --checkpoint.every 1"
"""A checkpoint at each step: more to be killed in than in a case's own few steps."""

_BY_LABEL = {case.label: case for case in CASES}


def _case(label: str, more: str = "") -> tuple[str, ...]:
    """The commands of a case of `same_bits.py`, the first with further words."""
    first, *others = _BY_LABEL[label].commands
    return (f"{first} {more}".strip(), *others)


_OTHER = "generate --model @rm2 --prompts @prompts.jsonl --out other.jsonl --sample.stop_strings a e i o"

CAMPAIGN: dict[str, tuple[str, ...]] = {
    "sft": _case("sft chat", LONGER),
    "text": _case("sft text packed", LONGER),
    "reward": _case("reward margin, then its run scores", LONGER),
    "dpo": _case("dpo", LONGER),
    "dpo lora": _case("dpo lora bfloat16 accumulate", LONGER),
    "dpo --online": _case("dpo online xpo", LONGER),
    "ppo": _case("ppo gae reward model", LONGER),
    "grpo": _case("grpo dapo", LONGER),
    "distill": _case("distill", LONGER),
    "rejection": _case("rejection"),
    "gatt": _case("gatt"),
    "recipe dsft": (
        "recipe dsft --prompts @heldout.jsonl --out out --model @rm2 --sample.max_new_tokens 8 --sample.stop_strings a"
        " e i o --write.rounds 0 --filter.near None --filter.most_characters 1000",
    ),
    "recipe aif": (
        _OTHER,
        "recipe aif --prompts @prompts.jsonl --pool @pool.yaml --judge length --out out --samples 2 --principles none",
    ),
    "recipe zephyr": _case("recipe zephyr"),
    "recipe llama2_chat": _case("recipe llama2_chat"),
    "recipe llama3": _case("recipe llama3"),
    "recipe iterative_rpo": _case("recipe iterative_rpo"),
    "recipe frontier": _case("recipe frontier", "--reward @mine.py:letters"),
    "generate": _case("generate greedy, sampled, beams"),
    "judge": _case("judge, pairs of what it scored"),
    "prepare": _case("prepare, and its set read"),
    "convert": (*_case("convert, and every format read"), "convert --from @model --to out.gguf --format gguf"),
    "extend-vocab": _case("extend-vocab"),
    "average": _case("average"),
}

BY_DESIGN = {
    "tensorboard/": "each start writes an event file of its own; their values are those of metrics.jsonl",
    "checkpoints/STEP/": "orbax compresses in an order that is not fixed; arrays and metadata are compared",
    "stages.json": "hashes of run folders cover the seconds of metrics.jsonl; some stages say what was there before",
    "clock": "figures whose name holds a word of `same_bits.CLOCK`",
    ".html, .png": "they show seconds",
    "exit code 2": "a whole result of one piece is not written over: the command says that it is there",
}
THERE = ("is not empty; name a new folder", "is there already; choose another")


@dataclass
class Result:
    """Of one command: `kills` holds where each fell, `differences` a line each; seconds of the clock, of processors."""

    command: str
    kills: list[dict[str, Any]] = field(default_factory=list)
    restarts: int = 0
    missed: int = 0
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


# ---------------------------------------------------------------- what a command leaves


def recorded(folder: Path, clean: Any) -> dict[str, Any]:
    """Of everything below a folder (file or folder, what is compared of it)."""
    return dict(_recorded(folder, folder, clean))


def _recorded(folder: Path, top: Path, clean: Any) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.iterdir()):
        name = str(path.relative_to(top))
        if path.is_dir() and path.name == "tensorboard":
            yield name, "there"
        elif path.is_dir() and (path / "_METADATA").exists():
            yield name, same_bits.arrays(path)
        elif path.is_dir():
            yield f"{name}/", "there"
            yield from _recorded(path, top, clean)
        elif path.name == "metadata" and path.parent.name == "meta":  # of a checkpoint: the position in the data
            yield name, json.loads(path.read_text())
        elif path.name == "stages.json":
            stages = json.loads(path.read_text()).items()
            kept = {stage: told | {"inputs": sorted(told["inputs"])} for stage, told in stages}
            figures = same_bits.flat(same_bits.without_clock(kept)).items()
            yield name, {key: value for key, value in figures if "from the disk" not in str(value)}
        else:
            yield name, same_bits.content(path, clean)


def in_fork(work: Any, into: Path) -> Any:
    """What `work()` returns, JSON-able, computed in a fork: this process must not begin to compute."""

    def write() -> int:
        into.write_text(json.dumps(work()))
        return 0

    ended = killing.forked(write, into.with_suffix(".said"))
    assert ended.code == 0, ended.said
    return json.loads(into.read_text())


# ---------------------------------------------------------------- one command


class Campaign:
    """The kills of one command.

    Args:
      name: of `CAMPAIGN`.
      work: the folder of the whole campaign, with the inputs in it.
      seed: of where the kills fall.
    """

    def __init__(self, name: str, work: Path, seed: int):
        self.result = Result(name)
        self._random = random.Random(f"{seed} {name}")
        self._inputs, self._folder = work / "inputs", work / name.replace(" ", "_")
        self._folder.mkdir()
        self._run, self._told = self._folder / "run", self._folder / "told.json"
        self._words = [
            [word.replace("@", f"{self._inputs}/", 1) if word[0] == "@" else word for word in line.split()]
            for line in CAMPAIGN[name]
        ]
        self._clean = same_bits.cleaner(work)

    def go(self, kills: int) -> Result:
        """An uninterrupted run, and others with so many kills in all."""
        start = time.monotonic()
        self._fresh()
        self._counts: list[Counter[str]] = []
        self._seconds: list[float] = []
        for words in self._words:
            ended = self._start(words, None)
            if ended.code:
                self.result.differences.append(f"not killed, and exit code {ended.code}: {ended.said[-500:]}")
                print(f"{self.result.command}: {self.result.differences[-1]}", flush=True)
                return self.result
            told = json.loads(self._told.read_text())
            self._counts.append(Counter(told["counts"]))
            self._seconds.append(ended.seconds)
            _import(told["modules"])
        whole = in_fork(partial(recorded, self._run, self._clean), self._folder / "whole.json")
        self._run.rename(self._folder / "whole")
        trial, kinds = 0, self._kinds()
        while len(self.result.kills) < kills and self.result.missed < 10 * kills:
            trial += 1
            plan = [next(kinds)]
            if kills - len(self.result.kills) > 1 and self._random.random() < 0.5:
                plan.append(next(kinds))
            self._trial(trial, sorted(plan, key=lambda one: one[0]), whole)
        self.result.seconds = round(time.monotonic() - start, 1)
        self.result.cpu_seconds = round(sum(os.times()[:4]), 1)
        return self.result

    def _fresh(self) -> None:
        shutil.rmtree(self._run, ignore_errors=True)
        self._run.mkdir()

    def _start(self, words: Sequence[str], kill: killing.Kill | None) -> killing.Ended:
        watched = killing.Watched(self._run, kill)

        def work() -> int:
            os.chdir(self._run)
            os.environ["DPO_JAX_CACHE"] = str(self._run / "cache")
            from dpo_jax.cli import main as command

            return killing.run_watched(command, words, watched, self._told)

        moment = kill.seconds if kill is not None and kill.kind == killing.MOMENT else None
        return killing.forked(work, self._folder / "said", moment)

    def _kinds(self) -> Iterator[tuple[int, str]]:
        """(which command of the chain, the kind of a kill) for ever: each pair once in a random order, then again."""
        pairs = [
            (index, kind)
            for index, counts in enumerate(self._counts)
            for kind in (killing.MOMENT, *killing.KINDS)
            if kind == killing.MOMENT or counts[kind]
        ]
        while True:
            yield from self._random.sample(pairs, len(pairs))

    def _kill(self, index: int, kind: str) -> killing.Kill:
        if kind == killing.MOMENT:
            return killing.Kill(kind, seconds=self._random.uniform(0, self._seconds[index]))
        ways = [killing.BEFORE, killing.AFTER, killing.SOON] + [killing.HALF] * (kind == killing.WRITE)
        number = self._random.randint(1, self._counts[index][kind])
        return killing.Kill(kind, number, self._random.choice(ways), self._random.uniform(0, killing.SOON_AFTER))

    def _trial(self, trial: int, plan: Sequence[tuple[int, str]], whole: Mapping[str, Any]) -> None:
        self._fresh()
        done, wrong = [], []
        for index, words in enumerate(self._words):
            for kill in [*(self._kill(at, kind) for at, kind in plan if at == index), None]:
                ended = self._start(words, kill)
                if ended.killed:
                    assert kill is not None, "it was killed by another"
                    done.append({"trial": trial, "command": words[0], "where": str(kill), "kind": kill.kind})
                    self.result.restarts += 1
                    continue
                if kill is not None:
                    self.result.missed += 1
                else:
                    self._seconds[index] = min(self._seconds[index], ended.seconds)
                if ended.code and not (done and ended.code == 2 and any(text in ended.said for text in THERE)):
                    wrong.append(f"exit code {ended.code}: {ended.said[-500:]}")
                break
        self.result.kills += done
        if done:
            left = in_fork(partial(recorded, self._run, self._clean), self._folder / "left.json")
            wrong += same_bits.differences(whole, left)
        where = ", ".join(f"{one['command']} {one['where']}" for one in done) or "not reached"
        print(f"{self.result.command}, trial {trial}: {where}: {'DIFFERS' if wrong else 'same'}", flush=True)
        for line in wrong:
            print(f"    {line}", flush=True)
        if wrong:
            self._run.rename(self._folder / f"differs-{trial}")
        self.result.differences += [f"trial {trial} ({where}): {line}" for line in wrong]


def _import(names: Sequence[str]) -> None:
    """What a command has read on its way need not be read again by its next start."""
    for name in names:
        if name.startswith(("dpo_jax", "jax", "orbax", "transformers", "matplotlib", "tokenizers", "optax", "flax")):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


# ---------------------------------------------------------------- all of them


def campaign(names: Sequence[str], kills: int, seed: int, work: Path, jobs: int) -> list[Result]:
    """So many kills, spread evenly over the commands; each command in a fork of its own, `jobs` of them at once."""
    share = {name: kills // len(names) + (i < kills % len(names)) for i, name in enumerate(names)}
    waiting, running = [name for name in names if share[name]], {}
    results: dict[str, Result] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            into = work / f"{name.replace(' ', '_')}.json"
            child = os.fork()
            if child == 0:
                code = 70
                try:
                    into.write_text(json.dumps(vars(Campaign(name, work, seed).go(share[name]))))
                    code = 0
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            running[child] = name, into
        child, status = os.wait()
        name, into = running.pop(child)
        if status:
            raise SystemExit(f"{name}: could not be run")
        results[name] = Result(**json.loads(into.read_text()))
    return [results[name] for name in names if name in results]


def table(results: Sequence[Result]) -> str:
    """Rows of Markdown, a command each and their sum."""
    lines = [
        "| command | kills | where | restarts | differences | seconds | CPU seconds |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for one in results:
        kinds = Counter(kill["kind"] for kill in one.kills)
        where = ", ".join(f"{kind} {count}" if count > 1 else kind for kind, count in sorted(kinds.items()))
        cells = (
            one.command,
            len(one.kills),
            where,
            one.restarts,
            len(one.differences),
            round(one.seconds),
            round(one.cpu_seconds),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    kinds = Counter(kill["kind"] for one in results for kill in one.kills)
    where = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    kills, restarts = sum(len(one.kills) for one in results), sum(one.restarts for one in results)
    differences = sum(len(one.differences) for one in results)
    seconds, processors = sum(one.seconds for one in results), sum(one.cpu_seconds for one in results)
    lines.append(f"| all | {kills} | {where} | {restarts} | {differences} | {seconds:.0f} | {processors:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="in all")
    parser.add_argument("--only", nargs="+", choices=CAMPAIGN, default=list(CAMPAIGN), metavar="COMMAND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="commands that run at once")
    parser.add_argument("--work", type=Path, help="a new folder for the runs, which then stay")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    start = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="kills-")) if options.work is None else options.work.resolve()
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(work / "compiled")}
    compiled |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    os.environ |= same_bits.ENVIRONMENT | compiled
    print(f"seed {options.seed}, {options.kills} kills over {len(options.only)} commands", flush=True)
    try:
        same_bits.build(work / "inputs")
        from dpo_jax.config.command_line.words import COMMANDS

        for command in COMMANDS.values():
            importlib.import_module(f"dpo_jax.commands.{command.function.partition(':')[0]}")
        results = campaign(options.only, options.kills, options.seed, work, options.jobs)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    seconds = round(time.monotonic() - start)
    print(f"\n{table(results)}\n\n{seconds} s with --jobs {options.jobs}")
    if options.out is not None:
        told = {"about": same_bits.about(ROOT), "seed": options.seed, "seconds": seconds, "by design": BY_DESIGN}
        options.out.write_text(json.dumps(told | {"commands": [vars(one) for one in results]}, indent=1) + "\n")
    return int(any(one.differences for one in results))


if __name__ == "__main__":
    sys.exit(main())
