"""Runs to plan, for tests of the planner and of what it compiles."""

import atexit
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from typing import Any
from unittest import mock

from dpo_jax.commands.plan import word_of
from dpo_jax.config import DPOLossConfig, DPORun, MeshConfig, TrainConfig, TrainingRun
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.plan import compiling
from dpo_jax.plan.jobs import Job
from dpo_jax.plan.programs import names
from dpo_jax.plan.shapes import SHAPES

GIB = 2**30
PARAMETERS = 6_738_415_616  # of Llama-2-7B


def dpo_run(*, pairs: int, mesh: MeshConfig | None = None, reference: Any = "live", **train: Any) -> DPORun:
    """Full fine-tuning in bfloat16 with --train.remat full, unless `train` says otherwise."""
    options: dict[str, Any] = {"batch_size": pairs, "dtype": "bfloat16", "remat": "full"} | train
    return DPORun(
        model="m",
        data="d",
        out="o",
        dpo=DPOLossConfig(reference=reference),
        train=TrainConfig(**options),
        mesh=mesh or MeshConfig(),
    )


def job(run: TrainingRun, topology: str, *, prompt: int, response: int, layers: int | None = None) -> Job:
    """The training step of `run` for Llama-2-7B, or for its first `layers` layers."""
    return job_of(run, topology, shape(layers), prompt=prompt, response=response)


def shape(layers: int | None = None) -> LlamaConfig:
    """Of Llama-2-7B, or of its first `layers` layers."""
    whole = SHAPES["llama2_7b"]
    return whole if layers is None else dataclasses.replace(whole, num_layers=layers)


def job_of(run: TrainingRun, topology: str, model: LlamaConfig, *, prompt: int, response: int) -> Job:
    """The training step of `run`."""
    return Job(word_of(run), names(run)[0], run, model, topology, prompt, response)


_COMPILER = """
import io, os, sys
from dpo_jax.plan import worker

for line in sys.stdin:
    if (child := os.fork()) == 0:
        sys.stdin = io.StringIO(line)
        worker.main()
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    print("ended ", flush=True)
"""


def quickly() -> Any:
    """Compilers that are started herein take half the time, with less thought about speed."""
    return mock.patch.dict(os.environ, XLA_FLAGS="", JAX_EXEC_TIME_OPTIMIZATION_EFFORT="-1.0")


@functools.cache
def _compiler() -> Any:
    """A process that imports once what compiles, 6 s of CPU, and compiles each job in a process of its own."""
    with quickly():
        command, pipe = [sys.executable, "-c", _COMPILER], subprocess.PIPE
        started = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=compiling.environment(), text=True)
    atexit.register(started.communicate)  # where its input ends, so does it
    return started


def compiled(one: Job) -> dict[str, Any]:
    """Its figures, compiled anew; sizes in GiB."""
    print(json.dumps(one.to_json()), file=_compiler().stdin, flush=True)
    said = list(itertools.takewhile(lambda line: not line.startswith("ended "), _compiler().stdout))
    assert said, "the compiler failed: see what it wrote to stderr"
    figures = json.loads(said[-1])
    assert "error" not in figures, figures
    memory = {name: size / GIB for name, size in figures.get("memory", {}).items()}
    return {**figures, "memory": memory}
