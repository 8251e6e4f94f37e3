"""What the steps of `dpo`, `reward` and `sft` have in common: a loss that is a sum over the rows of a batch, descended.

    L(θ) = Σ_m share_m(θ)        g = Σ_m ∇_θ share_m(θ)        m: the micro-batches of the batch

Whatever a row's loss takes from the whole batch (Σ w above all) is fixed before, and nothing is averaged here: each
micro-batch gives the gradient of its share Σ_i w_i ℓ_i / Σ w of the loss. So g is that of one big batch, exactly.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dpo_jax import masked, mesh as meshes
from dpo_jax.align.figures import Metrics
from dpo_jax.config.sections import Dtype, StepConfig
from dpo_jax.errors import InputError
from dpo_jax.model import dropout
from dpo_jax.state import TrainState
from dpo_jax.types import PreferenceBatch

Batch = TypeVar("Batch")
Rows = TypeVar("Rows")


# ---------------------------------------------------------------- micro-batches


def together(rows: int, group: int, pieces: int) -> int:
    """How many neighbouring rows of each group of `group` stay together where `rows` rows are cut into equal pieces.

    The largest divisor of `group` with which every piece holds whole blocks: 2 of 8 where 16 rows make 8 pieces.
    """
    return next((k for k in range(group, 1, -1) if group % k == 0 and rows % (k * pieces) == 0), 1)


def _units(batch: Any) -> int:
    """What a batch is split by: its rows or, where some of its arrays are of windows, these with the rows they hold."""
    return min(x.shape[0] for x in jax.tree.leaves(batch))


def _check_split(batch: Any, k: int) -> int:
    """How many units `batch` has. Raises `InputError` when they do not divide over k micro-batches and the devices."""
    units, parts = _units(batch), meshes.parts("batch")
    if units % (k * parts):
        raise InputError(
            f"a batch of {units} rows does not split into {k} micro-batches over {parts} devices; "
            f"choose --train.batch_size as a multiple of {k * parts}, or lower --train.accumulate"
        )
    return units


def _split(batch: Batch, k: int) -> Batch:
    """[B, ...] -> [k, B / k, ...]; micro-batch i takes rows i, i + k, ..., so that each row stays on its device.

    Of a batch with windows it takes windows i, i + k, ..., and the rows in them.
    """
    units = _check_split(batch, k)

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(units // k, k, x.shape[0] // units, *x.shape[1:]).swapaxes(0, 1)
        x = x.reshape(k, -1, *x.shape[3:])
        return meshes.constrain(x, (None, *meshes.batch_axes(x.ndim - 1)))

    return jax.tree.map(split, batch)


def _join(rows: Any, units: int) -> Any:
    """The inverse of `_split`, for arrays of rows: [k, B / k, ...] -> [B, ...]."""

    def join(x: jax.Array) -> jax.Array:
        k, some = x.shape[:2]
        x = x.reshape(k, units // k, some * k // units, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(k * some, *x.shape[3:])

    return jax.tree.map(join, rows)


def map_rows(f: Callable[[Batch], Any], batch: Batch, k: int) -> Any:
    """`f(batch)`, a tree of arrays of rows [B, ...], computed in k micro-batches.

    Raises `InputError` when the rows do not divide over k micro-batches and the devices.
    """
    return f(batch) if k == 1 else _join(jax.lax.map(f, _split(batch, k)), _units(batch))


def sum_gradients(
    f: Callable[[Batch], tuple[Any, Any]], batch: Batch, k: int, *, like: Any, crossing_dtype: Dtype = "float32"
) -> tuple[Any, Any]:
    """Gradients summed and rows put together, over k micro-batches and the copies of the model.

    Args:
      f: micro-batch -> (gradients of its share of the loss, tree of arrays of rows).
      batch: tree of arrays [B, ...].
      k: the number of micro-batches, of which each holds B / k rows.
      like: tree of arrays of the gradients' shapes and dtypes.
      crossing_dtype: of the gradients, where they cross between copies.

    Raises:
      InputError: the rows do not divide over k micro-batches and the devices.
    """

    def add(total: Any, part: Batch) -> tuple[Any, Any]:
        gradients, rows = f(part)
        return jax.tree.map(jnp.add, total, gradients), rows

    def own(batch: Batch) -> tuple[Any, Any]:
        if k == 1:
            return f(batch)
        gradients, rows = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), _split(batch, k))
        return gradients, _join(rows, _units(batch))

    if meshes.copies() > 1:
        _check_split(batch, k)
    return meshes.sum_over_copies(own, batch, crossing_dtype)


# ---------------------------------------------------------------- the update


def descend(
    state: TrainState,
    batch: Batch,
    values: Callable[[Any, Batch], Rows],
    share: Callable[[Batch, Rows], jax.Array],
    config: StepConfig,
) -> tuple[TrainState, Rows, Metrics]:
    """One optimizer update along ∇L; where loss or gradient is not finite, the state as it was.

    With `config.dropout` what adapters read is dropped in this pass, by the step and each row's number in the batch.

    Args:
      state: what to update.
      batch: tree of arrays [B, ...].
      values: (variables, micro-batch) -> what is computed for its rows, a tree of arrays of rows.
      share: (micro-batch, its values) -> its share of L, a scalar; of the whole batch L itself.
      config: of the step.

    Returns the new state, the values of all rows, and loss, grad_norm (before clipping) and learning_rate (of this
    step). Raises `InputError` where the rows do not divide over micro-batches and devices.
    """

    drops = config.dropout > 0 and "adapters" in state.trainable
    key = jax.random.fold_in(jax.random.key(config.dropout_seed), state.step)

    def part(numbered: tuple[Batch, Any]) -> tuple[Any, Rows]:
        rows, numbers = numbered

        def objective(trainable: Any) -> tuple[jax.Array, Rows]:
            variables = dataclasses.replace(state, trainable=trainable).variables
            if drops:
                variables["dropout"] = dropout.collection(trainable["adapters"], config.dropout, key, numbers)
            found = values(variables, rows)
            return share(rows, found), found

        return jax.grad(objective, has_aux=True)(state.trainable)

    numbers = jnp.arange(_units(batch)) if drops else None
    gradients, found = sum_gradients(
        part, (batch, numbers), config.accumulate, like=state.trainable, crossing_dtype=config.crossing_dtype
    )
    loss, norm = share(batch, found), optax.tree.norm(gradients)
    new = state.apply_gradients(gradients, finite=jnp.isfinite(loss) & jnp.isfinite(norm))
    rate: Any = state.schedule(state.step)
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


_kept = lru_cache(maxsize=2)
"""So few of a kind, since what is compiled takes memory of the devices."""


def jit_train(train_step: Callable[..., Any]) -> Callable[[Any, Mesh], meshes.ShardedStep]:
    """`jit_train_step(config, mesh)`: `step(state, batch) -> (state, metrics)`, jitted for `mesh`.

    The state is donated. Batches of host arrays go through `mesh.put_batch` first, which splits their rows over the
    devices. Who asks for the same again gets the same step, which may be compiled already: rounds ask again and again.
    So `config` must be hashable, as a frozen dataclass is.
    """
    return _kept(lambda config, mesh: meshes.ShardedStep(partial(train_step, config=config), mesh))


def jit_eval(eval_step: Callable[..., Metrics]) -> Callable[[Any, Mesh], Callable[[TrainState, Any], Metrics]]:
    """`jit_eval_step(config, mesh)`: `step(state, batch) -> metrics`, jitted for `mesh`; every process gets the whole.

    The state stays as it is. Kept as `jit_train` says.
    """
    return _kept(lambda config, mesh: meshes.Replicated(partial(eval_step, config=config), mesh))
