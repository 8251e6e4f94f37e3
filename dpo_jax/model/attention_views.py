"""Windows of real tokens become plain causal sequences around attention alone, so that every kernel can run them.

Projections, feed-forward layers and head see each token once; here, where keys and values are small, what stands in
several sequences (a prompt, in those of its responses) is repeated. Both ways, tokens are gathered, forwards and
backwards: the gradient of what stands in several sequences is the sum, in float32, of what is found in each.

W windows, T places, N sequences of a class, L places of each, S places of all sequences, J sequences that a place may
stand in, H heads (of keys and values: G), C channels of a head.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import mesh as meshes
from dpo_jax.model.attention_mask import AttentionMask
from dpo_jax.types import Views


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, plain: Callable[..., jax.Array]) -> jax.Array:
    """Attention within each sequence of windows.

    Args:
      q: [W, T, H, C]; k, v: [W, T, G, C].
      mask: with views.
      plain: (q, k, v, mask) -> what attention gives, for right-padded rows [W N, L, ...].

    Returns:
      [W, T, H, C]; 0 at places of no sequence.
    """
    views = mask.views
    assert views is not None
    parts = []
    for qs, ks, vs, lengths in zip(*(_sequences(x, views) for x in (q, k, v)), views.lengths, strict=True):
        w, n, length = qs.shape[:3]
        at = jnp.broadcast_to(jnp.arange(length), (w * n, length))
        own = AttentionMask(
            segments=(at < lengths.reshape(w * n, 1)).astype(jnp.int32),
            packed=False,
            window=mask.window,
            at=None if mask.window is None else at,
        )
        rows = (
            meshes.constrain(x.reshape(w * n, *x.shape[2:]), ("batch", "queries", heads, "channels"))
            for x, heads in ((qs, "query_heads"), (ks, "key_heads"), (vs, "key_heads"))
        )
        parts.append(plain(*rows, mask=own).reshape(w, n * length, *q.shape[2:]))
    return _windows(jnp.concatenate(parts, axis=1), views)


def _along(views: Views) -> jax.Array:
    """int32 [W, S]: the places of all classes, one behind the other."""
    return jnp.concatenate([places.reshape(places.shape[0], -1) for places in views.places], axis=1)


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """x [W, A, ...] at places [W, B] -> [W, B, ...]; 0 where a place lies behind the last."""
    return jnp.take_along_axis(x, at[..., None, None], axis=1, mode="fill", fill_value=0)


def _nothing(views: Views) -> Views:
    """The tangent of integers."""
    return jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), views)


@jax.custom_vjp
def _sequences(x: jax.Array, views: Views) -> list[jax.Array]:
    """Windows [W, T, H, C] -> the sequences of each class [W, N, L, H, C]; padding holds any token of the window."""
    rest = x.shape[2:]
    return [_take(x, at.reshape(at.shape[0], -1)).reshape(*at.shape, *rest) for at in views.places]


def _sequences_forward(x: jax.Array, views: Views) -> tuple[list[jax.Array], Views]:
    return _sequences(x, views), views


def _sequences_backward(views: Views, gradients: list[jax.Array]) -> tuple[jax.Array, Views]:
    whole = jnp.concatenate([g.reshape(g.shape[0], -1, *g.shape[3:]) for g in gradients], axis=1)
    found = (_take(whole, views.homes[..., j]).astype(jnp.float32) for j in range(views.homes.shape[2]))
    return sum(found, jnp.zeros((), jnp.float32)).astype(whole.dtype), _nothing(views)


_sequences.defvjp(_sequences_forward, _sequences_backward)


@jax.custom_vjp
def _windows(x: jax.Array, views: Views) -> jax.Array:
    """The places of all sequences [W, S, H, C] -> windows [W, T, H, C], each place from the first that it stands in."""
    return _take(x, views.homes[..., 0])


def _windows_forward(x: jax.Array, views: Views) -> tuple[jax.Array, Views]:
    return _windows(x, views), views


def _windows_backward(views: Views, gradient: jax.Array) -> tuple[jax.Array, Views]:
    at = _along(views)
    first = jnp.take_along_axis(views.homes[..., 0], at, axis=1) == jnp.arange(at.shape[1])
    return jnp.where(first[..., None, None], _take(gradient, at), 0), _nothing(views)


_windows.defvjp(_windows_forward, _windows_backward)
