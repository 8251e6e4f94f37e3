"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its family, as one pure step.

    L(θ) = Σ_i w_i ℓ(Lc_i, Lr_i, Rc_i, Rr_i) / Σ_i w_i         ℓ from `align/losses.py`, e.g. Eq. 7: −log σ(β (u − v))
    Lc = Σ_t log π_θ(y_c,t | x, y_c,<t)    Rc = Σ_t log π_ref(y_c,t | x, y_c,<t)    u = Lc − Rc    (v: the rejected)

x is the prompt, w_i is 1 for a row and 0 for a filler row; L is 0 where all are. The reference policy π_ref is one of
    cached   its log-probabilities come with the batch (`PreferenceBatch.reference_logps`, made by `reference_logps`);
    live     computed in every step: under LoRA by the same weights without their adapters (no second copy), else by a
             copy of the weights that training started from.

With `config.accumulate` = k the batch is split into k micro-batches whose gradients are summed. Everything that one
row's loss takes from the whole batch (Σ w, the token mean of the NLL, KTO's KL point) is fixed before the split, so the
result is that of one big batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax import masked
from dpo_jax import state as states
from dpo_jax.align import figures, microbatches, update
from dpo_jax.align.losses import implicit_rewards, nll_loss, per_token, preference_loss
from dpo_jax.config import DPOConfig
from dpo_jax.errors import InputError
from dpo_jax.model.groups import response_logps
from dpo_jax.model.llama import Llama
from dpo_jax.state import TrainState
from dpo_jax.types import CHOSEN, MISMATCHED, REJECTED, PreferenceBatch

__all__ = [
    "eval_step",
    "init_state",
    "jit_eval_step",
    "jit_train_step",
    "nll_loss",
    "preference_loss",
    "reference_logps",
    "train_step",
]

Metrics = dict[str, jax.Array]


def init_state(
    model: Llama,
    variables: Mapping[str, Any],
    config: DPOConfig,
    *,
    reference: Mapping[str, Any] | None = None,
) -> TrainState:
    """The training state at step 0: the adapters are trained where `variables` has them, all parameters otherwise.

    The state takes over the arrays of `variables`, and the jitted step uses them up (it donates its state): where they
    are needed later, pass a copy. With `jax.ShapeDtypeStruct`s in place of arrays the state is abstract too, for
    compiling ahead of time.

    Args:
      model: the policy.
      variables: {"params": ...[, "adapters": ...]}.
      config: its `reference` decides whether the state must hold a reference policy.
      reference: for `config.reference == "live"`, the parameters ({"params": ...}) of a reference policy other than
        the starting point.
    """
    live = config.reference == "live" and not config.reference_free
    frozen = {}
    if reference is not None:
        if not live:
            raise InputError(f"a reference policy has no effect with reference {config.reference}, loss {config.loss}")
        frozen["reference"] = reference["params"]
    elif live and "adapters" not in variables:
        # A real copy: the step is given the buffers of the trained weights for good.
        abstract = isinstance(jax.tree.leaves(variables)[0], jax.ShapeDtypeStruct)
        frozen["reference"] = variables["params"] if abstract else jax.tree.map(jnp.copy, variables["params"])
    return states.create(model.apply, variables, states.make_optimizer(config.optimizer), frozen=frozen)


@struct.dataclass
class _Whole:
    """What the loss of one row takes from the whole batch; scalars.

    Attributes:
      weight:     Σ w.
      nll_length: mean tokens of a chosen response, absent ones counting 0.
      chosen:     mean chosen responses in a row (1, except for unpaired KTO rows).
      responses:  mean responses present in a row (2, except for unpaired KTO rows).
      kl:         KTO's z₀.
      mismatched: responses that z₀ is the mean over.
    """

    weight: jax.Array
    nll_length: jax.Array
    chosen: jax.Array
    responses: jax.Array
    kl: jax.Array
    mismatched: jax.Array


@struct.dataclass
class _Rows:
    """What the step computes for each row. K is 2 here.

    Attributes:
      loss:    [B], 0 for a filler row.
      policy:  [B, K] summed log-probabilities, absent responses 0.
      rewards: [B, K].
      nll:     [B] negative log-likelihood of the whole chosen response, absent ones 0.
    """

    loss: jax.Array
    policy: jax.Array
    rewards: jax.Array
    nll: jax.Array


# ---------------------------------------------------------------- log-probabilities


def _responses(batch: PreferenceBatch, first: int, last: int) -> PreferenceBatch:
    """The batch with responses first..last - 1 only."""
    k = batch.responses.shape[1]
    if k < last:
        what = "kto takes its KL point from mismatched responses" if last > 2 else "a preference pair"
        raise InputError(f"{what}: the batch must have {last} responses a prompt, and has {k}")
    cut = partial(jax.tree.map, lambda x: x[:, first:last])
    return dataclasses.replace(
        batch,
        responses=cut(batch.responses),
        response_lengths=cut(batch.response_lengths),
        format_masks=cut(batch.format_masks),
        reference_logps=cut(batch.reference_logps),
        logp_weights=cut(batch.logp_weights),
    )


def _scored(batch: PreferenceBatch, mask_format_tokens: bool) -> jax.Array | None:
    """bool [B, K, R]: the response tokens in the preference sums; None for all of them."""
    if not mask_format_tokens:
        return None
    if batch.format_masks is None:
        raise InputError("mask_format_tokens needs batches with format_masks (data made with format masks)")
    return batch.response_mask & ~batch.format_masks


def _lengths(batch: PreferenceBatch, mask_format_tokens: bool) -> jax.Array:
    """[B, K]: the tokens in each preference sum."""
    scored = _scored(batch, mask_format_tokens)
    return batch.response_lengths if scored is None else jnp.sum(scored, axis=-1)


def _sums(
    apply_fn: Callable[..., Any], variables: Any, batch: PreferenceBatch, config: DPOConfig
) -> tuple[jax.Array, jax.Array]:
    """Summed log-probabilities of each response, [B, K] twice: of the tokens that are scored, and of all."""
    logps = response_logps(apply_fn, variables, batch, layout=config.layout, head_budget_bytes=config.head_budget_bytes)
    whole = jnp.sum(logps, axis=-1)
    scored = _scored(batch, config.mask_format_tokens)
    return (whole if scored is None else masked.total(logps, scored, axis=-1)), whole


def reference_logps(
    apply_fn: Callable[..., Any], variables: Any, batch: PreferenceBatch, *, config: DPOConfig
) -> jax.Array:
    """Summed log-probability of each of the K responses, float32 [B, K], in nats, as `train_step` wants it cached.

    Over the tokens that the preference term scores (without format tokens where `config` masks them).
    """
    return _sums(apply_fn, variables, batch, config)[0]


def _reference(state: TrainState, batch: PreferenceBatch, config: DPOConfig) -> jax.Array | None:
    """[B, K] summed log-probabilities under the reference policy, no gradient; None where the loss has none."""
    if config.reference_free:
        return None
    if config.reference == "cached":
        if batch.reference_logps is None:
            raise InputError(
                f'loss {config.loss} with reference "cached": the batch has no reference_logps; fill them in with '
                'reference_logps, or use reference "live"'
            )
        sums = batch.reference_logps
    else:
        if "reference" in state.frozen:
            params = state.frozen["reference"]
        elif "params" in state.frozen:
            params = state.frozen["params"]
        else:
            raise InputError('reference "live": the state holds no reference policy; make it with this config')
        sums = reference_logps(state.apply_fn, {"params": params}, batch, config=config)
    return jax.lax.stop_gradient(masked.select(sums, batch.present))


# ---------------------------------------------------------------- the loss of each row


def _row_values(state: TrainState, variables: Any, batch: PreferenceBatch, whole: _Whole, config: DPOConfig) -> _Rows:
    """Loss, log-probabilities and rewards of the rows of a (micro-)batch of pairs."""
    reference = _reference(state, batch, config)
    sums, sums_of_all = _sums(state.apply_fn, variables, batch, config)
    lengths = _lengths(batch, config.mask_format_tokens)
    nll = -sums_of_all[:, CHOSEN]
    loss = preference_loss(
        sums[:, CHOSEN],
        sums[:, REJECTED],
        None if reference is None else reference[:, CHOSEN],
        None if reference is None else reference[:, REJECTED],
        chosen_lengths=lengths[:, CHOSEN],
        rejected_lengths=lengths[:, REJECTED],
        config=config,
        chosen_nll=nll,
        nll_lengths=batch.response_lengths[:, CHOSEN],
        mean_nll_length=whole.nll_length,
        mean_chosen=whole.chosen,
        mean_responses=whole.responses,
        kl=whole.kl,
    )
    if batch.logp_weights is not None:
        loss += jnp.sum(batch.logp_weights * sums, axis=1)
    rewards = implicit_rewards(sums, reference, lengths, config=config)
    return _Rows(loss=masked.select(loss, batch.weights > 0), policy=sums, rewards=rewards, nll=nll)


def _whole(state: TrainState, batch: PreferenceBatch, pairs: PreferenceBatch, config: DPOConfig) -> _Whole:
    w, weight = pairs.weights, jnp.sum(pairs.weights)
    weight = jnp.where(weight > 0, weight, 1.0)  # pairs that are sampled may all be ties: a loss of 0, not of 0 / 0
    kl, mismatched = _kl_point(state, batch, config) if config.loss == "kto" else (jnp.zeros(()), jnp.zeros(()))
    return _Whole(
        weight=weight,
        nll_length=jnp.sum(w * pairs.response_lengths[:, CHOSEN]) / weight,
        chosen=jnp.sum(w * (pairs.response_lengths[:, CHOSEN] > 0)) / weight,
        responses=jnp.sum(w * jnp.sum(_lengths(pairs, config.mask_format_tokens) > 0, axis=1)) / weight,
        kl=kl,
        mismatched=mismatched,
    )


def _kl_point(state: TrainState, batch: PreferenceBatch, config: DPOConfig) -> tuple[jax.Array, jax.Array]:
    """KTO's z₀ = max(0, mean over the batch of log π_θ − log π_ref on mismatched pairs), and over how many.

    Scalars, no gradient. Without any the estimate is the least that a divergence can be, 0.
    """
    mismatched = _responses(batch, MISMATCHED, max(batch.responses.shape[1], MISMATCHED + 1))
    present = mismatched.present
    count = jnp.sum(present.astype(jnp.float32))

    def log_ratio(rows: PreferenceBatch) -> jax.Array:
        reference = _reference(state, rows, config)
        assert reference is not None
        return _sums(state.apply_fn, state.variables, rows, config)[0] - reference

    ratios = jax.lax.stop_gradient(microbatches.map_rows(log_ratio, mismatched, config.accumulate))
    return jax.nn.relu(masked.total(ratios, present) / jnp.maximum(count, 1)), count


# ---------------------------------------------------------------- the step


def train_step(state: TrainState, batch: PreferenceBatch, *, config: DPOConfig) -> tuple[TrainState, Metrics]:
    """One optimizer step on a batch of preference pairs. Pure: neither jitted nor tied to a mesh (`jit_train_step` is).

    Where the loss or the gradient is not finite, the state comes back as it was, so that the caller can name the step
    and the rows and stop with nothing spoilt.

    Args:
      state: from `init_state`.
      batch: K >= 2 responses a prompt; the first two are the pair. For kto, K >= 3: from index 2 on they are mismatched
        (another row's), which only moves the KL point, and a response of length 0 is absent.
      config: the one that `init_state` was given.

    Returns:
      The new state, and metrics: float32 scalars over the rows that count,
        loss, grad_norm (before clipping), learning_rate (the one used in this step), nll_loss (where the loss has that
        term), kl (KTO's z₀),
        rewards/chosen, rewards/rejected (means of β u and β v), rewards/margins (their difference),
        rewards/accuracies (share of pairs with a strictly larger chosen reward),
        logps/chosen, logps/rejected (means of the sums), logps/chosen_change (mean of u: where the reference is the
        starting policy, the change since step 0 on these very rows), lengths/chosen, lengths/rejected (mean tokens),
        tokens (in the batch: prompts once, and both responses),
      weights/NAME for those that a batch may leave undefined (of unpaired rows): see `align/figures.py`,
      and rows/nonfinite, int32 [B]: the file row number (`batch.rows`) of each row whose loss or log-probabilities are
      not finite, -1 for all others. Where it names no row though grad_norm is not finite, the backward pass overflowed.

    Raises:
      InputError: the batch lacks what `config` asks for (at trace time).
    """
    pairs = _responses(batch, CHOSEN, REJECTED + 1)
    whole = _whole(state, batch, pairs, config)

    def values(variables: Any, part: PreferenceBatch) -> _Rows:
        return _row_values(state, variables, part, whole, config)

    def share(part: PreferenceBatch, rows: _Rows) -> jax.Array:
        return jnp.sum(part.weights * rows.loss) / whole.weight

    new_state, rows, metrics = update.descend(state, pairs, values, share, config)
    return new_state, metrics | _row_metrics(pairs, rows, whole, config)


def _row_metrics(batch: PreferenceBatch, rows: _Rows, whole: _Whole, config: DPOConfig) -> Metrics:
    present = batch.present
    wins = rows.rewards[:, CHOSEN] > rows.rewards[:, REJECTED]
    metrics = update.of_batch(batch, rows.loss, rows.policy)
    metrics |= figures.mean("rewards/accuracies", wins, jnp.all(present, axis=1))
    for name, values in (("rewards", rows.rewards), ("logps", rows.policy), ("lengths", batch.response_lengths)):
        for side, k in (("chosen", CHOSEN), ("rejected", REJECTED)):
            metrics |= figures.mean(f"{name}/{side}", values[:, k], present[:, k])
    metrics |= figures.difference("rewards/margins", "rewards/chosen", "rewards/rejected", metrics)
    chosen, has_chosen = metrics["rewards/chosen"], present[:, CHOSEN]
    if config.nll_coefficient > 0 or config.loss == "orpo":
        lengths = batch.response_lengths[:, CHOSEN].astype(jnp.float32)
        share = lengths if config.nll_normalization == "token" else jnp.ones_like(lengths)
        nll = masked.total(per_token(rows.nll, lengths) * share, has_chosen) / masked.total(share, has_chosen)
        metrics |= figures.figure("nll_loss", nll, jnp.sum(has_chosen))
    if not config.reference_free:
        metrics |= figures.figure("logps/chosen_change", chosen / config.resolved("beta"), jnp.sum(has_chosen))
    if config.loss == "kto":
        metrics |= figures.figure("kl", whole.kl, whole.mismatched)
    return metrics


jit_train_step = update.jit_train(train_step)


def eval_step(state: TrainState, batch: PreferenceBatch, *, config: DPOConfig) -> Metrics:
    """The loss and its parts for each row; nothing is trained.

    Returns:
      Arrays [B]: loss, rewards/chosen, rewards/rejected, logps/chosen, logps/rejected (sums), lengths/chosen,
      lengths/rejected (response tokens), nll (of the whole chosen response, in nats, summed). Values of filler rows
      mean nothing. What a loss takes from its whole batch (KTO's KL point, `nll_normalization` token), it takes from
      this one.
    """
    config = dataclasses.replace(config, accumulate=1)  # without a backward pass there is little to save by splitting
    pairs = _responses(batch, CHOSEN, REJECTED + 1)
    whole = _whole(state, batch, pairs, config)
    rows = _row_values(state, state.variables, pairs, whole, config)
    return {
        "loss": rows.loss,
        "rewards/chosen": rows.rewards[:, CHOSEN],
        "rewards/rejected": rows.rewards[:, REJECTED],
        "logps/chosen": rows.policy[:, CHOSEN],
        "logps/rejected": rows.policy[:, REJECTED],
        "lengths/chosen": pairs.response_lengths[:, CHOSEN],
        "lengths/rejected": pairs.response_lengths[:, REJECTED],
        "nll": rows.nll,
    }


jit_eval_step = update.jit_eval(eval_step)
