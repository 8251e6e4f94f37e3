"""A tokenised data set of sequences, in memory: flat arrays of ids and of targets, and where each sequence lies."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import DataConfig
from dpo_jax.data.rows.dialogues import parse_dialogue
from dpo_jax.data.rows.layouts import DIALOGUE_ROW, RENDERED
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.tokenised import Tokenised, fingerprint_of, held_out
from dpo_jax.data.sources.checked_rows import CheckedRows, Numbered, OnBadRows, check_ids
from dpo_jax.data.tokens.encode_dialogue import DialogueEncoder, EncodedSequence, RenderedDialogue, TrainOn
from dpo_jax.data.tokens.ragged import Ragged


@dataclass(frozen=True, kw_only=True)
class SequenceDataset(Tokenised):
    """N sequences of token ids, and which of the tokens are to be predicted.

    Attributes:
      tokens: N sequences of ids int32, the BOS included where there is one.
      targets: bool sequences like `tokens`, True at tokens that the loss counts; never at the first of a sequence.
      cut: how many sequences lost their end to the length limit.
    """

    tokens: Ragged
    targets: Ragged
    cut: int = 0

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]."""
        return self.tokens.lengths

    @property
    def target_lengths(self) -> np.ndarray:
        """int64 [N]: how many tokens of each sequence the loss counts."""
        before = np.concatenate([[0], np.cumsum(self.targets.values, dtype=np.int64)])
        return np.diff(before[self.targets.starts])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the loss: ids, targets and lengths, in order."""
        return fingerprint_of((self.tokens.values, self.targets.values, self.tokens.starts))

    def summary(self) -> str:
        """A few lines for the log: rows used, lengths, how much of them the loss counts, columns not read.

        (What was left out was logged when it was.)
        """
        lengths = self.lengths
        return self.told(
            f"{self.source}: {len(self)} of {self.rows_read} rows; {lengths.sum()} tokens, {lengths.mean():.0f} a row "
            f"(longest {lengths.max()}), {self.targets.values.mean():.1%} of them in the loss; "
            f"{self.cut} rows cut at their end"
        )


def load_dialogues(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    train_on: TrainOn = "answers",
    vocab_size: int,
    on_bad_rows: OnBadRows = "refuse",
) -> SequenceDataset:
    """Read, check and tokenise a file of dialogues.

    Args:
      source, tokenizer, config, vocab_size, on_bad_rows: as for `dataset.load_preferences`, which raises the same
        errors; the layouts of rows: see `dialogues.py`.
      train_on: what the loss counts: every answer, the last answer alone, or all tokens.
    """
    encoder = DialogueEncoder.of(tokenizer, config, train_on=train_on)
    rows = CheckedRows(source, config.limit, columns=config.columns)

    def encode(chunk: Numbered[RenderedDialogue]) -> Iterator[EncodedSequence | BadRow]:
        encoded = encoder.encode([rendered for _, rendered in chunk], config.max_length)
        for (number, _), sequence in zip(chunk, encoded, strict=True):
            if not isinstance(sequence, BadRow):
                check_ids(int(sequence.tokens.max()), vocab_size, number)
            yield sequence

    sequences, read = rows.collect(lambda row: encoder.render(parse_dialogue(row)), encode, on_bad_rows)
    return SequenceDataset(
        tokens=Ragged.of([s.tokens for s in sequences], np.int32),
        targets=Ragged.of([s.targets for s in sequences], bool),
        cut=sum(s.cut for s in sequences),
        used_columns=rows.used(DIALOGUE_ROW),
        unused_columns=rows.unused(DIALOGUE_ROW, rendered=RENDERED, writes=encoder.writes),
        terminators=encoder.terminators,
        **read,
    )


def split_sequences(data: SequenceDataset, share: float, seed: int) -> tuple[SequenceDataset, SequenceDataset]:
    """(the rest, about `share` of the prompts): dialogues that begin alike, up to the first response, stay together.

    (Where all tokens are learnt there is no such beginning, and equal dialogues stay together.) What was left out of
    the file, and cut, stays told. Raises `InputError` where one side would be empty.
    """
    firsts = [int(data.targets[i].argmax()) for i in range(len(data))]
    prompts = [data.tokens[i][:first] if first > 1 else data.tokens[i] for i, first in enumerate(firsts)]
    rest, held = held_out(prompts, share, seed, data.source)
    return data.taken(rest), data.taken(held)
