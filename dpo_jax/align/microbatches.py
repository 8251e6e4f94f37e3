"""Gradient accumulation: a batch as k micro-batches, one after another, with the result of one big batch.

It is exact because nothing is averaged here: each micro-batch gives the gradient of its share Σ_i w_i ℓ_i / Σ w of the
loss, with Σ w of the whole batch, and the shares are added.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from dpo_jax import mesh as meshes
from dpo_jax.errors import InputError

Batch = TypeVar("Batch")


def together(rows: int, group: int, pieces: int) -> int:
    """How many neighbouring rows of each group of `group` stay together where `rows` rows are cut into equal pieces.

    The largest divisor of `group` with which every piece holds whole blocks: 2 of 8 where 16 rows make 8 pieces.
    """
    return next((k for k in range(group, 1, -1) if group % k == 0 and rows % (k * pieces) == 0), 1)


def _units(batch: Any) -> int:
    """What a batch is split by: its rows or, where some of its arrays are of windows, these with the rows they hold."""
    return min(x.shape[0] for x in jax.tree.leaves(batch))


def _split(batch: Batch, k: int) -> Batch:
    """[B, ...] -> [k, B / k, ...]; micro-batch i takes rows i, i + k, ..., so that each row stays on its device.

    Of a batch with windows it takes windows i, i + k, ..., and the rows in them.
    """
    units, parts = _units(batch), meshes.parts("batch")
    if units % k or (units // k) % parts:
        raise InputError(
            f"a batch of {units} rows does not split into {k} micro-batches over {parts} devices; "
            f"choose --train.batch_size as a multiple of {k * parts}, or lower --train.accumulate"
        )

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


def sum_gradients(f: Callable[[Batch], tuple[Any, Any]], batch: Batch, k: int, *, like: Any) -> tuple[Any, Any]:
    """Gradients summed and rows put together, over k micro-batches.

    Args:
      f: micro-batch -> (gradients of its share of the loss, tree of arrays of rows).
      batch: tree of arrays [B, ...].
      k: number of micro-batches; each holds B / k rows.
      like: tree of arrays of the gradients' shapes and dtypes.

    Raises:
      InputError: the rows do not divide over k micro-batches and the devices.
    """
    if k == 1:
        return f(batch)

    def add(total: Any, part: Batch) -> tuple[Any, Any]:
        gradients, rows = f(part)
        return jax.tree.map(jnp.add, total, gradients), rows

    gradients, rows = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, like), _split(batch, k))
    return gradients, _join(rows, _units(batch))
