"""Runs in processes of their own: killed, stopped, resumed, and several processes that work on one run."""

import os
import random
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import runs
import started
import tiny
from safetensors.numpy import load_file

from dpo_jax.files.log import CLOCK_KEYS, read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, training data and evaluation data."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", hidden=16, layers=1)
    tiny.preferences(folder / "train.jsonl", rows=30)
    tiny.preferences(folder / "eval.jsonl", rows=5, seed=1)
    return folder


def start_words(inputs: Path, out: Path) -> list[str]:
    return ["--model", str(inputs / "model"), "--data", str(inputs / "train.jsonl"), "--out", str(out)]


def start(inputs: Path, out: Path, *options: str) -> started.Started:
    """Start `dpo-jax dpo` in a process of its own, on one CPU device."""
    command = [*start_words(inputs, out), "--eval_data", str(inputs / "eval.jsonl")]
    command += ["--train.steps", str(STEPS), "--train.batch_size", "4", "--train.eval_every", "7"]
    command += ["--checkpoint.every", "3", "--data.max_length", "96", "--data.buckets", "2"]
    command += ["--optimizer.learning_rate", "3e-3", *options]
    return spawn(inputs, *command)


def spawn(inputs: Path, *words: str, devices: int = 1) -> started.Started:
    """`dpo-jax dpo` with these options, in a process of its own on so many CPU devices."""
    env = {name: value for name, value in os.environ.items() if name != "DPO_JAX_CACHE"}
    env |= {
        "DPO_JAX_CACHE": str(inputs / "cache"),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": runs.xla_flags(devices),
        "JAX_COMPILATION_CACHE_DIR": str(inputs / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    return started.start(["dpo", *words], env, folder=ROOT, both=True)


def finish(process: started.Started, code: int = 0) -> str:
    """Wait; what the process said. It must have ended with this code."""
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said
    return said


def wait_for_rows(process: started.Started, out: Path, rows: int) -> None:
    """Return as soon as the log has so many rows."""
    deadline = time.monotonic() + 600
    while len(read_metrics(out / "metrics.jsonl")) < rows:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def metrics(out: Path) -> list[dict]:
    """metrics.jsonl without the wall-clock figures."""
    return [{k: v for k, v in row.items() if k not in CLOCK_KEYS} for row in read_metrics(out / "metrics.jsonl")]


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    for path in sorted(b.glob("*/*.safetensors")):  # the model and, under LoRA, the adapter
        left, right = load_file(a / path.relative_to(b)), load_file(path)
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key], err_msg=key)


@pytest.fixture(scope="module")
def whole(inputs: Path) -> Path:
    """The run folder of an uninterrupted run."""
    finish(start(inputs, inputs / "whole"))
    assert len(metrics(inputs / "whole")) == STEPS
    return inputs / "whole"


@pytest.mark.campaign
@pytest.mark.parametrize("rank", [0, 2])
def test_killed_at_random_steps_and_rerun(inputs: Path, whole: Path, tmp_path: Path, rank: int) -> None:
    out, uninterrupted = tmp_path / "run", whole
    lora = ("--lora.rank", str(rank))
    if rank:
        uninterrupted = tmp_path / "uninterrupted"
        finish(start(inputs, uninterrupted, *lora))
    assert (uninterrupted / "adapter").exists() == (rank > 0)
    for at in sorted(random.Random(rank).sample(range(1, STEPS - 5), 2)):
        process = start(inputs, out, *lora)
        wait_for_rows(process, out, at)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (out / "model").exists()
    finish(start(inputs, out, *lora))
    assert_same_run(out, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_terminated_and_rerun(inputs: Path, whole: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    process = start(inputs, out)
    wait_for_rows(process, out, 5)
    process.send_signal(number)
    said = finish(process, 128 + number)
    assert "all saved; the same command goes on from there" in said
    done = len(metrics(out))
    assert 5 <= done < STEPS
    assert (out / "checkpoints" / str(done)).is_dir()
    assert f"going on after step {done} of {STEPS}" in finish(start(inputs, out))
    assert_same_run(out, whole)


DEVICES, TOGETHER = 4, 80
SMALL = ("--train.batch_size", "4", "--mesh.tensor", "2", "--data.max_length", "96", "--data.buckets", "1")
SMALL += ("--dpo.loss", "simpo", "--optimizer.learning_rate", "3e-3", "--checkpoint.every", "20")


def start_together(inputs: Path, out: Path, processes: int) -> list[started.Started]:
    """So many processes on one run, which share four devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = ("--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.processes", str(processes))
    words = [*start_words(inputs, out), "--train.steps", str(TOGETHER), *SMALL]
    return [
        spawn(
            inputs,
            *words,
            *((*several, "--distributed.process_id", str(i)) if processes > 1 else ()),
            devices=DEVICES // processes,
        )
        for i in range(processes)
    ]


@pytest.mark.multiprocess
def test_preempted_and_killed_then_restarted_with_other_counts(inputs: Path, tmp_path: Path) -> None:
    """2 processes, of which one is told to stop; 1, which is killed; 4 to the end."""
    out, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    (alone,) = start_together(inputs, uninterrupted, 1)
    finish(alone)

    told = start_together(inputs, out, 2)
    wait_for_rows(told[0], out, 5)
    told[1].send_signal(signal.SIGTERM)
    said = [finish(process, 143) for process in told]
    done = len(metrics(out))
    assert 5 <= done < TOGETHER
    assert (out / "checkpoints" / str(done)).is_dir()
    assert f"stopped after step {done} of {TOGETHER}, all saved" in said[0]
    assert "stopped" not in said[1]

    (killed,) = start_together(inputs, out, 1)
    wait_for_rows(killed, out, done + 10)
    killed.send_signal(signal.SIGKILL)
    assert f"going on after step {done} of {TOGETHER}" in finish(killed, -signal.SIGKILL)

    said = [finish(process) for process in start_together(inputs, out, 4)]
    assert "going on after step" in said[0]
    assert (out / "report.html").exists()
    ours, theirs = metrics(out), metrics(uninterrupted)
    assert [(row["step"], row["epoch"], row["tokens"]) for row in ours] == [
        (row["step"], row["epoch"], row["tokens"]) for row in theirs
    ], "every batch in its place"
    # Sums over processes are taken in another order than within one: equal up to rounding.
    losses = np.asarray([[row["loss"] for row in rows] for rows in (ours, theirs)])
    np.testing.assert_allclose(*losses, atol=1e-4)
