"""Summed log-probabilities of the responses of pairs, under the policy and under its reference: what losses compare.

Which tokens a sum is over, and how much each of them counts, is decided here, for policy and reference alike; where the
reference comes from is told in `align/dpo.py`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax import masked
from dpo_jax.align.losses import per_token
from dpo_jax.config import DPOConfig, Objective
from dpo_jax.errors import InputError
from dpo_jax.model.groups import response_logps, response_logps_and_collisions
from dpo_jax.state import TrainState
from dpo_jax.types import REJECTED, PreferenceBatch, Windows

Apply = Callable[..., Any]


def responses_of(batch: PreferenceBatch, first: int, last: int) -> PreferenceBatch:
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
        windows=of_responses(batch.windows, first, last),
    )


def of_responses(windows: tuple[Windows, ...] | None, first: int, last: int) -> tuple[Windows, ...] | None:
    """Those windows that hold these responses alone, for a batch that is cut to them."""
    those = [one for one in windows or () if (one.first, one.last) == (first, last)]
    found = [dataclasses.replace(one, first=0, last=last - first) for one in those]
    if windows is not None and not found:
        held = [(one.first, one.last) for one in windows]
        raise ValueError(f"responses {first} to {last - 1} are packed nowhere: the windows hold {held}")
    return tuple(found) or None


def _scored(batch: PreferenceBatch, mask_format_tokens: bool) -> jax.Array | None:
    """bool [B, K, R]: the response tokens in the preference sums; None for all of them."""
    if not mask_format_tokens:
        return None
    if batch.format_masks is None:
        raise InputError("mask_format_tokens needs batches with format_masks (data made with format masks)")
    return batch.response_mask & ~batch.format_masks


def scored_lengths(batch: PreferenceBatch, mask_format_tokens: bool) -> jax.Array:
    """[B, K]: the tokens in each preference sum."""
    scored = _scored(batch, mask_format_tokens)
    return batch.response_lengths if scored is None else jnp.sum(scored, axis=-1)


@struct.dataclass
class Sums:
    """Of each response, [B, K]: log-probability of what is scored, and of all its tokens; and log w of WPO, or None."""

    scored: jax.Array
    whole: jax.Array
    log_weights: jax.Array | None = None


def sums_of(
    apply_fn: Apply, variables: Any, batch: PreferenceBatch, objective: Objective, *, weighted: bool = False
) -> Sums:
    """`weighted`: with WPO's weights."""
    α, k = objective.ld_alpha, batch.responses.shape[1]
    if α < 1 and k != REJECTED + 1:
        raise InputError(f"ld_alpha compares the two responses of a pair: the batch has {k} responses a prompt")
    how: dict[str, Any] = {"layout": objective.layout, "head_budget_bytes": objective.head_budget_bytes}
    log_weights = None
    if weighted:
        logps, collisions = response_logps_and_collisions(apply_fn, variables, batch, **how)
        surplus = jnp.sum(jax.lax.stop_gradient(logps) - collisions, axis=-1)
        log_weights = per_token(surplus, batch.response_lengths)
    else:
        logps = response_logps(apply_fn, variables, batch, **how)
    whole = jnp.sum(logps, axis=-1)
    scored = _scored(batch, objective.mask_format_tokens)
    sums = whole if scored is None else masked.total(logps, scored, axis=-1)
    if α < 1:
        shorter = jnp.min(batch.response_lengths, axis=1)
        beyond = (jnp.arange(batch.responses.shape[2]) >= shorter[:, None, None]) & batch.response_mask
        beyond = beyond if scored is None else beyond & scored
        sums -= (1 - α) * masked.total(logps, beyond, axis=-1)
    return Sums(sums, whole, log_weights)


def scored_sums(apply_fn: Apply, variables: Any, batch: PreferenceBatch, objective: Objective) -> jax.Array:
    """What `reference_logps` gives, by the objective of a step."""
    if batch.windows is not None and len(batch.windows) > 1:
        spans = [responses_of(batch, one.first, one.last) for one in batch.windows]
        return jnp.concatenate([scored_sums(apply_fn, variables, x, objective) for x in spans], axis=1)
    return sums_of(apply_fn, variables, batch, objective).scored


def reference_logps(apply_fn: Apply, variables: Any, batch: PreferenceBatch, *, config: DPOConfig) -> jax.Array:
    """Summed log-probability of each of the K responses, float32 [B, K], in nats, as `train_step` wants it cached.

    Over the tokens that the preference term scores (without format tokens where `config` masks them), as it weighs them
    (LD-DPO: K must be 2).

    Raises:
      InputError: with LD-DPO, K is not 2.
    """
    return scored_sums(apply_fn, variables, batch, config.objective)


def reference_of(state: TrainState, batch: PreferenceBatch, objective: Objective) -> jax.Array | None:
    """[B, K] summed log-probabilities under the reference policy, no gradient; None where the loss has none."""
    if objective.reference_free:
        return None
    if objective.reference == "cached":
        if batch.reference_logps is None:
            raise InputError(
                f'loss {objective.loss} with reference "cached": the batch has no reference_logps; fill them in with '
                'reference_logps, or use reference "live"'
            )
        sums = batch.reference_logps
    else:
        params, adapters = None, {}
        if "reference" in state.carried and "params" in state.frozen:
            params, adapters = state.frozen["params"], {"adapters": state.carried["reference"]}
        elif "reference" in state.carried:
            params = state.carried["reference"]
        elif "reference" in state.frozen:
            params = state.frozen["reference"]
        elif "params" in state.frozen:
            params = state.frozen["params"]
        else:
            raise InputError('reference "live": the state holds no reference policy; make it with this config')
        sums = scored_sums(state.apply_fn, {"params": params, **adapters}, batch, objective)
    return jax.lax.stop_gradient(masked.select(sums, batch.present))
