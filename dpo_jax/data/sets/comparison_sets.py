"""Tokenised comparisons: a file of any layout as a `PreferenceDataset` with ranks, margins, labels; mixed and split."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import DataConfig, RewardLossConfig
from dpo_jax.data.rows.comparisons import (
    EXTRAS,
    SAFETY,
    Comparison,
    compares_replies,
    label_of,
    labels_of,
    marks,
    ordered,
    parse_comparison,
    parse_replies,
    safety_bin,
)
from dpo_jax.data.rows.dialogues import parse_dialogue
from dpo_jax.data.rows.layouts import COMPARISON_COLUMNS, PROMPTS
from dpo_jax.data.rows.readable import readable
from dpo_jax.data.sets.batches import permutation
from dpo_jax.data.sets.dataset import NO_TOKENS, PreferenceDataset, Usable, load_groups
from dpo_jax.data.sets.tokenised import held_out
from dpo_jax.data.sources.checked_rows import OnBadRows
from dpo_jax.data.tokens.encode import Rendered, ScoredEncoder
from dpo_jax.data.tokens.ragged import Ragged
from dpo_jax.errors import InputError


def load_comparisons(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    rules: RewardLossConfig,
    *,
    vocab_size: int,
    on_bad_rows: OnBadRows = "refuse",
) -> PreferenceDataset:
    """Read, check and tokenise a file of comparisons (layouts: see `comparisons.py`) to learn from.

    A response ends where a reward model scores it, with the whole of what the template writes behind it
    (`encode.ScoredEncoder`); one that `max_length` cut ends where it was cut. Responses stand best first. K is that of
    the longest list; rows with fewer have absent ones, of length 0. `ranks` is there where K > 2, `margins` where
    `rules` ask for margins (one a row, where K > 2 marks of the responses), `labels` where they name auxiliary heads.

    Args:
      source, tokenizer, config, vocab_size, on_bad_rows: as for `dataset.load_preferences`, which raises the same
        errors.
      rules: what to do with ties and long lists, where margins come from, which heads read labels.
    """
    encoder = ScoredEncoder.of(tokenizer, config)

    def parse(row: dict[str, Any], usable: Usable) -> tuple[Rendered, _Learnt]:
        found = parse_comparison(row)
        order = ordered(found, rules)
        assert found.places is not None, "it was ordered by them"
        learnt = _Learnt(
            ranks=[found.places[i] for i in order],
            marks=[] if rules.margin == "none" else marks(found, order, rules),
            labels={
                head.name: [label_of(labels[i], head) for i in order]
                for head in rules.heads
                for labels in [labels_of(found, head.name)]
            },
            extras=usable(found.evidence) | {SAFETY: safety_bin(found, order, rules)},
        )
        return _render(encoder, found, order), learnt

    limits = {"vocab_size": vocab_size, "on_bad_rows": on_bad_rows}
    data, rows, _ = load_groups(source, encoder, config, parse, known=COMPARISON_COLUMNS, rendered=PROMPTS, **limits)
    n, k = len(data), data.responses_per_prompt
    labels: dict[str, np.ndarray] = {}
    for head in rules.heads:
        shape = (n, k, len(head.classes)) if head.overlapping else (n, k)
        values = [learnt.labels[head.name] for learnt in rows]
        labels[head.name] = _filled(values, shape, -1, np.int8 if head.overlapping else np.int32)
        if (labels[head.name] < 0).all():
            raise InputError(f"{source}: no row has a label of the head '{head.name}' in its column 'labels'")
    margins = None
    if rules.margin != "none":
        margins = _filled([learnt.marks for learnt in rows], (n, k), 0, np.float32)
        margins = margins[:, 0] if k == 2 else margins
    extras = {name: [learnt.extras.get(name) for learnt in rows] for name in EXTRAS}
    return replace(
        data,
        formats=None,
        ranks=_filled([learnt.ranks for learnt in rows], (n, k), k, np.int32) if k > 2 else None,
        margins=margins,
        labels=labels or None,
        extras={name: values for name, values in extras.items() if any(value is not None for value in values)},
    )


def load_responses(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    vocab_size: int,
    on_bad_rows: OnBadRows = "refuse",
) -> PreferenceDataset:
    """Read and tokenise a file of responses to be scored, in the order in which each row holds them.

    Rows are comparisons, or a prompt with a single answer; ties and equal responses are welcome. `extras["layout"]`
    says for each row "pair" (chosen, rejected), "single", or "list". Arguments as for `load_comparisons`.
    """
    encoder = ScoredEncoder.of(tokenizer, config)

    def parse(row: dict[str, Any], usable: Usable) -> tuple[Rendered, str]:
        del usable
        row = readable(row)
        found = parse_responses(row)
        count = len(found.responses)
        layout = "pair" if "chosen" in row else "single" if count == 1 else "list"
        return _render(encoder, found, range(count)), layout

    limits = {"vocab_size": vocab_size, "on_bad_rows": on_bad_rows}
    limits |= {"known": COMPARISON_COLUMNS, "rendered": PROMPTS, "compared": False}
    data, layouts, _ = load_groups(source, encoder, config, parse, **limits)
    return replace(data, formats=None, extras={"layout": layouts})


def parse_responses(row: dict[str, Any]) -> Comparison:
    """Read one row of responses to be scored: a comparison, or a prompt with a single answer. Raises `BadRow`."""
    row = readable(row)
    if compares_replies(row) or "chosen" in row:
        return parse_replies(row, compared=False)
    dialogue = parse_dialogue(row)
    return Comparison(dialogue.messages[:-1], (dialogue.messages[-1].content,), None, dialogue.raw)


class _Learnt(NamedTuple):
    """What a row tells beside its texts, in the order of its kept responses."""

    ranks: list[int]
    marks: list[float]
    labels: dict[str, list[Any]]
    extras: dict[str, Any]


def _filled(rows: Sequence[Sequence[Any]], shape: tuple[int, ...], filler: int, dtype: Any) -> np.ndarray:
    """`rows`, of at most K values each, as one array; `filler` for absent responses."""
    filled = np.full(shape, filler, dtype)
    for row, values in zip(filled, rows, strict=True):
        row[: len(values)] = values
    return filled


def _render(encoder: ScoredEncoder, found: Comparison, order: Sequence[int]) -> Rendered:
    raw = None if found.raw is None else (found.raw[0], *(found.raw[1 + i] for i in order))
    return encoder.render_group(found.messages, [found.responses[i] for i in order], raw)


# ---------------------------------------------------------------- parts of data sets, and mixtures


def split_by_prompt(data: PreferenceDataset, share: float, seed: int) -> tuple[PreferenceDataset, PreferenceDataset]:
    """(the rest, about `share` of the prompts): rows of one prompt stay together. Which prompts depends on the seed.

    What was left out of the file is told of the rest, once. Raises `InputError` where one side would be empty.
    """
    rest, held = held_out([data.prompts[i] for i in range(len(data))], share, seed, data.source)
    return data.taken(rest), replace(data.taken(held), dropped=Counter())


def mix(first: PreferenceDataset, second: PreferenceDataset, share: float, seed: int) -> PreferenceDataset:
    """All rows of `first` and so many of `second`, drawn without replacement, that they are `share` of the whole.

    Rows that name no `source` get the name of their file; rows of `second` are numbered on from those of `first`.
    Raises `InputError` where `second` has too few.
    """
    wanted = round(share / (1 - share) * len(first))
    if not 0 < wanted <= len(second):
        raise InputError(
            f"{second.source}: a share of {share:g} beside the {len(first)} rows of {first.source} takes {wanted} rows,"
            f" and it has {len(second)}; change --mix"
        )
    drawn = second.taken(np.sort(permutation(len(second), seed, 0, 0)[:wanted]))
    told = f"{len(first)} of {first.source} + {wanted} drawn from the {len(second)} of {second.source}"
    return replace(join(first, drawn), source=f"{told} (--mix {share:g})")


def join(first: PreferenceDataset, drawn: PreferenceDataset) -> PreferenceDataset:
    """All rows of both, made under the same rules. Sources are named, and rows numbered, as in `mix`."""
    k = max(first.responses_per_prompt, drawn.responses_per_prompt)
    names = sorted({*first.extras, *drawn.extras, "source"})
    first, drawn = (_widened(_named(data, names), k) for data in (first, drawn))
    return first.joined(drawn)


def _named(data: PreferenceDataset, names: Sequence[str]) -> PreferenceDataset:
    """With all these columns beside the texts; the source of rows that name none is their file."""
    extras = {name: data.extras.get(name, [None] * len(data)) for name in names}
    own = Path(data.source).name.split(".")[0]
    return replace(data, extras={**extras, "source": [value or own for value in extras["source"]]})


def _widened(data: PreferenceDataset, k: int) -> PreferenceDataset:
    """The same rows with K = k: absent responses at the end."""
    own = data.responses_per_prompt
    if own == k:
        return data
    n, more = len(data), k - own
    ranks = np.broadcast_to(np.arange(own, dtype=np.int32), (n, own)) if data.ranks is None else data.ranks
    responses = [data.responses[i * own + j] if j < own else NO_TOKENS for i in range(n) for j in range(k)]

    def padded(values: np.ndarray, filler: int = -1) -> np.ndarray:
        return np.pad(values, ((0, 0), (0, more)) + ((0, 0),) * (values.ndim - 2), constant_values=filler)

    margins = data.margins
    if margins is not None and more:
        margins = padded(np.stack([margins, np.zeros_like(margins)], 1) if own == 2 else margins, 0)
    return replace(
        data,
        margins=margins,
        responses=Ragged.of(responses, np.int32),
        ranks=padded(ranks, k) if k > 2 else None,
        labels=None if data.labels is None else {name: padded(values) for name, values in data.labels.items()},
    )
