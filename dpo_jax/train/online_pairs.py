"""Between two updates of online DPO: sample responses, score them, pair them. It gives the step its batch."""

import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.align import dpo, online, ppo
from dpo_jax.config import DPOConfig, OnlineConfig
from dpo_jax.data.sets.prompts import PromptBatch, PromptDataset, PromptLoader
from dpo_jax.files.log import Row
from dpo_jax.files.sample_log import SampleLog
from dpo_jax.judge.rewards.scores import Responses, part_figures, told_parts
from dpo_jax.model.groups import response_logps
from dpo_jax.model.llama import Llama
from dpo_jax.sample import is_narrow
from dpo_jax.state import TrainState
from dpo_jax.train.answered import Answered, Policy, with_reference
from dpo_jax.train.rollout_packing import GroupPacking
from dpo_jax.train.rollouts import Scorer
from dpo_jax.types import PreferenceBatch, Rollout

_OPPONENT = 0x0990  # sets the opponent's draws apart from the policy's


class OnlinePairs(Answered):
    """A loader of prompts (see `loop.Loader`) whose `prepare` makes a batch of pairs of them."""

    def __init__(
        self,
        policy: Policy,
        data: PromptDataset,
        loader: PromptLoader,
        scorer: Scorer,
        samples: SampleLog,
        *,
        reference: Mapping[str, Any],
        config: OnlineConfig,
        step: DPOConfig,
    ):
        """Args: as `Rollouts` has them, and:
        config: who writes, and how pairs are made.
        step: of the DPO step.
        """
        super().__init__(policy, data, loader, group=config.samples)
        self._scorer, self._samples, self._reference = scorer, samples, reference
        self._config, self._step = config, step
        self._measure = jit_sums(policy.model, step, policy.mesh, narrow=is_narrow(policy.sample))
        self._packing = GroupPacking(step.layout, policy.mesh)

    def prepare(self, state: TrainState, batch: PromptBatch) -> tuple[PreferenceBatch, Row]:
        """Pairs of responses to the prompts of `batch`, a filler row for each prompt without a pair.

        Returns the batch, as host arrays that are the same in every process, and figures of the iteration under the
        names of TRL's OnlineDPOTrainer, over the policy's own responses: objective/kl (nats a response at temperature
        1), objective/entropy, objective/scores, objective/non_score_reward, objective/rlhf_reward,
        val/contain_eos_token; over prompts: objective/scores_margin (0 for a tie); beta; and rollout/ties, the share of
        prompts without a pair, rollout/wins, the share of pairs that the policy's response wins against an opponent's.
        """
        clock, k = [time.perf_counter()], self._group
        tokens, mask, logps = self._responses(state, batch)
        clock.append(time.perf_counter())
        written = self._policy.written(batch.prompts, batch.prompt_lengths, batch.rows, tokens, mask, logps)
        lengths, ended = np.asarray(written.response_lengths), np.asarray(written.ended)
        responses = Responses.to(self._data, batch.indices, self._policy.texts(written))
        scores, parts, _ = self._scorer(responses)
        if self._config.missing_eos_penalty is not None:
            scores = np.where(ended, scores, scores - np.float32(self._config.missing_eos_penalty))
        clock.append(time.perf_counter())
        groups = written.groups(k)
        measure = partial(self._measure, state, self._reference)
        order, pieces = self._packing.pieces(groups, self._policy.piece // k)
        (reference, policy), back = self._policy.measured(measure, pieces), np.argsort(order)
        reference = reference[back]
        clock.append(time.perf_counter())
        groups = dataclasses.replace(groups, reference_logps=reference)
        choice = online.best_and_worst(jnp.asarray(scores.reshape(-1, k)))
        pairs = jax.device_get(online.pairs_of(groups, choice, exploration=self._config.exploration))
        choice = jax.device_get(choice)
        policy = logps.sum(axis=1, dtype=np.float64).reshape(-1, k) if policy is None else policy[back]
        told = _Written(responses, scores, parts, policy - reference, lengths, ended)
        self._write(batch.step + 1, told, choice)
        own = slice(None) if self._config.opponent == "policy" else slice(0, online.OPPONENT)
        figures = self._figures(scores.reshape(-1, k), policy, reference, ended.reshape(-1, k), choice, own)
        sampling, scoring, measuring = np.diff(clock).tolist()
        figures |= {"seconds_sampling": sampling, "seconds_measuring": measuring, "seconds_scoring": scoring}
        return self._packing.whole(pairs, self._step.accumulate), figures | part_figures(parts)

    def _responses(self, state: TrainState, batch: PromptBatch) -> tuple[np.ndarray, ...]:
        """Tokens, mask and log-probabilities at temperature 1 (of an opponent: any) of all responses, [B K, R]."""
        weights, rows = self._policy.prepared(state), np.arange(len(batch.rows))
        key, opponent = jax.random.fold_in(self._key, batch.step), self._config.opponent
        if opponent == "policy":
            return self._drawn(weights, batch, rows, key, plain=True)
        own = self._drawn(weights, batch, rows, key, each=1, plain=True)
        against, reference = jax.random.fold_in(key, _OPPONENT), with_reference(state, self._reference)
        if opponent == "reference":
            del weights
            other = self._drawn(self._policy.prepared(reference), batch, rows, against, each=1, plain=True)
        else:
            mixed = (self._policy.prepared(reference), self._config.settled.mixture)
            other = self._drawn(weights, batch, rows, against, each=1, mixed=mixed)
        both = (np.stack(x, axis=1) for x in zip(own, other, strict=True))
        return tuple(x.reshape(-1, x.shape[-1]) for x in both)

    def _figures(
        self,
        scores: np.ndarray,
        policy: np.ndarray,
        reference: np.ndarray,
        ended: np.ndarray,
        choice: online.Choice,
        own: slice,
    ) -> Row:
        """See `prepare`; arrays [B, K], of which `own` are the policy's."""
        beta = self._step.objective.beta
        kl, score = float((policy - reference)[:, own].mean()), float(scores[:, own].mean(dtype=np.float64))
        found: Row = {
            "objective/kl": kl,
            "objective/entropy": float(-policy[:, own].mean()),
            "objective/scores": score,
            "objective/scores_margin": float((scores.max(axis=1) - scores.min(axis=1)).mean(dtype=np.float64)),
            "objective/non_score_reward": -beta * kl,
            "objective/rlhf_reward": score - beta * kl,
            "val/contain_eos_token": float(ended[:, own].mean()),
            "beta": beta,
            "rollout/ties": float(choice.tie.mean()),
        }
        if own.stop is not None and not choice.tie.all():
            found["rollout/wins"] = float((choice.chosen != online.OPPONENT)[~choice.tie].mean())
        return found

    def _write(self, step: int, told: "_Written", choice: online.Choice) -> None:
        k, opponent = self._group, self._config.opponent

        def side(prompt: int, place: int) -> str | None:
            if choice.tie[prompt]:
                return None
            return {int(choice.chosen[prompt]): "chosen", int(choice.rejected[prompt]): "rejected"}.get(place)

        def row(i: int) -> dict[str, Any]:
            prompt, place = divmod(i, k)
            own = opponent == "policy" or place != online.OPPONENT
            return {
                "row": int(told.responses.rows[i]),
                "prompt": told.responses.prompts[i].plain,
                "response": told.responses.texts[i],
                "by": "policy" if own else opponent,
                "score": float(told.scores[i]),
                **told_parts(told.parts, i),
                "side": side(prompt, place),
                **({"kl": float(told.ratios[prompt, place])} if own else {}),
                "tokens": int(told.lengths[i]),
                "ended": bool(told.ended[i]),
            }

        self._samples.append(step, map(row, range(len(told.scores))))


@dataclasses.dataclass(frozen=True)
class _Written:
    """Of each response, what samples.jsonl says; `ratios` [B, K], log π / π_ref at temperature 1."""

    responses: Responses
    scores: np.ndarray
    parts: Mapping[str, np.ndarray]
    ratios: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray


def jit_sums(model: Llama, config: DPOConfig, mesh: Mesh, *, narrow: bool) -> meshes.Replicated:
    """(state, reference, groups) -> summed log-probabilities of the reference, [B, K], and of the policy or None.

    `narrow`: the sampler is, and what it drew is not quite as likely under the policy as it says.
    """

    def measure(
        state: TrainState, reference: Mapping[str, Any], groups: PreferenceBatch
    ) -> tuple[jax.Array, jax.Array | None]:
        def sums(variables: Mapping[str, Any]) -> jax.Array:
            return dpo.reference_logps(model.apply, variables, groups, config=config)

        return sums(with_reference(state, reference)), sums(ppo.policy_of(state.variables)) if narrow else None

    return meshes.Replicated(measure, mesh)


def jit_measure(model: Llama, mesh: Mesh, *, temperature: float, vocabulary: int | None) -> meshes.Replicated:
    """(state, reference, rollout) -> log-probabilities of the reference and of the policy, [B, R], and None.

    For `HeldOutPrompts`, at its temperature.
    """

    def measure(state: TrainState, reference: Mapping[str, Any], rollout: Rollout) -> tuple[jax.Array, jax.Array, None]:
        def logps(variables: Mapping[str, Any]) -> jax.Array:
            options: dict[str, Any] = {"layout": "separate", "temperature": temperature, "vocabulary": vocabulary}
            return response_logps(model.apply, variables, rollout.groups(), **options)[:, 0]

        return logps(with_reference(state, reference)), logps(ppo.policy_of(state.variables)), None

    return meshes.Replicated(measure, mesh)
