"""What PPO reports of an update and of a step, from the parts that its losses have for every token."""

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax import masked
from dpo_jax.align.advantages import Targets, deviations, kl_estimate
from dpo_jax.align.figures import figure, mean
from dpo_jax.align.surrogates import ratio_of
from dpo_jax.config import PPOConfig
from dpo_jax.types import Rollout

_QUANTILES = (0.05, 0.5, 0.95)
_SAMPLED_QUANTILES = (0.5, 0.95, 0.99)
_LOGP, _RATIO = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"


@struct.dataclass
class TokenParts:
    """What one update computes for each token, [B, R], 0 outside the mask."""

    policy: jax.Array
    value: jax.Array
    entropy: jax.Array
    log_ratio: jax.Array
    clipped_low: jax.Array
    clipped_high: jax.Array
    value_clipped: jax.Array
    difference: jax.Array
    weight: jax.Array


@struct.dataclass
class Sampled:
    """Of the tokens of some updates, [U, B, R]: d_t, the weight, and whether it is there."""

    difference: jax.Array
    weight: jax.Array
    mask: jax.Array


@struct.dataclass
class UpdateFigures:
    """Figures of one update; scalars."""

    loss: jax.Array
    policy: jax.Array
    value: jax.Array
    entropy: jax.Array
    kl: jax.Array
    clipped_low: jax.Array
    clipped_high: jax.Array
    value_clipped: jax.Array
    ratio: jax.Array
    ratio_var: jax.Array
    tokens: jax.Array
    ratio_quantiles: jax.Array
    kl_quantiles: jax.Array
    sampled: Sampled
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
        clipped_low=masked.mean(tokens.clipped_low, mask),
        clipped_high=masked.mean(tokens.clipped_high, mask),
        value_clipped=masked.mean(tokens.value_clipped, mask),
        ratio=masked.mean(ratio, mask),
        ratio_var=masked.var(ratio, mask),
        tokens=jnp.sum(mask),
        ratio_quantiles=_quantiles(ratio, mask),
        kl_quantiles=_quantiles(half_square, mask),
        sampled=Sampled(tokens.difference, tokens.weight, mask),
        grad_norm=grad_norm,
        learned=learned,
    )


def _told_kl(rollout: Rollout, mask: jax.Array, config: PPOConfig) -> jax.Array:
    """[B, R]: the estimate that is a term of the loss (of k3_corrected k3), as TRL logs it; else k1."""
    logps, reference = masked.select(rollout.logps, mask), masked.select(rollout.reference_logps, mask)
    choice = config.kl_choice if config.kl_in_loss else "k1"
    return kl_estimate(logps, reference, "k3" if choice == "k3_corrected" else choice)


def nonfinite(rollout: Rollout, mask: jax.Array) -> jax.Array:
    """bool [B]: whether something that was measured of a real row is a NaN or infinity."""
    good = jnp.isfinite(rollout.scores)
    if rollout.greedy_scores is not None:
        good &= jnp.isfinite(rollout.greedy_scores)
    measured = (rollout.sampler_logps, rollout.old_logps, rollout.reference_logps, rollout.values, rollout.step_scores)
    for x in measured:
        if x is None:
            continue
        good &= jnp.all(jnp.isfinite(masked.select(x, mask)), axis=1)
    return (rollout.weights > 0) & ~good


def sampler_figures(tokens: Sampled, config: PPOConfig) -> dict[str, jax.Array]:
    """Under TRL's names: |d_t| (mean, max, quantiles), and of a correction its weights and how many the cap acts on.

    Weights of a sequence are counted once for each of its tokens.
    """
    mask, apart = tokens.mask, jnp.abs(tokens.difference)
    count = jnp.sum(mask)
    found = mean(f"{_LOGP}/mean", apart, mask) | figure(f"{_LOGP}/max", jnp.max(masked.select(apart, mask)), count)
    quantiles = jnp.nanquantile(jnp.where(mask, apart, jnp.nan), jnp.asarray(_SAMPLED_QUANTILES))
    for q, value in zip(_SAMPLED_QUANTILES, quantiles, strict=True):
        found |= figure(f"{_LOGP}/q{round(100 * q)}", value, count)
    correction = config.settled.sampler_correction
    if correction != "none":
        weight = tokens.weight
        cut = weight >= config.settled.sampler_cap if correction.endswith("truncate") else weight == 0
        found |= mean(f"{_RATIO}/mean", weight, mask) | mean(f"{_RATIO}/cut", cut, mask)
        found |= figure(f"{_RATIO}/min", jnp.min(jnp.where(mask, weight, jnp.inf)), count)
        found |= figure(f"{_RATIO}/max", jnp.max(jnp.where(mask, weight, -jnp.inf)), count)
    return found


def _prompt_tokens(rollout: Rollout, config: PPOConfig) -> jax.Array:
    """Of real prompts, each once for its responses."""
    group = rollout.groups(config.group)
    return masked.total(group.prompt_lengths.astype(jnp.float32), group.weights > 0)


def metrics(rollout: Rollout, targets: Targets, updates: UpdateFigures, config: PPOConfig) -> dict[str, jax.Array]:
    real, mask = rollout.weights > 0, targets.mask
    first = jax.tree.map(lambda x: x[: config.minibatches], updates.sampled)  # each response is there once
    some = updates.tokens > 0  # where all is left out, an update has nothing to report

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
        "val/num_eos_tokens": jnp.sum((rollout.ended & real).astype(jnp.float32)),
        "policy/updates": made,
        "lengths/response": masked.mean(jnp.sum(targets.mask.astype(jnp.float32), axis=1), real),
        "tokens": masked.total(rollout.response_lengths.astype(jnp.float32), real) + _prompt_tokens(rollout, config),
        "rows/nonfinite": jnp.where(nonfinite(rollout, mask), rollout.rows, -1),
    }
    found |= sampler_figures(first, config)
    several = updates.tokens > 1
    found |= figure("val/ratio_var", masked.mean(updates.ratio_var, several), jnp.sum(several))
    clipped = updates.clipped_low + updates.clipped_high
    means = {
        "policy/approxkl_avg": updates.kl,
        "policy/clipfrac_avg": clipped,
        "policy/entropy_avg": updates.entropy,
        "loss/policy_avg": updates.policy,
        "val/ratio": updates.ratio,
    }
    if config.critic is None:
        found |= {
            "reward": found["objective/scores"],
            "frac_reward_zero_std": masked.mean(targets.flat.astype(jnp.float32), real),
            "kl": masked.mean(_told_kl(rollout, mask, config), mask),
            "completions/mean_length": found["lengths/response"],
            "completions/clipped_ratio": masked.mean(1 - rollout.ended.astype(jnp.float32), real),
            "rollout/learned": masked.mean(jnp.any(targets.learned, axis=1).astype(jnp.float32), real),
        }
        if config.group > 1:
            found["reward_std"] = masked.mean(deviations(rollout.scores.astype(jnp.float32), config.group), real)
        means |= {
            "entropy": updates.entropy,
            "clip_ratio/low_mean": updates.clipped_low,
            "clip_ratio/high_mean": updates.clipped_high,
            "clip_ratio/region_mean": clipped,
        }
    if targets.returns is not None:
        means |= {"loss/value_avg": updates.value, "val/clipfrac_avg": updates.value_clipped}
    for name, of_updates in means.items():
        found |= mean(name, of_updates, some)
    for i, q in enumerate(_QUANTILES):
        found |= figure(f"policy/ratio_q{round(100 * q):02d}", last.ratio_quantiles[i], last.tokens)
        found |= figure(f"policy/approxkl_q{round(100 * q):02d}", last.kl_quantiles[i], last.tokens)
    return found
