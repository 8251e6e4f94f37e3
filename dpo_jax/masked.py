"""Masked statistics. A masked-out position never contributes, even when it holds NaN or infinity.

`x` and `mask` have the same shape; the mask is boolean or 0/1. The statistics run over every axis, so under
`jax.jit` on a sharded array they are those of the global batch.
"""

import chex
import jax
import jax.numpy as jnp

EPSILON = 1e-8
"""What `whiten` adds to the variance."""


def select(x: jax.Array, mask: jax.Array) -> jax.Array:
    """`x` where the mask holds, 0 elsewhere: unlike `x * mask`, this stops NaN, forwards and backwards."""
    chex.assert_equal_shape([x, mask])
    return jnp.where(mask.astype(bool), x, jnp.zeros_like(x))


def total(x: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Sum of `x` over the positions where the mask holds."""
    return jnp.sum(select(x, mask), axis=axis)


def mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the masked-in positions, a scalar. NaN if there are none: an all-masked batch is a mistake.

    A figure that a batch may lack by right is told from that by its weight: see `align/figures.py`.
    """
    return total(x, mask) / jnp.sum(mask.astype(jnp.float32))


def var(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Unbiased variance (n - 1 in the denominator) over the masked-in positions, a scalar.

    0 for a single position, of which it is undefined, so that whitening it is defined; NaN if there are none.
    """
    # Masked before the square: the gradient of a square at NaN is NaN, even under a cotangent of 0.
    deviation = select(x - mean(x, mask), mask)
    n = jnp.sum(mask.astype(jnp.float32))
    return jnp.where(n > 0, jnp.sum(jnp.square(deviation)) / jnp.maximum(n - 1, 1), jnp.nan)


def whiten(x: jax.Array, mask: jax.Array, *, shift_mean: bool = True, epsilon: float = EPSILON) -> jax.Array:
    """Scale the masked-in positions to unit (unbiased) variance and, if `shift_mean`, to zero mean.

    Args:
      x: any shape, floating.
      mask: the same shape; positions outside it come back as what the same affine map gives, a non-finite value
        there counting as 0.
      epsilon: added to the variance, so that a constant `x` stays finite.

    Returns:
      An array shaped like `x`. Whitening [1, 2, 3, 4] under [0, 1, 1, 0] gives about [-2.12, -.71, .71, 2.12].
    """
    x = select(x, mask.astype(bool) | jnp.isfinite(x))
    # Equal values give exactly 0: the rounding of their mean would be divided by next to nothing.
    pivot = jax.lax.stop_gradient(jnp.max(jnp.where(mask.astype(bool), x, -jnp.inf)))
    x = x - pivot
    mu = mean(x, mask)
    whitened = (x - mu) * jax.lax.rsqrt(var(x, mask) + epsilon)
    return whitened if shift_mean else whitened + mu + pivot
