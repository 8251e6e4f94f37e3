"""Attention in plain XLA, for every mask; memory grows with the length of a sequence, not with its square.

B rows, T query tokens, S key tokens, H query heads, G key/value heads, M = H / G, C channels of a head.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import mesh as meshes
from dpo_jax.model.attention_mask import AttentionMask
from dpo_jax.model.chunks import by_chunks
from dpo_jax.model.products import capped

SCORES = 512 * 2**20
"""Bytes of float32 scores a device may hold at once in plain XLA; of more queries they are made again backwards."""


class Scoring(NamedTuple):
    """What becomes of products of queries and keys; fields as the arguments of `attention.attend`."""

    scale: float
    cap: float | None
    windowed: jax.Array | None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    scale: float,
    cap: float | None = None,
    windowed: jax.Array | None = None,
) -> jax.Array:
    """Arguments and result of `attention.attend`."""
    slots = 1 if mask.positions is None else 2  # the axis of S
    q = q.reshape(*q.shape[:2], k.shape[3 - slots], -1, q.shape[3])  # [B, T, G, M, C]
    how = Scoring(scale, cap, windowed)
    out = _plain(q, k, v, mask, how, slots) if mask.prefix is None else _with_prefix(q, k, v, mask, how)
    return out.reshape(*q.shape[:2], -1, q.shape[-1])


def _at_once(batch: int, heads: int, keys: int) -> int:
    """How many queries of each row have room for their scores (`SCORES`); at least one."""
    a_query = 4 * -(-batch // meshes.parts("batch")) * -(-heads // meshes.parts("query_heads")) * keys
    return max(1, SCORES // a_query)


def _precision(x: jax.Array) -> jax.lax.Precision | None:
    """float32 means float32: accelerators would otherwise multiply in bfloat16 or TF32."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _scores(spec: str, q: jax.Array, k: jax.Array, how: Scoring) -> jax.Array:
    scores = how.scale * jnp.einsum(spec, q, k, precision=_precision(q), preferred_element_type=jnp.float32)
    return scores if how.cap is None else capped(scores, how.cap)


def _near(t: Any, s: Any, window: int | None, windowed: jax.Array | None) -> jax.Array:
    """bool [..., T, S]: whether keys at positions s [..., S] are in the window of queries at t [..., T]."""
    assert window is not None
    near = t[..., :, None] - s[..., None, :] < window
    return near if windowed is None else near | ~windowed


def _softmax(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax over the last axis. A row that sees nothing gets equal weights: finite, and so is its gradient."""
    return jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, how: Scoring, slots: int) -> jax.Array:
    """The layouts without a shared prefix; so many queries at once that their scores have room.

    `slots`: the axis of S in k and v.
    """
    (B, T, G, M), S = q.shape[:4], k.shape[slots]
    keys = "bsgc" if slots == 1 else "bgsc"
    at = jnp.arange(S)[None] if slots == 2 else mask.at

    def of(q: jax.Array, own: AttentionMask, t: jax.Array) -> jax.Array:
        """Queries t [1 or B, n] of the rows, with what the mask says of them."""
        if own.positions is not None:
            visible = jnp.arange(S) <= own.positions[:, :, None]
        else:
            visible = jnp.arange(S) <= t[:, :, None]
            if mask.segments is not None and own.segments is not None:
                visible = visible & (own.segments[:, :, None] == mask.segments[:, None, :])
        if mask.window is not None:
            visible = visible & _near(own.at, at, mask.window, how.windowed)
        return _block(q, k, v, visible, how, keys)

    size, places = _at_once(B, G * M, S), jnp.arange(T)
    if size >= T:
        return of(q, mask, places[None])
    return _by_queries(of, size, q, mask, jnp.broadcast_to(places, (B, T)))


def _by_queries(of: Callable[..., jax.Array], size: int, q: jax.Array, *rest: Any) -> jax.Array:
    """`of(q, *rest)`, whose arrays are [B, T, ...], `size` queries at a time."""
    leaves, tree = jax.tree.flatten(rest)
    return by_chunks(lambda q, *some: of(q, *jax.tree.unflatten(tree, some)), size, q, *leaves)


def _block(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, how: Scoring, keys: str) -> jax.Array:
    """q [B, T, G, M, C], k and v with the axes `keys`, visible [B or 1, T, S] -> [B, T, G, M, C]."""
    weights = _softmax(_scores(f"btgmc,{keys}->bgmts", q, k, how), visible[:, None, None])
    return jnp.einsum(f"bgmts,{keys}->btgmc", weights.astype(v.dtype), v, precision=_precision(v))


def _with_prefix(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, how: Scoring) -> jax.Array:
    """The shared-prefix layout, block by block: P^2 + K R (P + R) scores instead of (P + K R)^2.

    Of each block so many queries at once that their scores have room.
    """
    assert mask.prefix is not None
    P, K, R = mask.prefix
    B = q.shape[0]

    def split(x: Any) -> tuple[Any, Any]:
        return x[:, :P], x[:, P:].reshape(B, K, R, *x.shape[2:])

    (q_p, q_r), (k_p, k_r), (v_p, v_r) = split(q), split(k), split(v)
    segments = jnp.ones(q.shape[:2], jnp.int32) if mask.segments is None else mask.segments
    s_p, s_r = split(segments)
    at_p, at_r = split(jnp.zeros_like(segments) if mask.at is None else mask.at)
    alone = AttentionMask(segments=s_p, window=mask.window, at=None if mask.window is None else at_p)
    prompt = _plain(q_p, k_p, v_p, alone, how, 1)

    def of(q: jax.Array, s: jax.Array, at: jax.Array, t: jax.Array) -> jax.Array:
        """Queries t [B, n] of all responses: q [B, n, K, G, M, C], segments and positions [B, n, K]."""
        s, at = s.swapaxes(1, 2), at.swapaxes(1, 2)
        own = (jnp.arange(R) <= t[:, None, :, None]) & (s[..., :, None] == s_r[..., None, :])  # [B, K, n, R]
        shared = s[..., None] == s_p[:, None, None]  # [B, K, n, P]
        if mask.window is not None:
            own = own & _near(at, at_r, mask.window, how.windowed)
            shared = shared & _near(at, at_p[:, None], mask.window, how.windowed)
        scores = jnp.concatenate(
            [_scores("brkgmc,bpgc->bkgmrp", q, k_p, how), _scores("brkgmc,bksgc->bkgmrs", q, k_r, how)],
            axis=-1,
        )
        weights = _softmax(scores, jnp.concatenate([shared, own], axis=-1)[:, :, None, None]).astype(v.dtype)
        return jnp.einsum("bkgmrp,bpgc->brkgmc", weights[..., :P], v_p, precision=_precision(v)) + jnp.einsum(
            "bkgmrs,bksgc->brkgmc", weights[..., P:], v_r, precision=_precision(v)
        )

    places = jnp.broadcast_to(jnp.arange(R), (B, R))
    arguments = (q_r.swapaxes(1, 2), s_r.swapaxes(1, 2), at_r.swapaxes(1, 2), places)
    size = _at_once(B, K * math.prod(q.shape[2:4]), P + R)
    responses = of(*arguments) if size >= R else _by_queries(of, size, *arguments)
    responses = responses.swapaxes(1, 2).reshape(B, K * R, *q.shape[2:])
    return jnp.concatenate([prompt, responses], axis=1)
