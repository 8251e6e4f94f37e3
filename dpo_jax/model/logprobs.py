"""Log-probabilities of given tokens, from hidden states, without ever holding [B, T, V].

    log p(y_t | y_<t) = z_t[y_t] - logsumexp(z_t),   z_t = h_t W / temperature

The logits z are made for one chunk of positions at a time, forwards, and made again for that chunk backwards.
"""

import jax
import jax.numpy as jnp

from dpo_jax import mesh as meshes


def chunk_length(batch: int, length: int, vocab: int, budget_bytes: int) -> int:
    """Positions in one chunk: as many as `budget_bytes` of float32 logits a device hold, at most half of `length`.

    Half, so that the full array does not exist even where it would fit. `batch` and `vocab` are global sizes; the mesh
    in force says how much of them one device has.
    """
    a_position = 4 * -(-batch // meshes.parts("batch")) * -(-vocab // meshes.parts("vocab"))
    return max(1, min(budget_bytes // a_position, -(-length // 2)))


def token_logps(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    budget_bytes: int = 256 * 2**20,
) -> jax.Array:
    """Log-probability of each target token.

    Args:
      hidden: [N, R, D], the states that predict the targets.
      unembedding: [D, V], in the dtype of `hidden`.
      targets: int32 [N, R].
      temperature: divides the logits; positive.
      budget_bytes: memory a device may spend on one chunk of logits.

    Returns:
      float32 [N, R], in nats.
    """
    n, length, width = hidden.shape
    vocab = unembedding.shape[1]
    size = chunk_length(n, length, vocab, budget_bytes)
    chunks = -(-length // size)
    pad = chunks * size - length
    # Gathered once here, not once a chunk.
    unembedding = meshes.constrain(unembedding, (None, "vocab"))
    exact = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None

    @jax.checkpoint
    def chunk(h: jax.Array, y: jax.Array) -> jax.Array:
        z = jnp.matmul(h, unembedding, precision=exact, preferred_element_type=jnp.float32) / temperature
        z = meshes.constrain(z, ("batch", "length", "vocab"))
        # A comparison and a sum, not a gather: it stays local where the vocabulary is split over devices.
        at_target = jnp.sum(jnp.where(jnp.arange(vocab) == y[..., None], z, 0.0), axis=-1)
        return at_target - jax.nn.logsumexp(z, axis=-1)

    h = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(n, chunks, size, width).swapaxes(0, 1)
    y = jnp.pad(targets, ((0, 0), (0, pad))).reshape(n, chunks, size).swapaxes(0, 1)
    _, logps = jax.lax.scan(lambda _, xs: (None, chunk(*xs)), None, (h, y))
    return logps.swapaxes(0, 1).reshape(n, chunks * size)[:, :length]
