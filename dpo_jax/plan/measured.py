"""What a program of a command does on the devices that are here: the counterpart of `estimate.py`.

Weights are random (every matrix of standard deviation .02), rows are full and their tokens random, so that nothing is
read or downloaded, and every step does all of its work.
"""

import dataclasses
import math
import resource
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.config import AssumeConfig, SampleConfig
from dpo_jax.plan import worker
from dpo_jax.plan.estimate import estimate
from dpo_jax.plan.hardware import HARDWARE, Topology
from dpo_jax.plan.programs import Program
from dpo_jax.sample import generate, prepare
from dpo_jax.train.accounting import peak_flops


def seconds_of(run: Callable[[], Any], *, budget: float = 4.0, least: int = 3, most: int = 20) -> dict[str, Any]:
    """Median, fastest and 95th percentile of the seconds that `run` takes, which must give arrays to wait for.

    The first call is not counted. Called `least` times, and on until `budget` seconds are spent, `most` times at most.
    """
    jax.block_until_ready(run())
    times: list[float] = []
    while len(times) < least or (sum(times) < budget and len(times) < most):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    worst = sorted(times)[math.ceil(0.95 * len(times)) - 1]
    return {"seconds": statistics.median(times), "p95": worst, "fastest": min(times), "runs": len(times)}


def made(tree: Any) -> Any:
    """Arrays of these shapes in their places: weights random, norms' scales 1, all else (moments, counts) 0."""

    def fill(path: Any, x: Any) -> Any:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        if "opt_state" in names or not jnp.issubdtype(x.dtype, jnp.floating) or "lora_b" in names:
            return jnp.zeros(x.shape, x.dtype)
        if names[-1] == "scale":
            return jnp.ones(x.shape, x.dtype)
        key = jax.random.fold_in(jax.random.key(0), zlib.crc32("/".join(names).encode()) % 2**31)
        return 0.02 * jax.random.normal(key, x.shape, x.dtype)

    where = jax.tree.map(lambda x: x.sharding, tree)
    return jax.jit(lambda: jax.tree_util.tree_map_with_path(fill, tree), out_shardings=where)()


def with_tokens(batch: Any, vocab: int) -> Any:
    """The batch with random ids: rows of equal tokens would be faster than any data."""
    random = np.random.default_rng(0)
    names = [name for name in ("prompts", "responses", "tokens") if hasattr(batch, name)]
    return dataclasses.replace(
        batch, **{name: random.integers(3, vocab, getattr(batch, name).shape, np.int32) for name in names}
    )


def topology_here(mesh: Mesh) -> Topology | None:
    """The devices of `mesh` as the planner names them; None where it has no figures of their kind (a CPU)."""
    devices = list(mesh.devices.flat)
    names = [name for name, hardware in HARDWARE.items() if hardware.kind == devices[0].device_kind]
    slices = len(set(meshes.slices_of(mesh)))
    return Topology(names[0], (len(devices) // slices,), slices) if names else None


def measured(
    program: Program, mesh: Mesh, dtype: str, topology: Topology | None, vocab: int, *, budget: float = 4.0
) -> tuple[dict[str, Any], Any]:
    """Compile time, step time, rates and memory of one program with a step; beside them what the planner makes of it.

    Args:
      program: one with a `step`: a training step, or a measurement of a rollout.
      mesh: the devices.
      dtype: what it computes in.
      topology: what the planner estimates for; None: nothing.
      vocab: ids of the random tokens are below it.
      budget: seconds of running it.

    Returns:
      The figures (seconds, bytes / 2^30, FLOP/s; `plan` in seconds), and the trees that it ran on, the last state of a
      training step among them.
    """
    *trees, batch = program.arguments
    start = time.perf_counter()
    compiled = program.lower().compile()
    figures: dict[str, Any] = {"compile_seconds": time.perf_counter() - start}
    about = worker.measure(compiled, meshes.slices_of(mesh), program.trips)
    placed = meshes.put_batch(mesh, with_tokens(batch, vocab))
    held = [made(tree) for tree in trees]
    donates = len(trees) == 1  # a training step; a measurement reads two trees and keeps them

    def run() -> Any:
        out = compiled(*held, placed)
        if donates:
            held[0] = out[0]
        return out

    figures |= seconds_of(run, budget=budget)
    out = run()
    loss = out[1].get("loss") if donates and isinstance(out, tuple) else None
    if loss is not None:
        figures["loss"] = float(loss)
    figures |= rates(program, figures["seconds"], mesh)
    figures |= {
        "peak_compiled_gib": about["memory"]["peak"] / 2**30,
        **memory_now(),
        "attention": about["attention"],
        "plan": None if topology is None else planned(program, about, dtype, topology),
    }
    return figures, held


def memory_now() -> dict[str, float]:
    """GiB in use and the most that ever was, of the fullest device here; of a CPU the process's most."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    if not stats:
        unit = 1 if sys.platform == "darwin" else 2**10
        return {"peak_process_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    return {
        "in_use_gib": max(one.get("bytes_in_use", 0) for one in stats) / 2**30,
        "peak_gib": max(one.get("peak_bytes_in_use", 0) for one in stats) / 2**30,
    }


def rates(program: Program, seconds: float, mesh: Mesh) -> dict[str, Any]:
    """Tokens/s of all devices; TFLOP/s of model FLOPs and MFU of one."""
    devices = list(mesh.devices.flat)
    rate, peak = program.flops / seconds / len(devices), peak_flops(devices, None)
    figures = {"tokens": program.tokens, "tokens_per_second": program.tokens / seconds, "tflops": rate / 1e12}
    return figures if peak is None else figures | {"mfu": rate / peak}


def planned(program: Program, about: dict[str, Any], dtype: str, topology: Topology) -> dict[str, Any]:
    """The planner's estimate for a program's figures (`worker.measure`), in seconds."""
    figures = about | {"computed": program.computed, "flops": program.flops, "tokens": program.tokens}
    one = estimate(figures, topology, dtype, AssumeConfig())
    return {"all_overlaps": one.fastest, "nothing_overlaps": one.slowest, "bound": one.bound}


def sampled(
    model: Any,
    variables: Any,
    prompts: tuple[int, int],
    mesh: Mesh,
    *,
    config: SampleConfig,
    samples: int = 1,
    budget: float = 4.0,
) -> dict[str, Any]:
    """Seconds of a whole generation and of its prefill (with the first token), and decoded tokens a second.

    `prompts`: how many, and the tokens of each; `samples`: responses to each. Every response has
    `config.max_new_tokens` tokens.
    """
    ids = np.random.default_rng(1).integers(3, model.config.vocab_size, prompts)
    endless = model.clone(config=dataclasses.replace(model.config, eos_token_ids=(), further_stop_ids=()))
    rows, new = prompts[0] * samples, config.max_new_tokens
    took = {}
    weights = prepare(endless, variables, config, mesh=mesh)
    for length in (1, new):
        one = dataclasses.replace(config, max_new_tokens=length)
        count = iter(range(1000))
        took[length] = seconds_of(
            lambda one=one, count=count: (
                generate(
                    endless, weights, ids, jax.random.key(next(count)), config=one, samples=samples, mesh=mesh
                ).tokens
            ),
            budget=budget,
        )
    figures = {
        "seconds": took[new]["seconds"],
        "p95": took[new]["p95"],
        "prefill_seconds": took[1]["seconds"],
        "prefill_tokens_per_second": prompts[0] * prompts[1] / took[1]["seconds"],
        "tokens_per_second": rows * new / took[new]["seconds"],
    }
    each = (took[new]["seconds"] - took[1]["seconds"]) / max(new - 1, 1)
    if each <= 0:  # one token, or a model so small that its tokens drown in the noise
        return figures
    return figures | {"seconds_a_token": each, "decoded_tokens_per_second": rows / each}
