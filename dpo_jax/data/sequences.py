"""A tokenised data set of sequences, in memory: flat arrays of ids and of targets, and where each sequence lies."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import DataConfig
from dpo_jax.data.checked_rows import CheckedRows, OnBadRows, check_ids
from dpo_jax.data.dataset import Ragged
from dpo_jax.data.dialogues import COLUMNS, RENDERED, parse_dialogue
from dpo_jax.data.encode_dialogue import DialogueEncoder, EncodedSequence, TrainOn
from dpo_jax.data.problems import BadRow


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
