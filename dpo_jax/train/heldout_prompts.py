"""Figures of PPO and its relatives on held-out prompts during training: what the policy answers, and its worth.

Every evaluation draws with the same key: a response is a function of the seed, the prompt's place and the weights, so
that what differs between two evaluations is the policy.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax import mesh as meshes
from dpo_jax.align import ppo
from dpo_jax.complete.writing.responses import decode
from dpo_jax.config import SampleConfig
from dpo_jax.data.sets.prompts import PromptDataset
from dpo_jax.files.jsonl import Row, write_lines
from dpo_jax.judge.rewards.scores import Judges, part_figures, told_parts
from dpo_jax.model.llama import Llama
from dpo_jax.processes import distributed
from dpo_jax.report.statistics import interval, kl_estimates, pass_at
from dpo_jax.report.text_health import health
from dpo_jax.sample import Weights, generate, prepare
from dpo_jax.state import TrainState
from dpo_jax.types import Rollout

_STREAM = 0xE7A1  # sets these draws apart from those that are learnt from, which the same seed decides


class HeldOutPrompts:
    """Answers all held-out prompts and says what came out: `evaluate` of `loop.fit`."""

    def __init__(
        self,
        model: Llama,
        tokenizer: PreTrainedTokenizerBase,
        data: PromptDataset,
        judges: Judges,
        folder: Path,
        *,
        reference: Mapping[str, Any],
        measure: Callable[..., Any],
        seed: int,
        vocabulary: int | None,
        sample: SampleConfig,
        mesh: Mesh,
        piece: int,
        width: int,
        raw: bool,
        samples: int = 1,
        passes: float | None = None,
    ):
        """Args:
        model, tokenizer, reference, seed, vocabulary, sample, mesh, raw: as `Rollouts` has them.
        measure: `rollouts.jit_measure`, or another that gives the same.
        data: the held-out prompts.
        judges: the reward; two are combined as Llama 2 did, and not standardised.
        folder: of the run: the responses go to `eval_samples/STEP.jsonl` there.
        piece: responses sampled and measured at once, at most.
        width: of the training prompts, so that no other program is compiled where these are no longer.
        samples: responses to each prompt, K.
        passes: a response that scores at least this is right.
        """
        self._model, self._tokenizer, self._data, self._judges = model, tokenizer, data, judges
        self._folder, self._reference = folder / "eval_samples", reference
        self._seed, self._vocabulary, self._measure = seed, vocabulary, measure
        self._sample, self._mesh, self._raw = sample, mesh, raw
        parts = meshes.batch_parts(mesh)
        self._samples, self._passes = samples, passes
        self._piece = min(-(-max(piece // samples, 1) // parts), -(-len(data) // parts)) * parts  # prompts at once
        self._key = jax.random.fold_in(jax.random.key(seed), _STREAM)
        self._lengths = data.ids.lengths.astype(np.int32)
        self._prompts = np.zeros((len(data), max(width, int(self._lengths.max()))), np.int32)
        for i, row in enumerate(self._prompts):
            row[: self._lengths[i]] = data.ids[i]

    def __call__(self, state: TrainState) -> dict[str, float]:
        """reward, kl (nats a response, k1), length, each with a 95 % interval over prompts (NAME_low, NAME_high);
        pass@k likewise, where it was asked for; kl_token and kl_token_k3; ended, the share that reached a terminator;
        `text_health`'s figures; the parts of several rewards.
        """
        weights = prepare(self._model, ppo.policy_of(state.variables), self._sample, mesh=self._mesh)
        parts = [self._answered(state, weights, first) for first in range(0, len(self._data), self._piece)]
        del weights
        tokens, mask, logps, reference = (
            np.concatenate(arrays)[: len(self._data) * self._samples] for arrays in zip(*parts, strict=True)
        )
        lengths = mask.sum(axis=1)
        ended = np.isin(tokens[np.arange(len(tokens)), lengths - 1], self._sample.stop_tokens)
        bodies = [row[: n - end].tolist() for row, n, end in zip(tokens, lengths, ended, strict=True)]
        of = np.repeat(np.arange(len(self._data)), self._samples)
        texts = [
            decode(self._tokenizer, self._data.ids[i].tolist(), body, raw=self._raw)
            for i, body in zip(of.tolist(), bodies, strict=True)
        ]
        scores, combined = self._judges.as_they_are(
            [self._data.prompts[i] for i in of], texts, np.asarray(self._data.row_numbers)[of], self._data.safety[of]
        )
        kl = np.where(mask, logps - reference, 0.0).sum(axis=1, dtype=np.float64)
        self._write(int(jax.device_get(state.step)), texts, scores, combined, kl, lengths, ended)
        found: dict[str, float] = {}
        every = {"reward": scores, "kl": kl, "length": lengths}
        means = {name: np.asarray(x, np.float64).reshape(-1, self._samples).mean(axis=1) for name, x in every.items()}
        for name, values in (means | self._passed(scores)).items():
            low, high = interval(values, seed=self._seed)
            found |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
        found |= {name.removeprefix("eval_"): value for name, value in kl_estimates(logps, reference, mask).items()}
        found |= part_figures(combined)
        told = health(bodies)
        return found | {"ended": float(ended.mean())} | {name: told[name] for name in _HEALTH}

    def _passed(self, scores: np.ndarray) -> dict[str, np.ndarray]:
        """`pass@k` of each prompt, for k = 1, 2, 4, ... up to the responses to it."""
        if self._passes is None:
            return {}
        right = (scores.reshape(-1, self._samples) >= self._passes).sum(axis=1)
        every = [2**i for i in range(self._samples.bit_length())]
        return {f"pass@{k}": pass_at(k, right, self._samples) for k in every}

    def _answered(self, state: TrainState, weights: Weights, first: int) -> tuple[np.ndarray, ...]:
        """Tokens, mask, log-probabilities and the reference's of a piece, which is filled up with its own rows."""
        real = np.arange(first, min(first + self._piece, len(self._data)))
        at = np.resize(real, self._piece)
        generation = generate(
            self._model,
            weights,
            self._prompts[at],
            self._key,
            config=self._sample,
            prompt_lengths=self._lengths[at],
            row_ids=at,
            samples=self._samples,
            vocabulary=self._vocabulary,
            mesh=self._mesh,
        )
        tokens, mask, logps = (np.asarray(x) for x in generation)
        at = np.repeat(at, self._samples)
        arrays: dict[str, Any] = {
            "prompts": self._prompts[at],
            "prompt_lengths": self._lengths[at],
            "responses": tokens,
            "response_lengths": mask.sum(axis=1).astype(np.int32),
            "ended": np.zeros(len(at), bool),
            "sampler_logps": logps,
            "reference_logps": np.zeros_like(logps),
            "values": None,
            "scores": np.zeros(len(at), np.float32),
            "kl_coefficient": np.zeros(len(at), np.float32),
            "weights": np.ones(len(at), np.float32),
            "rows": np.asarray(self._data.row_numbers[at], np.int32),
        }
        rollout = meshes.put_batch(self._mesh, Rollout(**arrays))
        reference, old, _ = jax.device_get(self._measure(state, self._reference, rollout))
        logps = logps if old is None else old  # the sampler's weights may be narrow
        rows = len(real) * self._samples
        return tokens[:rows], mask[:rows], logps[:rows], reference[:rows]

    def _write(
        self,
        step: int,
        texts: list[str],
        scores: np.ndarray,
        combined: Mapping[str, np.ndarray],
        kl: np.ndarray,
        lengths: np.ndarray,
        ended: np.ndarray,
    ) -> None:
        if not distributed.is_main():
            return
        rows: list[Row] = [
            {
                "row": int(self._data.row_numbers[i // self._samples]),
                "prompt": self._data.prompts[i // self._samples].plain,
                **({"sample": i % self._samples} if self._samples > 1 else {}),
                "response": text,
                "score": float(scores[i]),
                **told_parts(combined, i),
                "kl": float(kl[i]),
                "tokens": int(lengths[i]),
                "ended": bool(ended[i]),
            }
            for i, text in enumerate(texts)
        ]
        write_lines(self._folder / f"{step}.jsonl", rows)


_HEALTH = ("distinct_1", "distinct_2", "distinct_3", "repetition_4", "looping", "longest_repeat", "empty")
