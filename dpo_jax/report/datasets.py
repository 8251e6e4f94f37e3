"""What a report says of the data: rows read, left out and why, lengths."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from dpo_jax.data.rows.comparisons import SAFETY, SAFETY_BINS
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.documents import DocumentDataset
from dpo_jax.data.sets.prompts import PromptDataset
from dpo_jax.data.sets.sequences import SequenceDataset
from dpo_jax.data.tokens import cuts
from dpo_jax.report import html

Count = tuple[str, int | str]
Data = PreferenceDataset | PromptDataset | SequenceDataset | DocumentDataset


def data_section(title: str, data: PreferenceDataset, taken: Sequence[tuple[str, str]] = ()) -> html.Section:
    """What was read of preference groups. `taken`: (source, what the run takes of it), where there are several."""
    chosen, rejected = data.response_lengths[:, 0], data.response_lengths[:, 1]
    lengths = {"prompt": data.prompt_lengths, "chosen": chosen[chosen > 0], "rejected": rejected[rejected > 0]}
    counts = Counter(data.extras.get(SAFETY, ()))
    bins = [(f"safety: {name}", counts[name]) for name in SAFETY_BINS if counts.total() > counts[None]]
    return _section(title, data, lengths, [*taken, *bins, *cuts.counts(data.cuts)], head="rows")


def prompts_section(data: PromptDataset) -> html.Section:
    """What was read of prompts."""
    return _section("Prompts", data, {"prompt": data.ids.lengths}, cuts.counts(data.cuts), head="rows")


def dialogues_section(title: str, data: SequenceDataset, taken: Sequence[Count]) -> html.Section:
    """What was read of dialogues, how long they are and how much of them the loss counts. `taken`: see above."""
    lengths = {"dialogue": data.lengths, "in the loss": data.target_lengths}
    tokens = [("tokens", int(data.lengths.sum())), ("tokens in the loss", int(data.target_lengths.sum()))]
    return _section(title, data, lengths, [*taken, ("rows cut at their end", data.cut)], tokens)


def documents_section(title: str, data: DocumentDataset, passes: float | None) -> html.Section:
    """What was read of documents. `passes`: how often a run goes through them."""
    told: list[Count] = [("tokens, with BOS and EOS", data.total), ("of them <unk>", data.unknown)]
    told += [] if passes is None else [("epochs in this run", f"{passes:.2f}")]
    return _section(title, data, {"document": data.lengths}, (), told, what="documents")


def _section(
    title: str,
    data: Data,
    lengths: Mapping[str, np.ndarray],
    before: Sequence[Count],
    behind: Sequence[Count] = (),
    *,
    what: str = "rows",
    head: str = "count",
) -> html.Section:
    """`before`, `behind`: what is told of the rows in front of those that were left out, and behind them."""
    counts: list[Count] = [(f"{what} read", data.rows_read), (f"{what} used", len(data)), *before]
    counts += [(f"left out: {reason}", count) for reason, count in data.dropped.most_common()]
    plot, table = html.lengths_plot("Lengths", lengths), html.Table(("what", head), [*counts, *behind])
    return html.Section(title, note=data.source, plots=(plot,), table=table)
