"""Runs in processes of their own: killed, stopped, resumed, and two processes that work on one run."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from dpo_jax.run.log import CLOCK_KEYS, read_metrics

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, training data and evaluation data."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", hidden=16, layers=1)
    tiny.preferences(folder / "train.jsonl", rows=30)
    tiny.preferences(folder / "eval.jsonl", rows=5, seed=1)
    return folder


def start(inputs: Path, out: Path, *options: str) -> subprocess.Popen:
    """Start `dpo-jax dpo` in a process of its own, on one CPU device."""
    command = [sys.executable, "-m", "dpo_jax", "dpo", "--model", str(inputs / "model")]
    command += ["--data", str(inputs / "train.jsonl"), "--eval_data", str(inputs / "eval.jsonl"), "--out", str(out)]
    command += ["--train.steps", str(STEPS), "--train.batch_size", "4", "--train.eval_every", "7"]
    command += ["--checkpoint.every", "3", "--data.max_length", "96", "--data.buckets", "2"]
    command += ["--optimizer.learning_rate", "3e-3", *options]
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "DPO_JAX_CACHE")}
    env |= {
        "DPO_JAX_CACHE": str(inputs / "cache"),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(inputs / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    """Wait; what the process said. It must have ended well."""
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def wait_for_rows(process: subprocess.Popen, out: Path, rows: int) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_killed_at_random_steps_and_rerun(inputs: Path, tmp_path: Path, rank: int) -> None:
    out, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    lora = ("--lora.rank", str(rank))
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
def test_terminated_and_rerun(inputs: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(inputs, out)
    wait_for_rows(process, out, 5)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    assert "all saved; the same command goes on from there" in said
    done = len(metrics(out))
    assert 5 <= done < STEPS
    assert (out / "checkpoints" / str(done)).is_dir()
    assert f"going on after step {done} of {STEPS}" in finish(start(inputs, out))
    assert_same_run(out, whole)


def start_two(inputs: Path, out: Path) -> list[subprocess.Popen]:
    """Two processes of one device each, on one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(
            inputs,
            out,
            *("--mesh.data", "1", "--mesh.fsdp", "2", "--distributed.coordinator", f"127.0.0.1:{port}"),
            *("--distributed.processes", "2", "--distributed.process_id", str(i)),
        )
        for i in range(2)
    ]


@pytest.mark.multiprocess
def test_two_processes_stop_together_go_on_and_agree_with_one(inputs: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    processes = start_two(inputs, out)
    wait_for_rows(processes[0], out, 6)
    processes[1].send_signal(signal.SIGTERM)  # only one of them is told
    said = [finish(process) for process in processes]
    done = len(metrics(out))
    assert 6 <= done < STEPS
    assert f"stopped after step {done} of {STEPS}" in said[0]
    assert "stopped" not in said[1]
    for process in start_two(inputs, out):
        finish(process)
    together, alone = metrics(out), metrics(whole)
    assert len(together) == STEPS
    for row, expected in zip(together[:5], alone[:5], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert (out / "report.html").exists()
    assert (
        load_file(out / "model" / "model.safetensors").keys() == load_file(whole / "model" / "model.safetensors").keys()
    )
