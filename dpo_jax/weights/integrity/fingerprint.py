"""A content hash of arrays that does not depend on how they are sharded, computed where they lie."""

import hashlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax.model.dropout import mix
from dpo_jax.model.quantised import Kind, Quantised, is_quantised, quantise

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
_SEEDS = (0x9E3779B9, 0x27D4EB2F)


def sums_by_row(leaf: jax.Array, dtype: Any, first: int | jax.Array = 0) -> jax.Array:
    """uint32 [N, 2] of a leaf [N, ...], which is rows first..first + N - 1 of a larger one: what each row adds to the
    two sums of `_sums`."""
    leaf = leaf.astype(jnp.uint8 if dtype == jnp.bool_ else dtype)
    bits = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)

    def one(seed: int) -> jax.Array:
        mixed = bits
        for axis, size in enumerate(bits.shape):  # axis by axis: a flat index can exceed 32 bits, and this is cheap
            begin = first if axis == 0 else 0
            along = mix(jnp.arange(size, dtype=jnp.uint32) + jnp.uint32(seed + (axis << 8)) + jnp.uint32(begin))
            mixed = mixed + jnp.expand_dims(along, [other for other in range(bits.ndim) if other != axis])
        return jnp.sum(mix(mixed), axis=tuple(range(1, bits.ndim)), dtype=jnp.uint32)

    return jnp.stack([one(seed) for seed in _SEEDS], axis=-1)


@partial(jax.jit, static_argnums=1)
def _sums(leaf: jax.Array, dtype: Any) -> jax.Array:
    """Two uint32 sums, modulo 2^32 and so in any order, of each element's bits mixed with its position."""
    rows = sums_by_row(leaf, dtype)
    return jnp.sum(rows, axis=0, dtype=jnp.uint32) if leaf.ndim else rows


def quantised_as(matrix: jax.Array, target: Quantised, first: int = 0) -> Quantised:
    """Layers `first` and following of a kernel that was read, [N, D, F], quantised and laid out as `target`.

    It can be known again by what it was made from. `target`: of arrays, or of shapes with shardings.
    """
    places = jax.tree.map(lambda x: x.sharding, target)
    return jax.jit(_quantised, static_argnums=1, out_shardings=places)(matrix, target.kind, np.uint32(first))


def _quantised(matrix: jax.Array, kind: Kind, first: jax.Array) -> Quantised:
    return quantise(matrix, kind, sums_by_row(matrix, jnp.bfloat16, first))


def _of_origin(leaf: Quantised) -> jax.Array:
    """The sums of what a quantised matrix was made from."""
    assert leaf.origin is not None, "made from weights that were read"
    return jnp.sum(leaf.origin, axis=0, dtype=jnp.uint32)


def fingerprint(tree: Any, dtype: Any = None) -> str:
    """SHA-256, in hex, over the path, dtype, shape and contents of every leaf of a tree of arrays.

    With `dtype` of the leaves as they are once rounded to it, and of quantised matrices what they were made from,
    which was rounded to bfloat16. The same on any mesh; only 8 bytes a leaf leave the device. It tells different
    weights apart; it is no defence against someone who makes two that agree on purpose.
    """
    digest = hashlib.sha256()
    of_origin = None if dtype is None else is_quantised
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=of_origin)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        kind = jnp.dtype(leaf.dtype if dtype is None else dtype)
        digest.update(f"{name} {kind.name} {tuple(leaf.shape)} ".encode())
        sums = _of_origin(leaf) if isinstance(leaf, Quantised) else _sums(leaf, kind)
        sums = np.asarray(sums) if sums.is_fully_addressable else multihost_utils.process_allgather(sums, tiled=True)
        digest.update(sums.tobytes())
    return digest.hexdigest()
