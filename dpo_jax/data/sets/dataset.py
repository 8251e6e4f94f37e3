"""A tokenised preference data set, in memory: two flat arrays of ids and where each row lies in them."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import DataConfig, Ties
from dpo_jax.data.rows.comparisons import REPLIES_COLUMNS, parse_preference
from dpo_jax.data.rows.preferences import COLUMNS, EXTRA_COLUMNS, PROMPT_COLUMNS, Extra
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sources.checked_rows import CheckedRows, OnBadRows, check_ids
from dpo_jax.data.tokens.cuts import RowCut
from dpo_jax.data.tokens.cuts import summary as cuts_summary
from dpo_jax.data.tokens.encode import ConversationEncoder, Rendered, cut_of, truncate
from dpo_jax.data.tokens.ragged import Ragged
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig

if TYPE_CHECKING:
    from dpo_jax.data.sets.row_mixture import RowMixture


def joined_ragged(a: Ragged, b: Ragged) -> Ragged:
    """The sequences of both."""
    return Ragged(np.concatenate([a.values, b.values]), np.concatenate([a.starts, a.starts[-1] + b.starts[1:]]))


def held_out(prompts: Sequence[np.ndarray], share: float, seed: int, source: str) -> np.ndarray:
    """bool [N], True for the rows of about `share` of the prompts: rows of one prompt stay together.

    `prompts`: the ids of each row's. Which of them depends on the seed. Raises `InputError` where one side would be
    empty.
    """
    keys = [hashlib.sha256(f"{seed} ".encode() + prompt.tobytes()).digest() for prompt in prompts]
    different = sorted(set(keys))
    count = round(share * len(different))
    if not 0 < count < len(different):
        raise InputError(
            f"{source}: a share of {share:g} of {len(different)} prompts leaves one side empty; change the share"
        )
    held = set(different[:count])
    return np.asarray([key in held for key in keys])


@dataclass(frozen=True)
class PreferenceDataset:
    """N preference groups: a prompt and K responses each (K index 0 chosen, 1 rejected, from 2 on mismatched for KTO).

    Attributes:
      prompts: N sequences of ids, BOS included.
      responses: N x K sequences of ids, response k of row i at i * K + k, terminator included; empty = absent.
      formats: bool sequences like `responses`, True at tokens that the template wrote; None where nobody asked.
      row_numbers: int32 [N], numbers of the rows in their file, from 1.
      extras: column -> N values (None where a row has none).
      dropped: how many rows were left out, by reason.
      rows_read: how many rows the file held (or `limit`).
      used_columns, unused_columns: columns of the file that are read, in words, and that nothing reads.
      terminators: ids that end a whole response (of comparisons: see `encode.ScoredEncoder`); none: not known.
      source: what was read.
      cuts: what the length limits cut off each of the N rows; empty where nobody measured it.
      reference_logps: float32 [N, K], or None.
      mixture: the sources it was joined from, where they were several.
      margins, ranks, labels: see `PreferenceBatch`, for N rows; None where nobody asked.
    """

    prompts: Ragged
    responses: Ragged
    formats: Ragged | None
    row_numbers: np.ndarray
    extras: dict[str, list[Extra | None]]
    dropped: Counter[str]
    rows_read: int
    unused_columns: tuple[str, ...]
    terminators: tuple[int, ...]
    source: str
    cuts: tuple[RowCut, ...] = ()
    reference_logps: np.ndarray | None = None
    margins: np.ndarray | None = None
    ranks: np.ndarray | None = None
    labels: dict[str, np.ndarray] | None = None
    used_columns: tuple[str, ...] = ()
    mixture: "RowMixture | None" = None
    problems: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def responses_per_prompt(self) -> int:
        """K."""
        return len(self.responses) // len(self)

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int64 [N]."""
        return self.prompts.lengths

    @property
    def response_lengths(self) -> np.ndarray:
        """int64 [N, K]; 0 = absent."""
        return self.responses.lengths.reshape(len(self), -1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what is learnt, in order: ids, lengths, format masks, ranks, margins, labels.

        (Not the reference log-probabilities, which follow from these and another model.)
        """
        digest = hashlib.sha256()
        parts = (self.prompts, self.responses, self.formats)
        arrays = [array for part in parts if part is not None for array in (part.values, part.starts)]
        arrays += [array for array in (self.margins, self.ranks) if array is not None]
        arrays += [values for _, values in sorted((self.labels or {}).items())]
        for array in arrays:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def with_reference(self, logps: np.ndarray) -> "PreferenceDataset":
        """A copy with the summed reference log-probabilities float32 [N, K], in row order."""
        logps = np.asarray(logps, np.float32)
        if logps.shape != self.response_lengths.shape:
            raise ValueError(f"reference log-probs {logps.shape} for a data set of shape {self.response_lengths.shape}")
        return replace(self, reference_logps=logps)

    def summary(self) -> str:
        """A few lines for the log: rows used, lengths, what was cut, columns not read.

        (What was left out was logged when it was.)
        """
        prompts, responses = self.prompt_lengths, self.response_lengths[:, :2]
        shown = responses[responses > 0]
        last = self.responses.values[np.maximum(self.responses.starts[1:] - 1, 0)].reshape(len(self), -1)[:, :2]
        ended = np.isin(last, self.terminators)[responses > 0].mean()
        lines = [
            f"{self.source}: {len(self)} of {self.rows_read} rows; prompts of {prompts.mean():.0f} tokens "
            f"(longest {prompts.max()}), responses of {shown.mean():.0f} (longest {shown.max()})"
            + (f", {ended:.1%} of them whole with their terminator" if self.terminators else "")
        ]
        if cut := cuts_summary(self.cuts):
            lines.append(cut)
        if self.used_columns:
            lines.append(f"columns used: {', '.join(self.used_columns)}")
        if self.unused_columns:
            lines.append(f"columns not used: {', '.join(self.unused_columns)}")
        return "\n".join(lines)


def load_preferences(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    vocab_size: int,
    on_bad_rows: OnBadRows = "refuse",
    with_mismatched: bool = False,
    with_format_masks: bool = False,
    needs_pairs: bool = True,
    ties: Ties | None = None,
) -> PreferenceDataset:
    """Read, check and tokenise a preference file.

    Every process does so itself: it is about a thousand chat pairs a second and core, so no cache of ids is kept that
    could go stale.

    Args:
      source: see `files.read_rows`; the layouts of rows: see `preferences.py`.
      tokenizer: a fast tokenizer.
      config: template, lengths, limit.
      vocab_size: rows of the model's embedding.
      on_bad_rows: "refuse": read the whole file, then raise one error that counts the bad rows by reason and names the
        first of each. "skip": leave them out. Which rows are left out in either case: see `problems.py`.
      with_mismatched: add, from K index 2 on, the responses of another prompt (for KTO's KL point).
      with_format_masks: keep the masks of header and turn-end tokens.
      needs_pairs: refuse unpaired rows (prompt, completion, label).
      ties: whether rows that prefer nothing are bad ("error") or left out ("drop"), by an option of this name.

    Raises:
      InputError: unreadable file, bad rows, no usable row, ids beyond the embedding, no chat template.
    """
    encoder = ConversationEncoder(tokenizer, config.template, config.date)
    rows = CheckedRows(source, config.limit, columns=config.columns, compared=True)
    prompts: list[np.ndarray] = []
    responses: list[np.ndarray] = []
    formats: list[np.ndarray] = []
    numbers: list[int] = []
    cuts: list[RowCut] = []
    extras: list[dict[str, Extra]] = []

    def parse(row: dict[str, Any]) -> tuple[Rendered, dict[str, Extra]]:
        pair = parse_preference(row, needs_pairs=needs_pairs, ties=ties)
        return encoder.render(pair), rows.usable(pair.extras)

    for chunk in rows.chunks(parse):
        encoded = encoder.encode([rendered for _, (rendered, _) in chunk])
        for (number, (rendered, extra)), whole in zip(chunk, encoded, strict=True):
            try:
                if isinstance(whole, BadRow):
                    raise whole
                pair = truncate(whole, config, bos=encoder.bos)
            except BadRow as problem:
                rows.tally.add(number, problem)
                continue
            check_ids(max(int(ids.max(initial=0)) for ids in (pair.prompt, *pair.responses)), vocab_size, number)
            prompts.append(pair.prompt)
            responses.extend(pair.responses)
            formats.extend(pair.formats)
            numbers.append(number)
            cuts.append(cut_of(whole, pair, system=rendered.system))
            extras.append(extra)

    problems = rows.close(len(prompts), on_bad_rows)
    dataset = PreferenceDataset(
        prompts=Ragged.of(prompts, np.int32),
        responses=Ragged.of(responses, np.int32),
        formats=Ragged.of(formats, bool) if with_format_masks else None,
        row_numbers=np.asarray(numbers, np.int32),
        extras={name: [e.get(name) for e in extras] for name in EXTRA_COLUMNS if name in rows.columns},
        dropped=rows.tally.dropped,
        rows_read=rows.rows_read,
        used_columns=rows.used(COLUMNS | REPLIES_COLUMNS),
        unused_columns=rows.unused(COLUMNS | REPLIES_COLUMNS, rendered=PROMPT_COLUMNS, writes=encoder.writes),
        terminators=encoder.terminators,
        source=source,
        cuts=tuple(cuts),
        problems=problems,
    )
    return with_mismatched_responses(dataset, config.max_length) if with_mismatched else dataset


def partners(prompts: Ragged) -> np.ndarray | None:
    """int [N]: for each row another one with another prompt, each row once; None where all have the same prompt.

    Rows in the order of their prompts are shifted by the size of the largest group of one prompt: where the prompts are
    all different, that is the next row. Where one prompt has more than half of the rows, the others serve it in turns.
    """
    seen: dict[bytes, int] = {}
    groups = np.asarray([seen.setdefault(prompts[i].tobytes(), len(seen)) for i in range(len(prompts))])
    sizes = np.bincount(groups)
    if len(sizes) == 1:
        return None
    order, largest = np.argsort(groups, kind="stable"), int(sizes.max())
    partner = np.empty(len(groups), int)
    if 2 * largest <= len(groups):
        partner[order] = np.roll(order, -largest)
    else:
        many, others = np.flatnonzero(groups == sizes.argmax()), np.flatnonzero(groups != sizes.argmax())
        partner[many] = np.resize(others, len(many))
        partner[others] = many[: len(others)]
    return partner


def with_mismatched_responses(dataset: PreferenceDataset, max_length: int) -> PreferenceDataset:
    """Add to each row the responses of a row that has another prompt, cut to `max_length` with this prompt.

    All responses of all rows serve so, once each (see `partners`), as the paper has it and TRL does: K becomes 3 where
    rows have one response, and 4 where rows have two (the last is empty of a partner with one). The pairing depends on
    the data set alone, not on batches.
    """
    partner = partners(dataset.prompts)
    if partner is None:
        raise InputError(f"{dataset.source}: KTO needs responses to other prompts, and all rows have the same one")
    lengths = dataset.response_lengths
    present = [np.flatnonzero(row) for row in lengths > 0]
    most = max(len(some) for some in present)
    responses: list[np.ndarray] = []
    formats: list[np.ndarray] = []
    for i, other in enumerate(partner):
        room = max_length - len(dataset.prompts[i])
        places = [2 * other + k for k in present[other]]
        for into, source in ((responses, dataset.responses), (formats, dataset.formats)):
            if source is not None:
                added = [source[place][:room] for place in places]
                into += [source[2 * i], source[2 * i + 1], *added, *[source.values[:0]] * (most - len(added))]
    return replace(
        dataset,
        responses=Ragged.of(responses, np.int32),
        formats=None if dataset.formats is None else Ragged.of(formats, bool),
    )


def check_lengths(dataset: PreferenceDataset, architecture: LlamaConfig, max_length: int) -> None:
    """Raise `InputError` where a row, cut to `max_length`, is longer than the model's context."""
    totals = dataset.prompt_lengths + dataset.response_lengths.max(axis=1)
    check_context(dataset.source, dataset.row_numbers, totals, architecture, max_length)


def check_context(
    source: str, row_numbers: np.ndarray, lengths: np.ndarray, architecture: LlamaConfig, max_length: int
) -> None:
    """Raise `InputError` where a row of `lengths` tokens [N], cut to `max_length`, exceeds the model's context."""
    longest = int(lengths.argmax())
    if lengths[longest] > architecture.max_position:
        raise InputError(
            f"{source}, row {row_numbers[longest]}: {lengths[longest]} tokens under --data.max_length {max_length}, and"
            f" the model's context is {architecture.max_position}; set --data.max_length to at most"
            f" {architecture.max_position}"
        )
