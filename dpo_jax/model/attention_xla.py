"""Attention in plain XLA, for every mask; memory grows with the length of a sequence, not with its square.

In a causal sequence a block of queries is multiplied with the keys up to its own end alone. The softmax has a gradient
of its own, which makes the weights again from the sums of the first pass (Dao et al. 2022, arXiv 2205.14135, algorithm
4, without its blocks of keys).

B rows, T query tokens, S key tokens, H query heads, G key/value heads, M = H / G, C channels of a head.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import mesh as meshes
from dpo_jax.model.attention_mask import AttentionMask
from dpo_jax.model.chunks import by_chunks
from dpo_jax.model.products import capped, saved_in_first_pass

SCORES = 512 * 2**20
"""Bytes of float32 scores a device may hold at once in plain XLA; of more queries they are made again backwards."""
QUERIES, MOST_BLOCKS = 128, 8
"""A block of a causal sequence has a multiple of so many queries, and a sequence at most so many blocks."""


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


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Summed in float32."""
    return jnp.einsum(spec, x, y, precision=_precision(x), preferred_element_type=jnp.float32)


def _scores(spec: str, q: jax.Array, k: jax.Array, how: Scoring) -> jax.Array:
    # In float32 the queries are scaled: a scaled score minus another is rounded once in one program, twice in the next.
    scores = _product(spec, how.scale * q, k) if q.dtype == jnp.float32 else how.scale * _product(spec, q, k)
    return scores if how.cap is None else capped(scores, how.cap)


def _near(t: Any, s: Any, window: int | None, windowed: jax.Array | None) -> jax.Array:
    """bool [..., T, S]: whether keys at positions s [..., S] are in the window of queries at t [..., T]."""
    assert window is not None
    near = t[..., :, None] - s[..., None, :] < window
    return near if windowed is None else near | ~windowed


def _softmax(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax over the last axis. A row that sees nothing gets equal weights: finite, and so is its gradient."""
    return jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)


def _blocks(length: int) -> Iterator[slice]:
    """The blocks of a causal sequence of `length` queries."""
    size = QUERIES * -(-length // (QUERIES * MOST_BLOCKS))
    return (slice(begin, min(begin + size, length)) for begin in range(0, length, size))


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, how: Scoring, slots: int) -> jax.Array:
    """The layouts without a shared prefix; so many queries at once that their scores have room.

    `slots`: the axis of S in k and v.
    """
    (B, T, G, M), S = q.shape[:4], k.shape[slots]
    k, v = (k, v) if slots == 2 else (k.swapaxes(1, 2), v.swapaxes(1, 2))  # [B, G, S, C]
    places = jnp.broadcast_to(jnp.arange(T), (B, T))
    parts = []
    for block in _blocks(T) if mask.positions is None else (slice(0, T),):
        seen = block.stop if mask.positions is None else S
        own = jax.tree.map(lambda x, block=block: x[:, block], mask)
        of = partial(_of_queries, k=k[:, :, :seen], v=v[:, :, :seen], mask=mask, how=how)
        parts.append(_by_queries(of, _at_once(B, G * M, seen), q[:, block], own, places[:, block]))
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _of_queries(
    q: jax.Array, own: AttentionMask, t: jax.Array, *, k: jax.Array, v: jax.Array, mask: AttentionMask, how: Scoring
) -> jax.Array:
    """Queries t [B, n] of the rows, of which `own` says what `mask` does of all; keys and values [B, G, S, C]."""
    seen = k.shape[2]
    at = jnp.arange(seen)[None]
    if own.positions is not None:
        visible = at <= own.positions[:, :, None]
    else:
        visible = at <= t[:, :, None]
        if mask.segments is not None and own.segments is not None:
            visible = visible & (own.segments[:, :, None] == mask.segments[:, None, :seen])
        if mask.at is not None:
            at = mask.at[:, :seen]
    if mask.window is not None:
        visible = visible & _near(own.at, at, mask.window, how.windowed)
    heads_first = q.transpose(0, 2, 3, 1, 4)
    out: Any = _attended(how.scale, how.cap, heads_first, k, v, visible)
    return out.transpose(0, 3, 1, 2, 4)


def _by_queries(of: Callable[..., jax.Array], size: int, q: jax.Array, *rest: Any) -> jax.Array:
    """`of(q, *rest)`, whose arrays are [B, T, ...], `size` queries at a time."""
    if size >= q.shape[1]:
        return of(q, *rest)
    leaves, tree = jax.tree.flatten(rest)
    return by_chunks(lambda q, *some: of(q, *jax.tree.unflatten(tree, some)), size, q, *leaves)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attended(
    scale: float, cap: float | None, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
) -> jax.Array:
    """q [B, G, M, T, C], k and v [B, G, S, C], visible [B, T, S] -> [B, G, M, T, C].

    A query that sees nothing sees all with equal weights: finite, and so is its gradient.
    """
    return _attended_forward(scale, cap, q, k, v, visible)[0]


def _rows(x: jax.Array) -> jax.Array:
    """[B, G, M, T, ...] -> [B, G, M T, ...]: all that a key/value head is multiplied with."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _masked(scores: jax.Array, visible: jax.Array) -> jax.Array:
    return jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _scored(scale: float, cap: float | None, q: jax.Array, k: jax.Array) -> jax.Array:
    """[B, G, M, T, S], before they are masked."""
    return _scores("bgrc,bgsc->bgrs", _rows(q), k, Scoring(scale, cap, None)).reshape(*q.shape[:4], -1)


def _attended_forward(
    scale: float, cap: float | None, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
) -> tuple[jax.Array, Any]:
    scores = _masked(_scored(scale, cap, q, k), visible)
    largest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    if meshes.platform() == "cpu":
        # XLA's backend there has two kinds of exp and takes the one with the maximum where that is read here alone. So
        # it is, with a gradient or without: a policy that is its reference still differs from it in no bit.
        largest = jax.lax.optimization_barrier(scores).max(axis=-1, keepdims=True)
    total = weights.sum(axis=-1, keepdims=True)
    out = _product("bgrs,bgsc->bgrc", _rows(weights).astype(v.dtype), v).reshape(q.shape)
    out = saved_in_first_pass((out / total).astype(q.dtype))
    log_total = saved_in_first_pass(largest + jnp.log(total))  # float32 [B, G, M, T, 1]
    return out, (q, k, v, visible, out, log_total)


def _attended_backward(scale: float, cap: float | None, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    q, k, v, visible, out, log_total = kept
    scores = _scored(scale, cap, q, k)
    weights = jnp.exp(_masked(scores, visible) - log_total)
    along = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    slopes = weights * (_product("bgrc,bgsc->bgrs", _rows(gradient), v).reshape(weights.shape) - along)
    slopes = jnp.where(visible[:, None, None], slopes, 0) * scale
    if cap is not None:
        slopes = slopes * (1 - jnp.square(scores / cap))
    by_row, weights = _rows(slopes).astype(q.dtype), _rows(weights).astype(v.dtype)
    return (
        _product("bgrs,bgsc->bgrc", by_row, k).reshape(q.shape).astype(q.dtype),
        _product("bgrs,bgrc->bgsc", by_row, _rows(q)).astype(k.dtype),
        _product("bgrs,bgrc->bgsc", weights, _rows(gradient)).astype(v.dtype),
        np.zeros(visible.shape, jax.dtypes.float0),
    )


_attended.defvjp(_attended_forward, _attended_backward)


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
    responses = _by_queries(of, _at_once(B, K * math.prod(q.shape[2:4]), P + R), *arguments)
    responses = responses.swapaxes(1, 2).reshape(B, K * R, *q.shape[2:])
    return jnp.concatenate([prompt, responses], axis=1)
