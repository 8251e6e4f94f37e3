"""Rows of a run: those that are learnt from, and those that are held out."""

from collections.abc import Callable, Iterator
from typing import Any

from dpo_jax.config import HoldoutRun
from dpo_jax.data.sets.row_mixture import Rows, read_mixture


def summaries(data: Any, heldout: Any) -> Iterator[str]:
    """What was read, for the log: of what is learnt from and of what is held out, each under its own name."""
    for name, part in (("training rows", data), ("held-out rows", heldout)):
        if part is not None:
            yield f"{name}: {part.summary()}"


def read_both(
    config: HoldoutRun,
    read: Callable[[str], Rows],
    join: Callable[[Rows, Rows], Rows],
    split: Callable[[Rows, float, int], tuple[Rows, Rows]],
) -> tuple[Rows, Rows | None]:
    """All rows of `--data`, and what is held out: `--holdout` of each of its sources, or `--eval_data`.

    `read`: one source. `join` and `split` (by a share and a seed): data sets of its kind. Raises `InputError`, for
    weights that are wrong too.
    """
    seed, share = config.train.seed, config.holdout
    data, heldout = read_mixture(
        config.data.files, read, join, holdout=share, split=lambda rows: split(rows, share or 0.0, seed)
    )
    if config.eval_data is not None:
        heldout, _ = read_mixture(config.eval_data, read, join, option="--eval_data", weighted=False)
    return data, heldout
