"""Between two PPO updates: sample responses, measure them, score them. It gives the step its batch.

What is drawn is a function of the seed, the iteration and the row alone, so a resumed run draws the same texts. The one
thing that goes on from iteration to iteration is β, where a controller moves it; it is saved with the position in the
data.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.align import ppo
from dpo_jax.align.advantages import flat_groups, next_kl_coefficient
from dpo_jax.config import PPOConfig
from dpo_jax.data.sets.prompts import PromptBatch, PromptDataset, PromptLoader
from dpo_jax.files.log import Row
from dpo_jax.files.sample_log import SampleLog
from dpo_jax.judge.rewards.scores import Responses, Scores, part_figures, told_parts
from dpo_jax.judge.rewards.step_scores import Steps
from dpo_jax.model.llama import Llama
from dpo_jax.state import TrainState
from dpo_jax.train.answered import Answered, Policy, with_reference
from dpo_jax.train.rollout_packing import RolloutPacking
from dpo_jax.types import Rollout

Scorer = Callable[[Responses], Scores]


class Rollouts(Answered):
    """A loader of prompts (see `loop.Loader`) whose `prepare` makes rollouts of them."""

    def __init__(
        self,
        policy: Policy,
        data: PromptDataset,
        loader: PromptLoader,
        scorer: Scorer,
        samples: SampleLog,
        *,
        reference: Mapping[str, Any],
        config: PPOConfig,
    ):
        """Args:
        policy: who answers; its seed and vocabulary are those of `config`.
        data, loader: the prompts, and their order.
        scorer: the reward, `judge.rewards.scores.Judges`.
        samples: where the texts are written down.
        reference: what the reference policy has in place of the trained weights: {"params": ...} under full
            fine-tuning, {"adapters": ...} or {} under LoRA.
        config: of the PPO step.
        """
        super().__init__(policy, data, loader, group=config.group)
        self._scorer, self._samples, self._reference, self._config = scorer, samples, reference, config
        self._measure = jit_measure(policy.model, config, policy.mesh)
        self._packing = RolloutPacking(config, policy.mesh, policy.piece)
        self.kl_coefficient = float(np.float32(config.kl_price))

    def get_state(self) -> dict[str, Any]:
        """The position in the prompts, and β of the next iteration."""
        return {**super().get_state(), "kl_coefficient": self.kl_coefficient}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position."""
        super().set_state(state)
        self.kl_coefficient = float(state["kl_coefficient"])

    # ---------------------------------------------------------------- rollouts

    def prepare(self, state: TrainState, batch: PromptBatch) -> tuple[Rollout, Row]:
        """Responses to the prompts of `batch` by the policy of `state`, with all that the step is to read.

        Returns the rollout, as host arrays that are the same in every process, and figures of the iteration.
        """
        clock = [time.perf_counter()]
        rollout = self._sampled(state, batch)
        clock.append(time.perf_counter())
        texts = self._policy.texts(rollout)
        scores, parts, steps = self._scorer(Responses.to(self._data, batch.indices, texts))
        rollout = dataclasses.replace(rollout, scores=scores)
        rollout = dataclasses.replace(rollout, step_scores=self._policy.step_scores(rollout, texts, steps))
        steps = steps or [[] for _ in texts]
        clock.append(time.perf_counter())
        more: Row = {}
        if self._config.settled.zero_variance == "resample":
            rollout, texts, more["rollout/resampled"] = self._again(state, batch, rollout, texts, parts, steps)
        if self._config.estimator == "greedy":
            rollout = dataclasses.replace(rollout, greedy_scores=self._greedy(state, batch))
        clock.append(time.perf_counter())
        rollout = self._measured(state, rollout)
        clock.append(time.perf_counter())
        kl = np.asarray(rollout.logps - rollout.reference_logps, np.float64).sum(axis=1)
        self._write(batch, texts, rollout, parts, steps, kl)
        self._move_kl_coefficient(float(kl.mean()))
        first, scoring, further, measuring = np.diff(clock).tolist()
        figures: Row = {"seconds_sampling": first + further, "seconds_measuring": measuring, "seconds_scoring": scoring}
        return rollout, figures | more | part_figures(parts)

    def _sampled(self, state: TrainState, batch: PromptBatch) -> Rollout:
        """Responses and the behaviour policy's log-probabilities."""
        rows = len(batch.rows)
        key = jax.random.fold_in(self._key, batch.step)
        drawn = self._drawn(self._policy.prepared(state), batch, np.arange(rows), key)
        price = np.full(rows, self.kl_coefficient, np.float32)
        return self._policy.written(batch.prompts, batch.prompt_lengths, batch.rows, *drawn, kl_coefficient=price)

    def _again(
        self,
        state: TrainState,
        batch: PromptBatch,
        rollout: Rollout,
        texts: list[str],
        parts: dict[str, np.ndarray],
        steps: Steps,
    ) -> tuple[Rollout, list[str], float]:
        """The rollout with other responses in place of those of groups without variance, and the share sampled again.

        The same prompts are answered again, `resample_rounds` times at most. DAPO's dynamic sampling draws other
        prompts instead; here a run reads its prompts in one order, whatever the scores.
        """
        first, weights = 0.0, self._policy.prepared(state)
        for attempt in range(self._config.settled.resample_rounds):
            flat = np.flatnonzero(np.asarray(flat_groups(rollout, self._config.group)))
            first = first or len(flat) / len(texts)
            if not len(flat):
                break
            key = jax.random.fold_in(jax.random.fold_in(self._key, batch.step), attempt + 1)
            tokens, mask, logps = self._drawn(weights, batch, flat, key)
            new = dataclasses.replace(
                jax.tree.map(lambda x: x[flat], rollout),  # noqa: B023 - used at once
                responses=tokens,
                response_lengths=mask.sum(axis=1).astype(np.int32),
                ended=self._policy.ended(tokens, mask),
                sampler_logps=logps,
            )
            written = self._policy.texts(new)
            scores, own, of_steps = self._scorer(Responses.to(self._data, batch.indices[flat], written))
            new = dataclasses.replace(new, scores=scores, step_scores=self._policy.step_scores(new, written, of_steps))
            rollout, new = _alike(rollout, new), _alike(new, rollout)
            rollout = jax.tree.map(lambda x, y: _with_rows(x, flat, y), rollout, new)  # noqa: B023 - used at once
            for i, text, ends in zip(flat, written, of_steps or [[] for _ in written], strict=True):
                texts[i], steps[i] = text, ends
            for name, part in own.items():
                parts[name] = _with_rows(parts[name], flat, part)
        return rollout, texts, first

    def _greedy(self, state: TrainState, batch: PromptBatch) -> np.ndarray:
        """The score of the greedy response to each row's prompt, float32 [B]: ReMax's baseline."""
        policy, group, rows = self._policy, self._config.group, np.arange(len(batch.rows))
        drawn = self._drawn(policy.prepared(state), batch, rows, self._key, greedy=True)
        written = policy.written(batch.prompts[::group], batch.prompt_lengths[::group], batch.rows[::group], *drawn)
        scores = self._scorer(Responses.to(self._data, batch.indices[::group], policy.texts(written)))
        return np.repeat(scores.total, group)

    def _measured(self, state: TrainState, rollout: Rollout) -> Rollout:
        """The rollout with the reference's log-probabilities, the policy's own and the values, packed for the step."""
        measure = partial(self._measure, state, self._reference)
        order, parts = self._packing.pieces(rollout)
        back = np.argsort(order)
        found = self._policy.measured(measure, parts)
        logps, old, values = (None if x is None else x[back] for x in found)
        rollout = dataclasses.replace(rollout, reference_logps=logps, old_logps=old, values=values)
        return self._packing.with_updates(rollout, int(jax.device_get(state.step)))

    def _write(
        self,
        batch: PromptBatch,
        texts: Sequence[str],
        rollout: Rollout,
        parts: Mapping[str, np.ndarray],
        steps: Steps,
        kl: np.ndarray,
    ) -> None:
        self._samples.append(
            batch.step + 1,
            (
                {
                    "row": int(rollout.rows[i]),
                    "prompt": self._data.prompts[index].plain,
                    "response": texts[i],
                    "score": float(rollout.scores[i]),
                    **told_parts(parts, i),
                    **({"steps": steps[i]} if steps[i] else {}),
                    "kl": float(kl[i]),
                    "tokens": int(rollout.response_lengths[i]),
                    "ended": bool(rollout.ended[i]),
                }
                for i, index in enumerate(batch.indices)
            ),
        )

    def _move_kl_coefficient(self, kl: float) -> None:
        if self._config.kl_target is None:
            return
        horizon = self._config.settled.kl_horizon
        responses, target = self._loader.batch_size, self._config.kl_target
        self.kl_coefficient = float(
            next_kl_coefficient(self.kl_coefficient, kl, responses, target=target, horizon=horizon)
        )


def _alike(one: Rollout, other: Rollout) -> Rollout:
    """`one`, with scores of steps where the other has some."""
    if one.step_scores is not None or other.step_scores is None:
        return one
    return dataclasses.replace(one, step_scores=np.zeros(one.responses.shape, np.float32))


def _with_rows(x: np.ndarray, rows: np.ndarray, new: np.ndarray) -> np.ndarray:
    """`x` with `new` in place of its `rows`."""
    x = np.array(x)
    x[rows] = new
    return x


def jit_measure(
    model: Llama, config: PPOConfig, mesh: Mesh, *, group: int | None = None, stores: bool = False
) -> meshes.Replicated:
    """(state, reference, rollout) -> the reference's log-probabilities, and what `ppo.measure` stores; each [B, R].

    `group`: neighbouring rows that answer one prompt; not given: `config.group`. `stores`: see `ppo.measure`.
    """

    def measure(
        state: TrainState, reference: Mapping[str, Any], rollout: Rollout
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        variables = with_reference(state, reference)
        logps = ppo.reference_logps(model.apply, variables, rollout, config, group=group)
        measured = ppo.measure(state, rollout, config=config, group=group, stores=stores)
        return logps, measured.old_logps, measured.values

    return meshes.Replicated(measure, mesh)
