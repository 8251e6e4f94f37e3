"""Log-probabilities from a sample of the vocabulary, for heads too large to be computed whole in every step.

    log p(y | h) = z_y − log Z,   Z = Σ_v exp z_v,   z = h W

Z is estimated by importance sampling (Bengio & Senécal 2008, "Adaptive importance sampling to accelerate training of a
neural probabilistic language model"; Jean et al. 2015, arXiv 1412.2007, Eq. 6-8): with s_1 ... s_k drawn from Q,

    Ẑ = exp z_y + Σ_{j: s_j ≠ y} exp(z_{s_j} − log(k Q(s_j)))

The target stands in Ẑ with certainty, so draws that hit it are left out; each other id v is drawn k Q(v) times on
average, which the log-Q correction divides by. Hence E Ẑ = Z, and loss and gradient approach the exact ones as k grows;
log Ẑ of a finite sample is too small on average, by about var(Ẑ) / 2 Z². A sample of every id once, expected once
(correction 0), gives Ẑ = Z.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax import mesh as meshes
from dpo_jax.config import Proposal
from dpo_jax.model.chunks import by_chunks, length_axis, split_over
from dpo_jax.model.logprobs import Output, chunk_length, logits_of
from dpo_jax.model.products import Shaped, read, rounded, take


@struct.dataclass
class Negatives:
    """Drawn ids.

    Attributes:
      ids:          int32 [k], with repetitions.
      log_expected: float32 [k], log of how often each is drawn on average: log(k Q(id)).
    """

    ids: jax.Array
    log_expected: jax.Array


def draw(key: jax.Array, vocab: int, k: int, proposal: Proposal) -> Negatives:
    """k ids of a vocabulary, independent of one another, from Q.

    uniform:      Q(v) = 1 / V.
    log_uniform:  Q(v) = log((v + 2) / (v + 1)) / log(V + 1): Zipf's law for ids in order of falling frequency.
    """
    if proposal == "uniform":
        ids = jax.random.randint(key, (k,), 0, vocab)
        return Negatives(ids=ids, log_expected=jnp.full((k,), math.log(k / vocab)))
    span = math.log(vocab + 1)
    # P(floor(exp(u span)) - 1 = v) = (log(v + 2) - log(v + 1)) / span, for u uniform in [0, 1)
    ids = jnp.exp(jax.random.uniform(key, (k,)) * span).astype(jnp.int32) - 1
    ids = jnp.clip(ids, 0, vocab - 1)  # where exp rounded up to V + 1
    return Negatives(ids=ids, log_expected=jnp.log(jnp.log1p(1 / (ids + 1)) * (k / span)))


def sampled_logps(
    hidden: jax.Array, unembedding: Output, targets: jax.Array, negatives: Negatives, *, budget_bytes: int
) -> jax.Array:
    """Estimated log-probability of each target token, z_y - log Ẑ.

    Args:
      hidden: [N, R, D], the states that predict the targets.
      unembedding: [D, V]; read in the dtype of `hidden`.
      targets: int32 [N, R].
      negatives: the same for all positions.
      budget_bytes: memory a device may spend on one chunk of logits.

    Returns:
      float32 [N, R], in nats.
    """
    # Gathered once, not once a chunk: the gradient of a gather is as large as the head.
    shaped = Shaped.whole(unembedding)
    head = jax.tree.map(lambda x: meshes.for_lookup(x, shaped.axes), rounded(shaped.matrix, hidden.dtype))
    drawn = take(head, negatives.ids, axis=shaped.axes.index("vocab"))
    sample = dataclasses.replace(shaped, matrix=jax.tree.map(lambda x: meshes.constrain(x, (None, None)), drawn))
    by_token = head if shaped.tied else jax.tree.map(jnp.transpose, head)
    own = read(take(by_token, meshes.constrain_in_copy(targets, ("copies", None)), axis=0))
    own = meshes.constrain_in_copy(own, ("copies", None, "embed"))
    own = meshes.constrain(own, ("batch", length_axis(targets.shape[1]), None))
    z_target = shaped.of(jnp.sum(hidden.astype(jnp.float32) * own.astype(jnp.float32), axis=-1))

    def chunk(h: jax.Array, y: jax.Array, z_y: jax.Array) -> jax.Array:
        z = logits_of(h, sample) - negatives.log_expected
        # Not minus infinity: where every draw hits the target, its gradient would be NaN.
        z = jnp.where(negatives.ids == y[..., None], jnp.finfo(jnp.float32).min, z)
        return z_y - jnp.logaddexp(z_y, jax.nn.logsumexp(z, axis=-1))

    size = chunk_length(targets.shape[0], targets.shape[1], len(negatives.ids), budget_bytes)
    return by_chunks(chunk, size, hidden, targets, z_target, split=split_over(targets.shape[1]))
