"""Compile jobs in processes of their own, and keep what came out: a job that was compiled before is read back."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_atomically
from dpo_jax.plan.jobs import Job
from dpo_jax.weights.smollm2 import cache_folder

_DEVICES = "--xla_force_host_platform_device_count"  # of tests and tools; the compilers below do not know it

Figures = dict[str, Any]


class CompilerFailed(RuntimeError):
    """The process that compiled ended without figures: a bug of a compiler or of ours, or this machine's memory."""


def plans_folder(chosen: str | None) -> Path:
    """Where results are kept: `chosen`, or a folder in the cache."""
    return cache_folder() / "plans" if chosen is None else Path(chosen)


def stored(job: Job, folder: Path) -> Figures | None:
    """The figures of a job that was compiled before."""
    path = folder / f"{job.key}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def figures_of(job: Job, folder: Path) -> Figures:
    """The figures of `job` (see `worker.compile_job`), from `folder` or from its compiler.

    Raises `InputError` for what the options make impossible, and `CompilerFailed`.
    """
    known = stored(job, folder)
    if known is not None:
        return known
    figures = _compile(job)
    write_atomically(folder / f"{job.key}.json", json.dumps(figures, indent=1))
    return figures


def environment() -> dict[str, str]:
    """Of a process that compiles for devices that are not here."""
    flags = " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_DEVICES))
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",  # the process itself runs on the CPU
        "XLA_FLAGS": flags,
        "TPU_SKIP_MDS_QUERY": "1",  # libtpu: do not ask the cloud's metadata server which machine this is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def _compile(job: Job) -> Figures:
    command = [sys.executable, "-m", "dpo_jax.plan.worker"]
    done = subprocess.run(
        command, input=json.dumps(job.to_json()), env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode == -signal.SIGKILL:
        raise CompilerFailed("the compiler was killed, most likely for want of this machine's memory")
    if done.returncode != 0:
        raise CompilerFailed(f"the compiler ended with code {done.returncode}: {done.stderr[-2000:]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    if "error" in figures:
        raise InputError(figures["error"])
    return figures
