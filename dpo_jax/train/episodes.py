"""Rollouts of several turns, and held-out ones: the policy learns from its own words in conversations.

A rollout's response is everything behind the first messages; `Rollout.own` tells the policy's tokens from those that
the environment's turns and the template put between them, which are context and carry no loss. What a turn was rewarded
with stands on its last token (`Rollout.step_scores`). How episodes are played: `train/playing.py`.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from dpo_jax import mesh as meshes
from dpo_jax.data.sets.prompts import PromptBatch, PromptDataset, PromptLoader
from dpo_jax.files.log import Row
from dpo_jax.files.sample_log import SampleLog
from dpo_jax.state import TrainState
from dpo_jax.train.answered import Policy
from dpo_jax.train.heldout_prompts import Answers, HeldOut
from dpo_jax.train.playing import Player, check_beginnings, figures
from dpo_jax.train.rollouts import Rollouts
from dpo_jax.types import Rollout


class EpisodeRollouts(Rollouts):
    """`Rollouts` whose responses are conversations with an environment, which scores them."""

    def __init__(
        self,
        policy: Policy,
        data: PromptDataset,
        loader: PromptLoader,
        samples: SampleLog,
        *,
        player: Player,
        **options: Any,
    ):
        """Args: as `Rollouts`, with a player in place of a scorer."""
        super().__init__(policy, data, loader, _unscored, samples, **options)
        self._player = player

    def prepare(self, state: TrainState, batch: PromptBatch) -> tuple[Rollout, Row]:
        """Episodes that begin with the rows of `batch`, with all that the step is to read; and figures.

        Beside those of `Rollouts`: those of `playing.figures`.
        """
        clock = [time.perf_counter()]
        key, prompts = jax.random.fold_in(self._key, batch.step), [self._data.prompts[i] for i in batch.indices]
        episodes, scoring = self._player.play(self._policy.prepared(state), key, prompts, batch.rows.tolist())
        clock.append(time.perf_counter())
        if self._config.layout != "separate":
            check_beginnings(episodes, self._config.group)
        price = np.full(len(episodes), self.kl_coefficient, np.float32)
        rollout = self._measured(state, self._player.rollout(episodes, kl_coefficient=price))
        clock.append(time.perf_counter())
        kl = np.asarray(rollout.logps - rollout.reference_logps, np.float64).sum(axis=1)
        self._samples.append(batch.step + 1, (e.told(one) for e, one in zip(episodes, kl.tolist(), strict=True)))
        self._move_kl_coefficient(float(kl.mean()))
        playing, measuring = np.diff(clock).tolist()
        seconds: Row = {
            "seconds_sampling": playing - scoring,
            "seconds_scoring": scoring,
            "seconds_measuring": measuring,
        }
        return rollout, figures(episodes) | seconds

    def _measured(self, state: TrainState, rollout: Rollout) -> Rollout:
        measured = super()._measured(state, rollout)
        assert rollout.own is not None, "episodes say whose tokens are whose"
        reference: Any = np.where(rollout.own, measured.reference_logps, 0.0)
        return dataclasses.replace(measured, reference_logps=reference)


def _unscored(*_: Any) -> Any:
    """Stands where `Rollouts` has a scorer: episodes bring their scores."""
    raise AssertionError("episodes are scored by their environment")


class HeldOutEpisodes(HeldOut):
    """Plays an episode, or several, from every held-out row, and says what came out: `evaluate` of `loop.fit`."""

    def __init__(self, *args: Any, player: Player, shares: bool, **options: Any):
        """Args: as `HeldOut`; who plays; whether a prompt is computed once for its episodes."""
        super().__init__(*args, **options)
        self._player, self._shares = player, shares

    def _answers(self, state: TrainState) -> Answers:
        weights, at = self._policy.prepared(state), np.repeat(np.arange(len(self._data)), self._samples)
        rows = self._data.row_numbers[at].tolist()
        episodes, _ = self._player.play(weights, self._key, [self._data.prompts[i] for i in at], rows)
        del weights
        if self._shares:
            check_beginnings(episodes, self._samples)
        rollout = self._player.rollout(episodes)
        at_once, parts = self._piece * self._samples, []
        for first in range(0, len(at), at_once):
            own = np.resize(np.arange(first, min(first + at_once, len(at))), at_once)
            part = meshes.put_batch(self._policy.mesh, jax.tree.map(lambda x: x[own], rollout))  # noqa: B023 - used at once
            reference, old, _ = jax.device_get(self._measure(state, self._reference, part))
            parts.append((reference, part.sampler_logps if old is None else old))
        reference, logps = (
            np.concatenate([np.asarray(x) for x in side])[: len(at)] for side in zip(*parts, strict=True)
        )
        own = np.asarray(rollout.own)
        stops = self._policy.sample.stop_tokens
        drawn = [e.own[:-1] if e.ids[-1] in stops else e.own for e in episodes]
        return Answers(
            mask=own,
            logps=logps,
            reference=reference,
            ended=np.asarray(rollout.ended),
            bodies=[
                [t for t, mine in zip(e.ids, keep, strict=False) if mine]
                for e, keep in zip(episodes, drawn, strict=True)
            ],
            scores=np.asarray(rollout.scores),
            parts={},
            told=lambda i, kl: episodes[i].told(kl),
            figures=figures(episodes),
        )
