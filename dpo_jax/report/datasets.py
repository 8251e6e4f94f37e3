"""What a report says of the data: rows read, left out and why, lengths."""

from collections.abc import Sequence

import numpy as np

from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.tokens import cuts
from dpo_jax.report import html


def data_section(title: str, data: PreferenceDataset, taken: Sequence[tuple[str, str]] = ()) -> html.Section:
    """What was read, what was left out and why, and how long the texts are.

    `taken`: (source, what the run takes of it), where there are several.
    """
    responses = data.response_lengths
    lengths: dict[str, np.ndarray] = {"prompt": data.prompt_lengths}
    lengths |= {
        name: column[column > 0] for name, column in (("chosen", responses[:, 0]), ("rejected", responses[:, 1]))
    }
    counts: list[tuple[str, int | str]] = [("rows read", data.rows_read), ("rows used", len(data))]
    counts += [*taken, *cuts.counts(data.cuts)]
    counts += [(f"left out: {reason}", count) for reason, count in data.dropped.most_common()]
    return html.Section(
        title,
        note=data.source,
        plots=(html.lengths_plot("Lengths", lengths),),
        table=html.Table(("what", "rows"), counts),
    )
