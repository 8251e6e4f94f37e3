"""What can be said of a training step without a compiler: its state for certain, memory and time roughly.

The meshes are whole: sizes without -1.
"""

import jax
import jax.numpy as jnp

from dpo_jax.config import DistillRun, DPORun, OnlineDPORun, PPORun, SFTRun, TrainingRun
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.model.variables import abstract_variables
from dpo_jax.plan.hardware import Topology
from dpo_jax.plan.programs import Lengths
from dpo_jax.plan.shapes import parameters
from dpo_jax.train.flops import ModelFlops, Work

# Forward passes of a training step, the backward pass counting two.
_AGAIN = {"none": 3.0, "dots": 3.1, "full": 4.0, "offload": 4.1}


def state_bytes(run: TrainingRun, shape: LlamaConfig) -> float:
    """Bytes of weights, optimizer and frozen models of all devices together, where each is held once."""
    weights = parameters(shape)
    frozen = frozen_bytes(run, shape)
    moments = _moments(run)
    moving = isinstance(run, DPORun) and run.dpo.reference_sync_steps is not None  # a reference of its own, in float32
    if run.lora.rank:
        adapters = ModelFlops.of(shape, run.lora).adapters
        return frozen + adapters * (4 + moments + 4 * moving)
    size = weights * (4.0 + moments)
    if isinstance(run, DPORun) and run.dpo.objective.live:
        size += weights * 4 if moving else frozen
    if isinstance(run, OnlineDPORun):
        size += frozen
    if isinstance(run, PPORun):
        size += frozen + (_trained_models(run) - 1) * weights * (4 + moments)
    return size


def _moments(run: TrainingRun) -> float:
    """Bytes of the optimizer's moments for each trained weight. Adafactor's rows and columns count nothing, and 8-bit
    moments as if embeddings had them too."""
    rule = run.optimizer
    first = {"float32": 4, "bfloat16": 2}[rule.settled.mu_dtype]
    return {"adamw": 4 + first, "adamw_8bit": 2 * (1 + 4 / 256), "adafactor": 0, "rmsprop": 4}[rule.name]


def frozen_bytes(run: TrainingRun, shape: LlamaConfig) -> float:
    """Bytes of a model that is not trained: of a quantised one its codes and scales, and what stays as it is."""
    held = abstract_variables(Llama(shape, dtype=jnp.dtype(run.train.dtype)), run.train.settled.frozen_dtype)["params"]
    return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held)))


def gradient_bytes(run: TrainingRun, shape: LlamaConfig) -> float:
    """Bytes of the gradients of all devices together: under accumulation their sum, and those of the micro-batch."""
    size = ModelFlops.of(shape, run.lora).adapters if run.lora.rank else parameters(shape) * _trained_models(run)
    return 4.0 * size * (2 if run.train.accumulate > 1 else 1)


def _trained_models(run: TrainingRun) -> int:
    return 2 if isinstance(run, PPORun) and run.ppo.critic == "separate" else 1


def _tokens(run: TrainingRun, lengths: Lengths) -> int:
    """Of all rows of a step; a prompt counts once for its responses."""
    responses = 1 if isinstance(run, SFTRun | PPORun | DistillRun) else 2
    return run.train.batch_size * (lengths.prompt + responses * lengths.response)


def rough_bytes(run: TrainingRun, shape: LlamaConfig, lengths: Lengths) -> float:
    """Memory of one device: state, gradients, and what the layers keep for the backward pass.

    `full` keeps what enters a layer, `dots` what its products give too, `none` also what lies between them, `offload`
    nothing. An axis of heads or feed-forward width is split over `tensor`, the hidden size is not.
    """
    mesh, train = run.mesh, run.train
    minibatches = run.ppo.minibatches if isinstance(run, PPORun) else 1
    tokens = _tokens(run, lengths) / (mesh.data * mesh.fsdp * mesh.context) / minibatches / train.accumulate
    heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    whole, split = {
        "offload": (0, 0),
        "full": (1, 0),
        "dots": (2, heads + 2 * shape.intermediate_size),
        "none": (8, 2 * heads + 4 * shape.intermediate_size),
    }[train.remat]
    width = 2 if train.dtype == "bfloat16" else 4
    kept = width * tokens * (whole * shape.hidden_size + split / mesh.tensor) * shape.num_layers * _trained_models(run)
    shared = (state_bytes(run, shape) + gradient_bytes(run, shape)) / (mesh.fsdp * mesh.context * mesh.tensor)
    return shared + kept


def rough_seconds(run: TrainingRun, shape: LlamaConfig, topology: Topology, lengths: Lengths) -> float:
    """Of compute and of collectives, in bfloat16, as if nothing overlapped; for ordering only."""
    hardware, mesh, accumulate = topology.hardware, run.mesh, run.train.accumulate
    passes, tokens = _AGAIN[run.train.remat], _tokens(run, lengths)
    work = Work(float(tokens), float(tokens), tokens * (lengths.prompt + lengths.response) / 2)
    compute = ModelFlops.of(shape).forward(work) * passes / topology.devices / hardware.peak(run.train.dtype)
    # Weights are gathered for the forward, the repeated forward and the backward pass, gradients scattered in float32.
    weights = parameters(shape) / mesh.tensor
    gathers = (2 if run.train.remat == "none" else 3) * accumulate * 2 * weights * (mesh.fsdp - 1) / mesh.fsdp
    scatters = 0.0 if run.lora.rank else accumulate * 4 * weights * (mesh.fsdp - 1) / mesh.fsdp
    crossing = 2 if run.train.settled.crossing_dtype == "bfloat16" else 4
    copies = 2 * crossing * weights / mesh.fsdp * (mesh.data - 1) / mesh.data
    # Two sums over the tensor axis in each layer and pass.
    width = tokens / (mesh.data * mesh.fsdp) * shape.hidden_size * 2
    sums = 2 * shape.num_layers * passes * 2 * width * (mesh.tensor - 1) / mesh.tensor
    between = hardware.network if topology.slices > 1 and hardware.network is not None else hardware.links
    return compute / 0.6 + ((gathers + scatters + sums) / hardware.links + copies / between) / 0.5
