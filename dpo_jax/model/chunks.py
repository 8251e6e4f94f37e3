"""A function of positions, a few of them at a time: what it needs for all of them at once is never held."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import mesh as meshes


def split_over(length: int) -> int:
    """The pieces that the mesh in force splits an axis of `length` positions into; 1 where they would be uneven.

    Sequences are even (`Llama` refuses others), so 1 is for the few positions that are picked out of them.
    """
    parts = meshes.parts("length")
    return 1 if length % parts else parts


def length_axis(length: int) -> str | None:
    """The logical axis of so many positions; see `split_over`."""
    return None if split_over(length) == 1 else "length"


def by_chunks(f: Callable[..., Any], size: int, *arrays: jax.Array, split: int = 1) -> Any:
    """`f` of `size` positions at a time, computed again for the backward pass.

    Args:
      f: arrays [N, size, ...] -> tree of arrays [N, size, ...]; the last piece is filled up with zeros.
      size: positions in one chunk, of all devices together: a multiple of `split`.
      arrays: [N, R, ...] each.
      split: devices that share the positions, R / split in a row each. A chunk takes the next size / split of every
        device, so that none of them stays idle and no position leaves its device.

    Returns:
      The tree of arrays [N, R, ...].
    """
    n, length = arrays[0].shape[:2]
    here, own = size // split, length // split
    chunks = -(-own // here)

    def cut(x: jax.Array) -> jax.Array:
        rest = x.shape[2:]
        x = x.reshape(n, split, own, *rest)
        filled = jnp.pad(x, ((0, 0), (0, 0), (0, chunks * here - own)) + ((0, 0),) * len(rest))
        pieces = jnp.moveaxis(filled.reshape(n, split, chunks, here, *rest), 2, 0).reshape(chunks, n, size, *rest)
        return pieces if split == 1 else meshes.constrain(pieces, (None, "batch", "length", *[None] * len(rest)))

    def join(x: jax.Array) -> jax.Array:
        rest = x.shape[3:]
        pieces = jnp.moveaxis(x.reshape(chunks, n, split, here, *rest), 0, 2).reshape(n, split, chunks * here, *rest)
        return pieces[:, :, :own].reshape(n, length, *rest)

    _, pieces = jax.lax.scan(lambda _, xs: (None, jax.checkpoint(f)(*xs)), None, tuple(cut(x) for x in arrays))
    return jax.tree.map(join, pieces)
