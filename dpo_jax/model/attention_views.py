"""Windows of real tokens become plain causal sequences around attention alone, so that every kernel can run them.

Projections, feed-forward layers and head see each token once; here, where keys and values are small, what stands in
several sequences (a prompt, in those of its responses) is repeated. Its queries are not, by a kernel that takes those
at the end of a sequence alone. Both ways, tokens are gathered, forwards and backwards: the gradient of what stands in
several sequences is the sum, in float32, of what is found in each.

W windows, T places, N sequences of a class, L places of each, Q queries of each, S places of all sequences, J sequences
that a place may stand in, H heads (of keys and values: G), C channels of a head.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import mesh as meshes
from dpo_jax.model.attention_mask import AttentionMask

Places = tuple[jax.Array, ...]
"""A class each: int32 [W, N, L], the place in the window of each token of its sequences; any at padding."""


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, plain: Callable[..., jax.Array], *, ends: bool
) -> jax.Array:
    """Attention within each sequence of windows.

    Args:
      q: [W, T, H, C]; k, v: [W, T, G, C].
      mask: with views.
      plain: (q, k, v, mask) -> what attention gives, for right-padded rows [W N, L, ...].
      ends: whether `plain` takes the last queries of a sequence alone, at `positions` in the form of a cache; else all
        of its queries are computed, and what stands in several sequences is taken from the first.

    Returns:
      [W, T, H, C]; 0 at places of no sequence.
    """
    views = mask.views
    assert views is not None
    queries, answers = (views.queries, views.answers) if ends else (views.places, views.homes[..., 0])
    qs = _sequences(q, queries, answers[..., None] if ends else views.homes)
    ks, vs = (_sequences(x, views.places, views.homes) for x in (k, v))
    starts = [None] * (len(ks) - len(views.starts)) + list(views.starts)
    parts = []
    for one, lengths, first in zip(zip(qs, ks, vs, strict=True), views.lengths, starts, strict=True):
        w, n = lengths.shape
        rows = [
            meshes.constrain(x.reshape(w * n, *x.shape[2:]), ("batch", "queries", heads, "channels"))
            for x, heads in zip(one, ("query_heads", "key_heads", "key_heads"), strict=True)
        ]
        at = jnp.broadcast_to(jnp.arange(rows[0].shape[1]), rows[0].shape[:2])
        if ends and first is not None:
            at = at + first.reshape(w * n, 1)
            rows[1:] = (x.swapaxes(1, 2) for x in rows[1:])
            own = AttentionMask(positions=at)
        else:
            own = AttentionMask(segments=(at < lengths.reshape(w * n, 1)).astype(jnp.int32), packed=False)
        if mask.window is not None:
            own = dataclasses.replace(own, window=mask.window, at=at)
        parts.append(plain(*rows, mask=own).reshape(w, -1, *q.shape[2:]))
    return _windows(jnp.concatenate(parts, axis=1), queries, answers)


def _along(places: Places) -> jax.Array:
    """int32 [W, S]: the places of all classes, one behind the other."""
    return jnp.concatenate([one.reshape(one.shape[0], -1) for one in places], axis=1)


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """x [W, A, ...] at places [W, B] -> [W, B, ...]; 0 where a place lies behind the last."""
    return jnp.take_along_axis(x, at[..., None, None], axis=1, mode="fill", fill_value=0)


def _nothing(integers: Any) -> Any:
    """The tangent of integers."""
    return jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), integers)


@jax.custom_vjp
def _sequences(x: jax.Array, places: Places, homes: jax.Array) -> list[jax.Array]:
    """Windows [W, T, H, C] -> the sequences of each class [W, N, L, H, C]; padding holds any token of the window.

    `homes`: int32 [W, T, J], where each place of the windows stands in these; the sum of all where there are fewer.
    """
    rest = x.shape[2:]
    return [_take(x, at.reshape(at.shape[0], -1)).reshape(*at.shape, *rest) for at in places]


def _sequences_forward(x: jax.Array, places: Places, homes: jax.Array) -> tuple[list[jax.Array], Any]:
    return _sequences(x, places, homes), (places, homes)


def _sequences_backward(kept: Any, gradients: list[jax.Array]) -> tuple[Any, ...]:
    places, homes = kept
    whole = jnp.concatenate([g.reshape(g.shape[0], -1, *g.shape[3:]) for g in gradients], axis=1)
    found = (_take(whole, homes[..., j]).astype(jnp.float32) for j in range(homes.shape[2]))
    return sum(found, jnp.zeros((), jnp.float32)).astype(whole.dtype), _nothing(places), _nothing(homes)


_sequences.defvjp(_sequences_forward, _sequences_backward)


@jax.custom_vjp
def _windows(x: jax.Array, places: Places, homes: jax.Array) -> jax.Array:
    """The places of all sequences [W, S, H, C] -> windows [W, T, H, C]; `homes`: int32 [W, T], as above."""
    return _take(x, homes)


def _windows_forward(x: jax.Array, places: Places, homes: jax.Array) -> tuple[jax.Array, Any]:
    return _windows(x, places, homes), (places, homes)


def _windows_backward(kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    places, homes = kept
    at = _along(places)
    real = jnp.take_along_axis(homes, at, axis=1) == jnp.arange(at.shape[1])
    return jnp.where(real[..., None, None], _take(gradient, at), 0), _nothing(places), _nothing(homes)


_windows.defvjp(_windows_forward, _windows_backward)
