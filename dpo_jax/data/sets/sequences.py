"""A tokenised data set of sequences, in memory: flat arrays of ids and of targets, and where each sequence lies."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import DataConfig
from dpo_jax.data.rows.dialogues import COLUMNS, RENDERED, parse_dialogue
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.dataset import held_out, joined_ragged
from dpo_jax.data.sources.checked_rows import CheckedRows, OnBadRows, check_ids
from dpo_jax.data.tokens.encode_dialogue import DialogueEncoder, EncodedSequence, TrainOn
from dpo_jax.data.tokens.ragged import Ragged

if TYPE_CHECKING:
    from dpo_jax.data.sets.row_mixture import RowMixture


@dataclass(frozen=True)
class SequenceDataset:
    """N sequences of token ids, and which of the tokens are to be predicted.

    Attributes:
      tokens: N sequences of ids int32, the BOS included where there is one.
      targets: bool sequences like `tokens`, True at tokens that the loss counts; never at the first of a sequence.
      row_numbers: int32 [N], numbers of the rows in their file, from 1.
      dropped: how many rows were left out, by reason.
      rows_read: how many rows the file held (or `limit`).
      source: what was read.
      cut: how many sequences lost their end to the length limit.
      used_columns, unused_columns: columns of the file that are read, in words, and that nothing reads.
      terminators: ids that end an answer.
      mixture: the sources it was joined from, where they were several.
      problems: what was left out, in words.
    """

    tokens: Ragged
    targets: Ragged
    row_numbers: np.ndarray
    dropped: Counter[str]
    rows_read: int
    source: str
    cut: int = 0
    unused_columns: tuple[str, ...] = ()
    terminators: tuple[int, ...] = ()
    used_columns: tuple[str, ...] = ()
    mixture: "RowMixture | None" = None
    problems: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

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
        digest = hashlib.sha256()
        for array in (self.tokens.values, self.targets.values, self.tokens.starts):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def summary(self) -> str:
        """A few lines for the log: rows used, lengths, how much of them the loss counts, columns not read.

        (What was left out was logged when it was.)
        """
        lengths = self.lengths
        lines = [
            f"{self.source}: {len(self)} of {self.rows_read} rows; {lengths.sum()} tokens, {lengths.mean():.0f} a row "
            f"(longest {lengths.max()}), {self.targets.values.mean():.1%} of them in the loss; "
            f"{self.cut} rows cut at their end"
        ]
        if self.used_columns:
            lines.append(f"columns used: {', '.join(self.used_columns)}")
        if self.unused_columns:
            lines.append(f"columns not used: {', '.join(self.unused_columns)}")
        return "\n".join(lines)


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
      source: see `files.read_rows`; the layouts of rows: see `dialogues.py`.
      tokenizer: a fast tokenizer.
      config: template, max_length, limit.
      train_on: what the loss counts: every answer, the last answer alone, or all tokens.
      vocab_size: rows of the model's embedding.
      on_bad_rows: "refuse": read the whole file, then raise one error that counts the bad rows by reason and names the
        first of each. "skip": leave them out. Which rows are left out in either case: see `problems.py`.

    Raises:
      InputError: unreadable file, bad rows, no usable row, ids beyond the embedding, no chat template.
    """
    encoder = DialogueEncoder(tokenizer, config.template, train_on, config.date)
    rows = CheckedRows(source, config.limit, columns=config.columns)
    sequences: list[EncodedSequence] = []
    numbers: list[int] = []
    for chunk in rows.chunks(lambda row: encoder.render(parse_dialogue(row))):
        encoded = encoder.encode([rendered for _, rendered in chunk], config.max_length)
        for (number, _), sequence in zip(chunk, encoded, strict=True):
            if isinstance(sequence, BadRow):
                rows.tally.add(number, sequence)
                continue
            check_ids(int(sequence.tokens.max()), vocab_size, number)
            sequences.append(sequence)
            numbers.append(number)
    problems = rows.close(len(sequences), on_bad_rows)
    return SequenceDataset(
        tokens=Ragged.of([s.tokens for s in sequences], np.int32),
        targets=Ragged.of([s.targets for s in sequences], bool),
        row_numbers=np.asarray(numbers, np.int32),
        dropped=rows.tally.dropped,
        rows_read=rows.rows_read,
        source=source,
        cut=sum(s.cut for s in sequences),
        used_columns=rows.used(COLUMNS),
        unused_columns=rows.unused(COLUMNS, rendered=RENDERED, writes=encoder.writes),
        terminators=encoder.terminators,
        problems=problems,
    )


def take_sequences(data: SequenceDataset, rows: np.ndarray) -> SequenceDataset:
    """The rows at the positions `rows`, in that order. What was left out of the file, and cut, stays told."""
    return replace(
        data,
        tokens=Ragged.of([data.tokens[i] for i in rows], np.int32),
        targets=Ragged.of([data.targets[i] for i in rows], bool),
        row_numbers=data.row_numbers[rows],
    )


def split_sequences(data: SequenceDataset, share: float, seed: int) -> tuple[SequenceDataset, SequenceDataset]:
    """(the rest, about `share` of the prompts): dialogues that begin alike, up to the first answer, stay together.

    (Where all tokens are learnt there is no such beginning, and equal dialogues stay together.) Raises `InputError`
    where one side would be empty.
    """
    firsts = [int(data.targets[i].argmax()) for i in range(len(data))]
    prompts = [data.tokens[i][:first] if first > 1 else data.tokens[i] for i, first in enumerate(firsts)]
    inside = held_out(prompts, share, seed, data.source)
    return take_sequences(data, np.flatnonzero(~inside)), take_sequences(data, np.flatnonzero(inside))


def join_sequences(first: SequenceDataset, second: SequenceDataset) -> SequenceDataset:
    """All rows of both; those of `second` are numbered on from those of `first`."""
    behind = max(first.rows_read, int(first.row_numbers.max()))
    return replace(
        first,
        tokens=joined_ragged(first.tokens, second.tokens),
        targets=joined_ragged(first.targets, second.targets),
        row_numbers=np.concatenate([first.row_numbers, second.row_numbers + behind]),
        dropped=first.dropped + second.dropped,
        rows_read=first.rows_read + second.rows_read,
        source=f"{first.source} + {second.source}",
        cut=first.cut + second.cut,
        used_columns=tuple(sorted({*first.used_columns, *second.used_columns})),
        unused_columns=tuple(sorted({*first.unused_columns, *second.unused_columns})),
    )
