"""A tiny Llama and made-up preference batches, for the tests of the training steps."""

import dataclasses
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.config import LoraConfig
from dpo_jax.model import llama, variables as model_variables
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.types import PreferenceBatch

TINY = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)


def model_and_variables(
    config: LlamaConfig = TINY, *, seed: int = 0, lora: int = 0, mesh: Any = None, noise: float = 0.0, **fields: Any
) -> tuple[llama.Llama, Any]:
    """A Llama with weights large enough for log-probabilities far from even.

    `noise` is added to the second factor of the adapters, so that the adapted model differs from its base.
    """
    model = llama.Llama(config, lora=LoraConfig(rank=lora), **fields)

    def scaled(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        name = path[-1].key
        if name == "lora_b":
            return noise * jax.random.normal(jax.random.key(seed + 1), x.shape)
        return x if name in ("scale", "lora_a") else 5 * x

    variables = model_variables.init_variables(model, jax.random.key(seed), mesh=mesh)
    # Without a mesh nothing is tied to a device, as a new state's counts are: else a second step is compiled anew.
    where = None if mesh is None else jax.tree.map(lambda x: x.sharding, variables)
    return model, jax.jit(lambda tree: jax.tree_util.tree_map_with_path(scaled, tree), out_shardings=where)(variables)


def toy_policy(seed: int = 0, *, vocab: int = 64, width: int = 8) -> tuple[Any, Any]:
    """(model, variables) of a one-matrix language model that compiles at once, for tests of the step around a model.

    h_t = E[y_t] + mean of E[y_s] over s <= t, logits = h Eᵀ. For layout "separate" only.
    """

    def apply(variables: Any, *args: jax.Array, method: str | None = None, packed: bool = False) -> jax.Array:
        table = variables["params"]["embed"]["kernel"]
        if method == "unembedding":
            return table.T
        tokens, positions, segments = args
        x = table[tokens] * segments[..., None]
        return x + jnp.cumsum(x, axis=1) / (positions + 1)[..., None]

    table = jax.random.normal(jax.random.key(seed), (vocab, width))
    shape = SimpleNamespace(hidden_size=width)
    return SimpleNamespace(apply=apply, config=shape), {"params": {"embed": {"kernel": table}}}


def quick_jit(f: Callable[..., Any], *, donate: tuple[int, ...] = (), **fixed: Any) -> Any:
    """`jax.jit` of `f` with keywords filled in, compiled without optimisation: the model is tiny, compiling is not."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(partial(f, **fixed), donate_argnums=donate, compiler_options=options)


def make_batch(
    rows: int = 8, *, prompt: int = 9, response: int = 7, responses: int = 2, seed: int = 0, vocab: int = 64
) -> PreferenceBatch:
    """Random groups of unequal lengths, with junk at padded positions, format masks, and made-up reference values."""
    rng = np.random.default_rng(seed)
    response_lengths = rng.integers(2, response + 1, (rows, responses)).astype(np.int32)
    return PreferenceBatch(
        prompts=rng.integers(0, vocab, (rows, prompt)).astype(np.int32),
        prompt_lengths=rng.integers(1, prompt + 1, rows).astype(np.int32),
        responses=rng.integers(0, vocab, (rows, responses, response)).astype(np.int32),
        response_lengths=response_lengths,
        weights=np.ones(rows, np.float32),
        rows=np.arange(1, rows + 1, dtype=np.int32),
        format_masks=rng.random((rows, responses, response)) < 0.3,
        reference_logps=(-6.0 * response_lengths + rng.normal(0, 2, (rows, responses))).astype(np.float32),
    )


def pad(batch: PreferenceBatch, prompt: int, response: int) -> PreferenceBatch:
    """The batch with so many more padded positions; they hold ids outside any vocabulary."""
    junk = {"constant_values": 2**30}
    return dataclasses.replace(
        batch,
        prompts=np.pad(batch.prompts, ((0, 0), (0, prompt)), **junk),
        responses=np.pad(batch.responses, ((0, 0), (0, 0), (0, response)), **junk),
        format_masks=np.pad(batch.format_masks, ((0, 0), (0, 0), (0, response)), constant_values=True),
    )


def take(batch: PreferenceBatch, index: Any) -> PreferenceBatch:
    """Some rows of the batch."""
    return jax.tree.map(lambda x: x[index], batch)


def with_sgd(state: Any) -> Any:
    """The state with plain gradient descent of rate 1: the change of the weights is minus the gradient."""
    tx = optax.sgd(1.0)
    return dataclasses.replace(state, tx=tx, opt_state=tx.init(state.trainable))


def gradients(before: Any, after: Any) -> Any:
    """The gradients that `with_sgd(before)` went down."""
    return jax.tree.map(lambda a, b: np.asarray(jnp.asarray(a) - b), before.trainable, after.trainable)
