"""What steps that learn from responses have in common: prompts in order, and the policy that answers them.

What is drawn is a function of the seed, the iteration and the row alone, so a resumed run draws the same texts.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.align import ppo
from dpo_jax.complete.writing.responses import decode, terminators
from dpo_jax.config import SampleConfig, SampledRun
from dpo_jax.data.sets.prompts import PromptBatch, PromptDataset, PromptLoader
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.templates import RAW
from dpo_jax.errors import InputError
from dpo_jax.judge.rewards.step_scores import Steps, at_tokens
from dpo_jax.mesh import put_batch
from dpo_jax.model.llama import Llama
from dpo_jax.sample import Weights, generate, generate_mixture, generate_with_plain_logps, prepare, serve, with_layout
from dpo_jax.state import TrainState
from dpo_jax.train.kept_reference import ROWS, kept_reference
from dpo_jax.train.session import Training
from dpo_jax.types import Rollout

STREAM = 0x5A3E  # sets the draws of texts apart from the order of mini-batches, which the same seed decides


@dataclass(frozen=True)
class Policy:
    """The policy of a run as it answers prompts.

    Attributes:
      model: its shape; its weights are those of a state.
      tokenizer: decodes what it writes.
      sample: how it draws, with all terminators.
      mesh: where the weights lie.
      piece: responses sampled and measured at once.
      raw: responses go on where the prompts end.
      seed: of the draws.
      vocabulary: ids from here on are never drawn; None: all may be.
    """

    model: Llama
    tokenizer: PreTrainedTokenizerBase
    sample: SampleConfig
    mesh: Mesh
    piece: int
    raw: bool
    seed: int
    vocabulary: int | None

    @classmethod
    def of(
        cls,
        config: SampledRun,
        state: TrainState,
        model: Llama,
        tokenizer: PreTrainedTokenizerBase,
        encoder: ConversationEncoder,
        mesh: Mesh,
        *,
        rows: int,
        vocabulary: int | None,
        held: Any,
    ) -> "Policy":
        """The policy of a run with these options, `rows` responses an iteration, beside all that `held` is laid out."""
        sample = terminators(model, encoder, config.sample)
        return cls(
            model,
            tokenizer,
            with_layout(sample, model, ppo.policy_of(state.variables), mesh, held=held),
            mesh,
            piece=config.rollout_batch_size or rows,
            raw=config.data.template == RAW,
            seed=config.train.seed,
            vocabulary=vocabulary,
        )

    def prepared(self, of: TrainState | Mapping[str, Any]) -> Weights:
        """What the sampler reads, the policy of a state or other variables, laid out for it once.

        Whoever has it gives it up before the devices do anything else.
        """
        variables = ppo.policy_of(of.variables) if isinstance(of, TrainState) else of
        return prepare(self.model, variables, self.sample, mesh=self.mesh)

    def ended(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """bool [N]: whether responses, at least a token each, end with a terminator."""
        return np.isin(tokens[np.arange(len(tokens)), mask.sum(axis=1) - 1], self.sample.stop_tokens)

    def text(self, prompt: np.ndarray, response: np.ndarray) -> str:
        """The text of a response, without its terminator, to a prompt; ids without padding."""
        return decode(self.tokenizer, prompt.tolist(), response.tolist(), raw=self.raw)

    def written(
        self,
        prompts: np.ndarray,
        prompt_lengths: np.ndarray,
        rows: np.ndarray,
        tokens: np.ndarray,
        mask: np.ndarray,
        logps: np.ndarray,
        **known: Any,
    ) -> Rollout:
        """A rollout of what was sampled: `tokens`, `mask` and `logps` [B, R], as `sample.generate` gives them.

        What is not `known` of the rest is 0, and the weights are 1.
        """
        zeros = np.zeros(len(rows), np.float32)
        arrays: dict[str, Any] = {
            "prompts": prompts,
            "prompt_lengths": prompt_lengths,
            "responses": tokens,
            "response_lengths": mask.sum(axis=1).astype(np.int32),
            "ended": self.ended(tokens, mask),
            "sampler_logps": logps,
            "reference_logps": np.zeros_like(logps),
            "values": None,
            "scores": zeros,
            "kl_coefficient": zeros,
            "weights": np.ones_like(zeros),
            "rows": np.asarray(rows, np.int32),
        }
        return Rollout(**arrays | known)

    def texts(self, written: Rollout) -> list[str]:
        """The texts of responses, host arrays, without their terminators."""
        bounds = zip(written.prompt_lengths, written.response_lengths, written.ended, strict=True)
        prompts, responses = np.asarray(written.prompts), np.asarray(written.responses)
        return [
            self.text(prompts[i, :prompt], responses[i, : length - int(end)])
            for i, (prompt, length, end) in enumerate(bounds)
        ]

    def step_scores(self, written: Rollout, texts: Sequence[str], steps: Steps | None) -> np.ndarray | None:
        """[N, R]: the scores of steps of responses, whose texts these are, at the tokens they end with; or None."""
        if steps is None:
            return None
        found = np.zeros(np.shape(written.responses), np.float32)
        for i, (text, own) in enumerate(zip(texts, steps, strict=True)):
            count = int(written.response_lengths[i])
            prompt = np.asarray(written.prompts[i])[: int(written.prompt_lengths[i])]
            tokens = np.asarray(written.responses[i])[:count]
            found[i, :count] = at_tokens(own, text, count, lambda n: self.text(prompt, tokens[:n]))  # noqa: B023 - used at once
        return found

    def measured(self, measure: Callable[[Any], Any], parts: Iterable[Any]) -> tuple[Any, ...]:
        """What a jitted `measure` gives of batches or rollouts of host arrays, one after the other, on the host."""
        found = [jax.device_get(measure(put_batch(self.mesh, part))) for part in parts]
        return tuple(None if x[0] is None else np.concatenate(x) for x in zip(*found, strict=True))


class Answered:
    """A loader of prompts (see `loop.Loader`) and what lets a policy answer them."""

    def __init__(self, policy: Policy, data: PromptDataset, loader: PromptLoader, *, group: int):
        """`data`, `loader`: the prompts, and their order; `group`: responses to each prompt."""
        self._policy, self._data, self._loader, self._group = policy, data, loader, group
        self._key = jax.random.fold_in(jax.random.key(policy.seed), STREAM)
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
          weights: of `Policy.prepared`.
          each: responses to each group; None: one a row.
          greedy: one response to each group, without chance.
          plain: log-probabilities at temperature 1.
          mixed: other weights and their share of the mixture that writes (`sample/mixture.py`).
        """
        policy, group, config = self._policy, self._group, self._policy.sample
        if greedy:
            config, each = dataclasses.replace(config, temperature=0.0), 1
        each, parts = each or group, []
        if len(rows) > policy.piece and not plain and mixed is None:
            return self._served(weights, batch, rows[::group], key, config, each)
        for first in range(0, len(rows), policy.piece):
            own = rows[first : first + policy.piece]
            at = np.resize(own, policy.piece)[::group]  # the last piece is filled up, so that all have one shape
            options: dict[str, Any] = {
                "config": config,
                "prompt_lengths": batch.prompt_lengths[at],
                "row_ids": at,
                "samples": each,
                "vocabulary": policy.vocabulary,
                "mesh": policy.mesh,
            }
            prompts = batch.prompts[at]
            if mixed is not None:
                found = generate_mixture(policy.model, weights, *mixed, prompts, key, **options)
            elif plain:
                found, logps = generate_with_plain_logps(policy.model, weights, prompts, key, **options)
                found = found._replace(logps=logps)
            else:
                found = generate(policy.model, weights, prompts, key, **options)
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
        policy = self._policy
        prompts = [row[:length].tolist() for row, length in zip(batch.prompts, batch.prompt_lengths, strict=True)]
        requests = [(int(i), k) for i in firsts for k in range(each)]
        place = {request: n for n, request in enumerate(requests)}
        shape = (len(requests), config.max_new_tokens)
        tokens, mask, logps = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.float32)
        served = serve(
            policy.model,
            weights,
            prompts,
            key,
            config=config,
            requests=requests,
            rows=policy.piece // self._group * each,
            vocabulary=policy.vocabulary,
            mesh=policy.mesh,
        )
        for done in (one for some in served for one in some):
            n, size = place[done.request], len(done.tokens)
            tokens[n, :size], mask[n, :size], logps[n, :size] = done.tokens, True, done.logps
        return tokens, mask, logps


def rows_of(batch: Any, rows: Any) -> Any:
    """Some rows, or one, of every host array of a batch or rollout."""
    return jax.tree.map(lambda x: x[rows], batch)


def reference_of(
    training: Training[Any], model: Llama, variables: Mapping[str, Any], data: PromptDataset
) -> dict[str, Any]:
    """What the reference policy has in place of the trained weights, as copies: those are given to the first step.

    Beneath fresh adapters it has nothing; adapters of a folder are trained on, and the reference keeps them as they
    were. The error of a quantised copy is said, on prompts of the data.
    """
    config = training.config
    if config.lora.rank:
        return {}
    if "adapters" in variables:
        if config.train.frozen_dtype is not None:
            raise InputError(
                "--train.frozen_dtype has no effect: --model has adapters, and the weights beneath them are kept as"
                " they were when these learnt"
            )
        return {"adapters": jax.tree.map(jnp.copy, variables["adapters"])}
    texts = [data.ids[i] for i in range(min(len(data), ROWS))]
    kept, told = kept_reference(model, variables["params"], config.train, texts, training.mesh)
    if told is not None:
        training.say(told)
    return kept


def with_reference(state: TrainState, reference: Mapping[str, Any]) -> dict[str, Any]:
    """The reference policy's variables: what it has of its own, and beneath adapters the frozen weights."""
    frozen = {"params": state.frozen["params"]} if "params" in state.frozen else {}
    return {**frozen, **reference}
