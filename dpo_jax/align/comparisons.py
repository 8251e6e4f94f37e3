"""Losses of comparisons and labels, one value an example: the equations of `align/reward.py`."""

import jax
import jax.numpy as jnp
import optax

from dpo_jax import masked


def ranking_loss(chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0) -> jax.Array:
    """−log σ(r_c − r_r − m), elementwise (Llama 2, Eq. 2; with margin 0 Eq. 1, the Bradley-Terry likelihood).

    Args:
      chosen, rejected: scores [B] (any equal shapes).
      margin: scalar or [B], not negative.

    Returns:
      float32 [B]. Scores [1.2, .3, -.5] against [.2, .8, -.5] give .3132616875, .9740769842, .6931471806.
    """
    return -jax.nn.log_sigmoid(jnp.asarray(chosen, jnp.float32) - rejected - margin)


def centering(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """(r_c + r_r)²: holds the scores, of which the ranking loss fixes only differences, around 0. Elementwise."""
    return jnp.square(jnp.asarray(chosen, jnp.float32) + rejected)


def multi_class_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """−log softmax(z)_y, for classes of which exactly one holds. logits [..., C], labels int [...], result [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))


def multi_label_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """−Σ_c [y_c log σ(z_c) + (1 − y_c) log σ(−z_c)] / C, for classes that hold or not, each by itself.

    logits [..., C]; labels [..., C], 1 or 0, -1 where nobody said (left out of the mean); result [...], 0 where nobody
    said anything.
    """
    known = labels >= 0
    losses = optax.sigmoid_binary_cross_entropy(logits, jnp.maximum(labels, 0).astype(logits.dtype))
    return masked.total(losses, known, axis=-1) / jnp.maximum(jnp.sum(known, axis=-1), 1)


def pair_mask(ranks: jax.Array, present: jax.Array, pairs: str = "all") -> jax.Array:
    """Which responses are compared: bool [B, K, K], True at (w, l) where w ranks better than l.

    Args:
      ranks: int32 [B, K], 0 the best; equal ranks are a tie.
      present: bool [B, K].
      pairs: "all", or "adjacent": l has the next worse rank that occurs.
    """
    better = (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]
    if pairs == "adjacent":
        # (w, l) is adjacent where no response stands between them.
        between = jnp.any(better[:, :, :, None] & better[:, None, :, :], axis=2)
        return better & ~between
    return better
