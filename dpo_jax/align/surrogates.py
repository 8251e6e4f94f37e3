"""What PPO's family makes of a ratio and an advantage, and how it averages over tokens: choices that go with any other.

Of token t of response i, with n_i tokens in a group g of K responses to one prompt, ρ the new policy over the old:

    ratio       token            ρ_it
                sequence         s_i = (Π_t ρ_it)^(1 / n_i)                     GSPO, Eq. 7
                sequence_token   sg(s_i) π_it / sg(π_it)                        GSPO, Eq. 14
    surrogate   clipped          max(−A ρ, −A clip(ρ, 1 − ε_low, 1 + ε_high))   PPO, Eq. 7; two ε: DAPO, Eq. 10
                  dual_clip c    of A < 0 no more than −c A                     Ye et al. 2020 (1912.09729), Eq. 5
                cispo            −sg(clip(ρ, 1 − ε_low, 1 + ε_high)) A log π    MiniMax-M1, Eqs. 4 and 5
                reinforce        −A log π
    averaging   token            Σ_it ℓ_it / Σ_i n_i                            over the mini-batch
                sequence         mean_i Σ_t ℓ_it / n_i                          GRPO, Eq. 3
                group            mean_g Σ_{i in g, t} ℓ_it / Σ_{i in g} n_i     DAPO, Eq. 8
                sum              mean_i Σ_t ℓ_it                                the gradient of E[score] itself
                constant         mean_i Σ_t ℓ_it / L                            Dr. GRPO, section 3.2

PPO: Schulman et al. 2017 (1707.06347). GRPO: Shao et al. 2024 (2402.03300). DAPO: Yu et al. 2025 (2503.14476). GSPO:
Zheng et al. 2025 (2507.18071). Dr. GRPO: Liu et al. 2025 (2503.20783). MiniMax-M1: 2025 (2506.13585).

sg stops the gradient.

Where what drew a response is not quite the policy that learns from it. The sampler μ reads weights and caches in fewer
bits (`--sample.weights`, `--sample.cache`), or rounds otherwise; π_old is the policy before the first update, as the
update computes it. With the log-ratio d_t = log π_old − log μ of a token and a cap C, what a token adds to the loss is
multiplied by

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
from dpo_jax.config.training.ppo import SamplerCorrection

_LARGEST = 30.0
"""A log-ratio up to which e^x is taken as it is: there products of two, and sums of squares, are finite."""


def ratio_of(log_ratio: jax.Array) -> jax.Array:
    """e^x of log-ratios x, continued by its tangent beyond x = 30, where float32 would soon overflow (at 88.7).

    So what is clipped has a gradient of 0, and not the NaN of 0 · ∞, and a token that is too far off still has a
    finite pull back.
    """
    near = jnp.minimum(log_ratio, _LARGEST)
    return jnp.exp(near) * (1 + (log_ratio - near))


@struct.dataclass
class Rule:
    """The choices above. `low`, `high`: ε_low, ε_high; `dual`: c, or None."""

    ratio: Literal["token", "sequence", "sequence_token"] = struct.field(pytree_node=False, default="token")
    surrogate: Literal["clipped", "cispo", "reinforce"] = struct.field(pytree_node=False, default="clipped")
    low: float = struct.field(pytree_node=False, default=0.2)
    high: float = struct.field(pytree_node=False, default=0.2)
    dual: float | None = struct.field(pytree_node=False, default=None)


def log_ratios(
    logps: jax.Array,
    old_logps: jax.Array,
    mask: jax.Array,
    kind: Literal["token", "sequence", "sequence_token"] = "token",
) -> jax.Array:
    """The logarithm of the ratio of each token, [B, R]: `kind` as at the top of this file.

    Args:
      logps, old_logps: [B, R] log-probabilities of the policy that learns and of the old one, finite.
      mask: bool or 0/1 [B, R]; a row without tokens gives 0.
      kind: whose ratio.
    """
    log_ratio = masked.select(logps - old_logps, mask)
    if kind == "token":
        return log_ratio
    tokens = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    of_row = jnp.broadcast_to(jnp.sum(log_ratio, axis=1, keepdims=True) / tokens, log_ratio.shape)
    if kind == "sequence_token":
        of_row = jax.lax.stop_gradient(of_row - logps) + logps
    return masked.select(of_row, mask)


def policy_terms(logps: jax.Array, log_ratio: jax.Array, advantages: jax.Array, rule: Rule) -> jax.Array:
    """The loss of each token, [B, R], by `rule.surrogate`; `log_ratio` from `log_ratios`."""
    if rule.surrogate == "reinforce":
        return -advantages * logps
    ratio = ratio_of(log_ratio)
    near = jnp.clip(ratio, 1 - rule.low, 1 + rule.high)
    if rule.surrogate == "cispo":
        return -jax.lax.stop_gradient(near) * advantages * logps
    terms = jnp.maximum(-advantages * ratio, -advantages * near)
    return terms if rule.dual is None else jnp.where(advantages < 0, jnp.minimum(terms, -advantages * rule.dual), terms)


def beyond(log_ratio: jax.Array, advantages: jax.Array, rule: Rule) -> tuple[jax.Array, jax.Array]:
    """Which tokens the clipping acts on, bool [B, R]: those of a ratio too low, and too high.

    For `clipped` where the gradient stops (a bad token that got less likely, a good one that got more likely); for
    `cispo` where the weight is the bound's; for `reinforce` none.
    """
    ratio = ratio_of(log_ratio)
    low, high = ratio < 1 - rule.low, ratio > 1 + rule.high
    if rule.surrogate == "reinforce":
        return jnp.zeros_like(low), jnp.zeros_like(high)
    return (low, high) if rule.surrogate == "cispo" else (low & (advantages < 0), high & (advantages > 0))


def row_weights(
    averaging: Literal["token", "sequence", "group", "sum", "constant"],
    tokens: jax.Array,
    group_tokens: jax.Array,
    group_rows: jax.Array,
    longest: int | None,
) -> jax.Array:
    """[B]: what each token of a row counts in the loss of these rows, as at the top of this file.

    Args:
      averaging: how.
      tokens: float [B], n_i: tokens of each row that are learnt from. Rows without any are in no mean.
      group_tokens: float [B], of the whole group that the row is of, wherever its other rows are.
      group_rows: float [B], how many rows of that group have tokens. A group of which a mini-batch holds a part counts
        by that part.
      longest: L, for "constant".
    """
    held = tokens > 0
    rows = jnp.maximum(jnp.sum(held.astype(jnp.float32)), 1.0)
    match averaging:
        case "token":
            weights = jnp.full(tokens.shape, 1 / jnp.maximum(jnp.sum(tokens), 1.0))
        case "sequence":
            weights = 1 / (jnp.maximum(tokens, 1.0) * rows)
        case "group":
            groups = jnp.sum(jnp.where(held, 1 / jnp.maximum(group_rows, 1.0), 0.0))
            weights = 1 / (jnp.maximum(group_tokens, 1.0) * jnp.where(groups > 0, groups, 1.0))
        case "sum":
            weights = jnp.full(tokens.shape, 1 / rows)
        case "constant":
            assert longest is not None
            weights = jnp.full(tokens.shape, 1 / (rows * longest))
    return jnp.where(held, weights, 0.0)


def importance_weights(difference: jax.Array, mask: jax.Array, correction: SamplerCorrection, cap: float) -> jax.Array:
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
