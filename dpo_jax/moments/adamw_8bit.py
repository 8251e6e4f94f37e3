"""AdamW with 8-bit moments (Dettmers et al. 2022, arXiv 2110.02861), kept as `blocks.py` says.

    m = β1 m + (1 - β1) G            v = β2 v + (1 - β2) G²
    U = m / (1 - β1^t) / (√(v / (1 - β2^t)) + ε)

in float32, for m and v read from their bytes; U is made of them as they are, and then they are rounded to bytes again.
As bitsandbytes and `transformers`' Trainer have it, small matrices and embeddings keep float32 moments (section 2.3
says why: an embedding's gradients are the least even); here norm scales and biases do too.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpo_jax.moments import is_matrix
from dpo_jax.moments.blocks import Blocks, decoded, encoded, tile_of

_SMALL = 4096
"""bitsandbytes' `min_8bit_size`: a matrix with fewer numbers stays float32."""


class Adam8bitState(NamedTuple):
    """count: int32 [], updates done. mu, nu: trees like the parameters, of `Blocks` or float32 arrays."""

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_adam_8bit(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """U for each matrix and vector. `b1`, `b2` and `eps` are β1, β2 and ε."""

    def init(params: Any) -> Any:
        def zero(path: tuple[Any, ...], x: jax.Array) -> jax.Array | Blocks:
            tile = _tile(path, x)
            if tile is None:
                return jnp.zeros(x.shape, jnp.float32)
            *stack, n, m = x.shape
            return Blocks(jnp.zeros(x.shape, jnp.uint8), jnp.zeros((*stack, n // tile[0], m // tile[1]), jnp.float32))

        mu, nu = (jax.tree_util.tree_map_with_path(zero, params) for _ in range(2))
        return Adam8bitState(jnp.zeros((), jnp.int32), mu, nu)

    def average(g: jax.Array, mu: jax.Array | Blocks, nu: jax.Array | Blocks) -> tuple[jax.Array, jax.Array]:
        m = decoded(mu, signed=True) if isinstance(mu, Blocks) else mu
        v = decoded(nu, signed=False) if isinstance(nu, Blocks) else nu
        return b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g

    def kept(g: jax.Array, mu: jax.Array | Blocks, nu: jax.Array | Blocks) -> tuple[Any, Any]:
        if not isinstance(mu, Blocks):
            return average(g, mu, nu)
        if g.ndim == 2:
            m, v = average(g, mu, nu)
            return encoded(m, signed=True), encoded(v, signed=False)

        def layer(i: jax.Array, held: tuple[Blocks, Blocks]) -> tuple[Blocks, Blocks]:
            own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), (g, *held))
            put = partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
            return jax.tree.map(lambda x, new: put(x, new), held, kept(*own))

        # Layer by layer, each over itself: the float32 moments of one are all there ever is.
        return jax.lax.fori_loop(0, g.shape[0], layer, (mu, nu))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = jnp.asarray(optax.safe_increment(state.count))
        first, second = 1 - b1 ** count.astype(jnp.float32), 1 - b2 ** count.astype(jnp.float32)

        def step(g: jax.Array, mu: jax.Array | Blocks, nu: jax.Array | Blocks) -> jax.Array:
            m, v = average(g, mu, nu)
            return m / first / (jnp.sqrt(v / second) + eps)

        changes = jax.tree.map(step, updates, state.mu, state.nu)
        new = jax.tree.map(kept, updates, state.mu, state.nu)
        mu, nu = (jax.tree.map(lambda _, pair, k=k: pair[k], updates, new) for k in (0, 1))
        return changes, Adam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _tile(path: tuple[Any, ...], x: jax.Array) -> tuple[int, int] | None:
    """Rows and columns of the blocks of a parameter's moments; None where they stay float32."""
    if not is_matrix(path) or path[-1].key == "embedding" or x.shape[-2] * x.shape[-1] < _SMALL:
        return None
    return tile_of(x.shape[-2], x.shape[-1])
