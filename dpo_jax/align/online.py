"""Preferences learnt online: pairs of what the policy itself writes, judged while it learns.

    y_1, ..., y_K ~ π_θ(· | x)           or y_1 ~ π_θ, y_2 ~ an opponent
    y_c = argmax_k r(x, y_k)    y_r = argmin_k r(x, y_k)         no pair where all are equal
    L(θ) = ℓ(y_c, y_r) + α log π_θ(ỹ | x)                        ℓ of `align/losses.py`

Online DPO (Guo et al. 2024, arXiv 2402.04792, Algorithm 1) has K = 2, π_θ on both sides and α = 0. The opponent is

    reference   ỹ ~ π_ref: with α > 0 it is XPO (Xie et al. 2024, arXiv 2405.21046, Algorithm 1), whose last term makes
                what the reference writes less likely: exploration;
    mixture     y_2 ~ π_mix, token by token π_mix(v) ∝ π_θ(v)^(1−a) π_ref(v)^a (Nash-MD, Munos et al. 2023,
                arXiv 2312.00886, section 6; `sample/mixture.py`).

The step is `dpo.train_step`: pairs come with the reference's log-probabilities, α with `PreferenceBatch.logp_weights`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax.types import PreferenceBatch

OPPONENT = 1
"""Place on the K axis of a group of the response that another than the policy wrote."""


@struct.dataclass
class Choice:
    """Which responses of each group make its pair.

    Attributes:
      chosen, rejected: int32 [B], places on the K axis; of equal scores the first that was drawn.
      tie: bool [B], whether all scores are equal, so that there is no pair.
    """

    chosen: jax.Array
    rejected: jax.Array
    tie: jax.Array


def best_and_worst(scores: jax.Array) -> Choice:
    """The pair of each group by its scores, float [B, K]."""
    chosen, rejected = jnp.argmax(scores, axis=1), jnp.argmin(scores, axis=1)
    tie = jnp.max(scores, axis=1) == jnp.min(scores, axis=1)
    return Choice(chosen.astype(jnp.int32), rejected.astype(jnp.int32), tie)


def pairs_of(groups: PreferenceBatch, choice: Choice, *, exploration: float | None = None) -> PreferenceBatch:
    """The pairs [B, 2, R] of groups [B, K, R] with `reference_logps`; a tie is a filler row.

    `exploration`: XPO's α, for the response at the place OPPONENT, wherever in the pair it came to stand.
    """
    places = jnp.stack([choice.chosen, choice.rejected], axis=1)

    def taken(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)

    return dataclasses.replace(
        groups,
        responses=taken(groups.responses),
        response_lengths=taken(groups.response_lengths),
        reference_logps=None if groups.reference_logps is None else taken(groups.reference_logps),
        weights=jnp.where(choice.tie, 0.0, groups.weights),
        rows=jnp.where(choice.tie, -1, groups.rows),
        logp_weights=None if exploration is None else jnp.where(places == OPPONENT, jnp.float32(exploration), 0.0),
    )
