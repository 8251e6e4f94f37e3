"""Where what drew a response is not quite the policy that learns from it: how far apart they are, and weights for it.

The sampler μ reads weights and caches in fewer bits (`--sample.weights`, `--sample.cache`), or rounds otherwise; π_old
is the policy before the first update, as the update computes it. With the log-ratio d_t = log π_old − log μ of a token
and a cap C, what a token adds to the loss is multiplied by

    token_truncate      min(e^d_t, C)                          truncated importance sampling, TIS
    token_mask          e^d_t where it is at most C, else 0    masked importance sampling, MIS
    sequence_truncate   min(e^(Σ_t d_t), C)
    sequence_mask       e^(Σ_t d_t) where it is at most C, else 0

TIS: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; MIS: Liu et al. 2025,
"When speed kills stability". Without the cap, e^(Σ_t d_t) makes the gradient of what μ drew that of what π_old would
have drawn; the token's own weight takes the prefixes as they came. In TRL (1.16) these are
`vllm_importance_sampling_mode` and `_clip_max`; it weights the policy's term alone. Here the KL divergence and the
entropy of a drawn token are weighted too: they are expectations over the same draws. The value loss is not.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax import masked
from dpo_jax.align.figures import figure, mean
from dpo_jax.align.surrogates import ratio_of
from dpo_jax.config import PPOConfig

Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
_QUANTILES = (0.5, 0.95, 0.99)
_LOGP, _RATIO = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"


def importance_weights(difference: jax.Array, mask: jax.Array, correction: Correction, cap: float) -> jax.Array:
    """What each token counts, [B, R]; 1 without a correction. No gradient goes into it.

    Args:
      difference: [B, R], d_t, 0 outside the mask.
      mask: bool or 0/1 [B, R].
      correction: as at the top of this file.
      cap: C, positive.
    """
    if correction == "none":
        return jnp.ones_like(difference)
    log_ratio = jax.lax.stop_gradient(masked.select(difference, mask))
    if correction.startswith("sequence"):
        log_ratio = jnp.broadcast_to(jnp.sum(log_ratio, axis=1, keepdims=True), log_ratio.shape)
    ratio = ratio_of(log_ratio)
    return jnp.minimum(ratio, cap) if correction.endswith("truncate") else jnp.where(ratio > cap, 0.0, ratio)


@struct.dataclass
class Sampled:
    """Of the tokens of some updates, [U, B, R]: d_t, the weight, and whether it is there."""

    difference: jax.Array
    weight: jax.Array
    mask: jax.Array


def sampler_figures(tokens: Sampled, config: PPOConfig) -> dict[str, jax.Array]:
    """Under TRL's names: |d_t| (mean, max, quantiles), and of a correction its weights and how many the cap acts on.

    Weights of a sequence are counted once for each of its tokens.
    """
    mask, apart = tokens.mask, jnp.abs(tokens.difference)
    count = jnp.sum(mask)
    found = mean(f"{_LOGP}/mean", apart, mask) | figure(f"{_LOGP}/max", jnp.max(masked.select(apart, mask)), count)
    quantiles = jnp.nanquantile(jnp.where(mask, apart, jnp.nan), jnp.asarray(_QUANTILES))
    for q, value in zip(_QUANTILES, quantiles, strict=True):
        found |= figure(f"{_LOGP}/q{round(100 * q)}", value, count)
    correction = config.resolved("sampler_correction")
    if correction != "none":
        weight = tokens.weight
        cut = weight >= config.resolved("sampler_cap") if correction.endswith("truncate") else weight == 0
        found |= mean(f"{_RATIO}/mean", weight, mask) | mean(f"{_RATIO}/cut", cut, mask)
        found |= figure(f"{_RATIO}/min", jnp.min(jnp.where(mask, weight, jnp.inf)), count)
        found |= figure(f"{_RATIO}/max", jnp.max(jnp.where(mask, weight, -jnp.inf)), count)
    return found
