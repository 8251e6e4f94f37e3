"""Dropout of what adapters read (Hu et al. 2021, section 4.1; Srivastava et al. 2014), in training steps alone.

    y = x W + scale (m x / (1 - p)) A B,    m_ntd = 1 where a hash of (seed, step, matrix, layer, row n, place t d) >= p

The hash of a row comes with the variables, as the collection `dropout`, which a step adds for the pass that it takes
gradients of (`align/update.py`) and nothing else does. A row of the batch keeps its number in whatever micro-batch and
on whatever device it lies, so the same units fall; windows are numbered as they are packed.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit reaches every output bit (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def collection(adapters: Mapping[str, Any], rate: float, key: jax.Array, rows: jax.Array) -> dict[str, Any]:
    """The collection `dropout` beside `adapters`: of each, the `rate` [L] and the hash of each row, uint32 [L, N].

    `key`: of the step; `rows`: int32 [N], the numbers of the rows in the whole batch.
    """

    def beside(tree: Mapping[str, Any], path: str) -> dict[str, Any]:
        if "lora_a" not in tree:
            return {name: beside(inner, f"{path}/{name}") for name, inner in tree.items()}
        own, layers = jax.random.fold_in(key, zlib.crc32(path.encode())), tree["lora_a"].shape[0]
        seeds = jax.random.bits(own, (layers, 1), jnp.uint32)
        return {"rows": mix(seeds + mix(rows.astype(jnp.uint32))), "rate": jnp.full(layers, rate, jnp.float32)}

    return beside(adapters, "")


def dropped(x: jax.Array, rows: jax.Array, rate: jax.Array) -> jax.Array:
    """x [B, T, D] without the units that fall, others times 1 / (1 - rate); `rows` uint32 [N], B a multiple of N."""
    each = x.reshape(rows.shape[0], -1, *x.shape[1:])
    place = jnp.zeros((1, *each.shape[1:]), jnp.uint32)
    for axis in range(1, each.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, place.shape, axis)
        place = place * jnp.uint32(each.shape[axis]) + along
    bits = mix(rows[:, None, None, None] ^ mix(place))
    kept = (bits >> 8).astype(jnp.float32) >= rate * 2**24
    return jnp.where(kept, each / (1 - rate).astype(x.dtype), 0).reshape(x.shape)
