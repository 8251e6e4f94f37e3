"""Splash attention, JAX's flash attention for TPUs, with masks that are worked out block by block.

The kernel is told for every block of its mask whether it is empty, full or mixed, and its own code finds that out by
building every block, several times over: for a pair of 128k tokens half an hour of comparisons. The masks here say it
of a block from its corners, and build the mixed ones alone.

B batch, T query tokens, S key tokens, H query heads, G key/value heads, C channels of a head.
"""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention

from dpo_jax import mesh as meshes
from dpo_jax.model.attention_mask import AttentionMask, Prefix

LANES = 128
"""A TPU's vector registers are 128 wide, and splash attention's blocks are multiples of that."""
LARGEST = 512
"""Side of a block. Larger ones keep the TPU busier, up to here."""
LONG = 16 * LARGEST
"""Sequences from here on are filled up to whole blocks of `LARGEST`: what small blocks cost is more than that."""


def padded(length: int) -> int:
    """The length that the kernel computes for `length` tokens."""
    multiple = LANES if length < LONG else LARGEST
    return -(-length // multiple) * multiple


def _block(length: int) -> int:
    """The largest block of at most `LARGEST` that divides `length` (a multiple of 128)."""
    return max(size for size in range(LANES, LARGEST + 1, LANES) if length % size == 0)


@cache
def _all(value: bool, shape: tuple[int, int]) -> np.ndarray:
    block = np.full(shape, value)
    block.flags.writeable = False
    return block


def _bounds(part: slice, length: int) -> tuple[int, int]:
    """First and last place of a slice."""
    start, stop, _ = part.indices(length)
    return start, stop - 1


class Causal(splash_attention.CausalMask):
    """Places up to one's own."""

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        (t0, t1), (s0, s1) = (_bounds(part, size) for part, size in zip(index, self.shape, strict=True))
        if s0 > t1 or s1 <= t0:
            return _all(s0 <= t1, (t1 - t0 + 1, s1 - s0 + 1))
        return super().__getitem__(index)


class Window(splash_attention.LocalMask):
    """The last `size` places up to one's own."""

    def __init__(self, length: int, size: int) -> None:
        super().__init__((length, length), window_size=(size - 1, 0), offset=0)
        self.size = size

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        (t0, t1), (s0, s1) = (_bounds(part, size) for part, size in zip(index, self.shape, strict=True))
        empty, full = s0 > t1 or t0 - s1 >= self.size, s1 <= t0 and t1 - s0 < self.size
        if empty or full:
            return _all(full, (t1 - t0 + 1, s1 - s0 + 1))
        return super().__getitem__(index)


@dataclasses.dataclass(frozen=True)
class Shared(splash_attention.Mask):
    """The shared-prefix layout. What follows the last response (padding) counts as more responses."""

    length: int
    prefix: Prefix

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.length

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        ends = [_bounds(part, self.length) for part in index]
        ((t0, t1), (s0, s1)), shape = ends, tuple(b - a + 1 for a, b in ends)
        (a, b), (c, d) = ((self._owner(first), self._owner(last)) for first, last in ends)  # of queries, of keys
        if s0 > t1 or (c > 0 and (d < a or c > b)):
            return _all(False, shape)
        if s1 <= t0 and (d == 0 or a == b == c == d):
            return _all(True, shape)
        t, s = np.arange(t0, t1 + 1)[:, None], np.arange(s0, s1 + 1)
        return (s <= t) & ((self._owner(s) == 0) | (self._owner(s) == self._owner(t)))

    def _owner(self, place: Any) -> Any:
        """0 for the prompt, k for the k-th response."""
        prompt, _, response = self.prefix
        return np.maximum(0, 1 + (place - prompt) // response)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, scale: float, cap: float | None = None
) -> jax.Array:
    """Arguments and result of `attention.attend`, on every device's own rows and heads; not windows of shared prompts.

    Off TPUs, in Pallas' interpreter (for tests).
    """
    T, H = q.shape[1:3]
    length = padded(T)
    heads = H // meshes.parts("query_heads")
    interpret = meshes.platform() != "tpu"
    block = _block(length)
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    one_head: Any = Causal((length, length))
    if mask.prefix is not None:
        one_head = Shared(length, mask.prefix)
    elif mask.window is not None:
        one_head = Window(length, mask.window)
    static = splash_attention.MultiHeadMask([one_head] * heads)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        kernel: Any = splash_attention.make_splash_mha(
            static,
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=cap,
            interpret=interpret,
        )
        ids = None if segments is None else splash_attention.SegmentIds(q=segments, kv=segments)
        return jax.vmap(kernel)(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), ids).swapaxes(1, 2)

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, length - T)] + [(0, 0)] * (x.ndim - 2))

    # The kernel itself does not scale. Padding needs no segment of its own: it stands last, and the mask is causal.
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    segments = None if mask.segments is None else pad(mask.segments)
    axes = (
        ("batch", "queries", "query_heads", None),
        *[("batch", "keys", "key_heads", None)] * 2,
        ("batch", "queries"),
    )
    out = meshes.shard_map(local, axes, axes[0])(pad(q), pad(k), pad(v), segments)
    return out[:, :T]
