"""Hosts of a run are lost, one after another, in a step, in a save and in a restore; the end is the same, bit for bit.

    python benchmarks/host_losses.py --work /tmp/losses --losses 20

A tiny DPO run on two processes, which stand for two hosts. In every start but the last one of them, drawn by the seed,
is killed (SIGKILL) or frozen (SIGSTOP) at a random moment
    step     of one of the first steps of this start
    save     while a checkpoint is written
    restore  while a checkpoint is read
The other must end by itself, with exit code 75 and one line that names the lost one, within a minute. Then both are
started again with the same command. At the end metrics (wall-clock figures apart), weights and the position in the data
are compared with those of a run that lost nobody. The exit code is 1 where anything differs.

After them a disk fills up in a save of one of the two: it must end with exit code 2 and say so, and so must the other,
which names it.

With --local both also keep checkpoints on a disk of their own, which half of the lost hosts take along.

Every start is a fork of one process that has read the modules, and has not begun to compute.
"""

import argparse
import atexit
import importlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MOMENTS = ("step", "save", "restore")
BAD_INPUT, AGAIN, LIMIT = 2, 75, 60
FULL = 12_000
"""Bytes of the largest file that still fits: the log of a process, but not what it keeps of the arrays."""


@dataclass
class Loss:
    """One host lost: when, which, how, after which calls and how long after them."""

    moment: str
    victim: int
    frozen: bool
    calls: int
    delay: float
    with_disk: bool
    """Its own checkpoints are gone with it."""
    named: bool = False
    code: int = 0
    seconds: float = 0.0
    """From the loss to the end of the other."""
    step: int = 0
    """The last step in the log by then."""


def drawn(losses: int, seed: int) -> list[Loss]:
    """The losses; the first is in a step, for nothing is there to restore."""
    rng = random.Random(seed)
    found = []
    for i in range(losses):
        moment = MOMENTS[i % len(MOMENTS)]
        calls = rng.randint(3, 8) if moment == "step" else 1
        frozen = rng.random() < 0.25
        found.append(Loss(moment, rng.randrange(2), frozen, calls, rng.uniform(0, 0.15), rng.random() < 0.5))
    return [*found, Loss("full disk", rng.randrange(2), False, 2, 0.0, False)]


def arm(loss: Loss, mark: Path) -> None:
    """Let this process be lost as `loss` says; the time of it goes into the file `mark`."""
    from dpo_jax.files.log import MetricLog
    from dpo_jax.weights.orbax.checkpoint import Checkpoints

    left = [loss.calls]

    def die() -> None:
        if loss.moment == "full disk":
            mark.write_text(str(time.monotonic()))
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, resource.RLIM_INFINITY))
            return
        time.sleep(loss.delay)
        mark.write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGSTOP if loss.frozen else signal.SIGKILL)

    def dying(method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                thread = threading.Thread(target=die, daemon=True)
                thread.start()
                if loss.moment == "full disk":
                    thread.join()
            return method(*args, **named)

        return wrapped

    where: Any = MetricLog if loss.moment == "step" else Checkpoints
    name = {"step": "write", "save": "save", "restore": "attempt", "full disk": "save"}[loss.moment]
    setattr(where, name, dying(getattr(where, name)))


def start(words: Sequence[str], log: Path, before: Callable[[], None] | None = None) -> int:
    """Fork a process that runs `dpo-jax` with these words; its number. What it says goes into `log`."""
    from dpo_jax import cli

    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if before is not None:
            before()
        code = cli.main(list(words))
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_two(words: Sequence[str], work: Path, loss: Loss | None = None) -> list[int]:
    """Both processes of the run; one of them will be lost as `loss` says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = ("--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.processes", "2")
    return [
        start(
            [*words, *several, "--distributed.process_id", str(i)],
            work / f"process{i}.log",
            None if loss is None or loss.victim != i else partial(arm, loss, work / "lost"),
        )
        for i in range(2)
    ]


def ended(child: int, limit: float = 300) -> int:
    """The exit code of a process, or minus the signal that ended it; past the limit it is killed."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lose(words: Sequence[str], work: Path, out: Path, loss: Loss) -> None:
    """Run until one is lost and the other has ended; fill in what came of it."""
    from dpo_jax.files.log import read_metrics

    mark = work / "lost"
    mark.unlink(missing_ok=True)
    children = start_two(words, work, loss)
    loss.code = ended(children[1 - loss.victim])
    if mark.exists():
        loss.seconds = time.monotonic() - float(mark.read_text())
    if loss.moment != "full disk":
        os.kill(children[loss.victim], signal.SIGKILL)
    own_code = ended(children[loss.victim])
    lost = loss.moment != "full disk" or own_code == BAD_INPUT
    for own in (work / "own").glob(f"*/process-{loss.victim}-*") if loss.with_disk else ():
        shutil.rmtree(own)
    said = [line for line in (work / f"process{1 - loss.victim}.log").read_text().splitlines() if "error: " in line]
    loss.named = len(said) == 1 and f"process {loss.victim} " in said[0]
    loss.step = len(read_metrics(out / "metrics.jsonl"))
    wanted = BAD_INPUT if loss.moment == "full disk" else AGAIN
    if not (mark.exists() and lost and loss.named and loss.code == wanted and loss.seconds < LIMIT):
        logs = [(work / f"process{i}.log").read_text()[-3000:] for i in range(2)]
        raise SystemExit(f"{loss}\n--- process 0\n{logs[0]}\n--- process 1\n{logs[1]}")


def run_whole(words: Sequence[str], work: Path) -> None:
    """Run to the end."""
    codes = [ended(child) for child in start_two(words, work)]
    if codes != [0, 0]:
        raise SystemExit(f"exit codes {codes}\n" + (work / "process0.log").read_text()[-3000:])


def same(out: Path, whole: Path, last: int) -> list[str]:
    """What of two runs of `last` steps differs, by name."""
    from dpo_jax.files.log import CLOCK_KEYS, read_metrics

    rows = [
        [{k: v for k, v in row.items() if k not in CLOCK_KEYS} for row in read_metrics(one / "metrics.jsonl")]
        for one in (out, whole)
    ]
    steps = [i + 1 for i, (a, b) in enumerate(zip(*rows, strict=False)) if a != b]
    found = [f"step {steps[0]} of metrics.jsonl"] if steps else []
    if len(rows[0]) != len(rows[1]):
        found.append(f"{len(rows[0])} rows of metrics.jsonl instead of {len(rows[1])}")
    for path in sorted(whole.glob("*/*.safetensors")):
        if (out / path.relative_to(whole)).read_bytes() != path.read_bytes():
            found.append(str(path.relative_to(whole)))
    state = f"checkpoints/{last}/meta/metadata"  # the position in the data, and a hash of weights and optimizer
    if json.loads((out / state).read_text()) != json.loads((whole / state).read_text()):
        found.append(state)
    return found


def inputs(work: Path, steps: int) -> list[str]:
    """A tiny model and its data in `work`; the words of the run but for --out."""
    import tiny

    child = os.fork()  # it computes, which the process that is forked later must not
    if not child:
        tiny.folder(work / "model", hidden=16, layers=1)
        tiny.preferences(work / "train.jsonl", rows=30)
        os._exit(0)
    if ended(child):
        raise SystemExit("the inputs could not be made")
    words = ["dpo", "--model", f"{work}/model", "--data", f"{work}/train.jsonl", "--train.steps", str(steps)]
    words += ["--train.batch_size", "4", "--data.max_length", "96", "--data.buckets", "1", "--checkpoint.every", "5"]
    return [*words, "--dpo.loss", "simpo", "--optimizer.learning_rate", "3e-3", "--distributed.lost_after", "20"]


def main() -> None:
    """Lose hosts, compare, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, runs and logs; emptied first")
    parser.add_argument("--losses", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100, help="of the run: some eight for each loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local", action="store_true", help="with --checkpoint.local, too")
    options = parser.parse_args()
    work = options.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1".strip(),
        "DPO_JAX_CACHE": str(work / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    for module in ("dpo_jax.commands.dpo", "dpo_jax.files.events", "matplotlib.figure", "transformers.models.auto"):
        importlib.import_module(module)  # read once, before the first fork

    began = time.monotonic()
    words = inputs(work, options.steps)
    if options.local:
        words += ["--checkpoint.local", str(work / "own"), "--checkpoint.local_every", "2"]
    whole, out = work / "whole", work / "run"
    run_whole([*words, "--out", str(whole)], work)
    print(f"uninterrupted: {time.monotonic() - began:.0f} s with its inputs")
    losses = drawn(options.losses, options.seed)
    print(f"seed {options.seed}\n{'moment':<9} {'lost':<18} {'log at step':>11} {'other ended after':>18}")
    for loss in losses:
        lose([*words, "--out", str(out)], work, out, loss)
        how = f"{loss.victim}, {'full' if loss.moment == 'full disk' else 'frozen' if loss.frozen else 'killed'}"
        print(f"{loss.moment:<9} process {how:<10} {loss.step:>11} {loss.seconds:>16.1f} s", flush=True)
    run_whole([*words, "--out", str(out)], work)
    differences = same(out, whole, options.steps)
    seconds = time.monotonic() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    told = {"seed": options.seed, "seconds": round(seconds), "cpu_seconds": round(cpu), "differences": differences}
    (work / "losses.json").write_text(json.dumps(told | {"losses": [asdict(loss) for loss in losses]}, indent=1))
    took = f"{seconds:.0f} s ({cpu:.0f} s of CPU time)"
    print(f"{options.losses} losses and a full disk in {took}; differences: {', '.join(differences) or 'none'}")
    raise SystemExit(1 if differences else 0)


if __name__ == "__main__":
    main()
