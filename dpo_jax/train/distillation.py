"""Between two updates of distillation: the student answers, or the data do. It gives the step its batch."""

import time
from typing import Any

import jax
import numpy as np

from dpo_jax.data.sets.prompts import PromptBatch
from dpo_jax.data.tokens.ragged import Ragged
from dpo_jax.files.log import Row
from dpo_jax.files.sample_log import SampleLog
from dpo_jax.state import TrainState
from dpo_jax.train.answered import Answered
from dpo_jax.types import PreferenceBatch

_COIN = (
    0xC014  # sets the draw of which steps are on-policy apart from the order of prompts, which the same seed decides
)


class StudentResponses(Answered):
    """A loader of prompts (see `loop.Loader`) whose `prepare` answers them."""

    def __init__(
        self, *parts: Any, answers: Ragged | None, on_policy: float, samples: SampleLog, seed: int, **options: Any
    ):
        """Args: as `Answered` has them, and:
        answers: those of the data, where they are learnt on.
        on_policy: λ, the share of steps on the student's own responses.
        samples: where the texts are written down.
        """
        super().__init__(*parts, group=1, seed=seed, **options)
        self._answers, self._on_policy, self._samples, self._seed = answers, on_policy, samples, seed

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
            tokens, mask, logps = self._drawn(self._prepared(state), batch, rows, key)
            figures["objective/entropy"] = float(-logps.sum(axis=1, dtype=np.float64).mean())
        else:
            tokens, mask = self._given(batch)
        lengths, ended = mask.sum(axis=1).astype(np.int32), self._ended(tokens, mask)
        figures |= {"val/contain_eos_token": float(ended.mean()), "seconds_sampling": time.perf_counter() - start}
        self._write(batch, tokens, lengths, ended, own=own)
        arrays: dict[str, Any] = {
            "prompts": batch.prompts,
            "prompt_lengths": batch.prompt_lengths,
            "responses": tokens[:, None],
            "response_lengths": lengths[:, None],
            "weights": np.ones(len(rows), np.float32),
            "rows": np.asarray(batch.rows, np.int32),
        }
        return PreferenceBatch(**arrays), figures

    def _is_own(self, step: int) -> bool:
        return bool(np.random.default_rng([self._seed, _COIN, step]).random() < self._on_policy)

    def _given(self, batch: PromptBatch) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of the data's answers, [B, R]."""
        assert self._answers is not None, "the data were read with answers"
        tokens = np.zeros((len(batch.rows), self._sample.max_new_tokens), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for i, index in enumerate(batch.indices):
            ids = self._answers[index]
            tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
        return tokens, mask

    def _write(
        self, batch: PromptBatch, tokens: np.ndarray, lengths: np.ndarray, ended: np.ndarray, *, own: bool
    ) -> None:
        self._samples.append(
            batch.step + 1,
            (
                {
                    "row": int(batch.rows[i]),
                    "prompt": self._data.prompts[index].plain,
                    "response": self._text(
                        batch.prompts[i, : batch.prompt_lengths[i]], tokens[i, : lengths[i] - int(ended[i])]
                    ),
                    "by": "student" if own else "data",
                    "tokens": int(lengths[i]),
                    "ended": bool(ended[i]),
                }
                for i, index in enumerate(batch.indices)
            ),
        )
