"""Several sources of rows with weights: which rows an epoch holds.

A source is an endless series of rows: its own, in a new order every epoch of its own. Row i of the run is drawn from
source s(i), so that every stretch of the run holds the sources in the proportions of their weights (see
`text_windows.Mixture`). Weights are shares of rows. An epoch of the run is as many rows as all sources hold together; a
source with a large weight goes through several epochs of its own in it, one with a small weight through a part of one,
and the next epoch goes on with the rest.

All of it is a pure function of the sizes, the weights, the seed and i: a run resumes at a number.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import TypeVar

import numpy as np

from dpo_jax.data.rows.readable import NoSuchColumn
from dpo_jax.data.sets.batches import permutation
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.sequences import SequenceDataset
from dpo_jax.data.sets.text_windows import PERIOD, Mixture, parse_sources, shares
from dpo_jax.errors import InputError

Rows = TypeVar("Rows", PreferenceDataset, SequenceDataset)


@dataclass(frozen=True)
class RowMixture:
    """The sources of a data set that was joined from several, with their weights.

    Attributes:
      names: of the sources.
      sizes: rows of each; those of source s stand behind those of the sources before it.
      weights: shares of the rows, in proportion; None: every row once an epoch.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None

    @cached_property
    def _mixture(self) -> Mixture:
        return Mixture(list(zip(self.names, self.weights or map(float, self.sizes), strict=True)))

    @property
    def identity(self) -> list[list[int]]:
        """What decides the draws by weights, for the position of a loader."""
        return [list(self.sizes), self._mixture.counts.tolist()]

    def epoch(self, epoch: int, *, seed: int, shuffle: bool) -> np.ndarray | None:
        """int64 [N]: the rows of an epoch of the run, in the order in which they are drawn; None: each once."""
        if self.weights is None:
            return None
        n = sum(self.sizes)
        source, number = self._mixture.at(np.arange(epoch * n, (epoch + 1) * n))
        rows = np.empty(n, np.int64)
        for s, size in enumerate(self.sizes):
            mine = source == s
            passes, place = np.divmod(number[mine], size)
            drawn = np.empty(len(place), np.int64)
            for once in np.unique(passes):
                order = permutation(size, seed, (s << 40) + int(once), 0) if shuffle else np.arange(size)
                drawn[passes == once] = order[place[passes == once]]
            rows[mine] = sum(self.sizes[:s]) + drawn
        return rows

    def told(self, rows: int) -> list[tuple[str, str]]:
        """(source, its share of the rows and how often a run of so many goes through it), in words."""
        drawn = self._mixture.drawn(rows) if self.weights is not None else None
        told = []
        for s, (name, size) in enumerate(zip(self.names, self.sizes, strict=True)):
            share = size / sum(self.sizes) if drawn is None else self._mixture.counts[s] / PERIOD
            times = rows / sum(self.sizes) if drawn is None else drawn[s] / size
            told.append((name, f"{size} rows, {share:.2%} of the rows drawn, {times:.2f} epochs of its own"))
        return told


def weighted(dataset: PreferenceDataset | SequenceDataset) -> bool:
    """Whether rows are drawn by the weights of their sources, and not each once an epoch."""
    return dataset.mixture is not None and dataset.mixture.weights is not None


def read_mixture(
    words: str,
    read: Callable[[str], Rows],
    join: Callable[[Rows, Rows], Rows],
    *,
    option: str = "--data",
    weighted: bool = True,
    holdout: float | None = None,
    split: Callable[[Rows], tuple[Rows, Rows]] | None = None,
) -> tuple[Rows, Rows | None]:
    """(all rows of the sources that `words` names, what is held out of each).

    Args:
      words: see `text_windows.parse_sources`.
      read, join: read one source; put two data sets together.
      option: the option that holds `words`, for messages.
      weighted: whether weights mean something.
      holdout: the share of each source that `split` holds out.
      split: a data set -> (the rest, what is held out).

    Raises `InputError` for sources that cannot be read, and for weights that are wrong or mean nothing.
    """
    named = parse_sources(words, option)
    weights = [weight for _, weight in named]
    if weights[0] is not None and not weighted:
        raise InputError(f"{option} {words}: the weights have no effect, every row is used once; leave them out")
    given = tuple(weight for weight in weights if weight is not None)
    if given:
        shares([(name, weight) for (name, _), weight in zip(named, given, strict=True)])
    try:
        parts = [read(name) for name, _ in named]
    except NoSuchColumn as error:
        if len(named) == 1:
            raise
        raise InputError(
            f"{error}; it holds for every file of {option}: where they differ, write one with its own names (dpo-jax"
            " prepare --data FILE --data.columns ... --to DIR) and give tfds:DIR in its place"
        ) from error
    held: Rows | None = None
    if holdout is not None and split is not None:
        both = [split(part) for part in parts]
        parts, held = [rest for rest, _ in both], reduce(join, [part for _, part in both])
    if len(parts) == 1:
        return parts[0], held
    mixture = RowMixture(tuple(name for name, _ in named), tuple(len(part) for part in parts), given or None)
    return replace(reduce(join, parts), mixture=mixture), held
