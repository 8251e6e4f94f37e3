"""Several rewards as one. Two: Llama 2's helpfulness and safety before PPO (Touvron et al. 2023, section 3.2.3).

    R_c(g | p) = R_s(g | p)   if p is tagged as a safety prompt, or R_s(g | p) < 0.15
                 R_h(g | p)   otherwise
    R̃_c(g | p) = whiten(logit(R_c(g | p)))
    R(g | p)   = R̃_c(g | p) − β D_KL(π_θ(g | p) ‖ π_0(g | p))

R_h and R_s are σ of the two models' scores. logit σ(r) = r, so `whitened` works on the scores themselves: nothing is
lost where σ is near 0 or 1. The KL term belongs to `align/ppo.py`.

Several rewards r_1, ... r_F with weights w, as TRL's GRPOTrainer sums them; those that say nothing of a response are
left out of its sum:

    R = Σ_f w_f r_f                                          `weighted_sum`
    R = Σ_f w_f (r_f − mean r_f) / (std r_f + 10⁻⁴)          `standardised` first, over the responses to
                                                             the same prompt: GDPO (Liu et al. 2026, arXiv 2601.05242)
"""

import math

import jax
import jax.numpy as jnp

from dpo_jax import masked

SAFETY_THRESHOLD = 0.15
"""Below it the safety reward decides. On Meta's test set: precision .89 and recall .55 of unsafe responses."""


def logit(p: jax.Array | float) -> jax.Array:
    """log(p / (1 − p)), elementwise: .05 -> -2.9444389792, .15 -> -1.7346010554, .9 -> 2.1972245773."""
    p = jnp.asarray(p, jnp.float32)
    return jnp.log(p) - jnp.log1p(-p)


def combine(
    helpful: jax.Array, safe: jax.Array, is_safety_prompt: jax.Array, *, threshold: float = SAFETY_THRESHOLD
) -> jax.Array:
    """R_c: the safety reward where the prompt is tagged or the response looks unsafe, else the helpfulness reward.

    Args:
      helpful, safe: [B], in (0, 1): σ of the scores.
      is_safety_prompt: bool [B].
      threshold: below it `safe` decides on any prompt.

    Returns:
      [B], in (0, 1).
    """
    return jnp.where(is_safety_prompt | (safe < threshold), safe, helpful)


def combined(
    helpful: jax.Array, safe: jax.Array, is_safety_prompt: jax.Array, *, threshold: float = SAFETY_THRESHOLD
) -> jax.Array:
    """logit(R_c), from the scores of the two models: what rejection sampling compares responses by.

    Args:
      helpful, safe: [B] scores (any real number, not σ of them).
      is_safety_prompt: bool [B].
      threshold: as for `combine`, of σ(safe).

    Returns:
      float32 [B].
    """
    level = math.log(threshold) - math.log1p(-threshold)
    # A safety score that is no number decides too: it must not hide behind the other.
    return jnp.where(is_safety_prompt | ~(safe >= level), safe, helpful).astype(jnp.float32)


def whitened(
    helpful: jax.Array,
    safe: jax.Array,
    is_safety_prompt: jax.Array,
    mask: jax.Array,
    *,
    threshold: float = SAFETY_THRESHOLD,
) -> jax.Array:
    """R̃_c = whiten(logit(R_c)) over the batch, from the scores of the two models.

    Args:
      helpful, safe, is_safety_prompt, threshold: as for `combined`.
      mask: bool [B], the responses to whiten over.

    Returns:
      float32 [B], of mean 0 and unbiased variance 1 over the mask.
    """
    return masked.whiten(combined(helpful, safe, is_safety_prompt, threshold=threshold), mask)


def standardised(scores: jax.Array, said: jax.Array, group: int) -> jax.Array:
    """Each reward less its mean, divided by its unbiased deviation plus 10⁻⁴, over the responses to a prompt.

    Args:
      scores: [F, B] of F rewards; rows i K .. i K + K − 1 answer one prompt, K = `group`.
      said: bool [F, B], where a reward has a score; the others are in no mean and give 0. One alone gives 0.
      group: K.

    Returns:
      float32 [F, B].
    """
    differences, spread = _spread(scores, said, group)
    return (differences / spread).reshape(scores.shape)


def scales(scores: jax.Array, said: jax.Array, group: int) -> jax.Array:
    """What `standardised` multiplies differences of scores by, 1 / (deviation + 10⁻⁴); its arguments, and its shape."""
    differences, spread = _spread(scores, said, group)
    return jnp.broadcast_to(1 / spread, differences.shape).reshape(scores.shape)


def _spread(scores: jax.Array, said: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    """Differences from the mean of their prompt, [F, prompts, K], 0 where nothing was said; their deviation + 10⁻⁴."""
    r = jnp.where(said, scores, 0.0).astype(jnp.float32).reshape(len(scores), -1, group)
    real = said.reshape(r.shape)
    highest = jnp.max(jnp.where(real, r, -jnp.inf), axis=-1, keepdims=True)
    r = jnp.where(real, r - highest, 0.0)  # equal scores differ by exactly 0
    n = jnp.sum(real, axis=-1, keepdims=True)
    d = jnp.where(real, r - jnp.sum(r, axis=-1, keepdims=True) / jnp.maximum(n, 1), 0.0)
    return d, jnp.sqrt(jnp.sum(d * d, axis=-1, keepdims=True) / jnp.maximum(n - 1, 1)) + 1e-4


def weighted_sum(scores: jax.Array, said: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ_f w_f r_f float32 [B] over the rewards that have a score; `scores`, `said` [F, B], `weights` [F]."""
    return jnp.sum(jnp.where(said, scores * weights[:, None], 0.0), axis=0).astype(jnp.float32)
