"""Keys and values of earlier tokens, for generation. A token at position p stands in slot p of its row.

A cache is one `Cache` with the layers stacked in front, as scanned layers take it, or a tuple of one `Cache` a layer,
as unrolled ones do (`Llama.unrolled`). In int8, each vector of a head is kept as integers and one scale.

The slots of a head stand together, so that attention reads them as they stand, without a transposed copy.

L layers, B rows, G key/value heads, S slots, C channels of a head.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax import mesh as meshes
from dpo_jax.model import narrow
from dpo_jax.model.architecture import LlamaConfig

_AXES = ("layers", "batch", "kv", "length", "channels")


@struct.dataclass
class Cache:
    """Keys and values of one layer, or of all with L in front.

    Attributes:
      keys, values: [B, G, S, C].
      key_scales, value_scales: float32 [B, G, S], what the integers of an int8 cache are multiplied by; else None.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    def write(self, keys: jax.Array, values: jax.Array, start: jax.Array) -> "Cache":
        """With keys and values [B, T, G, C] in the slots from start [B] on. One layer."""
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
        if self.key_scales is None:
            new = Cache(keys.astype(self.keys.dtype), values.astype(self.values.dtype))
        else:
            (k, k_scales), (v, v_scales) = narrow.quantise(keys), narrow.quantise(values)
            new = Cache(k, v, k_scales, v_scales)

        def put(slots: jax.Array, x: jax.Array) -> jax.Array:
            return jax.vmap(lambda a, b, at: jax.lax.dynamic_update_slice_in_dim(a, b, at, axis=1))(slots, x, start)

        return jax.tree.map(put, self, new)

    def read(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, G, S, C] in `dtype`. One layer."""
        k, v = self.keys.astype(dtype), self.values.astype(dtype)
        if self.key_scales is None or self.value_scales is None:
            return k, v
        return k * self.key_scales[..., None].astype(dtype), v * self.value_scales[..., None].astype(dtype)


@struct.dataclass
class Two:
    """The caches of two models that write one text together."""

    first: Any
    second: Any


ModelCache = Cache | tuple[Cache, ...]
"""What one model keeps: its layers stacked, or one by one."""
Caches = ModelCache | Two


def init_cache(config: LlamaConfig, rows: int, slots: int, dtype: Any) -> Cache:
    """An empty cache, the layers stacked; `dtype` int8 makes a quantised one."""
    shape = (config.num_layers, rows, config.num_kv_heads, slots, config.head_dim)
    zeros = jnp.zeros(shape, dtype)
    scales = jnp.zeros(shape[:-1], jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None
    return Cache(zeros, zeros, scales, scales)


def count_slots(cache: ModelCache) -> int:
    """S."""
    return (cache[0] if isinstance(cache, tuple) else cache).keys.shape[-2]


def unstack(cache: Cache) -> tuple[Cache, ...]:
    """One cache a layer."""
    return tuple(jax.tree.map(lambda x, i=i: x[i], cache) for i in range(cache.keys.shape[0]))


def map_rows(function: Callable[..., jax.Array], cache: Caches, *others: Caches) -> Any:
    """function(array, ..., axis) for each array of the caches, where `axis` is that of the rows."""
    if isinstance(cache, Two):
        parts = zip(*((one.first, one.second) for one in (cache, *others)), strict=True)  # pyright: ignore[reportAttributeAccessIssue]
        return Two(*(map_rows(function, *part) for part in parts))
    axis = 0 if isinstance(cache, tuple) else 1
    return jax.tree.map(lambda *x: function(*x, axis), cache, *others)


def constrain(cache: Caches) -> Any:
    """Lay a cache out over the mesh in force."""
    if isinstance(cache, Two):
        return Two(constrain(cache.first), constrain(cache.second))
    first = 1 if isinstance(cache, tuple) else 0
    return jax.tree.map(lambda x: meshes.constrain(x, _AXES[first : first + x.ndim]), cache)
