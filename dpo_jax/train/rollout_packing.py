"""The windows of a rollout, planned on the host when it has been sampled: for measuring it, and for the step's updates.

Where groups do not divide over the windows (one for each micro-batch of each device), nothing is packed, and prompts
are shared as far as they can be (`ppo.sharing`).
"""

import logging
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.align import ppo
from dpo_jax.config import PPOConfig
from dpo_jax.data.sets.group_packing import Packing, WindowShape
from dpo_jax.data.sets.sampled_windows import Packed, packed
from dpo_jax.train.answered import rows_of
from dpo_jax.train.row_data import packing_of
from dpo_jax.types import Rollout, Updates

_log = logging.getLogger(__name__)


@dataclass
class RolloutPacking:
    """How a run packs its rollouts.

    Attributes:
      config: of the PPO step.
      mesh: for whose devices.
      piece: responses measured at once.
    """

    config: PPOConfig
    mesh: Mesh
    piece: int
    _known: dict[str, set[WindowShape]] = field(default_factory=dict)

    def pieces(self, rollout: Rollout) -> tuple[np.ndarray, list[Rollout]]:
        """The rollout in pieces to be measured, and which of its rows they hold, int [B], one behind the other."""
        rows, group = len(rollout.rows), self.config.group
        packing = self._packing(self.piece, 1)
        if packing is None:
            order = np.arange(rows).reshape(-1, self.piece)
            return order.reshape(-1), [rows_of(rollout, own) for own in order]
        groups = np.arange(rows // group).reshape(-1, self.piece // group)
        plan = self._told("measuring", packed(rollout, groups, packing, group))
        parts = [replace(rows_of(rollout, x), windows=(rows_of(plan.windows, i),)) for i, x in enumerate(plan.rows)]
        return plan.rows.reshape(-1), parts

    def with_updates(self, rollout: Rollout, step: int) -> Rollout:
        """The rollout with the windows of the updates that the step of a state at `step` makes of it."""
        config, rows = self.config, len(rollout.rows)
        packing = self._packing(rows // config.minibatches, config.accumulate)
        if packing is None:
            return rollout
        batches = np.asarray(ppo.order(config, step, rows))[:, :: config.group] // config.group
        plan = self._told("updates", packed(rollout, batches, packing, config.group))
        arrays = {"rows": plan.rows.astype(np.int32), "windows": plan.windows}
        return replace(rollout, updates=Updates(**jax.tree.map(lambda x: np.swapaxes(x, 0, 1), arrays)))

    def _packing(self, rows: int, accumulate: int) -> Packing | None:
        """How batches of so many rows are packed; None: they are not."""
        group = self.config.group
        packing = packing_of(self.config.layout, self.mesh, group, accumulate=accumulate, pairs=False)
        return None if packing is None or rows % (group * packing.windows) else packing

    def _told(self, what: str, plan: Packed) -> Packed:
        """`plan`, with a line in the log where it has a shape that nothing is compiled for yet."""
        known = self._known.setdefault(what, set())
        if plan.shape not in known:
            known.add(plan.shape)
            _log.info(
                "%s: a program for windows of %d tokens, %d of them predicted (shape %d of this run; %.0f%% of this"
                " rollout's places are real)",
                what,
                plan.shape.size,
                plan.shape.reads,
                len(known),
                100 * plan.real,
            )
        return plan
