"""Compiles one program for devices that are not here: a job on stdin, its figures as JSON on the last line of stdout.

    python -m dpo_jax.plan.worker < job.json

A process of its own (`compiling.py` starts it): these compilers want other settings than the process that asks, a
compiler that crashes or is killed for memory takes nobody with it, and all memory is given back.
"""

import contextlib
import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.config import DistillRun, DPORun, OnlineDPORun, PPORun, RewardRun, SFTRun
from dpo_jax.errors import InputError
from dpo_jax.plan import programs, programs_sampled
from dpo_jax.plan.hardware import Topology
from dpo_jax.plan.hlo import read_traffic
from dpo_jax.plan.jobs import Job
from dpo_jax.train.session import check_batch

_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([BKMGT])"
_KERNELS = {"splash": "splash", "cudnn": "__cudnn$fmha"}


def main() -> None:
    """Compile the job that stands on stdin."""
    job = Job.from_json(json.load(sys.stdin))
    try:
        figures: dict[str, Any] = compile_job(job)
    except InputError as error:
        figures = {"error": str(error)}
    print(json.dumps(figures))


def compile_job(job: Job) -> dict[str, Any]:
    """The figures of one program; where the compiler refuses it for want of memory, `refused` and what it said."""
    topology = Topology.parse(job.topology)
    sizes = job.run.mesh
    devices = devices_of(topology)
    mesh = meshes.make_mesh(sizes.data, sizes.fsdp, sizes.tensor, sizes.context, devices=devices)
    # Described GPUs do not say their node.
    places = {device: i // math.prod(topology.shape) for i, device in enumerate(devices)}
    lengths = programs.Lengths(job.prompt, job.response)
    program = build(job, mesh, lengths)
    figures = {
        "mesh": dict(mesh.shape),
        "flops": program.flops,
        "computed": program.computed,
        "tokens": program.tokens,
        "held": program.held,
        "repeats": program.repeats,
    }
    started = time.perf_counter()
    try:
        with assumed_cudnn(topology):
            compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return figures | {"seconds": time.perf_counter() - started, "refused": parse_refusal(str(error))}
    seconds = time.perf_counter() - started
    return figures | {"seconds": seconds, **measure(compiled, [places[d] for d in mesh.devices.flat], program.trips)}


def build(job: Job, mesh: Mesh, lengths: programs.Lengths) -> programs.Program:
    """The program of a job. Raises `InputError` where sizes do not divide over the mesh."""
    check_batch(job.run.train.batch_size, job.run.train.accumulate, mesh)
    run = programs.with_schedule(job.run)
    memory = Topology.parse(job.topology).hardware.memory if job.topology else None
    if isinstance(run, PPORun):
        return programs_sampled.build_ppo(run, job.shape, mesh, lengths, job.program, memory)
    if isinstance(run, OnlineDPORun):
        return programs_sampled.build_online(run, job.shape, mesh, lengths, job.program, memory)
    if isinstance(run, DistillRun):
        assert job.teacher is not None, "a job of distillation has one"
        return programs_sampled.build_distill(run, job.shape, job.teacher, mesh, lengths, job.program, memory)
    if isinstance(run, SFTRun):
        return programs.build_sft(run, job.shape, mesh, lengths)
    if isinstance(run, RewardRun):
        return programs.build_reward(run, job.shape, mesh, lengths)
    if isinstance(run, DPORun):
        return programs.build_dpo(run, job.shape, mesh, lengths)
    raise InputError(f"no plan can be made for the options of {type(run).__name__}")


def measure(compiled: Any, slices: Sequence[int], trips: float = 1.0) -> dict[str, Any]:
    """Memory of a device in bytes, what it moves, and the attention kernel of a compiled program.

    `slices`: the slice of each device, in the order of the mesh.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text()
    traffic = read_traffic(text, slices=slices, unknown_trips=trips)
    return {
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
            "peak": memory.peak_memory_in_bytes,
            "host": memory.host_temp_size_in_bytes,
        },
        "moved": traffic.memory,
        "collectives": [
            {"kind": kind, "devices": n, "slices": slices, **dataclasses.asdict(one)}
            for (kind, n, slices), one in sorted(traffic.collectives.items())
        ],
        "unknown_loops": traffic.unknown_loops,
        "attention": next((name for name, sign in _KERNELS.items() if sign in text), "xla"),
    }


def devices_of(topology: Topology) -> list[Any]:
    """The devices of a topology, described, not here. Raises `InputError` where their compiler is not installed."""
    hardware = topology.hardware
    if hardware.platform == "tpu":
        options: dict[str, Any] = {}
        if topology.name == "v4":
            options["chip_config_name"] = "megacore"  # one device a chip, as on a TPU VM
        if topology.slices > 1:
            options["num_slices"] = topology.slices
        if math.prod(topology.shape) < 4:
            options["chips_per_host_bounds"] = (*topology.shape, 1)[:3]
        try:
            made = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{topology.name}:{'x'.join(map(str, topology.shape))}", **options
            )
        except RuntimeError as error:
            if "not installed" in str(error) or "libtpu" in str(error):
                raise InputError(
                    f"--topology {topology}: the compiler for TPUs is missing: pip install libtpu"
                ) from error
            raise InputError(f"--topology {topology}: {str(error).splitlines()[0]}") from error
        return list(made.devices)
    try:
        made = topologies.get_topology_desc(
            platform="cuda", topology=f"{topology.slices}x1x{topology.shape[0]}", target_config=hardware.target
        )
    except RuntimeError as error:
        if "cuda" in str(error).lower():
            raise InputError(
                f"--topology {topology}: the compiler for NVIDIA GPUs is missing: pip install --no-deps"
                f" jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
            ) from error
        raise
    return list(made.devices)


@contextlib.contextmanager
def assumed_cudnn(topology: Topology) -> Any:
    """JAX asks the installed cuDNN for its version before it calls it; compiling needs no cuDNN otherwise."""
    if topology.hardware.platform != "cuda":
        yield
        return
    checks = "jax._src.cudnn.fused_attention_stablehlo"
    capability = "8.0" if topology.name == "a100" else "9.0"
    with (
        mock.patch(f"{checks}.check_cudnn_version", return_value=90800),
        mock.patch(f"{checks}.check_compute_capability", lambda wanted: float(wanted) <= float(capability)),
        mock.patch(f"{checks}.is_cuda_compute_capability_equal", lambda wanted: wanted == capability),
    ):
        yield


def parse_refusal(message: str) -> dict[str, Any]:
    """What a compiler says that refuses a program for want of memory: its words, and where it gives them the figures.

    `wanted` and `limit` in bytes, or None.
    """
    line = next(line for line in message.splitlines() if "RESOURCE_EXHAUSTED" in line)
    figures: dict[str, Any] = {"said": line.strip(), "wanted": None, "limit": None}
    for pattern in (rf"Used {_SIZE} of {_SIZE} hbm", rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"):
        if found := re.search(pattern, message):
            wanted, unit, limit, limit_unit = found.groups()
            figures |= {"wanted": float(wanted) * _UNITS[unit], "limit": float(limit) * _UNITS[limit_unit]}
    return figures


if __name__ == "__main__":
    main()
