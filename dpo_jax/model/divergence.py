"""How far two models' distributions of each next token are apart, without ever holding [B, T, V] of either.

The logits of both are made for one chunk of positions at a time, forwards, and made again for that chunk backwards
(`logprobs.py` does so for one model).
"""

from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import mesh as meshes
from dpo_jax.model.chunks import by_chunks, length_axis, split_over
from dpo_jax.model.logprobs import Output, chunk_length, head_of, logits_of


def generalised_js(student: jax.Array, teacher: jax.Array, beta: float) -> jax.Array:
    """D_β(P, Q) of log-probabilities [..., V], in nats, [...]: see `align/distill.py`.

    P is the teacher, Q the student; β 0 is KL(P ‖ Q), β 1 is KL(Q ‖ P). At log-probabilities of -inf, of both, it is
    finite.
    """

    def kl(p: jax.Array, q: jax.Array) -> jax.Array:
        there = p > -jnp.inf
        gap = jnp.where(there, p, 0.0) - jnp.where(there, q, 0.0)
        return jnp.sum(jnp.exp(p) * gap, axis=-1)

    if beta == 0:
        return kl(teacher, student)
    if beta == 1:
        return kl(student, teacher)
    mixture = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def token_divergence(
    student: tuple[jax.Array, Output],
    teacher: tuple[jax.Array, Output],
    *,
    beta: float,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    budget_bytes: int = 256 * 2**20,
) -> jax.Array:
    """D_β of the two predictions at each position.

    Args:
      student, teacher: hidden states [N, R, D] and output matrix [D, V]; D may differ, and V beyond `vocabulary`.
      beta: see `generalised_js`.
      temperature: divides the logits of both; positive.
      vocabulary: ids from here on have no part in the distributions; None: all have, and both V are the same.
      budget_bytes: memory a device may spend on one chunk of logits, of each of the two.

    Returns:
      float32 [N, R], in nats.
    """
    (hidden, unembedding), (other, others) = student, teacher
    rows, length = hidden.shape[:2]
    size = min(unembedding.shape[1], others.shape[1]) if vocabulary is None else vocabulary

    def logps(h: jax.Array, head: Any) -> jax.Array:
        z = logits_of(h, head) / temperature
        z = meshes.constrain(z, ("batch", length_axis(length), "vocab"))
        return jax.nn.log_softmax(z[..., :size], axis=-1)

    def chunk(h: jax.Array, g: jax.Array) -> jax.Array:
        return generalised_js(logps(h, heads[0]), logps(g, heads[1]), beta)

    heads = head_of(unembedding, hidden.dtype), head_of(others, other.dtype)
    most = max(unembedding.shape[1], others.shape[1])
    positions = chunk_length(rows, length, most, budget_bytes)
    return by_chunks(chunk, positions, hidden, other, split=split_over(length))
