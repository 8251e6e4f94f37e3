"""Adafactor (Shazeer & Stern 2018, arXiv 1804.04235): the second moment of a matrix as a row and a column.

For a matrix X with gradient G [n, m] at step t (from 1), as in algorithm 4, with means where the paper has sums:

    β2 = 1 - t^-c                               equation 7.2; c 0.8
    R  = β2 R + (1 - β2) mean over columns of (G² + ε1)      [n, 1]
    C  = β2 C + (1 - β2) mean over rows of (G² + ε1)         [1, m]
    V  = R C / mean(R)
    U  = G / √V
    Û  = U / max(1, RMS(U) / d)                 section 6; d 1

and of a vector V = β2 V + (1 - β2) (G² + ε1). Relative steps (section 8) multiply Û by max(ε2, RMS(X)).

`optax.adafactor` is the same for one matrix; of a stack of them it takes the two largest axes for the matrix, and one
RMS for all. Here a matrix is the last two axes of its array, each layer's by itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpo_jax.moments import is_matrix


class Factors(NamedTuple):
    """The second moment of matrices [..., n, m].

    Attributes:
      rows:    R, float32 [..., n, 1].
      columns: C, float32 [..., 1, m].
    """

    rows: jax.Array
    columns: jax.Array


class AdafactorState(NamedTuple):
    """count: int32 [], updates done. nu: tree like the parameters, `Factors` of matrices, V [..., n] of vectors."""

    count: jax.Array
    nu: Any


def scale_by_adafactor(
    *, exponent: float, update_clip: float, eps1: float, eps2: float | None
) -> optax.GradientTransformation:
    """Û for each matrix and vector; times max(ε2, RMS(X)) where `eps2` is given.

    Args:
      exponent, update_clip: c and d.
      eps1, eps2: added to squared gradients, and the least RMS of weights.
    """

    def init(params: Any) -> Any:
        def zero(path: tuple[Any, ...], x: jax.Array) -> jax.Array | Factors:
            if not is_matrix(path):
                return jnp.zeros(x.shape, jnp.float32)
            *stack, n, m = x.shape
            return Factors(jnp.zeros((*stack, n, 1), jnp.float32), jnp.zeros((*stack, 1, m), jnp.float32))

        return AdafactorState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(zero, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = jnp.asarray(optax.safe_increment(state.count))
        beta2 = 1 - jnp.power(count.astype(jnp.float32), -exponent)

        def average(g: jax.Array, nu: jax.Array | Factors) -> jax.Array | Factors:
            square = jnp.square(g) + eps1
            if not isinstance(nu, Factors):
                return beta2 * nu + (1 - beta2) * square
            rows, columns = (jnp.mean(square, axis=axis, keepdims=True) for axis in (-1, -2))
            return Factors(beta2 * nu.rows + (1 - beta2) * rows, beta2 * nu.columns + (1 - beta2) * columns)

        def step(g: jax.Array, nu: jax.Array | Factors, x: jax.Array) -> jax.Array:
            if isinstance(nu, Factors):
                own: tuple[int, ...] = (-2, -1)
                u = g * jax.lax.rsqrt(nu.rows / jnp.mean(nu.rows, axis=-2, keepdims=True)) * jax.lax.rsqrt(nu.columns)
            else:
                own, u = (-1,), g * jax.lax.rsqrt(nu)
            u = u / jnp.maximum(1.0, _rms(u, own) / update_clip)
            return u if eps2 is None else u * jnp.maximum(eps2, _rms(x, own))

        nu = jax.tree.map(average, updates, state.nu)
        return jax.tree.map(step, updates, nu, params), AdafactorState(count, nu)

    return optax.GradientTransformation(init, update)


def _rms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Root of the mean square over `axes`, which stay, of length 1."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))
