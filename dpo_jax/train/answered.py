"""What steps that learn from responses have in common: prompts in order, and the policy that answers them.

What is drawn is a function of the seed, the iteration and the row alone, so a resumed run draws the same texts.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.align import ppo
from dpo_jax.complete.writing.responses import decode
from dpo_jax.config import SampleConfig
from dpo_jax.data.sets.prompts import PromptBatch, PromptDataset, PromptLoader
from dpo_jax.model.llama import Llama
from dpo_jax.sample import Weights, generate, generate_mixture, generate_with_plain_logps, prepare, serve
from dpo_jax.state import TrainState

STREAM = 0x5A3E  # sets the draws of texts apart from the order of mini-batches, which the same seed decides


class Answered:
    """A loader of prompts (see `loop.Loader`) and what lets a model answer them."""

    def __init__(
        self,
        model: Llama,
        tokenizer: PreTrainedTokenizerBase,
        data: PromptDataset,
        loader: PromptLoader,
        *,
        sample: SampleConfig,
        mesh: Mesh,
        group: int,
        piece: int,
        raw: bool,
        seed: int,
        vocabulary: int | None,
    ):
        """Args:
        model: the policy.
        tokenizer: decodes what it writes.
        data, loader: the prompts, and their order.
        sample: with all terminators.
        mesh: where the weights lie.
        group: responses to each prompt.
        piece: responses sampled and measured at once.
        raw: the texts go on where the prompts end.
        seed: of the draws.
        vocabulary: ids from here on are never drawn; None: all may be.
        """
        self._model, self._tokenizer, self._data, self._loader = model, tokenizer, data, loader
        self._sample, self._mesh, self._group, self._piece, self._raw = sample, mesh, group, piece, raw
        self._vocabulary = vocabulary
        self._key = jax.random.fold_in(jax.random.key(seed), STREAM)
        self.steps_per_epoch = len(data) * group / loader.batch_size

    # ---------------------------------------------------------------- the loader

    def __iter__(self) -> Iterator[PromptBatch]:
        return iter(self._loader)

    def get_state(self) -> dict[str, Any]:
        """The position in the prompts."""
        return self._loader.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position."""
        self._loader.set_state(state)

    def summary(self) -> str:
        """One line for the log."""
        return self._loader.summary()

    def close(self) -> None:
        """Release the loader."""
        self._loader.close()

    # ---------------------------------------------------------------- responses

    def _prepared(self, of: TrainState | Mapping[str, Any]) -> Weights:
        """What `_drawn` reads, the policy of a state or other variables, laid out for it once.

        Whoever has it gives it up before the devices do anything else.
        """
        variables = ppo.policy_of(of.variables) if isinstance(of, TrainState) else of
        return prepare(self._model, variables, self._sample, mesh=self._mesh)

    def _drawn(
        self,
        weights: Weights,
        batch: PromptBatch,
        rows: np.ndarray,
        key: jax.Array,
        *,
        each: int | None = None,
        greedy: bool = False,
        plain: bool = False,
        mixed: tuple[Weights, float] | None = None,
    ) -> tuple[np.ndarray, ...]:
        """Tokens, mask and log-probabilities of responses to `rows` of the batch, which are whole groups.

        Args:
          weights: of `_prepared`.
          each: responses to each group; None: one a row.
          greedy: one response to each group, without chance.
          plain: log-probabilities at temperature 1.
          mixed: other weights and their share of the mixture that writes (`sample/mixture.py`).
        """
        group, config = self._group, self._sample
        if greedy:
            config, each = dataclasses.replace(config, temperature=0.0), 1
        each, parts = each or group, []
        if len(rows) > self._piece and not plain and mixed is None:
            return self._served(weights, batch, rows[::group], key, config, each)
        for first in range(0, len(rows), self._piece):
            own = rows[first : first + self._piece]
            at = np.resize(own, self._piece)[::group]  # the last piece is filled up, so that all have one shape
            options: dict[str, Any] = {
                "config": config,
                "prompt_lengths": batch.prompt_lengths[at],
                "row_ids": at,
                "samples": each,
                "vocabulary": self._vocabulary,
                "mesh": self._mesh,
            }
            prompts = batch.prompts[at]
            if mixed is not None:
                found = generate_mixture(self._model, weights, *mixed, prompts, key, **options)
            elif plain:
                found, logps = generate_with_plain_logps(self._model, weights, prompts, key, **options)
                found = found._replace(logps=logps)
            else:
                found = generate(self._model, weights, prompts, key, **options)
            parts.append([np.asarray(x)[: len(own) // group * each] for x in found])
        tokens, mask, logps = (np.concatenate(x) for x in zip(*parts, strict=True))
        return tokens, mask, logps

    def _served(
        self,
        weights: Weights,
        batch: PromptBatch,
        firsts: np.ndarray,
        key: jax.Array,
        config: SampleConfig,
        each: int,
    ) -> tuple[np.ndarray, ...]:
        """`each` responses to each of the rows `firsts`, a piece of them at once: one that ends makes room for another.

        They are those that whole pieces would give: a response draws with its row's number and its own.
        """
        prompts = [row[:length].tolist() for row, length in zip(batch.prompts, batch.prompt_lengths, strict=True)]
        requests = [(int(i), k) for i in firsts for k in range(each)]
        place = {request: n for n, request in enumerate(requests)}
        shape = (len(requests), config.max_new_tokens)
        tokens, mask, logps = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.float32)
        served = serve(
            self._model,
            weights,
            prompts,
            key,
            config=config,
            requests=requests,
            rows=self._piece // self._group * each,
            vocabulary=self._vocabulary,
            mesh=self._mesh,
        )
        for done in (one for some in served for one in some):
            n, size = place[done.request], len(done.tokens)
            tokens[n, :size], mask[n, :size], logps[n, :size] = done.tokens, True, done.logps
        return tokens, mask, logps

    def _ended(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """bool [N]: whether responses, at least a token each, end with a terminator."""
        return np.isin(tokens[np.arange(len(tokens)), mask.sum(axis=1) - 1], self._sample.stop_tokens)

    def _text(self, prompt: Any, response: Any) -> str:
        return decode(self._tokenizer, prompt.tolist(), response.tolist(), raw=self._raw)


def reference_of(variables: Mapping[str, Any], *, fresh_adapters: bool, dtype: Any) -> dict[str, Any]:
    """What the reference policy has in place of the trained weights, as copies: those are given to the first step.

    Beneath fresh adapters it has nothing; adapters of a folder are trained on, and the reference keeps them as they
    were.
    """
    if fresh_adapters:
        return {}
    if "adapters" in variables:
        return {"adapters": jax.tree.map(jnp.copy, variables["adapters"])}
    return {"params": jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), variables["params"])}
