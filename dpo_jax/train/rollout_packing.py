"""The windows of what has been sampled, planned on the host: for measuring it, and for the step's updates.

Where groups do not divide over the windows (one for each micro-batch of each device), nothing is packed, and prompts
are shared as far as they can be (`ppo.sharing`).
"""

import logging
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.align import ppo
from dpo_jax.config import Layout, PPOConfig
from dpo_jax.data.sets.batches import Shape
from dpo_jax.data.sets.group_packing import Packing, WindowShape
from dpo_jax.data.sets.sampled_windows import Packed, packed
from dpo_jax.train.answered import rows_of
from dpo_jax.train.row_data import packing_of
from dpo_jax.types import PreferenceBatch, Rollout, Updates

_log = logging.getLogger(__name__)


@dataclass
class GroupPacking:
    """How a run packs groups of responses, and which shapes it had so far.

    Attributes:
      layout: packs or does not.
      mesh: for whose devices.
    """

    layout: Layout
    mesh: Mesh
    _known: dict[str, set[WindowShape]] = field(default_factory=dict)

    def of(self, groups: int, k: int, *, accumulate: int = 1) -> Packing | None:
        """How a batch of so many groups of k responses is packed; None: it is not."""
        packing = packing_of(self.layout, self.mesh, k, accumulate=accumulate, pairs=False)
        return None if packing is None or groups % packing.windows else packing

    def plan(self, what: str, batch: PreferenceBatch, batches: np.ndarray, packing: Packing) -> Packed:
        """The windows of batches, int [U, n], of the groups of `batch`, host arrays.

        The log tells of a shape that nothing is compiled for yet; `what`: who takes the batches.
        """
        sizes: Shape = batch.prompts.shape[1], batch.responses.shape[2]
        plan = packed(np.asarray(batch.prompt_lengths), np.asarray(batch.response_lengths), sizes, batches, packing)
        known = self._known.setdefault(what, set())
        if plan.shape not in known:
            known.add(plan.shape)
            _log.info(
                "%s: a program for windows of %d tokens, %d of them predicted (number %d of this run; %.0f%% of these"
                " places are real)",
                what,
                plan.shape.size,
                plan.shape.reads,
                len(known),
                100 * plan.real,
            )
        return plan

    def pieces(self, batch: PreferenceBatch, at_once: int) -> tuple[np.ndarray, list[PreferenceBatch]]:
        """A batch in pieces of so many groups to be measured, and which these are, int [B], one behind the other."""
        order = np.arange(len(batch.rows)).reshape(-1, at_once)
        packing = self.of(at_once, batch.responses.shape[1])
        if packing is None:
            return order.reshape(-1), [rows_of(batch, own) for own in order]
        plan = self.plan("measuring", batch, order, packing)
        parts = [replace(rows_of(batch, x), windows=(rows_of(plan.windows, i),)) for i, x in enumerate(plan.groups)]
        return plan.groups.reshape(-1), parts

    def whole(self, batch: PreferenceBatch, accumulate: int) -> PreferenceBatch:
        """A batch for one update, its rows in the order of its windows."""
        rows, k = batch.response_lengths.shape
        packing = self.of(rows, k, accumulate=accumulate)
        if packing is None:
            return batch
        plan = self.plan("updates", batch, np.arange(rows)[None], packing)
        return replace(rows_of(batch, plan.groups[0]), windows=(rows_of(plan.windows, 0),))


class RolloutPacking:
    """How a run packs its rollouts."""

    def __init__(self, config: PPOConfig, mesh: Mesh, piece: int):
        """`config`: of the PPO step; `piece`: responses measured at once."""
        self._config, self._piece, self._packing = config, piece, GroupPacking(config.layout, mesh)

    def pieces(self, rollout: Rollout) -> tuple[np.ndarray, list[Rollout]]:
        """The rollout in pieces to be measured, and which of its rows they hold, int [B], one behind the other."""
        k = self._config.group
        order = np.arange(len(rollout.rows)).reshape(-1, self._piece)
        packing = self._packing.of(self._piece // k, k)
        if packing is None:
            return order.reshape(-1), [rows_of(rollout, own) for own in order]
        plan = self._packing.plan("measuring", rollout.groups(k), order[:, ::k] // k, packing)
        order = _rows(plan.groups, k)
        parts = [replace(rows_of(rollout, x), windows=(rows_of(plan.windows, i),)) for i, x in enumerate(order)]
        return order.reshape(-1), parts

    def with_updates(self, rollout: Rollout, step: int) -> Rollout:
        """The rollout with the windows of the updates that the step of a state at `step` makes of it."""
        config, k, rows = self._config, self._config.group, len(rollout.rows)
        groups, rest = divmod(rows // config.minibatches, k)
        packing = None if rest else self._packing.of(groups, k, accumulate=config.accumulate)
        if packing is None:
            return rollout
        batches = np.asarray(ppo.order(config, step, rows))[:, ::k] // k
        plan = self._packing.plan("updates", rollout.groups(k), batches, packing)
        arrays = {"rows": _rows(plan.groups, k).astype(np.int32), "windows": plan.windows}
        return replace(rollout, updates=Updates(**jax.tree.map(lambda x: np.swapaxes(x, 0, 1), arrays)))


def _rows(groups: np.ndarray, k: int) -> np.ndarray:
    """int [U, n k]: the rows of groups, int [U, n]."""
    return (groups[..., None] * k + np.arange(k)).reshape(len(groups), -1)
