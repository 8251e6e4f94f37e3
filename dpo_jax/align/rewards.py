"""Two rewards as one: how Llama 2 combines helpfulness and safety before PPO (Touvron et al. 2023, section 3.2.3).

    R_c(g | p) = R_s(g | p)   if p is tagged as a safety prompt, or R_s(g | p) < 0.15
                 R_h(g | p)   otherwise
    R̃_c(g | p) = whiten(logit(R_c(g | p)))
    R(g | p)   = R̃_c(g | p) − β D_KL(π_θ(g | p) ‖ π_0(g | p))

R_h and R_s are σ of the two models' scores. logit σ(r) = r, so `whitened` works on the scores themselves: nothing is
lost where σ is near 0 or 1. The KL term belongs to `align/ppo.py`.
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
      helpful, safe: [B] scores (any real number, not σ of them).
      is_safety_prompt: bool [B].
      mask: bool [B], the responses to whiten over.
      threshold: as for `combine`, of σ(safe).

    Returns:
      float32 [B], of mean 0 and unbiased variance 1 over the mask.
    """
    return masked.whiten(combined(helpful, safe, is_safety_prompt, threshold=threshold), mask)
