"""Log-probabilities of given tokens, from hidden states, without ever holding [B, T, V].

    log p(y_t | y_<t) = z_t[y_t] - logsumexp(z_t),   z_t = h_t W / temperature

The logits z are made for one chunk of positions at a time, forwards, and made again for that chunk backwards. The
gradient of W is summed over the chunks in float32, whatever the hidden states are in.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax import mesh as meshes
from dpo_jax.model.chunks import by_chunks, length_axis, split_over
from dpo_jax.model.products import Rounded, Shaped, product, rounded, saved

Output = jax.Array | Shaped
"""An output matrix [D, V], as `Llama.unembedding` gives it."""


@struct.dataclass
class TokenScores:
    """What `token_scores` says of each target token.

    Attributes:
      logps:   float32 [N, R], log-probability in nats.
      correct: bool [N, R], whether no other token has as large a probability: greedy decoding gives the target.
      entropy: float32 [N, R], of the whole distribution, in nats; no gradient flows through it.
    """

    logps: jax.Array
    correct: jax.Array
    entropy: jax.Array


def chunk_length(batch: int, length: int, vocab: int, budget_bytes: int) -> int:
    """Positions in one chunk: as many as `budget_bytes` of float32 logits a device hold, at most half of `length`.

    Of all devices that share the positions together; see `chunks.by_chunks`.

    Half, so that the full array does not exist even where it would fit. `batch` and `vocab` are global sizes; the mesh
    in force says how much of them one device has.
    """
    a_position = 4 * -(-batch // meshes.parts("batch")) * -(-vocab // meshes.parts("vocab"))
    split = split_over(length)
    return split * max(1, min(budget_bytes // a_position, -(-(length // split) // 2)))


def head_of(unembedding: Output, dtype: Any) -> Shaped:
    """The output matrix for products with hidden states of `dtype`, chunk by chunk.

    Its values are gathered over the devices here, once, not once a chunk. A float32 gradient beside bfloat16 values
    stays split as the matrix is: it is twice as large.
    """
    shaped = Shaped.whole(unembedding)
    head = rounded(shaped.matrix, dtype)
    gathered = tuple(None if axis == "embed" else axis for axis in shaped.axes)
    if isinstance(head, Rounded):
        head = Rounded(meshes.constrain(head.values, gathered), meshes.constrain(head.master, shaped.axes))
    else:
        head = meshes.constrain(head, gathered)
    return dataclasses.replace(shaped, matrix=head)


def logits_of(hidden: jax.Array, head: Shaped) -> jax.Array:
    """float32 [..., V] from hidden [..., D] and what `head_of` gives; float32 means float32, on every device."""
    return head.of(saved(product(hidden, head.matrix, jnp.float32, turned=head.tied)))


def _at(z: jax.Array, y: jax.Array) -> jax.Array:
    """z[..., y]. A comparison and a sum, not a gather: it stays local where the vocabulary is split over devices."""
    return jnp.sum(jnp.where(jnp.arange(z.shape[-1]) == y[..., None], z, 0.0), axis=-1)


def _of_text(z: jax.Array, vocabulary: int | None) -> jax.Array:
    """z [..., V] with no probability from `vocabulary` on; finite, as probability times z is summed for the entropy."""
    return z if vocabulary is None else jnp.where(jnp.arange(z.shape[-1]) < vocabulary, z, -1e30)


def _by_logits(
    of: Callable[[jax.Array, jax.Array], Any],
    hidden: jax.Array,
    unembedding: Output,
    targets: jax.Array,
    budget_bytes: int,
    temperature: float | None = None,
) -> Any:
    """What `of` (logits [N, n, V] / temperature, targets [N, n]) gives, chunk by chunk of positions, of all [N, R]."""
    (rows, length), head = targets.shape, head_of(unembedding, hidden.dtype)

    def chunk(h: jax.Array, y: jax.Array) -> Any:
        z = logits_of(h, head)
        z = z if temperature is None else z / temperature
        return of(meshes.constrain(z, ("batch", length_axis(length), "vocab")), y)

    size = chunk_length(rows, length, unembedding.shape[1], budget_bytes)
    return by_chunks(chunk, size, hidden, targets, split=split_over(length))


def token_logps(
    hidden: jax.Array,
    unembedding: Output,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    budget_bytes: int = 256 * 2**20,
) -> jax.Array:
    """Log-probability of each target token.

    Args:
      hidden: [N, R, D], the states that predict the targets.
      unembedding: [D, V]; read in the dtype of `hidden`.
      targets: int32 [N, R].
      temperature: divides the logits; positive.
      vocabulary: ids from here on have no part in the distribution; None: all have.
      budget_bytes: memory a device may spend on one chunk of logits.

    Returns:
      float32 [N, R], in nats.
    """

    def of(z: jax.Array, y: jax.Array) -> jax.Array:
        z = _of_text(z, vocabulary)
        return _at(z, y) - jax.nn.logsumexp(z, axis=-1)

    return _by_logits(of, hidden, unembedding, targets, budget_bytes, temperature)


def token_scores(
    hidden: jax.Array, unembedding: Output, targets: jax.Array, *, budget_bytes: int = 256 * 2**20
) -> TokenScores:
    """Log-probability of each target token, whether it is the greedy choice, and the entropy of the prediction.

    Arguments as for `token_logps`.
    """

    def of(z: jax.Array, y: jax.Array) -> TokenScores:
        at_target, log_sum = _at(z, y), jax.nn.logsumexp(z, axis=-1)
        fixed, log_total = jax.lax.stop_gradient((z, log_sum))
        others = jnp.where(jnp.arange(fixed.shape[-1]) == y[..., None], -jnp.inf, fixed)
        surprise = log_total[..., None] - fixed
        return TokenScores(
            logps=at_target - log_sum,
            correct=jnp.max(others, axis=-1) < at_target,
            entropy=jnp.sum(jnp.exp(-surprise) * surprise, axis=-1),
        )

    return _by_logits(of, hidden, unembedding, targets, budget_bytes)


def token_logps_and_entropy(
    hidden: jax.Array,
    unembedding: Output,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    budget_bytes: int = 256 * 2**20,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target token and entropy of its prediction, float32 [N, R] each, in nats.

    Gradients flow through both. Arguments as for `token_logps`.
    """

    def of(z: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = _of_text(z, vocabulary)
        log_sum = jax.nn.logsumexp(z, axis=-1)
        probabilities = jnp.exp(z - log_sum[..., None])
        return _at(z, y) - log_sum, log_sum - jnp.sum(probabilities * z, axis=-1)

    return _by_logits(of, hidden, unembedding, targets, budget_bytes, temperature)


def token_logps_and_collisions(
    hidden: jax.Array, unembedding: Output, targets: jax.Array, *, budget_bytes: int = 256 * 2**20
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target token, and log Σ_v p_v² of its prediction, float32 [N, R] each.

    The latter is the logarithm of the probability that two draws are the same token, at most 0; no gradient flows
    through it. Arguments as for `token_logps`.
    """

    def of(z: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        logps = _at(z, y) - jax.nn.logsumexp(z, axis=-1)
        fixed = jax.lax.stop_gradient(z)
        return logps, jax.nn.logsumexp(2 * fixed, axis=-1) - 2 * jax.nn.logsumexp(fixed, axis=-1)

    return _by_logits(of, hidden, unembedding, targets, budget_bytes)
