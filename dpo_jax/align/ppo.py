"""Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) of a language model, and its relatives.

One step takes a rollout (`types.Rollout`: responses, and what was measured when they were sampled) and makes
epochs x mini-batches optimizer updates, in one compiled scan. The rollout is read, never computed again: ρ_t compares
the policy as it becomes with the policy as it was before the first of them, so it is 1 there and not afterwards. Where
there is only one, π_old is the policy itself without a gradient, and nothing is measured for it. What was drawn by
other weights is weighted (`align/surrogates.py`).

    ρ_t  = π_θ(y_t | x, y_<t) / π_old(y_t | x, y_<t)                                    both at the sampling temperature
    L^π  = mean_t max(−A_t ρ_t, −A_t clip(ρ_t, 1 − ε, 1 + ε))                           Eq. 7
    L^V  = ½ mean_t max((V_t − R_t)², (clip(V_t, V_old ± ε_V) − R_t)²)
    L    = L^π + c_V L^V − c_H mean_t H_t  (+ β mean_t k_t where the KL divergence is a term of the loss)

K = `config.group` neighbouring rows answer one prompt, which is computed once for them (`config.layout`). Windows of
real tokens are planned on the host (`train/packing.py`); a rollout without is laid out as shared.

Means are over all response tokens of a mini-batch, over devices and micro-batches, or as `config.averaging` says, which
holds for all terms alike. A_t and R_t: `align/advantages.py`; other ratios, surrogates and averages:
`align/surrogates.py`. `config.preset` names the published combinations (`config/training/presets.py`).

The value model is one of
    separate   a trunk of its own, under `trainable["value"]`: a copy of the policy's (or another model, such as the
               reward model) with a head; under LoRA only adapters and head, beside the policy's frozen weights;
    shared     the policy's trunk with a head;
    stopped    the same, without a gradient from the values into the trunk.

(One file, though long: all of it is the one scan, and its parts have no other caller.)
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dpo_jax import masked, mesh as meshes, state as states
from dpo_jax.align import update
from dpo_jax.align.advantages import (
    Targets,
    gae,
    kl_estimate,
    kl_term,
    learning_targets,
    token_rewards,
)
from dpo_jax.align.figures import Metrics
from dpo_jax.align.ppo_figures import TokenParts, UpdateFigures, figures, metrics, nonfinite
from dpo_jax.align.surrogates import Rule, beyond, importance_weights, log_ratios, policy_terms, row_weights
from dpo_jax.config import Layout, PPOConfig
from dpo_jax.errors import InputError
from dpo_jax.model import heads
from dpo_jax.model.groups import PredictingStates, predicting_states, response_logps, response_predictions
from dpo_jax.model.llama import Llama
from dpo_jax.state import TrainState
from dpo_jax.types import Rollout

__all__ = [
    "gae",
    "init_state",
    "jit_train_step",
    "kl_estimate",
    "measure",
    "policy_loss",
    "reference_logps",
    "sharing",
    "token_rewards",
    "train_step",
    "value_loss",
]

VALUE = "value"
"""Name of the value model's collection, and of its head."""


# ---------------------------------------------------------------- losses


def _value_terms(values: jax.Array, old_values: jax.Array, returns: jax.Array, clip: float) -> jax.Array:
    near = jnp.clip(values, old_values - clip, old_values + clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(near - returns))


def policy_loss(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip: float,
    *,
    rule: Rule | None = None,
) -> jax.Array:
    """L^π, a scalar: the mean over the masked-in tokens of the clipped surrogate (Eq. 7, as a loss).

    Args:
      logps, old_logps: [B, R] log-probabilities under the policy and under the one that sampled.
      advantages: [B, R].
      mask: bool or 0/1 [B, R].
      clip: ε, on both sides.
      rule: another surrogate (`align/surrogates.py`), whose own bounds then stand for `clip`.
    """
    logps, old_logps, advantages = (masked.select(x, mask) for x in (logps, old_logps, advantages))
    rule = Rule(low=clip, high=clip) if rule is None else rule
    return masked.mean(policy_terms(logps, log_ratios(logps, old_logps, mask, rule.ratio), advantages, rule), mask)


def value_loss(values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, clip: float) -> jax.Array:
    """L^V, a scalar: half the masked mean of the larger of the two squared errors, of the value and the clipped value.

    Args:
      values, old_values, returns: [B, R].
      mask: bool or 0/1 [B, R].
      clip: ε_V.
    """
    values, old_values, returns = (masked.select(x, mask) for x in (values, old_values, returns))
    return masked.mean(_value_terms(values, old_values, returns, clip), mask)


# ---------------------------------------------------------------- state and models


def init_state(
    model: Llama, variables: Mapping[str, Any], config: PPOConfig, *, value: Mapping[str, Any] | None = None
) -> TrainState:
    """The training state at step 0.

    Args:
      model: the policy.
      variables: {"params": ...[, "adapters": ...]}; its arrays become the state's.
      config: decides whether there is a value model, and which.
      value: another model to start the separate value model from, such as a reward model: {"params": ...,
        "heads": {"score": ...}}; its score head becomes the value head. Under LoRA it must share the policy's frozen
        `params`, and brings its own "adapters".

    The reference policy is not part of the state: its log-probabilities come with the rollout.
    """
    variables = dict(variables)
    kind = config.critic
    if value is not None and kind != "separate":
        raise InputError(f"a value model to start from has no effect with --ppo.advantage {config.estimator}, {kind}")
    if kind is not None:
        head = heads.heads_beside(model, variables, {VALUE: 1}, key=None)
        if kind == "separate":
            variables[VALUE] = _separate_value_model(variables, head, value)
        else:
            variables["heads"] = head
    return states.create(model.apply, variables, states.make_optimizer(config.optimizer, scheduled=False))


def _separate_value_model(
    variables: Mapping[str, Any], head: Mapping[str, Any], value: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A trunk like the policy's trained weights, or those of `value`, with a head."""
    collection = "adapters" if "adapters" in variables else "params"
    start = variables if value is None else value
    if collection not in start:
        raise InputError(f"the value model to start from has no {collection}, which the policy trains")
    trunk = {name: tree for name, tree in start[collection].items() if name != "lm_head"}
    own = {collection: trunk, "heads": head if value is None else {VALUE: value["heads"][heads.SCORE]}}
    return states.copied(own)


@struct.dataclass
class _Predictions:
    """Of each response token, [B, R]: log-probability and entropy under the policy, value of the state before it."""

    logps: jax.Array
    entropy: jax.Array
    values: jax.Array | None


def policy_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The policy's own collections, without value model and heads."""
    return {name: variables[name] for name in ("params", "adapters") if name in variables}


def _layout(config: PPOConfig, rollout: Rollout, k: int) -> Layout:
    """How groups of k responses are laid out: unpacked, and with one to a prompt, there is nothing to share."""
    return config.layout if k > 1 or rollout.windows is not None else "separate"


def _how(config: PPOConfig, rollout: Rollout, k: int) -> dict[str, Any]:
    """What log-probabilities of groups of k responses are computed with."""
    names = ("temperature", "vocabulary", "head_budget_bytes")
    return {"layout": _layout(config, rollout, k), **{name: getattr(config, name) for name in names}}


def _rows(x: jax.Array) -> jax.Array:
    """What is said of groups, [B / k, k, R], of their responses: [B, R]."""
    return meshes.constrain(x.reshape(-1, *x.shape[2:]), meshes.batch_axes(x.ndim - 1))


def _values(
    state: TrainState,
    variables: Mapping[str, Any],
    rollout: Rollout,
    states: PredictingStates | None,
    config: PPOConfig,
    k: int,
) -> jax.Array | None:
    """[B, R], or None without a value model. `states`: the policy's, where they are at hand already."""
    kind = config.critic
    if kind is None:
        return None
    of_policy, own = kind != "separate", variables.get(VALUE, variables)
    if not of_policy or states is None:
        # Under LoRA the separate value model has adapters of its own on the policy's frozen weights.
        trunk = policy_of(variables) if of_policy else policy_of({"params": variables.get("params"), **own})
        states = predicting_states(state.apply_fn, trunk, rollout.groups(k), layout=_layout(config, rollout, k))
    assert states is not None, "made above"
    if kind == "stopped":
        states = dataclasses.replace(states, hidden=jax.lax.stop_gradient(states.hidden))
    return _rows(states.read(lambda hidden, _: heads.apply(own, VALUE, hidden)[..., 0]))


def _predict(state: TrainState, trainable: Any, rollout: Rollout, config: PPOConfig, k: int) -> _Predictions:
    """Of a rollout whose rows answer one prompt by k neighbours."""
    variables = dataclasses.replace(state, trainable=trainable).variables
    out = response_predictions(
        state.apply_fn,
        policy_of(variables),
        rollout.groups(k),
        **_how(config, rollout, k),
    )
    values = _values(state, variables, rollout, out.states, config, k)
    return _Predictions(_rows(out.logps), _rows(out.entropy), values)


def sharing(config: PPOConfig, rows: int, pieces: int, group: int | None = None) -> int:
    """How many neighbouring responses have their prompt computed once, where `rows` rows are cut into equal pieces.

    All of a group (`group`, by default of `config`) where that leaves every piece whole ones, else as many as do
    (`update.together`); 1 with the layout "separate". The numbers are the same whatever it is.
    """
    group = config.group if group is None else group
    return 1 if config.layout == "separate" else update.together(rows, group, pieces)


def order(config: PPOConfig, step: Any, rows: int) -> jax.Array:
    """int32 [updates, rows / minibatches]: the rows of a rollout's mini-batches at a step, each pass shuffled anew."""
    m, key = config.minibatches, jax.random.fold_in(jax.random.key(config.seed), step)
    unit = update.together(rows, config.group, m)
    keys = [jax.random.fold_in(key, e) for e in range(config.passes)]
    firsts = jnp.concatenate([jax.random.permutation(one, rows // unit) for one in keys])
    return (unit * firsts[:, None] + jnp.arange(unit)).reshape(-1, rows // m)


def reference_logps(
    apply_fn: Any, variables: Mapping[str, Any], rollout: Rollout, config: PPOConfig, *, group: int | None = None
) -> jax.Array:
    """float32 [B, R]: log-probabilities of the responses under another policy. `group`: as for `measure`."""
    k = sharing(config, rollout.responses.shape[0], meshes.parts("batch"), group)
    found = response_logps(
        apply_fn,
        variables,
        rollout.groups(k),
        **_how(config, rollout, k),
    )
    return _rows(found)


def measure(
    state: TrainState, rollout: Rollout, *, config: PPOConfig, group: int | None = None, stores: bool = False
) -> Rollout:
    """The rollout with `values` and `old_logps`, as the models give them now: what is stored before the first update.

    Either stays None where `config` needs none. `group`: neighbouring rows that answer one prompt; not given:
    `config.group`; `stores`: `old_logps` in any case.
    """
    k = sharing(config, rollout.responses.shape[0], meshes.parts("batch"), group)
    if config.stores_old_logps or stores:
        found = _predict(state, state.trainable, rollout, config, k)
        logps, values = found.logps, found.values
    else:
        logps, values = None, _values(state, state.variables, rollout, None, config, k)
    mask = rollout.response_mask
    old, values = (None if x is None else masked.select(x, mask) for x in (logps, values))
    return dataclasses.replace(rollout, old_logps=old, values=values if values is not None else rollout.values)


# ---------------------------------------------------------------- the step


def rule_of(config: PPOConfig) -> Rule:
    """Ratio and surrogate of a configuration."""
    low, high = config.clip_range
    return Rule(config.settled.ratio, config.settled.surrogate, low, high, config.settled.dual_clip)


def _losses(
    state: TrainState, trainable: Any, rollout: Rollout, targets: Targets, weights: jax.Array, config: PPOConfig, k: int
) -> tuple[jax.Array, TokenParts]:
    """L of a (micro-)batch's share of its mini-batch, and its parts. `weights` [B]: what a token of each row counts."""
    mask, rule = targets.learned, rule_of(config)
    new = _predict(state, trainable, rollout, config, k)
    logps = masked.select(new.logps, mask)
    # Of a single update the policy before it is the policy that it is made for.
    old = jax.lax.stop_gradient(logps) if rollout.old_logps is None else masked.select(rollout.old_logps, mask)
    log_ratio = log_ratios(logps, old, mask, rule.ratio)
    difference = masked.select(old - rollout.sampler_logps, mask)
    correction, cap = config.settled.sampler_correction, config.settled.sampler_cap
    weight = importance_weights(difference, mask, correction, cap)
    policy = policy_terms(logps, log_ratio, targets.advantages, rule) * weight
    terms = policy - config.entropy_coefficient * weight * new.entropy
    if config.kl_in_loss:
        reference = masked.select(rollout.reference_logps, mask)
        terms += rollout.kl_coefficient[:, None] * weight * kl_term(logps, old, reference, config.kl_choice)
    value = value_clipped = jnp.zeros_like(policy)
    if targets.returns is not None:
        assert new.values is not None
        assert rollout.values is not None
        values, before = masked.select(new.values, mask), masked.select(rollout.values, mask)
        clip = config.settled.value_clip
        value = _value_terms(values, before, targets.returns, clip)
        value_clipped = value > 0.5 * jnp.square(values - targets.returns)
        terms += config.settled.value_coefficient * value
    low, high = beyond(log_ratio, targets.advantages, rule)
    parts = TokenParts(
        policy=policy,
        value=value,
        entropy=new.entropy,
        log_ratio=log_ratio,
        clipped_low=low,
        clipped_high=high,
        value_clipped=value_clipped,
        difference=difference,
        weight=weight,
    )
    parts = jax.tree.map(lambda x: masked.select(x.astype(jnp.float32), mask), parts)
    return jnp.sum(masked.total(terms, mask, axis=1) * weights), parts


def train_step(state: TrainState, rollout: Rollout, *, config: PPOConfig) -> tuple[TrainState, Metrics]:
    """All updates of one rollout: `config.passes` passes over it in `config.minibatches` mini-batches each.

    Pure: the order of rows is a function of `config.seed` and `state.step`. A mini-batch takes whole groups where they
    divide over the mini-batches, and else as many rows of one together as do. With a rollout that is not finite the
    state comes back as it was. Where a loss or gradient is not finite, neither that update nor a later one is made, and
    `step` stays: to undo those before it too, a copy of all weights and moments would have to be held all the time.

    Args:
      state: from `init_state`.
      rollout: sampled by the state's policy, with what `measure` stores.
      config: the one that `init_state` was given.

    Returns:
      The new state, its step one larger, and metrics: float32 scalars. Under the names of TRL's PPOTrainer:
        objective/kl (Σ_t k1 a response), objective/entropy (Σ_t −log π a response), objective/non_score_reward,
        objective/rlhf_reward (with the score), objective/scores (before normalising, clipping, penalty);
        policy/approxkl_avg (mean of ½ log² ρ), policy/clipfrac_avg, policy/entropy_avg, loss/policy_avg,
        loss/value_avg, val/clipfrac_avg, val/ratio, val/ratio_var (all means over the updates), val/num_eos_tokens
        (responses that ended);
      and loss, grad_norm (mean over the updates, before clipping), learning_rate, kl_coefficient, lengths/response,
      tokens (prompts and responses, once),
      without a value model, under the names of TRL's GRPOTrainer: reward, reward_std (in groups), frac_reward_zero_std,
      kl (a token), entropy, completions/mean_length, completions/clipped_ratio (responses that were cut),
      clip_ratio/low_mean, high_mean, region_mean (tokens that the clipping acts on), and rollout/learned (share of the
      responses that are learnt from),
      policy/ratio_q05, _q50, _q95, policy/approxkl_q05, _q50, _q95 (of the last update),
      sampling/sampling_logp_difference/mean, max, q50, q95, q99 (|log π_old − log of what was drawn| of a token), and
      with `sampler_correction` sampling/importance_sampling_ratio/min, mean, max (the weights) and cut (share at the
      cap or masked),
      policy/updates (share of the updates that were made before `stop_kl`),
      weights/val/ratio_var (updates on more than one token: see `align/figures.py`),
      rows/nonfinite, int32 [B]: rows whose log-probabilities, scores or values are not finite, -1 elsewhere.

    Raises:
      InputError: the rows do not divide over mini-batches, micro-batches, groups and devices, or the rollout lacks what
        `config` asks for (at trace time).
    """
    b, m = rollout.responses.shape[0], config.minibatches
    if b % m:
        raise InputError(
            f"a rollout of {b} responses does not split into --ppo.minibatches {m}; choose a divisor of {b}"
        )
    if config.stores_old_logps and rollout.old_logps is None:
        raise InputError(
            "the rollout has no old_logps, which several updates, and a KL in the reward, need (ppo.measure)"
        )
    targets = learning_targets(rollout, config)
    updates, rollout = rollout.updates, dataclasses.replace(rollout, windows=None, updates=None)
    if updates is None:
        batches: tuple[jax.Array, Any] = order(config, state.step, b), None
    else:
        batches = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (updates.rows, (updates.windows,)))
    k = sharing(config, b, m * config.accumulate * meshes.parts("batch"))
    lr, averaging = state.schedule(state.step), config.settled.averaging
    # Micro-batches are made of blocks, so that responses that share a prompt stay together; windows keep them so.
    cut, joined = (partial(_blocks, k=k), _rows) if updates is None else (jnp.asarray, jnp.asarray)

    def one(
        carry: tuple[Any, Any, jax.Array], batch: tuple[jax.Array, Any]
    ) -> tuple[tuple[Any, Any, jax.Array], UpdateFigures]:
        (trainable, opt_state, stopped), (rows, windows) = carry, batch
        part, aims = _taken((rollout, targets), rows)
        part = dataclasses.replace(part, windows=jax.tree.map(_split, windows))
        tokens = jnp.sum(aims.learned.astype(jnp.float32), axis=1)
        counts = row_weights(averaging, tokens, aims.group_tokens, aims.group_rows, config.max_response)

        def gradients(blocks: tuple[Rollout, Targets, jax.Array]) -> tuple[Any, tuple[jax.Array, TokenParts]]:
            micro, goals, counts = jax.tree.map(joined, blocks)

            def objective(weights: Any) -> tuple[jax.Array, tuple[jax.Array, TokenParts]]:
                loss, parts = _losses(state, weights, micro, goals, counts, config, k)
                return loss, (jnp.full(counts.shape, loss / counts.shape[0]), parts)

            slopes, found = jax.grad(objective, has_aux=True)(trainable)
            return slopes, jax.tree.map(cut, found)

        blocks = jax.tree.map(cut, (part, aims, counts))
        found, blocks = update.sum_gradients(
            gradients, blocks, config.accumulate, like=trainable, crossing_dtype=config.crossing_dtype
        )
        shares, parts = jax.tree.map(joined, blocks)
        loss, norm = jnp.sum(shares), optax.tree.norm(found)
        stopped |= ~(jnp.isfinite(loss) & jnp.isfinite(norm))
        if config.stop_kl is not None:
            stopped |= masked.mean(0.5 * jnp.square(parts.log_ratio), aims.learned) > config.stop_kl
        trainable, opt_state = states.apply_update(state.tx, found, trainable, opt_state, keep=~stopped, rate=lr)
        return (trainable, opt_state, stopped), figures(parts, aims.learned, loss, norm, ~stopped)

    bad = jnp.any(nonfinite(rollout, targets.mask))
    start = (state.trainable, state.opt_state, bad)
    (trainable, opt_state, _), made = jax.lax.scan(one, start, batches)
    finite = ~bad & jnp.all(jnp.isfinite(made.loss)) & jnp.all(jnp.isfinite(made.grad_norm))
    new_state = dataclasses.replace(state, step=state.step + finite, trainable=trainable, opt_state=opt_state)
    return new_state, {"learning_rate": jnp.asarray(lr), **metrics(rollout, targets, made, config)}


def _blocks(x: jax.Array, k: int) -> jax.Array:
    """[B, ...] as blocks of k neighbours, [B / k, k, ...]: what `_rows` undoes."""
    return meshes.constrain(x.reshape(x.shape[0] // k, k, *x.shape[1:]), meshes.batch_axes(x.ndim + 1))


def _split(x: jax.Array) -> jax.Array:
    """Laid out over the devices by its first axis."""
    return meshes.constrain(x, meshes.batch_axes(x.ndim))


def _taken(tree: Any, rows: jax.Array) -> Any:
    """The rows [n] of every array of a tree, laid out over the devices again."""
    return jax.tree.map(lambda x: _split(jnp.take(x, rows, axis=0)), tree)


jit_train_step = update.jit_train(train_step)
