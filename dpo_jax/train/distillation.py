"""Between two updates of distillation: the student answers, or the data do. It gives the step its batch."""

import time

import jax
import numpy as np

from dpo_jax.data.sets.prompts import PromptBatch, PromptDataset, PromptLoader
from dpo_jax.data.tokens.ragged import Ragged
from dpo_jax.files.log import Row
from dpo_jax.files.sample_log import SampleLog
from dpo_jax.state import TrainState
from dpo_jax.train.answered import Answered, Policy
from dpo_jax.types import PreferenceBatch, Rollout

_COIN = 0xC014  # sets the draw of on-policy steps apart from the order of prompts, which the same seed decides


class StudentResponses(Answered):
    """A loader of prompts (see `loop.Loader`) whose `prepare` answers them."""

    def __init__(
        self,
        policy: Policy,
        data: PromptDataset,
        loader: PromptLoader,
        samples: SampleLog,
        *,
        answers: Ragged | None,
        on_policy: float,
    ):
        """Args: as `Rollouts` has them, and:
        answers: those of the data, where they are learnt on.
        on_policy: λ, the share of steps on the student's own responses.
        """
        super().__init__(policy, data, loader, group=1)
        self._answers, self._on_policy, self._samples = answers, on_policy, samples

    def prepare(self, state: TrainState, batch: PromptBatch) -> tuple[PreferenceBatch, Row]:
        """Responses to the prompts of `batch`, as host arrays that are the same in every process; and figures.

        Whether a step is on-policy is a function of the seed and the step (GKD, Algorithm 1). Figures:
        rollout/on_policy (1 or 0), val/contain_eos_token (share of responses with a terminator), objective/entropy of
        the student's own (Σ −log q a response, at the sampling temperature).
        """
        start = time.perf_counter()
        rows, own = np.arange(len(batch.rows)), self._is_own(batch.step)
        figures: Row = {"rollout/on_policy": float(own)}
        if own:
            key = jax.random.fold_in(self._key, batch.step)
            tokens, mask, logps = self._drawn(self._policy.prepared(state), batch, rows, key)
            figures["objective/entropy"] = float(-logps.sum(axis=1, dtype=np.float64).mean())
        else:
            tokens, mask, logps = self._given(batch)
        written = self._policy.written(batch.prompts, batch.prompt_lengths, batch.rows, tokens, mask, logps)
        ended = float(np.mean(written.ended))
        figures |= {"val/contain_eos_token": ended, "seconds_sampling": time.perf_counter() - start}
        self._write(batch, written, own=own)
        return written.groups(), figures

    def _is_own(self, step: int) -> bool:
        return bool(np.random.default_rng([self._policy.seed, _COIN, step]).random() < self._on_policy)

    def _given(self, batch: PromptBatch) -> tuple[np.ndarray, ...]:
        """Tokens and mask of the data's answers, and zeros in the place of their log-probabilities, [B, R]."""
        assert self._answers is not None, "the data were read with answers"
        tokens = np.zeros((len(batch.rows), self._policy.sample.max_new_tokens), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for i, index in enumerate(batch.indices):
            ids = self._answers[index]
            tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
        return tokens, mask, np.zeros(tokens.shape, np.float32)

    def _write(self, batch: PromptBatch, written: Rollout, *, own: bool) -> None:
        texts = self._policy.texts(written)
        self._samples.append(
            batch.step + 1,
            (
                {
                    "row": int(batch.rows[i]),
                    "prompt": self._data.prompts[index].plain,
                    "response": texts[i],
                    "by": "student" if own else "data",
                    "tokens": int(written.response_lengths[i]),
                    "ended": bool(written.ended[i]),
                }
                for i, index in enumerate(batch.indices)
            ),
        )
