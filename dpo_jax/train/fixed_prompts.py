"""A few fixed prompts that the policy answers as it learns: text by step, for people to read.

The answers are greedy, so that what differs between two steps is the policy. They stand in `training_samples.jsonl`,
which is written whole each time, without rows of later steps: a run that was killed and goes on neither repeats nor
loses one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax import mesh as meshes
from dpo_jax.align import ppo
from dpo_jax.complete.writing.responses import decode, terminators
from dpo_jax.config import SampleConfig, SFTRun, TrainingRun
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.documents import DocumentDataset
from dpo_jax.data.sets.prompts import PromptDataset, load_prompts
from dpo_jax.data.sets.sequences import SequenceDataset
from dpo_jax.data.tokens.chat_tokenizer import end_of
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.ragged import Ragged
from dpo_jax.data.tokens.templates import RAW
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import Row, read_lines, write_lines
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.processes import distributed
from dpo_jax.report.samples import TRAINING_SAMPLES
from dpo_jax.sample import generate, with_layout
from dpo_jax.state import TrainState
from dpo_jax.train.row_data import read_alike
from dpo_jax.weights.tokenizer import text_ids

Data = PreferenceDataset | SequenceDataset | DocumentDataset | PromptDataset

_OF_DATA, _OF_FILE = 4, 32
"""Prompts that are taken of the data, and the most that a file of them may hold."""
_OPENING = 32
"""Tokens of a text that has no prompt which are gone on with, at most; half of a shorter one."""


@dataclass(frozen=True)
class FixedPrompts:
    """The prompts, and how they are answered.

    Attributes:
      ids: N sequences of ids.
      tokens: the longest answer.
      tokenizer, encoder: what is written is read with them.
      raw: answers go on where the prompts end.
      vocabulary: ids from here on are never drawn; None: all may be.
    """

    ids: Ragged
    tokens: int
    tokenizer: PreTrainedTokenizerBase
    encoder: ConversationEncoder
    raw: bool
    vocabulary: int | None

    @classmethod
    def of(
        cls, config: TrainingRun, tokenizer: PreTrainedTokenizerBase, architecture: LlamaConfig, *data: Data | None
    ) -> "FixedPrompts | None":
        """Those of `--train.sample_prompts`, or the first different ones of the first of `data` that is there.

        None without `--train.sample_every`. Raises `InputError` for bad prompts, and where the model's context has no
        room for a prompt and its answer.
        """
        if config.train.sample_every is None:
            return None
        tokens = config.train.settled.sample_tokens
        room = architecture.max_position - tokens
        if room < 1:
            raise InputError(
                f"--train.sample_tokens {tokens}: leaves no room for a prompt in the model's context of"
                f" {architecture.max_position}; lower it"
            )
        raw = config.data.template == RAW or (isinstance(config, SFTRun) and config.data.kind == "text")
        encoder = ConversationEncoder(tokenizer, RAW) if raw else ConversationEncoder.of(tokenizer, config.data)
        if config.train.sample_prompts is None:
            ids = _first_of(next(each for each in data if each is not None))
        else:
            rows = replace(config.data, template=RAW if raw else config.data.template, limit=None, columns=None)
            size = architecture.vocab_size
            how: dict[str, Any] = {"longest": room, "vocab_size": size, "tagged": False}
            read = partial(load_prompts, encoder=encoder, config=rows, **how)
            found = read_alike(config.train.sample_prompts, read)
            ids = [found.ids[i] for i in range(len(found))]
            if len(ids) > _OF_FILE:
                raise InputError(
                    f"--train.sample_prompts {config.train.sample_prompts}: holds {len(ids)} prompts, to be read by"
                    f" people; give at most {_OF_FILE}, and the others as --eval_data"
                )
        cut = Ragged.of([end_of(np.asarray(each, np.int32), room, encoder.bos) for each in ids], np.int32)
        return cls(cut, tokens, tokenizer, encoder, raw, text_ids(tokenizer, architecture))

    def answered_by(
        self, model: Llama, mesh: Mesh, folder: Path, *, like: SampleConfig | None = None
    ) -> Callable[[TrainState], None]:
        """What answers them with the policy of a state, and writes the answers into the run's folder.

        `like`: where and in how many bits the run's own responses have their weights and caches, if it samples any.
        """
        like = like or SampleConfig()
        config = SampleConfig(
            max_new_tokens=self.tokens, temperature=0.0, layout=like.layout, weights=like.weights, cache=like.cache
        )
        return partial(self._answer, model, terminators(model, self.encoder, config), mesh, folder / TRAINING_SAMPLES)

    def _answer(self, model: Llama, config: SampleConfig, mesh: Mesh, path: Path, state: TrainState) -> None:
        parts = meshes.batch_parts(mesh)
        policy = ppo.policy_of(state.variables)
        config = with_layout(config, model, policy, mesh, held=state)
        at = np.resize(np.arange(len(self.ids)), -(-len(self.ids) // parts) * parts)  # filled up with its own rows
        generation = generate(
            model,
            policy,
            [self.ids[i].tolist() for i in at.tolist()],
            jax.random.key(0),  # greedy: nothing is drawn with it
            config=config,
            vocabulary=self.vocabulary,
            mesh=mesh,
        )
        tokens, lengths = np.asarray(generation.tokens), np.asarray(generation.mask).sum(axis=1)
        if not distributed.is_main():
            return
        step = int(jax.device_get(state.step))
        rows = list(self._rows(step, tokens, lengths, config.stop_tokens))
        before = [row for row in read_lines(path) if row["step"] < step] if path.exists() else []
        if {row["prompt"] for row in before} - {row["prompt"] for row in rows}:
            raise InputError(
                f"{path}: holds answers to other prompts than the run has now; restore --train.sample_prompts, or start"
                " again with another --out"
            )
        write_lines(path, [*before, *rows])

    def _rows(self, step: int, tokens: np.ndarray, lengths: np.ndarray, stop: Sequence[int]) -> Iterator[Row]:
        for i in range(len(self.ids)):
            prompt, written = self.ids[i].tolist(), tokens[i, : lengths[i]].tolist()
            ended = written[-1] in stop
            yield {
                "step": step,
                "prompt": decode(self.tokenizer, [], prompt),
                "response": decode(self.tokenizer, prompt, written[: len(written) - ended], raw=self.raw),
                "tokens": len(written),
                "ended": ended,
            }


def _first_of(data: Data) -> list[np.ndarray]:
    """The first different prompts of a data set."""
    found: dict[bytes, np.ndarray] = {}
    for i in range(len(data)):
        prompt = _prompt(data, i)
        found.setdefault(prompt.tobytes(), prompt)
        if len(found) == _OF_DATA:
            break
    return list(found.values())


def _prompt(data: Data, i: int) -> np.ndarray:
    """What stands in row i in front of what is learnt."""
    match data:
        case PromptDataset():
            return data.ids[i]
        case PreferenceDataset():
            return data.prompts[i]
        case SequenceDataset():
            tokens, first = data.tokens[i], int(data.targets[i].argmax())
            return tokens[:first] if first > 1 else _opening(tokens)
        case DocumentDataset():
            return _opening(data.tokens[i])


def _opening(tokens: np.ndarray) -> np.ndarray:
    return tokens[: max(min(_OPENING, len(tokens) // 2), 1)].astype(np.int32)
