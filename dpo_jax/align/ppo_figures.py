"""What PPO reports of an update and of a step, from the parts that its losses have for every token."""

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax import masked
from dpo_jax.align.advantages import Targets, ratio_of
from dpo_jax.align.figures import figure
from dpo_jax.types import Rollout

_QUANTILES = (0.05, 0.5, 0.95)


@struct.dataclass
class TokenParts:
    """What one update computes for each token, [B, R], 0 outside the mask."""

    policy: jax.Array
    value: jax.Array
    entropy: jax.Array
    log_ratio: jax.Array
    policy_clipped: jax.Array
    value_clipped: jax.Array


@struct.dataclass
class UpdateFigures:
    """Figures of one update; scalars."""

    loss: jax.Array
    policy: jax.Array
    value: jax.Array
    entropy: jax.Array
    kl: jax.Array
    policy_clipped: jax.Array
    value_clipped: jax.Array
    ratio: jax.Array
    ratio_var: jax.Array
    tokens: jax.Array
    ratio_quantiles: jax.Array
    kl_quantiles: jax.Array
    largest_difference: jax.Array
    grad_norm: jax.Array
    learned: jax.Array


def _quantiles(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.nanquantile(jnp.where(mask, x, jnp.nan), jnp.asarray(_QUANTILES))


def figures(
    tokens: TokenParts, mask: jax.Array, loss: jax.Array, grad_norm: jax.Array, learned: jax.Array
) -> UpdateFigures:
    ratio = ratio_of(tokens.log_ratio)
    half_square = 0.5 * jnp.square(tokens.log_ratio)
    return UpdateFigures(
        loss=loss,
        policy=masked.mean(tokens.policy, mask),
        value=masked.mean(tokens.value, mask),
        entropy=masked.mean(tokens.entropy, mask),
        kl=masked.mean(half_square, mask),
        policy_clipped=masked.mean(tokens.policy_clipped, mask),
        value_clipped=masked.mean(tokens.value_clipped, mask),
        ratio=masked.mean(ratio, mask),
        ratio_var=masked.var(ratio, mask),
        tokens=jnp.sum(mask),
        ratio_quantiles=_quantiles(ratio, mask),
        kl_quantiles=_quantiles(half_square, mask),
        largest_difference=jnp.max(jnp.abs(tokens.log_ratio)),
        grad_norm=grad_norm,
        learned=learned,
    )


def nonfinite(rollout: Rollout, mask: jax.Array) -> jax.Array:
    """bool [B]: whether something that was measured of a real row is a NaN or infinity."""
    good = jnp.isfinite(rollout.scores)
    for x in (rollout.logps, rollout.reference_logps, *(() if rollout.values is None else (rollout.values,))):
        good &= jnp.all(jnp.isfinite(masked.select(x, mask)), axis=1)
    return (rollout.weights > 0) & ~good


def metrics(rollout: Rollout, targets: Targets, updates: UpdateFigures) -> dict[str, jax.Array]:
    real, mask = rollout.weights > 0, targets.mask

    def a_response(x: jax.Array) -> jax.Array:
        """Mean over responses of the sum over tokens."""
        return masked.total(x, mask) / jnp.sum(rollout.weights)

    mean_kl = a_response(targets.kl)
    reward = a_response(targets.rewards)
    score = masked.mean(targets.scores, real)
    made = jnp.mean(updates.learned.astype(jnp.float32))
    last = jax.tree.map(lambda x: x[-1], updates)
    found = {
        "loss": jnp.mean(updates.loss),
        "grad_norm": jnp.mean(updates.grad_norm),
        "kl_coefficient": rollout.kl_coefficient[0],
        "objective/kl": mean_kl,
        "objective/entropy": -a_response(rollout.logps),
        "objective/non_score_reward": reward - score,
        "objective/rlhf_reward": reward,
        "objective/scores": masked.mean(rollout.scores.astype(jnp.float32), real),
        "policy/approxkl_avg": jnp.mean(updates.kl),
        "policy/clipfrac_avg": jnp.mean(updates.policy_clipped),
        "policy/entropy_avg": jnp.mean(updates.entropy),
        "loss/policy_avg": jnp.mean(updates.policy),
        "val/ratio": jnp.mean(updates.ratio),
        "val/num_eos_tokens": jnp.sum((rollout.ended & real).astype(jnp.float32)),
        "policy/sampler_difference": updates.largest_difference[0],
        "policy/updates": made,
        "lengths/response": masked.mean(rollout.response_lengths.astype(jnp.float32), real),
        "tokens": masked.total((rollout.prompt_lengths + rollout.response_lengths).astype(jnp.float32), real),
        "rows/nonfinite": jnp.where(nonfinite(rollout, mask), rollout.rows, -1),
    }
    several = updates.tokens > 1
    found |= figure("val/ratio_var", masked.mean(updates.ratio_var, several), jnp.sum(several))
    if targets.returns is not None:
        found |= {"loss/value_avg": jnp.mean(updates.value), "val/clipfrac_avg": jnp.mean(updates.value_clipped)}
    for i, q in enumerate(_QUANTILES):
        found[f"policy/ratio_q{round(100 * q):02d}"] = last.ratio_quantiles[i]
        found[f"policy/approxkl_q{round(100 * q):02d}"] = last.kl_quantiles[i]
    return found
