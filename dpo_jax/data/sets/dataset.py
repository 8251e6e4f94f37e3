"""A tokenised preference data set, in memory: two flat arrays of ids and where each row lies in them."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import DataConfig, Ties
from dpo_jax.data.rows.comparisons import parse_preference
from dpo_jax.data.rows.layouts import EXTRA_COLUMNS, PAIR_COLUMNS, PROMPT_COLUMNS, REPLIES_COLUMNS
from dpo_jax.data.rows.preferences import Extra
from dpo_jax.data.rows.problems import BadRow, Tally
from dpo_jax.data.rows.ratings import Evidence
from dpo_jax.data.sets.stored_ids import NUMBERS, TEXTS, StoredIds, open_ids
from dpo_jax.data.sets.tokenised import Tokenised, fingerprint_of
from dpo_jax.data.sources.checked_rows import CheckedRows, Numbered, OnBadRows, check_ids
from dpo_jax.data.tokens.cuts import RowCut, summary as cuts_summary
from dpo_jax.data.tokens.encode import ConversationEncoder, Encoded, Rendered, cut_of, same_tokens, truncate
from dpo_jax.data.tokens.ragged import Ragged, StoredRagged
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig

Told = TypeVar("Told")
Usable = Callable[[Mapping[str, Evidence]], dict[str, Extra]]
"""`CheckedRows.usable`."""
NO_TOKENS = np.zeros(0, np.int32)
"""An absent response."""


@dataclass(frozen=True, kw_only=True)
class PreferenceDataset(Tokenised):
    """N preference groups: a prompt and K responses each (K index 0 chosen, 1 rejected, from 2 on mismatched for KTO).

    Attributes:
      prompts: N sequences of ids, BOS included.
      responses: N x K sequences of ids, response k of row i at i * K + k, terminator included; empty = absent.
      formats: bool sequences like `responses`, True at tokens that the template wrote; None where nobody asked.
      extras: column -> N values (None where a row has none).
      reference_logps: float32 [N, K], or None.
      margins, ranks, labels: see `PreferenceBatch`, for N rows; None where nobody asked.
    """

    prompts: Ragged
    responses: Ragged
    formats: Ragged | None
    extras: dict[str, list[Extra | None]]
    reference_logps: np.ndarray | None = None
    margins: np.ndarray | None = None
    ranks: np.ndarray | None = None
    labels: dict[str, np.ndarray] | None = None

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
        parts = (self.prompts, self.responses, self.formats)
        arrays = [array for part in parts if part is not None for array in part.told]
        arrays += [array for array in (self.margins, self.ranks) if array is not None]
        arrays += [values for _, values in sorted((self.labels or {}).items())]
        return fingerprint_of(arrays)

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
        last = self.responses.last.reshape(len(self), -1)[:, :2]
        ended = np.isin(last, self.terminators)[responses > 0].mean()
        return self.told(
            f"{self.source}: {len(self)} of {self.rows_read} rows; prompts of {prompts.mean():.0f} tokens "
            f"(longest {prompts.max()}), responses of {shown.mean():.0f} (longest {shown.max()})"
            + (f", {ended:.1%} of them whole with their terminator" if self.terminators else ""),
            cuts_summary(self.cuts),
        )


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

    Every process does so itself: it is about a thousand chat pairs a second and core. Of a store that holds the ids,
    too (`stored_ids.py`), those are taken, and read when they are asked for.

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
    encoder = ConversationEncoder.of(tokenizer, config)
    others = {
        "--data.limit takes the first rows alone": config.limit is not None,
        "--data.columns names others": config.columns is not None,
        "--data.empty_system puts a message before them": config.empty_system,
        "--dpo.mask_format_tokens needs to know more of them": with_format_masks,
    }
    stored = open_ids(
        source,
        "preferences",
        tokenizer,
        template=config.template,
        date=config.date,
        otherwise=next((why for why, so in others.items() if so), ""),
    )
    if stored is not None and not (needs_pairs and (stored.rows["responses"] == 0).any()):
        found = _stored(source, stored, config, encoder, vocab_size, on_bad_rows)
        return with_mismatched_responses(found, config.max_length) if with_mismatched else found

    def parse(row: dict[str, Any], usable: Usable) -> tuple[Rendered, dict[str, Extra]]:
        pair = parse_preference(row, needs_pairs=needs_pairs, ties=ties)
        return encoder.render(pair), usable(pair.extras)

    known, limits = PAIR_COLUMNS | REPLIES_COLUMNS, {"vocab_size": vocab_size, "on_bad_rows": on_bad_rows}
    data, extras, columns = load_groups(source, encoder, config, parse, known=known, rendered=PROMPT_COLUMNS, **limits)
    told = columns | {name for each in extras for name in each}
    dataset = replace(
        data,
        formats=data.formats if with_format_masks else None,
        extras={name: [e.get(name) for e in extras] for name in EXTRA_COLUMNS if name in told},
    )
    return with_mismatched_responses(dataset, config.max_length) if with_mismatched else dataset


def _stored(
    source: str,
    stored: StoredIds,
    config: DataConfig,
    encoder: ConversationEncoder,
    vocab_size: int,
    on_bad_rows: OnBadRows,
) -> PreferenceDataset:
    """The pairs whose ids are stored, cut as `encode.truncate` cuts them."""
    rows = stored.rows
    prompts, responses = rows["prompt"].astype(np.int64), rows["responses"].astype(np.int64)
    most = config.max_prompt_length
    room = np.maximum(config.max_length // 2, config.max_length - responses.max(axis=1)) if most is None else most
    kept = np.minimum(prompts, room)
    left = np.minimum(responses, (config.max_length - kept)[:, None])
    lasts = rows["lasts"].reshape(-1).astype(np.int64)
    dataset = PreferenceDataset(
        prompts=StoredRagged.stored(stored.files["prompt"], stored.digest, prompts, kept, ends=True, lead=encoder.bos),
        responses=StoredRagged.stored(
            stored.files["responses"], stored.digest, responses.reshape(-1), left.reshape(-1), lasts=lasts
        ),
        formats=None,
        extras=_extras(stored),
        used_columns=tuple(sorted(PAIR_COLUMNS.intersection(stored.told["columns"]))),
        terminators=encoder.endings,
        row_numbers=rows["number"].astype(np.int32),
        source=source,
        dropped=Counter(),
        rows_read=stored.count,
    )
    tally = Tally()
    alike = np.flatnonzero((left[:, 0] == left[:, 1]) & (left != responses).any(axis=1))
    same = [i for i in alike.tolist() if np.array_equal(dataset.responses[2 * i], dataset.responses[2 * i + 1])]
    for i in same:
        room_of = config.max_length - int(kept[i])
        tally.add(int(dataset.row_numbers[i]), same_tokens(f"the first {room_of} of them; raise --data.max_length"))
    told = stored.read(source, vocab_size, on_bad_rows, tally)
    shorter, off = (left != responses).sum(axis=1), prompts - kept
    cuts = [RowCut()] * len(rows)
    for i in np.flatnonzero((shorter > 0) | (off > 0)).tolist():
        cuts[i] = RowCut(int(off[i]), int(shorter[i]), bool(rows["system"][i] and off[i] > 0))
    dataset = replace(dataset, cuts=tuple(cuts), **told)
    return dataset.taken(np.setdiff1d(np.arange(len(rows)), same)) if same else dataset


def _extras(stored: StoredIds) -> dict[str, list[Extra | None]]:
    """The columns beside the pairs, under the readers' names."""
    there = {*stored.told["columns"]}
    found = {name: stored.column(name) for name in (*NUMBERS, *TEXTS) if name in there}
    if words := found.pop("rating_text", None):
        numbers = found.get("rating", [None] * len(words))
        found["rating"] = [word if number is None else number for word, number in zip(words, numbers, strict=True)]
    return {name: found[name] for name in EXTRA_COLUMNS if name in found}


def load_groups(
    source: str,
    encoder: ConversationEncoder,
    config: DataConfig,
    parse: Callable[[dict[str, Any], Usable], tuple[Rendered, Told]],
    *,
    known: Collection[str],
    rendered: Collection[str],
    vocab_size: int,
    on_bad_rows: OnBadRows,
    compared: bool = True,
) -> tuple[PreferenceDataset, list[Told], set[str]]:
    """Prompts with their responses; what `parse` told beside the texts, for each row; and the columns that there are.

    K is that of the longest list; rows with fewer have absent responses, of length 0.

    Args:
      source, encoder, config, vocab_size, on_bad_rows: as for `load_preferences`.
      parse: (a row, what keeps of its evidence what can be used) -> its texts, and what it tells beside them.
      known, rendered: see `CheckedRows.unused`.
      compared: see `encode.truncate`; rows with one scored response each are put together.
    """
    rows = CheckedRows(source, config.limit, columns=config.columns, compared=compared)
    lengths = config.max_length, config.max_prompt_length

    def encode(chunk: Numbered[tuple[Rendered, Told]]) -> Iterator[tuple[Encoded, RowCut, Told] | BadRow]:
        encoded = encoder.encode([texts for _, (texts, _) in chunk], compared=compared)
        for (number, (texts, told)), whole in zip(chunk, encoded, strict=True):
            try:
                if isinstance(whole, BadRow):
                    raise whole
                group = truncate(whole, *lengths, bos=encoder.bos, compared=compared)
            except BadRow as problem:
                yield problem
                continue
            check_ids(max(int(ids.max(initial=0)) for ids in (group.prompt, *group.responses)), vocab_size, number)
            yield group, cut_of(whole, group, system=texts.system), told

    made, read = rows.collect(lambda row: parse(row, rows.usable), encode, on_bad_rows)
    groups, cuts, told = zip(*made, strict=True)
    k = max(len(group.responses) for group in groups)
    responses, formats = (
        [ids for group in groups for ids in (*part(group), *[NO_TOKENS] * (k - len(group.responses)))]
        for part in (lambda group: group.responses, lambda group: group.formats)
    )
    data = PreferenceDataset(
        prompts=Ragged.of([group.prompt for group in groups], np.int32),
        responses=Ragged.of(responses, np.int32),
        formats=Ragged.of(formats, bool),
        extras={},
        used_columns=rows.used(known),
        unused_columns=rows.unused(known, rendered=rendered, writes=encoder.writes),
        terminators=encoder.endings,
        cuts=cuts,
        **read,
    )
    return data, list(told), rows.columns


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
                into += [source[2 * i], source[2 * i + 1], *added, *[source[0][:0]] * (most - len(added))]
    return replace(
        dataset,
        responses=Ragged.of(responses, np.int32),
        formats=None if dataset.formats is None else Ragged.of(formats, bool),
    )


def with_score_gaps(dataset: PreferenceDataset) -> PreferenceDataset:
    """`margins` [N] of the pairs: how much more the chosen response scores, by the rows' own scores.

    Raises `InputError` where a row has none, or where the chosen response does not score more.
    """
    n = len(dataset)
    better, worse = (dataset.extras.get(name, [None] * n) for name in ("score_chosen", "score_rejected"))
    gaps = np.zeros(n, np.float32)
    for i, (number, mine, other) in enumerate(zip(dataset.row_numbers, better, worse, strict=True)):
        where = f"{dataset.source}, row {number}"
        if not isinstance(mine, float | int) or not isinstance(other, float | int):
            raise InputError(
                f"{where}: odpo takes its offset from the scores of both responses, and the row has none; give numbers"
                " in 'score_chosen' and 'score_rejected' (--data.columns score_chosen=COLUMN), or choose another"
                " --dpo.loss"
            )
        gaps[i] = mine - other
        if not gaps[i] > 0:
            raise InputError(
                f"{where}: the chosen response scores {mine:g} and the rejected {other:g}; odpo needs a higher score of"
                " the chosen one in every row: leave such rows out, or choose another --dpo.loss"
            )
    return replace(dataset, margins=gaps)


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
