"""What a preference loss takes from other rows of its batch, or from batches before, as constants of each row.

    bco_pair      δ = (n r̄ + Σ_i r_i) / (n + m)        r̄ the mean of the n rewards of the steps before, r_i the m of
                                                      this batch, β (L − R): Jung et al. 2024 (BCO, arXiv 2404.04656)
    aot           (Rc − Rr) of the pair whose rank among them is that of this pair's Lc − Lr among those
    aot_unpaired  v of the row whose v has the rank of this row's u, and u of the row whose u has the rank of its v
                                                      Melnyk et al. 2024 (AOT, arXiv 2406.05882): in one dimension the
                                                      optimal transport of two samples pairs them in order

A rank is one among all rows of the batch that count, over all devices and micro-batches: so these are found before
the batch is split, and the loss of a row is then a function of that row.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dpo_jax import masked
from dpo_jax.config import Objective
from dpo_jax.types import CHOSEN, REJECTED

Carried = Mapping[str, jax.Array]
"""{"reward_mean": r̄, "reward_count": n}, float32 scalars; without any, 0."""


def running_mean(rewards: jax.Array, present: jax.Array, before: Carried) -> dict[str, jax.Array]:
    """δ and n + m of bco_pair as the next `Carried`. `rewards`, `present`: [B, K].

    A reward that is not finite counts as absent, so that it is that row alone whose loss is not.
    """
    mean, count = before.get("reward_mean", jnp.zeros(())), before.get("reward_count", jnp.zeros(()))
    present = present & jnp.isfinite(rewards)
    new = jnp.sum(present.astype(jnp.float32))
    mean += (masked.total(rewards, present) - new * mean) / jnp.maximum(count + new, 1)
    return {"reward_mean": mean, "reward_count": count + new}


def _partners(x: jax.Array, y: jax.Array, real: jax.Array) -> jax.Array:
    """For each row, the `y` whose rank among the real ones is the rank of its `x`; [B] all. Of others any value."""
    ranks = jnp.argsort(jnp.argsort(jnp.where(real, x, jnp.inf)))
    return jnp.sort(jnp.where(real, y, jnp.inf))[ranks]


def of_batch(
    policy: jax.Array,
    reference: jax.Array,
    present: jax.Array,
    objective: Objective,
    before: Carried | None = None,
    *,
    learns: bool = True,
) -> dict[str, jax.Array]:
    """name -> [B], no gradient: what the losses take across rows, as `losses.preference_terms` reads it.

    Args:
      policy, reference: [B, 2], summed log-probabilities of the whole batch's pairs, in nats.
      present: bool [B, 2], responses that are there, in rows that count.
      objective: which losses, and β.
      before: of the steps before, for bco_pair.
      learns: whether this batch counts in bco_pair's mean (not where it is only looked at).
    """
    policy, reference = jax.lax.stop_gradient((policy, reference))
    ratios, real = policy - reference, jnp.all(present, axis=1)
    u, v = ratios[:, CHOSEN], ratios[:, REJECTED]
    found: dict[str, jax.Array] = {}
    if "bco_pair" in objective.losses:
        before = before or {}
        rewards = objective.beta * ratios
        mean = running_mean(rewards, present if learns else jnp.zeros_like(present), before)["reward_mean"]
        found["reward_mean"] = jnp.broadcast_to(mean, u.shape)
    finite = jnp.all(jnp.isfinite(policy) & jnp.isfinite(reference), axis=1)
    ranked = real & finite  # of a row that is not, that row's loss alone is not finite
    if "aot" in objective.losses:
        mine, theirs = (x[:, CHOSEN] - x[:, REJECTED] for x in (policy, reference))
        found["reference_partner"] = _partners(mine, theirs, ranked)
    if "aot_unpaired" in objective.losses:
        found |= {"rejected_partner": _partners(u, v, ranked), "chosen_partner": _partners(v, u, ranked)}
    found |= {name: jnp.where(finite, found[name], jnp.nan) for name in found if name != "reward_mean"}
    return {name: jnp.where(real, value, 0.0) for name, value in found.items()}
