"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its family, as one pure step.

    L(θ) = Σ_i w_i ℓ(Lc_i, Lr_i, Rc_i, Rr_i) / Σ_i w_i         ℓ from `align/losses.py`, e.g. Eq. 7: −log σ(β (u − v))
    Lc = Σ_t log π_θ(y_c,t | x, y_c,<t)    Rc = Σ_t log π_ref(y_c,t | x, y_c,<t)    u = Lc − Rc    (v: the rejected)

x is the prompt, w_i is 1 for a row and 0 for a filler row; L is 0 where all are. The reference policy π_ref is one of
    cached   its log-probabilities come with the batch (`PreferenceBatch.reference_logps`, made by `reference_logps`);
    live     computed in every step: under LoRA by the same weights without their adapters (no second copy), else by a
             copy of the weights that training started from;
    moving   live, and every τ steps π_ref ← α π_θ + (1 − α) π_ref, weight by weight (under LoRA a second adapter, whose
             two factors are mixed each): Gorbatovski et al. 2024 (TR-DPO, 2404.09656), α = 1 its hard update.

What the sums are over may be changed: format tokens left out; the tokens of the longer response beyond the length of
the shorter one times α (Liu et al. 2024, LD-DPO, 2409.06411). With `config.use_weighting` ℓ is multiplied by
w(y_c) w(y_r), no gradient, log w(y) = mean_t (log π_θ(y_t) − log Σ_v π_θ(v)²): Zhou et al. 2024 (WPO, 2406.11827),
Eq. 2, aligned by the expectation of a drawn token's probability.

With `config.accumulate` = k the batch is split into k micro-batches whose gradients are summed. Everything that one
row's loss takes from the whole batch (Σ w, the token mean of the NLL, KTO's KL point, ranks and means of rewards, see
`align/across.py`) is fixed before the split, so the result is that of one big batch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax import masked, state as states
from dpo_jax.align import figures, update
from dpo_jax.align.across import of_batch, running_mean
from dpo_jax.align.figures import Metrics
from dpo_jax.align.losses import implicit_rewards, nll_loss, per_token, preference_loss, preference_terms, total
from dpo_jax.align.pair_logps import reference_logps, reference_of, responses_of, scored_lengths, sums_of
from dpo_jax.config import DPOConfig, Objective
from dpo_jax.errors import InputError
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
    objective = config.objective
    live, moving = objective.live, objective.moving
    frozen, carried, start = {}, {}, None
    if reference is not None:
        if not live:
            raise InputError(f"a reference policy has no effect with reference {config.reference}, loss {config.loss}")
        if moving and "adapters" in variables:
            raise InputError("reference_sync_steps: what moves towards adapters starts from them; give no reference")
        start = reference["params"]
    elif moving or (live and "adapters" not in variables):
        start = states.copied(variables["adapters" if "adapters" in variables else "params"])
    if moving:  # small steps of bfloat16 weights would be rounded away
        carried["reference"] = jax.tree.map(states.as_float32, start)
    elif start is not None:
        frozen["reference"] = start
    state = states.create(model.apply, variables, states.make_optimizer(config.optimizer), frozen=frozen)
    if "bco_pair" in objective.losses:
        # Zeros that lie on the devices as the step, 0, does.
        carried |= {name: states.as_float32(state.step) for name in ("reward_mean", "reward_count")}
    return dataclasses.replace(state, carried=carried)


@struct.dataclass
class _Whole:
    """What the loss of one row takes from the whole batch; scalars.

    Attributes:
      weight:     Σ w.
      nll_length: mean tokens of a chosen response, absent ones counting 0.
      chosen:     mean chosen responses in a row (1, except for unpaired rows).
      responses:  mean responses present in a row (2, except for unpaired rows).
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
      terms:   name -> [B], the losses that it is the sum of, unweighted.
      weights: [B], WPO's of the pairs; None without them.
      policy:  [B, K] summed log-probabilities, absent responses 0.
      rewards: [B, K].
      nll:     [B] negative log-likelihood of the whole chosen response, absent ones 0.
    """

    loss: jax.Array
    terms: dict[str, jax.Array]
    weights: jax.Array | None
    policy: jax.Array
    rewards: jax.Array
    nll: jax.Array


# ---------------------------------------------------------------- the loss of each row


def _row_values(
    state: TrainState,
    variables: Any,
    batch: PreferenceBatch,
    whole: _Whole,
    objective: Objective,
    across: Mapping[str, jax.Array] | None,
    *,
    learns: bool = True,
) -> _Rows:
    """Loss, log-probabilities and rewards of the rows of a (micro-)batch of pairs.

    `across`: see `across.of_batch`; None where this is the whole batch.
    """
    reference = reference_of(state, batch, objective)
    sums = sums_of(state.apply_fn, variables, batch, objective, weighted=objective.use_weighting)
    policy, nll = sums.scored, -sums.whole[:, CHOSEN]
    if across is None and objective.takes_across:
        assert reference is not None
        across = of_batch(policy, reference, batch.present, objective, state.carried, learns=learns)
    lengths = scored_lengths(batch, objective.mask_format_tokens)
    terms = preference_terms(
        policy[:, CHOSEN],
        policy[:, REJECTED],
        None if reference is None else reference[:, CHOSEN],
        None if reference is None else reference[:, REJECTED],
        chosen_lengths=lengths[:, CHOSEN],
        rejected_lengths=lengths[:, REJECTED],
        objective=objective,
        chosen_nll=nll,
        nll_lengths=batch.response_lengths[:, CHOSEN],
        mean_nll_length=whole.nll_length,
        mean_chosen=whole.chosen,
        mean_responses=whole.responses,
        kl=whole.kl,
        score_gaps=batch.margins,
        across=across,
    )
    counted = batch.weights > 0
    weights = None if sums.log_weights is None else jnp.exp(jnp.sum(sums.log_weights, axis=1))
    weights = None if weights is None else masked.select(weights, counted)
    loss = total(terms, objective, weights)
    if batch.logp_weights is not None:
        loss += jnp.sum(batch.logp_weights * policy, axis=1)
    return _Rows(
        loss=masked.select(loss, counted),
        terms={name: masked.select(value, counted) for name, value in terms.items() if name in objective.losses},
        weights=weights,
        policy=policy,
        rewards=implicit_rewards(policy, reference, lengths, objective=objective),
        nll=nll,
    )


def _across(state: TrainState, pairs: PreferenceBatch, objective: Objective) -> dict[str, jax.Array] | None:
    """What rows take across the micro-batches of their batch, by a forward pass before; None where one pass does."""
    if not objective.takes_across or objective.accumulate == 1:
        return None

    def both(rows: PreferenceBatch) -> tuple[jax.Array, jax.Array]:
        reference = reference_of(state, rows, objective)
        assert reference is not None
        return sums_of(state.apply_fn, state.variables, rows, objective).scored, reference

    policy, reference = update.map_rows(both, pairs, objective.accumulate)
    return of_batch(policy, reference, pairs.present, objective, state.carried)


def _carried(before: TrainState, after: TrainState, rows: _Rows, present: jax.Array, objective: Objective) -> Any:
    """What the next step is handed; after a step that was not taken, what it was."""
    taken, carried = after.step > before.step, dict(before.carried)
    if "bco_pair" in objective.losses:
        new = running_mean(rows.rewards, present, before.carried)
        carried |= {name: jnp.where(taken, value, carried[name]) for name, value in new.items()}
    if objective.reference_sync_steps is not None:
        α, policy = objective.reference_mixup_alpha, after.trainable
        moves = taken & (after.step % objective.reference_sync_steps == 0)
        carried["reference"] = jax.lax.cond(
            moves,
            lambda old, new: jax.tree.map(lambda a, b: (1 - α) * a + α * b, old, new),
            lambda old, _: old,
            before.carried["reference"],
            policy["adapters"] if "adapters" in policy else policy["params"],
        )
    return carried


def _whole(
    state: TrainState, batch: PreferenceBatch, pairs: PreferenceBatch, objective: Objective, *, accumulate: int
) -> _Whole:
    w, weight = pairs.weights, jnp.sum(pairs.weights)
    weight = jnp.where(weight > 0, weight, 1.0)  # pairs that are sampled may all be ties: a loss of 0, not of 0 / 0
    kl = mismatched = jnp.zeros(())
    if objective.loss == "kto":
        kl, mismatched = _kl_point(state, batch, objective, accumulate)
    return _Whole(
        weight=weight,
        nll_length=jnp.sum(w * pairs.response_lengths[:, CHOSEN]) / weight,
        chosen=jnp.sum(w * (pairs.response_lengths[:, CHOSEN] > 0)) / weight,
        responses=jnp.sum(w * jnp.sum(scored_lengths(pairs, objective.mask_format_tokens) > 0, axis=1)) / weight,
        kl=kl,
        mismatched=mismatched,
    )


def _kl_point(
    state: TrainState, batch: PreferenceBatch, objective: Objective, accumulate: int
) -> tuple[jax.Array, jax.Array]:
    """KTO's z₀ = max(0, mean over the batch of log π_θ − log π_ref on mismatched pairs), and over how many.

    Scalars, no gradient. Without any the estimate is the least that a divergence can be, 0.
    """
    mismatched = responses_of(batch, MISMATCHED, max(batch.responses.shape[1], MISMATCHED + 1))
    present = mismatched.present
    count = jnp.sum(present.astype(jnp.float32))

    def log_ratio(rows: PreferenceBatch) -> jax.Array:
        reference = reference_of(state, rows, objective)
        assert reference is not None
        return sums_of(state.apply_fn, state.variables, rows, objective).scored - reference

    ratios = jax.lax.stop_gradient(update.map_rows(log_ratio, mismatched, accumulate))
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
        term), kl (KTO's z₀), loss/NAME (of each of several losses, unweighted), pair_weights (mean of WPO's),
        rewards/running_mean (BCO's δ),
        rewards/chosen, rewards/rejected (means of β u and β v), rewards/margins (their difference),
        rewards/accuracies (share of pairs with a strictly larger chosen reward),
        logps/chosen, logps/rejected (means of the sums that the loss compares: of LD-DPO's weighted tokens, without
        masked ones), logps/chosen_change (mean of u: where the reference is the starting policy, the change since step
        0 on these very rows; not where the reference moves, which u is relative to),
        lengths/chosen, lengths/rejected (mean tokens), tokens (in the batch: prompts once, and both responses),
      weights/NAME for those that a batch may leave undefined (of unpaired rows): see `align/figures.py`,
      and rows/nonfinite, int32 [B]: the file row number (`batch.rows`) of each row whose loss or log-probabilities are
      not finite, -1 for all others. Where it names no row though grad_norm is not finite, the backward pass overflowed.

    Raises:
      InputError: the batch lacks what `config` asks for (at trace time).
    """
    objective = config.objective
    pairs = responses_of(batch, CHOSEN, REJECTED + 1)
    whole = _whole(state, batch, pairs, objective, accumulate=objective.accumulate)
    across = _across(state, pairs, objective)

    def values(variables: Any, part: tuple[PreferenceBatch, Any]) -> _Rows:
        return _row_values(state, variables, part[0], whole, objective, part[1])

    def share(part: tuple[PreferenceBatch, Any], rows: _Rows) -> jax.Array:
        return jnp.sum(part[0].weights * rows.loss) / whole.weight

    new_state, rows, metrics = update.descend(state, (pairs, across), values, share, config)
    if state.carried:
        carried = _carried(state, new_state, rows, pairs.present, objective)
        new_state = dataclasses.replace(new_state, carried=carried)
        if "reward_mean" in carried:
            metrics["rewards/running_mean"] = carried["reward_mean"]
    return new_state, metrics | _row_metrics(pairs, rows, whole, objective)


def _sides(batch: PreferenceBatch, rows: _Rows) -> dict[str, tuple[jax.Array, int]]:
    """name -> ([B], of which response) of what is reported of chosen and rejected responses."""
    told = {"rewards": rows.rewards, "logps": rows.policy, "lengths": batch.response_lengths}
    sides = (("chosen", CHOSEN), ("rejected", REJECTED))
    return {f"{name}/{side}": (values[:, k], k) for name, values in told.items() for side, k in sides}


def _row_metrics(batch: PreferenceBatch, rows: _Rows, whole: _Whole, objective: Objective) -> Metrics:
    present = batch.present
    wins = rows.rewards[:, CHOSEN] > rows.rewards[:, REJECTED]
    metrics = update.of_batch(batch, rows.loss, rows.policy)
    metrics |= figures.mean("rewards/accuracies", wins, jnp.all(present, axis=1))
    for name, (values, k) in _sides(batch, rows).items():
        metrics |= figures.mean(name, values, present[:, k])
    metrics |= figures.difference("rewards/margins", "rewards/chosen", "rewards/rejected", metrics)
    chosen, has_chosen = metrics["rewards/chosen"], present[:, CHOSEN]
    if len(rows.terms) > 1:
        for name, values in rows.terms.items():
            metrics[f"loss/{name}"] = masked.total(values, batch.weights > 0) / whole.weight
    if rows.weights is not None:
        metrics |= figures.mean("pair_weights", rows.weights, batch.weights > 0)
    if objective.nll_coefficient > 0 or {"orpo", "sft"} & set(objective.losses):
        lengths = batch.response_lengths[:, CHOSEN].astype(jnp.float32)
        share = lengths if objective.nll_normalization == "token" else jnp.ones_like(lengths)
        nll = masked.total(per_token(rows.nll, lengths) * share, has_chosen) / masked.total(share, has_chosen)
        metrics |= figures.figure("nll_loss", nll, jnp.sum(has_chosen))
    if not (objective.reference_free or objective.moving):
        metrics |= figures.figure("logps/chosen_change", chosen / objective.beta, jnp.sum(has_chosen))
    if objective.loss == "kto":
        metrics |= figures.figure("kl", whole.kl, whole.mismatched)
    return metrics


jit_train_step = update.jit_train(train_step)


def eval_step(state: TrainState, batch: PreferenceBatch, *, config: DPOConfig) -> Metrics:
    """The loss and its parts for each row; nothing is trained.

    Returns:
      Arrays [B]: loss, rewards/chosen, rewards/rejected, logps/chosen, logps/rejected (sums, as in `train_step`),
      lengths/chosen, lengths/rejected (response tokens), nll (of the whole chosen response, in nats, summed), loss/NAME
      of each of several losses, unweighted. Values of filler rows mean nothing. What a loss takes from its whole batch
      (KTO's KL point, `nll_normalization` token, AOT's ranks), it takes from this one; BCO's mean of rewards is that of
      the steps before.
    """
    objective, pairs = config.objective, responses_of(batch, CHOSEN, REJECTED + 1)
    # Without a backward pass there is little to save by splitting.
    whole = _whole(state, batch, pairs, objective, accumulate=1)
    rows = _row_values(state, state.variables, pairs, whole, objective, None, learns=False)
    terms = rows.terms if len(rows.terms) > 1 else {}
    return {
        "loss": rows.loss,
        **{f"loss/{name}": values for name, values in terms.items()},
        **{name: values for name, (values, _) in _sides(pairs, rows).items()},
        "nll": rows.nll,
    }


jit_eval_step = update.jit_eval(eval_step)
