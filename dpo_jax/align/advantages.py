"""From scores to advantages: what PPO and its critic-free relatives learn from a rollout.

Ziegler et al. 2019 (arXiv 1909.08593), section 2: the reward of a token is minus the price of leaving the reference
policy, and the score of the whole response stands on its last token T, the terminator:

    r_t = −β KL_t + s [t = T]

Where steps of the response have scores s_k of their own, each stands on the token with which its step ends, and on the
last one what is left: r_t = −β KL_t + Σ_{k ends at t} s_k + (s − Σ_k s_k) [t = T]. Returns to go and GAE see where.

Kullback-Leibler estimators of one sample (Schulman 2020, "Approximating KL divergence"), with δ_t = log π − log π_ref:

    k1 = δ          unbiased
    k2 = δ² / 2     biased, low variance
    k3 = e^−δ − 1 + δ   unbiased and never negative

Their size is one thing, what training with them optimises is another. In the reward, k1 gives the gradient of the whole
response's KL(π ‖ π_ref); k2 and k3 give the gradient of no divergence, and no pull back to π_ref near it. In the loss,
differentiated at fixed samples, k1 gives 0 in expectation, and

    k2             the gradient of KL(π ‖ π_ref)
    k3             the gradient of KL(π_ref ‖ π)
    k3_corrected   ρ k3, with ρ differentiated too: of KL(π ‖ π_ref) again   DeepSeek-V3.2 (arXiv 2512.02556), 3.1

each of every token's own KL at the prefixes that were visited, not of what a token makes likely later.

Advantages without a value model are a return less a baseline, over a scale, and each is chosen on its own. The return
G_it is that of the whole response, Σ_t r_t, or the one to go, Σ_{l ≥ 0} γ^l r_{t+l}; R_i is always the whole one.

    baseline   none             0
               leave_one_out    mean of R_j over the other samples j ≠ i of the prompt   RLOO
               group_mean       mean of R_j over the samples of the prompt               GRPO
               batch_mean       mean of all G                                            REINFORCE++
               greedy           the score of the greedy response                         ReMax
    scale      none, group (deviation of the R_j of the prompt), batch (of all G)

    GAE    A_t = Σ_l (γ λ)^l (r_{t+l} + γ V_{t+l+1} − V_{t+l})      Schulman et al. 2016 (arXiv 1506.02438), Eq. 16
    RLOO   A = R_i − mean of R_j over the other samples j ≠ i of the prompt   Ahmadian et al. 2024 (arXiv 2402.14740)
    GRPO   A = (s_i − mean s) / std s over the samples of the prompt      Shao et al. 2024 (arXiv 2402.03300), 4.1.2
    REINFORCE++   A_t = (G_t − mean G) / std G over the tokens of the rollout   Hu et al. 2025 (arXiv 2501.03262)
    ReMax  A = R_i − s(greedy)                                            Li et al. 2023 (arXiv 2310.10505)

GRPO's mean holds the sample itself, which scales the gradient of the reward by (K − 1) / K of K samples, and that of a
KL term in the loss not at all; leaving it out (RLOO) does not.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax import masked
from dpo_jax.align.surrogates import ratio_of
from dpo_jax.config import PPOConfig, PPOLossConfig
from dpo_jax.errors import InputError
from dpo_jax.types import Rollout

KLEstimator = Literal["k1", "k2", "k3"]
KLTerm = Literal["k1", "k2", "k3", "k3_corrected"]
_EPSILON = 1e-4  # added to the deviation of GRPO's groups, as TRL's GRPOTrainer does: equal scores give advantages of 0


def kl_estimate(logps: jax.Array, reference_logps: jax.Array, estimator: KLEstimator = "k1") -> jax.Array:
    """The estimate of KL(π ‖ π_ref) of each token, in nats; arrays of one shape. k1 of -0.5 is k3 of 0.1487212707.

    k3 is finite, with a finite gradient, at any finite log-probabilities: see `surrogates.ratio_of`.
    """
    delta = logps - reference_logps
    if estimator == "k1":
        return delta
    if estimator == "k2":
        return jnp.square(delta) / 2
    # expm1 keeps the digits of a small δ, and overflows at a large one.
    near = delta > -1
    return jnp.where(near, jnp.expm1(-jnp.where(near, delta, 0.0)), ratio_of(-delta) - 1) + delta


def kl_term(logps: jax.Array, old_logps: jax.Array, reference_logps: jax.Array, estimator: KLTerm = "k3") -> jax.Array:
    """What each token adds to the loss for its KL divergence (see the top of this file), in nats; arrays of one shape.

    Args:
      logps: log-probabilities of the policy that learns; the gradient flows into them.
      old_logps: of the policy that sampled.
      reference_logps: of the reference policy.
      estimator: k3_corrected is ρ k3 with ρ = π / π_old.
    """
    if estimator == "k3_corrected":
        return ratio_of(logps - old_logps) * kl_estimate(logps, reference_logps, "k3")
    return kl_estimate(logps, reference_logps, estimator)


def token_rewards(scores: jax.Array, kl: jax.Array, mask: jax.Array, *, kl_coefficient: jax.Array | float) -> jax.Array:
    """r_t: −β KL_t at every token, and the score at the last one.

    Args:
      scores: [B], any floating dtype; an integer score is refused, for 0.7 would silently be 0.
      kl: [B, R].
      mask: bool [B, R], True at the response's tokens, the terminator included.
      kl_coefficient: β.

    Returns:
      float32 [B, R], 0 outside the mask.
    """
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"scores are {scores.dtype}; they must be floating")
    mask = mask.astype(bool)
    last = mask & (jnp.cumsum(mask, axis=1) == jnp.sum(mask, axis=1, keepdims=True))
    return masked.select(-kl_coefficient * kl, mask) + jnp.where(last, scores.astype(jnp.float32)[:, None], 0.0)


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation over the valid tokens only.

    Masked positions, wherever they stand, are stepped over: the next valid token's value and running sum reach through
    them. Behind the last valid token the value is 0.

    Args:
      rewards, values: [B, R].
      mask: bool or 0/1 [B, R].
      gamma, lam: γ and λ.

    Returns:
      Advantages and returns (advantages + values), float32 [B, R], 0 outside the mask.
    """
    mask = mask.astype(bool)
    rewards, values = (masked.select(x.astype(jnp.float32), mask) for x in (rewards, values))

    def back(carry: tuple[jax.Array, jax.Array], at: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        following, running = carry
        reward, value, real = at
        total = reward + gamma * following - value + gamma * lam * running
        return (jnp.where(real, value, following), jnp.where(real, total, running)), jnp.where(real, total, 0.0)

    nothing = jnp.zeros_like(rewards[:, 0])
    _, advantages = jax.lax.scan(back, (nothing, nothing), (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T, advantages.T + values


def leave_one_out(totals: jax.Array, group_size: int) -> jax.Array:
    """RLOO's advantage of each response: its reward less the mean of the others' to the same prompt.

    `totals` [B]: the reward of each whole response; rows i K .. i K + K − 1 answer one prompt, K = `group_size` ≥ 2.
    """
    groups = totals.reshape(-1, group_size)
    groups = groups - groups[:, :1]  # equal rewards give exactly 0
    others = (jnp.sum(groups, axis=1, keepdims=True) - groups) / (group_size - 1)
    return (groups - others).reshape(-1)


def deviations(totals: jax.Array, group_size: int) -> jax.Array:
    """[B]: the standard deviation (unbiased) of `totals` over the responses to the same prompt, at each of them."""
    groups = totals.reshape(-1, group_size)
    return jnp.repeat(jnp.std(groups - groups[:, :1], axis=1, ddof=1), group_size)


def _mean_of_group(totals: jax.Array, group_size: int) -> jax.Array:
    """[B]: the mean of `totals` over the responses to the same prompt; of equal ones exactly each of them."""
    groups = totals.reshape(-1, group_size)
    return jnp.repeat(groups[:, 0] + jnp.mean(groups - groups[:, :1], axis=1), group_size)


def critic_free(
    rewards: jax.Array, mask: jax.Array, config: PPOLossConfig, *, greedy: jax.Array | None = None
) -> jax.Array:
    """Advantages [B, R] without a value model, by `config.estimator`, `returns` and `scale`; 0 outside the mask.

    Args:
      rewards: [B, R], of each token.
      mask: bool [B, R].
      config: says how.
      greedy: [B], the score of the greedy response to each prompt, for the baseline of that name.
    """
    totals = masked.total(rewards, mask, axis=1)
    one_each = config.settled.returns == "response"
    if one_each:
        returns = jnp.broadcast_to(totals[:, None], mask.shape)
    else:
        nothing = jnp.zeros_like(rewards)
        returns, _ = gae(rewards, nothing, mask, gamma=config.settled.gamma, lam=1.0)
    # Of whole responses each counts once, however long it is.
    counted = mask & (jnp.cumsum(mask, axis=1) == 1) if one_each else mask
    match config.estimator:
        case "leave_one_out":
            shifted = returns - (totals - leave_one_out(totals, config.group))[:, None]
        case "group_mean":
            shifted = returns - _mean_of_group(totals, config.group)[:, None]
        case "batch_mean":
            some = jnp.max(jnp.where(counted, returns, -jnp.inf))  # equal returns give exactly 0
            shifted = (returns - some) - masked.mean(returns - some, counted)
        case "greedy":
            if greedy is None:
                raise InputError("the rollout has no scores of greedy responses, which --ppo.advantage greedy needs")
            shifted = returns - greedy.astype(jnp.float32)[:, None]
        case _:
            shifted = returns
    if config.settled.scale == "group":
        shifted = shifted / (deviations(totals, config.group)[:, None] + _EPSILON)
    elif config.settled.scale == "batch":
        shifted = shifted / (jnp.sqrt(masked.var(returns, counted)) + _EPSILON)
    return masked.select(shifted, mask)


def next_kl_coefficient(
    kl_coefficient: jax.Array | float, kl: jax.Array | float, responses: int, *, target: float, horizon: int
) -> jax.Array:
    """β after a rollout: a proportional controller in log space (Ziegler et al. 2019, section 2.2).

    e = clip((KL − target) / target, ±0.2);  β ← β (1 + e n / horizon)

    Args:
      kl_coefficient: β of the rollout.
      kl: its mean KL divergence a response, in nats.
      responses: n.
      target: nats a response.
      horizon: responses over which an error of 1 would change β by its own size.
    """
    error = jnp.clip((kl - target) / target, -0.2, 0.2)
    return jnp.asarray(kl_coefficient * (1 + error * responses / horizon), jnp.float32)


# ---------------------------------------------------------------- the reward stage


@struct.dataclass
class Targets:
    """What the updates learn from, computed once a rollout.

    Attributes:
      mask:       bool [B, R], the tokens of the responses.
      learned:    bool [B, R], those of them that are learnt from: not of groups left out, or of masked responses.
      group_tokens, group_rows: float32 [B], of the group of each row: tokens learnt from, and rows that have some.
      flat:       bool [B], whether all scores of the row's group are equal.
      advantages: [B, R], 0 outside the mask.
      returns:    [B, R], or None without a value model.
      scores:     [B], as they went into the rewards.
      rewards:    [B, R], of each token, not whitened.
      kl:         [B, R], k1 of the sampling policy to the reference.
    """

    mask: jax.Array
    learned: jax.Array
    group_tokens: jax.Array
    group_rows: jax.Array
    flat: jax.Array
    advantages: jax.Array
    returns: jax.Array | None
    scores: jax.Array
    rewards: jax.Array
    kl: jax.Array


def _shaped_scores(rollout: Rollout, config: PPOConfig) -> tuple[jax.Array, jax.Array | None]:
    """[B]: normalised, clipped, and less the penalty of a response that was cut; of them [B, R], at the ends of steps.

    Normalising divides the scores of steps too; all else that it and the others do stands on the last token.
    """
    real = rollout.weights > 0
    scores, steps = masked.select(rollout.scores.astype(jnp.float32), real), rollout.step_scores
    if steps is not None:
        steps = masked.select(steps.astype(jnp.float32), rollout.response_mask)
    if config.normalize_scores:
        if steps is not None:
            steps = steps * jax.lax.rsqrt(masked.var(scores, real) + masked.EPSILON)
        scores = masked.whiten(scores, real)
    if config.score_clip is not None:
        scores = jnp.clip(scores, -config.score_clip, config.score_clip)
    if config.missing_eos_penalty is not None:
        scores = jnp.where(rollout.ended, scores, scores - config.missing_eos_penalty)
    if config.settled.overlong == "ramp":
        assert config.max_response is not None
        over = rollout.response_lengths - (config.max_response - config.ramp)
        scores -= jnp.clip(over / config.ramp, 0.0, 1.0)
    return masked.select(scores, real), steps


def flat_groups(rollout: Rollout, group_size: int) -> jax.Array:
    """bool [B]: rows of groups whose scores are all the same, so that comparing them teaches nothing.

    A group of one response has no variance either, and is not called flat. Fillers are.
    """
    if group_size == 1:
        return rollout.weights <= 0
    scores, real = (x.reshape(-1, group_size) for x in (rollout.scores, rollout.weights > 0))
    high = jnp.max(jnp.where(real, scores, -jnp.inf), axis=1)
    low = jnp.min(jnp.where(real, scores, jnp.inf), axis=1)
    return jnp.repeat(high <= low, group_size)


def _learned(rollout: Rollout, flat: jax.Array, config: PPOConfig) -> jax.Array:
    """bool [B, R]: the tokens that are learnt from."""
    rows = rollout.weights > 0
    if config.settled.zero_variance != "keep":
        rows &= ~flat
    if config.settled.overlong == "mask":
        rows &= rollout.ended
    return rollout.response_mask & rows[:, None]


def learning_targets(rollout: Rollout, config: PPOConfig) -> Targets:
    """The reward stage of a whole rollout, before it is split into mini-batches.

    Raises `InputError` where the rows are not made of groups of `config.group`, or values are missing.
    """
    if rollout.responses.shape[0] % config.group:
        raise InputError(f"a rollout of {rollout.responses.shape[0]} rows is not made of groups of {config.group}")
    mask, (scores, steps) = rollout.response_mask, _shaped_scores(rollout, config)
    logps, reference = masked.select(rollout.logps, mask), masked.select(rollout.reference_logps, mask)
    beta = jnp.zeros(()) if config.kl_in_loss else rollout.kl_coefficient[:, None]
    kl = kl_estimate(logps, reference)
    if steps is None:
        rewards = token_rewards(scores, kl, mask, kl_coefficient=beta)
    else:
        rewards = steps + token_rewards(scores - jnp.sum(steps, axis=1), kl, mask, kl_coefficient=beta)
    returns = None
    if config.estimator == "gae":
        if rollout.values is None:
            raise InputError("the rollout has no values, which gae needs (ppo.measure gives them)")
        scaled = rewards
        if config.whiten_rewards:
            scaled = masked.select(masked.whiten(rewards, mask, shift_mean=False), mask)
        gamma = config.settled.gamma
        lam = config.settled.lam
        advantages, returns = gae(scaled, rollout.values, mask, gamma=gamma, lam=lam)
    else:
        advantages = critic_free(rewards, mask, config, greedy=rollout.greedy_scores)
    if config.whitens:
        advantages = masked.select(masked.whiten(advantages, mask), mask)
    flat = flat_groups(rollout, config.group)
    learned = _learned(rollout, flat, config)
    tokens = jnp.sum(learned.astype(jnp.float32), axis=1)

    def of_group(x: jax.Array) -> jax.Array:
        return jnp.repeat(jnp.sum(x.reshape(-1, config.group), axis=1), config.group)

    return Targets(
        mask=mask,
        learned=learned,
        group_tokens=of_group(tokens),
        group_rows=of_group((tokens > 0).astype(jnp.float32)),
        flat=flat,
        advantages=advantages,
        returns=returns,
        scores=scores,
        rewards=rewards,
        kl=kl,
    )
