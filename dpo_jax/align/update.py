"""What the steps of `dpo`, `reward` and `sft` have in common: a loss that is a sum over the rows of a batch, descended.

    L(θ) = Σ_m share_m(θ)        g = Σ_m ∇_θ share_m(θ)        m: the micro-batches of the batch

Whatever a row's loss takes from the whole batch (Σ w above all) is fixed before, so that g is that of one big batch.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dpo_jax import masked, mesh as meshes, state as states
from dpo_jax.align import microbatches
from dpo_jax.align.figures import Metrics
from dpo_jax.state import TrainState
from dpo_jax.types import PreferenceBatch

Batch = TypeVar("Batch")
Rows = TypeVar("Rows")


def descend(
    state: TrainState,
    batch: Batch,
    values: Callable[[Any, Batch], Rows],
    share: Callable[[Batch, Rows], jax.Array],
    config: Any,
) -> tuple[TrainState, Rows, Metrics]:
    """One optimizer update along ∇L; where loss or gradient is not finite, the state as it was.

    Args:
      state: what to update.
      batch: tree of arrays [B, ...].
      values: (variables, micro-batch) -> what is computed for its rows, a tree of arrays of rows.
      share: (micro-batch, its values) -> its share of L, a scalar; of the whole batch L itself.
      config: of the step: `accumulate` and `optimizer`.

    Returns the new state, the values of all rows, and loss, grad_norm (before clipping) and learning_rate (of this
    step). Raises `InputError` where the rows do not divide over micro-batches and devices.
    """

    def part(rows: Batch) -> tuple[Any, Rows]:
        def objective(trainable: Any) -> tuple[jax.Array, Rows]:
            found = values(dataclasses.replace(state, trainable=trainable).variables, rows)
            return share(rows, found), found

        return jax.grad(objective, has_aux=True)(state.trainable)

    gradients, found = microbatches.sum_gradients(part, batch, config.accumulate, like=state.trainable)
    loss, norm = share(batch, found), optax.tree.norm(gradients)
    new = state.apply_gradients(gradients, finite=jnp.isfinite(loss) & jnp.isfinite(norm))
    rate: Any = states.learning_rate_schedule(config.optimizer)(state.step)
    return new, found, {"loss": loss, "grad_norm": norm, "learning_rate": rate}


def of_batch(batch: PreferenceBatch, loss: jax.Array, numbers: jax.Array) -> Metrics:
    """tokens (prompts once, and all responses), and rows/nonfinite int32 [B]: see `dpo.train_step`.

    `loss` [B] and `numbers` [B, K]: what must be finite in a row that counts.
    """
    counted = batch.weights > 0
    tokens = batch.prompt_lengths + jnp.sum(batch.response_lengths, axis=1)
    bad = counted & ~(jnp.isfinite(loss) & jnp.all(jnp.isfinite(numbers), axis=1))
    return {
        "tokens": masked.total(tokens.astype(jnp.float32), counted),
        "rows/nonfinite": jnp.where(bad, batch.rows, -1),
    }


def jit_train(train_step: Callable[..., Any]) -> Callable[[Any, Mesh], meshes.ShardedStep]:
    """`jit_train_step(config, mesh)`: `step(state, batch) -> (state, metrics)`, jitted for `mesh`.

    The state is donated. Batches of host arrays go through `mesh.put_batch` first, which splits their rows over the
    devices.
    """
    return lambda config, mesh: meshes.ShardedStep(partial(train_step, config=config), mesh)


def jit_eval(eval_step: Callable[..., Metrics]) -> Callable[[Any, Mesh], Callable[[TrainState, Any], Metrics]]:
    """`jit_eval_step(config, mesh)`: `step(state, batch) -> metrics`, jitted for `mesh`; every process gets the whole.

    The state stays as it is.
    """
    return lambda config, mesh: meshes.Replicated(partial(eval_step, config=config), mesh)
