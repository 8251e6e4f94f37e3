"""Prompts to sample responses to: a file of them in memory, and those of each iteration in a deterministic order.

Of a file of dialogues the last answer of each may stand apart, for who learns from it beside what is sampled.
"""

import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Unpack

import numpy as np

from dpo_jax.config import DataConfig
from dpo_jax.data.rows.dialogues import Dialogue, parse_dialogue
from dpo_jax.data.rows.layouts import PROMPTS
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.preferences import parse_prompt
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.steps_loader import RunOptions, StepsLoader, check_seed
from dpo_jax.data.sets.tokenised import Tokenised, fingerprint_of
from dpo_jax.data.sources.checked_rows import CheckedRows, Numbered, OnBadRows, check_ids
from dpo_jax.data.tokens.chat_tokenizer import end_of
from dpo_jax.data.tokens.cuts import RowCut, summary as cuts_summary
from dpo_jax.data.tokens.encode import ConversationEncoder, Rendered
from dpo_jax.data.tokens.ragged import Ragged
from dpo_jax.data.tokens.templates import RAW

log = logging.getLogger(__name__)


_LISTED = ("prompt", "messages", "conversations")
"""Columns that give a prompt as messages, where they hold a list."""


class Prompt(NamedTuple):
    """What a row asks: messages, of which a user's is the last, and the text, where the row gives one.

    `columns` are the other columns of the row, as they stand in the file, for reward functions; `conversational`: the
    row's prompt is a list of messages, if of one.
    """

    messages: tuple[Message, ...]
    text: str | None
    columns: Mapping[str, Any] = MappingProxyType({})
    conversational: bool = False

    @property
    def plain(self) -> str | list[dict[str, str]]:
        """For functions of users and for files: the text, or [{"role", "content"}, ...]."""
        return self._listed() if self.text is None else self.text

    @property
    def as_in_trl(self) -> str | list[dict[str, str]]:
        """As TRL gives it to reward functions: a list of messages where the row has one, else the text."""
        return self._listed() if self.conversational else self.plain

    def _listed(self) -> list[dict[str, str]]:
        return [message.as_dict() for message in self.messages]


@dataclass(frozen=True, kw_only=True)
class PromptDataset(Tokenised):
    """N prompts.

    Attributes:
      ids: N sequences of ids, the BOS included where there is one.
      prompts: the same as messages and text.
      safety: bool [N], rows whose column `safety` is true: what a safety reward is to judge.
    """

    ids: Ragged
    prompts: tuple[Prompt, ...]
    safety: np.ndarray

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the ids in order, the texts, the safety tags, and the other columns, which a reward may read."""
        texts = repr([prompt[:2] for prompt in self.prompts]).encode("utf-8", "surrogatepass")
        columns = json.dumps([dict(prompt.columns) for prompt in self.prompts], default=str).encode()
        return fingerprint_of((self.ids.values, self.ids.starts, self.safety), texts, columns)

    def summary(self) -> str:
        """One line for the log: rows used, lengths. (What was left out was logged when it was.)"""
        lengths = self.ids.lengths
        return self.told(
            f"{self.source}: {len(self)} of {self.rows_read} prompts, {lengths.mean():.0f} tokens each"
            f" (longest {lengths.max()})",
            cuts_summary(self.cuts),
        )


def other_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row of prompts beside its `prompt`."""
    return {name: value for name, value in row.items() if name != "prompt"}


def same_columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same rows, each with every column that any of them has a value in."""
    names = sorted({name for row in rows for name, value in row.items() if value is not None})
    return [{name: row.get(name) for name in names} for row in rows]


def load_prompts(
    source: str,
    encoder: ConversationEncoder,
    config: DataConfig,
    *,
    longest: int,
    vocab_size: int,
    on_bad_rows: OnBadRows = "refuse",
    tagged: bool = True,
) -> PromptDataset:
    """Read, check and tokenise a file of prompts.

    Args:
      source: see `files.read_rows`; the layouts of rows: see `preferences.parse_prompt`.
      encoder: of the policy's tokenizer and template.
      config, vocab_size, on_bad_rows: as for `dataset.load_preferences`, which raises the same errors.
      longest: a prompt of more tokens loses its beginning (its BOS is kept).
      tagged: read the column `safety`, which tags rows for a safety reward.
    """
    rows = CheckedRows(source, config.limit, columns=config.columns)
    raw = config.template == RAW

    def parse(row: dict[str, Any]) -> tuple[Prompt, bool, list[int]]:
        messages, text = parse_prompt(row)
        tag = (tagged and row.get("safety")) or False
        if not isinstance(tag, bool):
            raise BadRow("'safety' is neither true nor false", f"it holds {str(tag)[:40]!r}")
        if raw and text is None:
            raise BadRow("--data.template raw takes prompts as plain text", "the row has several messages")
        encoded = encoder.prompt_ids(text if raw and text is not None else messages)
        if not encoded:
            raise BadRow("the prompt has no token", "give it a text")
        listed = text is None or any(isinstance(row.get(name), list) for name in _LISTED)
        return Prompt(messages, text, other_columns(row), listed), tag, encoded

    def encode(chunk: Numbered[tuple[Prompt, bool, list[int]]]) -> Iterator[tuple[Prompt, bool, np.ndarray, RowCut]]:
        for number, (prompt, tag, encoded) in chunk:
            check_ids(max(encoded), vocab_size, number)
            lost = max(len(encoded) - longest, 0)
            cut = RowCut(lost, system=lost > 0 and prompt.messages[0].role == "system")
            yield prompt, tag, end_of(np.asarray(encoded, np.int32), longest, encoder.bos), cut

    found, read = rows.collect(parse, encode, on_bad_rows)
    prompts, safety, ids, cuts = zip(*found, strict=True)
    if unused := [name for name in rows.unused(PROMPTS, rendered=PROMPTS, writes=encoder.writes) if _speaks(name)]:
        log.warning("%s: the template does not write %s", source, ", ".join(unused))
    columns = same_columns([prompt.columns for prompt in prompts])
    return PromptDataset(
        ids=Ragged.of(ids, np.int32),
        prompts=tuple(prompt._replace(columns=own) for prompt, own in zip(prompts, columns, strict=True)),
        safety=np.asarray(safety, bool),
        cuts=cuts,
        **read,
    )


def _speaks(name: str) -> bool:
    """Whether a column, or a key of messages, may hold what the prompt says."""
    return name == "tools" or ": " in name


def load_answered_prompts(
    source: str,
    encoder: ConversationEncoder,
    config: DataConfig,
    *,
    longest: int,
    answer: int,
    vocab_size: int,
    on_bad_rows: OnBadRows = "refuse",
) -> tuple[PromptDataset, Ragged]:
    """The prompts of a file of dialogues, and the last answer of each, its terminator included.

    Args and errors: as of `load_prompts`, and `answer`: of a longer one the first so many tokens are kept.
    """
    rows = CheckedRows(source, config.limit, columns=config.columns)

    def parse(row: dict[str, Any]) -> tuple[Dialogue, Rendered]:
        dialogue = parse_dialogue(row)
        *prompt, last = dialogue.messages
        return dialogue, encoder.render_group(tuple(prompt), (last.content,), dialogue.raw)

    def encode(
        chunk: Numbered[tuple[Dialogue, Rendered]],
    ) -> Iterator[tuple[Prompt, np.ndarray, np.ndarray, RowCut] | BadRow]:
        encoded = encoder.encode([rendered for _, (_, rendered) in chunk], compared=False)
        for (number, (dialogue, _)), found in zip(chunk, encoded, strict=True):
            if isinstance(found, BadRow):
                yield found
                continue
            ids, response = found.prompt, found.responses[0]
            check_ids(int(max(ids.max(), response.max())), vocab_size, number)
            response = response[:-1] if dialogue.cut else response
            lost, first = max(len(ids) - longest, 0), dialogue.messages[0]
            cut = RowCut(lost, int(len(response) > answer), lost > 0 and first.role == "system")
            prompt = Prompt(dialogue.messages[:-1], None if dialogue.raw is None else dialogue.raw[0])
            yield prompt, end_of(ids, longest, encoder.bos), response[:answer], cut

    found, read = rows.collect(parse, encode, on_bad_rows)
    prompts, ids, answers, cuts = zip(*found, strict=True)
    data = PromptDataset(
        ids=Ragged.of(ids, np.int32),
        prompts=tuple(prompts),
        safety=np.zeros(len(prompts), bool),
        cuts=cuts,
        **read,
    )
    return data, Ragged.of(answers, np.int32)


class PromptBatch(NamedTuple):
    """The prompts of one iteration, each as often as it is to be answered, in neighbouring rows.

    Attributes:
      step: iterations before this one.
      prompts: int32 [B, P], right-padded.
      prompt_lengths: int32 [B].
      indices: int [B], positions in the data set.
      rows: int32 [B], numbers of the rows in their file.
    """

    step: int
    prompts: np.ndarray
    prompt_lengths: np.ndarray
    indices: np.ndarray
    rows: np.ndarray


class PromptLoader(StepsLoader[PromptBatch]):
    """Iterator over the `PromptBatch`es of a whole run.

    The epochs of the file follow each other without a gap, so that every batch is full: iteration t takes the prompts
    t n .. t n + n - 1 of that endless row, n of them in an iteration.
    """

    def __init__(
        self,
        dataset: PromptDataset,
        *,
        batch_size: int,
        group: int,
        seed: int,
        shuffle: bool = True,
        multiple: int = 8,
        **run: Unpack[RunOptions],
    ):
        """Args: see `RowOptions`, and:
        dataset: the prompts.
        batch_size: responses an iteration, a multiple of `group`.
        group: responses to each prompt.
        multiple: prompts are padded to a multiple of this, the same in all batches.
        """
        check_seed(seed)
        self.batch_size = batch_size
        run.setdefault("workers", 0)
        self._dataset, self._group, self._prompts = dataset, group, batch_size // group
        self.width = -(-int(dataset.ids.lengths.max()) // multiple) * multiple

        def order(epoch: int) -> np.ndarray:
            n = len(dataset)
            return np.random.default_rng([seed, epoch]).permutation(n) if shuffle else np.arange(n)

        self._order = functools.lru_cache(maxsize=4)(order)
        steps_per_epoch = -(-len(dataset) // self._prompts)
        super().__init__(
            self._batch_of,
            holds=lambda step: f"rows {dataset.row_numbers[self._indices(step)].tolist()}",
            steps_per_epoch=steps_per_epoch,
            identity={
                "data": dataset.fingerprint,
                "batch_size": batch_size,
                "group": group,
                "seed": seed,
                "shuffle": shuffle,
            },
            **run,
        )

    def _indices(self, step: int) -> np.ndarray:
        n = len(self._dataset)
        places = (divmod(i, n) for i in range(step * self._prompts, (step + 1) * self._prompts))
        return np.asarray([self._order(epoch)[i] for epoch, i in places])

    def _batch_of(self, step: int) -> PromptBatch:
        indices = np.repeat(self._indices(step), self._group)
        prompts = np.zeros((len(indices), self.width), np.int32)
        for row, index in zip(prompts, indices, strict=True):
            ids = self._dataset.ids[index]
            row[: len(ids)] = ids
        lengths = self._dataset.ids.lengths[indices].astype(np.int32)
        return PromptBatch(step, prompts, lengths, indices, self._dataset.row_numbers[indices])

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"{self.total_steps} iterations of {self._prompts * self._group} responses to {self._prompts} prompts;"
            f" {self.steps_per_epoch} iterations an epoch"
        )
