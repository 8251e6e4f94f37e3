"""What a report says of the data: rows read, left out and why, lengths."""

from collections.abc import Mapping, Sequence

import numpy as np

from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.prompts import PromptDataset
from dpo_jax.data.tokens import cuts
from dpo_jax.report import html


def data_section(title: str, data: PreferenceDataset, taken: Sequence[tuple[str, str]] = ()) -> html.Section:
    """What was read of preference groups. `taken`: (source, what the run takes of it), where there are several."""
    chosen, rejected = data.response_lengths[:, 0], data.response_lengths[:, 1]
    lengths = {"prompt": data.prompt_lengths, "chosen": chosen[chosen > 0], "rejected": rejected[rejected > 0]}
    return _section(title, data, lengths, taken)


def prompts_section(data: PromptDataset) -> html.Section:
    """What was read of prompts."""
    return _section("Prompts", data, {"prompt": data.ids.lengths})


def _section(
    title: str,
    data: PreferenceDataset | PromptDataset,
    lengths: Mapping[str, np.ndarray],
    taken: Sequence[tuple[str, str]] = (),
) -> html.Section:
    counts: list[tuple[str, int | str]] = [("rows read", data.rows_read), ("rows used", len(data))]
    counts += [*taken, *cuts.counts(data.cuts)]
    counts += [(f"left out: {reason}", count) for reason, count in data.dropped.most_common()]
    plot = html.lengths_plot("Lengths", lengths)
    return html.Section(title, note=data.source, plots=(plot,), table=html.Table(("what", "rows"), counts))
