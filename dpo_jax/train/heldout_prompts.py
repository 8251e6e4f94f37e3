"""Figures of PPO and its relatives on held-out prompts during training: what the policy answers, and its worth.

Every evaluation draws with the same key: a response is a function of the seed, the prompt's place and the weights, so
that what differs between two evaluations is the policy.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax import mesh as meshes
from dpo_jax.data.sets.prompts import PromptDataset
from dpo_jax.files.jsonl import Row, write_lines
from dpo_jax.judge.rewards.scores import Judges, Responses, part_figures, told_parts
from dpo_jax.processes import distributed
from dpo_jax.report.statistics import interval, kl_estimates, pass_at
from dpo_jax.report.text_health import health
from dpo_jax.sample import Weights, generate
from dpo_jax.state import TrainState
from dpo_jax.train.answered import Policy
from dpo_jax.types import Rollout

_STREAM = 0xE7A1  # sets these draws apart from those that are learnt from, which the same seed decides


@dataclass(frozen=True)
class Answers:
    """What a policy answered N times, the K responses to a prompt behind one another.

    Attributes:
      mask: bool [N, R], the tokens that it drew.
      logps, reference: [N, R], their log-probabilities under the policy and under the reference.
      ended: bool [N], whether the response reached a terminator.
      bodies: its tokens without that, for the health of the text.
      scores: [N].
      parts: what they were combined from.
      told: (place, KL divergence in nats) -> the response as a row of a file.
      figures: more of them.
    """

    mask: np.ndarray
    logps: np.ndarray
    reference: np.ndarray
    ended: np.ndarray
    bodies: list[list[int]]
    scores: np.ndarray
    parts: Mapping[str, np.ndarray]
    told: Callable[[int, float], Row]
    figures: Mapping[str, float] = field(default_factory=dict)


class HeldOut(ABC):
    """Has all held-out prompts answered and says what came out: `evaluate` of `loop.fit`."""

    def __init__(
        self,
        policy: Policy,
        data: PromptDataset,
        folder: Path,
        *,
        reference: Mapping[str, Any],
        measure: Callable[..., Any],
        samples: int = 1,
        passes: float | None = None,
    ):
        """Args:
        policy, reference: as `Rollouts` has them; `policy.piece` responses are sampled and measured at once, at most.
        measure: `rollouts.jit_measure`, or another that gives the same.
        data: the held-out prompts.
        folder: of the run: the responses go to `eval_samples/STEP.jsonl` there.
        samples: responses to each prompt, K.
        passes: a response that scores at least this is right.
        """
        self._policy, self._data = policy, data
        self._folder, self._reference, self._measure = folder / "eval_samples", reference, measure
        parts = meshes.batch_parts(policy.mesh)
        self._samples, self._passes = samples, passes
        prompts = max(policy.piece // samples, 1)  # at once
        self._piece = min(-(-prompts // parts), -(-len(data) // parts)) * parts
        self._key = jax.random.fold_in(jax.random.key(policy.seed), _STREAM)

    @abstractmethod
    def _answers(self, state: TrainState) -> Answers:
        """K responses to every prompt by the policy of `state`, scored and measured."""

    def __call__(self, state: TrainState) -> dict[str, float]:
        """reward, kl (nats a response, k1), length, each with a 95 % interval over prompts (NAME_low, NAME_high);
        pass@k likewise, where it was asked for; kl_token and kl_token_k3; ended, the share that reached a terminator;
        `text_health`'s figures; the parts of several rewards.
        """
        answers = self._answers(state)
        kl = np.where(answers.mask, answers.logps - answers.reference, 0.0).sum(axis=1, dtype=np.float64)
        if distributed.is_main():
            rows = [
                answers.told(i, float(one)) | ({"sample": i % self._samples} if self._samples > 1 else {})
                for i, one in enumerate(kl)
            ]
            write_lines(self._folder / f"{int(jax.device_get(state.step))}.jsonl", rows)
        found: dict[str, float] = {}
        every = {"reward": answers.scores, "kl": kl, "length": answers.mask.sum(axis=1)}
        means = {name: np.asarray(x, np.float64).reshape(-1, self._samples).mean(axis=1) for name, x in every.items()}
        for name, values in (means | self._passed(answers.scores)).items():
            low, high = interval(values, seed=self._policy.seed)
            found |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
        estimates = kl_estimates(answers.logps, answers.reference, answers.mask)
        found |= {name.removeprefix("eval_"): value for name, value in estimates.items()}
        found |= part_figures(answers.parts)
        told = health(answers.bodies)
        found |= {"ended": float(answers.ended.mean())} | {name: told[name] for name in _HEALTH}
        return found | dict(answers.figures)

    def _passed(self, scores: np.ndarray) -> dict[str, np.ndarray]:
        """`pass@k` of each prompt, for k = 1, 2, 4, ... up to the responses to it."""
        if self._passes is None:
            return {}
        right = (scores.reshape(-1, self._samples) >= self._passes).sum(axis=1)
        every = [2**i for i in range(self._samples.bit_length())]
        return {f"pass@{k}": pass_at(k, right, self._samples) for k in every}


class HeldOutPrompts(HeldOut):
    """`HeldOut` whose prompts are answered in one turn, and judged."""

    def __init__(
        self, policy: Policy, data: PromptDataset, judges: Judges, folder: Path, *, width: int, **options: Any
    ):
        """Args: as `HeldOut`, and
        judges: the reward; two are combined as Llama 2 did, and not standardised.
        width: of the training prompts, so that no other program is compiled where these are no longer.
        """
        super().__init__(policy, data, folder, **options)
        self._judges = judges
        self._lengths = data.ids.lengths.astype(np.int32)
        self._prompts = np.zeros((len(data), max(width, int(self._lengths.max()))), np.int32)
        for i, row in enumerate(self._prompts):
            row[: self._lengths[i]] = data.ids[i]

    def _answers(self, state: TrainState) -> Answers:
        weights = self._policy.prepared(state)
        parts = [self._answered(state, weights, first) for first in range(0, len(self._data), self._piece)]
        del weights
        tokens, mask, logps, reference = (
            np.concatenate(arrays)[: len(self._data) * self._samples] for arrays in zip(*parts, strict=True)
        )
        of = np.repeat(np.arange(len(self._data)), self._samples)
        written = self._written(of, tokens, mask, logps)
        lengths, ended = np.asarray(written.response_lengths), np.asarray(written.ended)
        texts = self._policy.texts(written)
        scores = self._judges.as_they_are(Responses.to(self._data, of, texts))

        def told(i: int, kl: float) -> Row:
            return {
                "row": int(self._data.row_numbers[of[i]]),
                "prompt": self._data.prompts[of[i]].plain,
                "response": texts[i],
                "score": float(scores.total[i]),
                **told_parts(scores.parts, i),
                **({"steps": scores.steps[i]} if scores.steps and scores.steps[i] else {}),
                "kl": kl,
                "tokens": int(lengths[i]),
                "ended": bool(ended[i]),
            }

        return Answers(
            mask=mask,
            logps=logps,
            reference=reference,
            ended=ended,
            bodies=[row[: n - end].tolist() for row, n, end in zip(tokens, lengths, ended, strict=True)],
            scores=scores.total,
            parts=scores.parts,
            told=told,
        )

    def _answered(self, state: TrainState, weights: Weights, first: int) -> tuple[np.ndarray, ...]:
        """Tokens, mask, log-probabilities and the reference's of a piece, which is filled up with its own rows."""
        real = np.arange(first, min(first + self._piece, len(self._data)))
        at = np.resize(real, self._piece)
        policy = self._policy
        generation = generate(
            policy.model,
            weights,
            self._prompts[at],
            self._key,
            config=policy.sample,
            prompt_lengths=self._lengths[at],
            row_ids=at,
            samples=self._samples,
            vocabulary=policy.vocabulary,
            mesh=policy.mesh,
        )
        tokens, mask, logps = (np.asarray(x) for x in generation)
        at = np.repeat(at, self._samples)
        rollout = meshes.put_batch(policy.mesh, self._written(at, tokens, mask, logps))
        reference, old, _ = jax.device_get(self._measure(state, self._reference, rollout))
        logps = logps if old is None else old  # the sampler's weights may be narrow
        rows = len(real) * self._samples
        return tokens[:rows], mask[:rows], logps[:rows], reference[:rows]

    def _written(self, at: np.ndarray, *drawn: np.ndarray) -> Rollout:
        """Responses to the prompts `at`: tokens, mask, log-probabilities."""
        return self._policy.written(self._prompts[at], self._lengths[at], self._data.row_numbers[at], *drawn)


_HEALTH = ("distinct_1", "distinct_2", "distinct_3", "repetition_4", "looping", "longest_repeat", "empty")
