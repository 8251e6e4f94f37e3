"""Where the weights lie that tokens are drawn with (`--sample.layout`).

    gathered   a copy that is whole on every device (of a layer split along `tensor` its part), rows split over all
    tensor     a copy of which every device has a part of each layer, all rows on all of them: activations travel
    training   no copy: the weights as they lie; under fsdp each token gathers every layer

The copy is in the dtype that the model computes in, or in the bits of `--sample.weights`. It is made once for all that
is drawn with the same weights, and given up before anything else is computed.
"""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.config import GATHERED, TENSOR, TRAINING, SampleConfig, SampleLayout
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.model.quantised import is_quantised

USED = 0.9
"""Share of a device's memory that is counted on."""

SHARE = 0.5
"""Share of what is free that the copy may take; caches and what a step computes need the rest."""


def resolved(
    config: SampleConfig,
    model: Llama,
    variables: Any,
    mesh: Mesh | None,
    *,
    held: Any = None,
    limit: float | None = None,
) -> SampleConfig:
    """`config` with a layout: the one that is given, or the first that fits of gathered, tensor and training.

    A function of sizes alone, so that a run that goes on has the layout that it began with.

    Args:
      config, model: as for `engine.generate`.
      variables: what is drawn with; arrays, or shapes with shardings.
      mesh: where they lie.
      held: all that lies on the devices meanwhile, a tree or bytes a device; None: `variables`, and what is whole on a
        device in few enough bits stays as it is.
      limit: bytes of a device; None: of those that are here.

    Raises `InputError` where the model does not divide as the layout that is given wants.
    """
    if config.layout == TENSOR:
        problem = None if mesh is None else _indivisible(model.config, mesh)
        if problem is not None:
            raise InputError(f"--sample.layout tensor: {problem}; take gathered or training")
    if config.layout is not None:
        return config
    return dataclasses.replace(config, layout=_fitting(config, model, variables, mesh, held, limit))


def _fitting(
    config: SampleConfig, model: Llama, variables: Any, mesh: Mesh | None, held: Any, limit: float | None
) -> SampleLayout:
    leaves = jax.tree.leaves(variables["params"], is_leaf=is_quantised)
    width = {None: jnp.dtype(model.dtype).itemsize, "bfloat16": 2, "int8": 1}[config.weights]
    shared = 1 if mesh is None else meshes.pieces(mesh, "embed")
    # Of quantised matrices a whole copy saves making them for every token.
    as_they_are = not any(map(is_quantised, leaves)) and max(x.dtype.itemsize for x in leaves) <= width
    narrow = config.weights is not None or as_they_are
    with meshes.in_force(mesh):
        apart = meshes.platform() == "cpu"
    if shared == 1 and narrow and (held is None or apart):
        return TRAINING  # whole and narrow enough as they are; a CPU copies its layers apart anyway
    held = variables if held is None else held
    taken = held if isinstance(held, float | int) else meshes.device_bytes(held)
    room = SHARE * (USED * (memory() if limit is None else limit) - taken)
    size = width * sum(x.size for x in leaves) / (1 if mesh is None else meshes.pieces(mesh, "heads"))
    if size <= room:
        return GATHERED
    if mesh is not None and size / shared <= room and _indivisible(model.config, mesh) is None:
        return TENSOR
    return TRAINING


def _indivisible(shape: LlamaConfig, mesh: Mesh) -> str | None:
    """What does not divide over all devices that share the weights, in words; None where all does."""
    parts = meshes.pieces(meshes.for_sampling(mesh, whole_rows=True), "heads")
    sizes = {
        "attention heads": shape.num_heads,
        "key/value heads": shape.num_kv_heads,
        "feed-forward width": shape.intermediate_size,
        "vocabulary": shape.vocab_size,
    }
    name = next((name for name, size in sizes.items() if size % parts), None)
    return None if name is None else f"{name} of {sizes[name]} do not divide over {parts} devices"


def memory() -> float:
    """Bytes of a device that is here; of a CPU its share of the machine's."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats and devices[0].platform != "cpu":
        return float(stats["bytes_limit"])
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / len(devices)
