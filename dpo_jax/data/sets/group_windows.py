"""Preference groups packed into windows of real tokens: which rows share a batch and a window, and in which shapes.

Padding goes through every product of a model as tokens do, so there is to be none: a window holds as many whole groups
as every other one, B / W of them, and of nearly as many tokens. So each device and each micro-batch has the same work,
and one shape or a few hold all windows of a run.

    which rows share a batch   see `dealing.py`: of all lengths, so that batches have nearly as many tokens.
    which share a window       The same, of the rows of a batch.
    which shapes there are     (places, response tokens) of the windows of some epochs, by `batches.plan_buckets`; and a
                               last shape that holds whatever strata may give, which is rarely used.

All of it is a pure function of the lengths, the seed and the epoch.

N rows, B rows a batch, W windows a batch, g = B / W groups a window, K responses a row, T places of a window, M of its
response tokens.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpo_jax.data.sets.batches import RowBatch, Shape, collate, completed, plan_buckets
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.group_packing import Lengths, Need, Packing, WindowShape, pack, up, window_shape
from dpo_jax.types import PreferenceBatch, Windows

_SAMPLE = 128  # batches whose shapes are looked at beforehand, at least, and those of one epoch
_EPOCHS = 16  # most epochs of them


# ---------------------------------------------------------------- shapes


@dataclass(frozen=True)
class WindowPlan:
    """How the rows of a data set are packed, batch by batch.

    Attributes:
      shapes: cheapest first; of each the shapes of all spans.
      spans: (first, last): the responses first to last - 1 of each row are packed together, each span apart.
      prompt, response: P, R of the batches' arrays of rows, which no product reads.
      windows: W; batch_size: B.
      dealt: see `plan_windows`.
      used: indices into `shapes` of those that the first epoch needs.
      real: share of real tokens in the places of the first epoch's windows.
      read: share of response tokens in what its windows read.
    """

    lengths: Lengths
    shapes: tuple[tuple[WindowShape, ...], ...]
    spans: tuple[Shape, ...]
    prompt: int
    response: int
    windows: int
    batch_size: int
    dealt: bool
    used: tuple[int, ...]
    real: float
    read: float

    def summary(self) -> str:
        """Shapes and real tokens, for the log."""
        kinds = [" and ".join(f"{one.size}+{one.reads}" for one in self.shapes[i]) for i in self.used]
        rows = self.batch_size // self.windows
        return (
            f"{self.windows} window{'s' * (self.windows > 1)} a batch with {rows} row{'s' * (rows > 1)} each, in"
            f" {len(kinds)} shape{'s' * (len(kinds) > 1)} (tokens+predicted) {', '.join(kinds)}; {self.real:.1%} of the"
            f" tokens and {self.read:.1%} of the predicted ones are real"
        )

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return math.ceil(self.lengths.count / self.batch_size)

    def epoch(self, seed: int, epoch: int, *, shuffle: bool, order: np.ndarray | None = None) -> list[RowBatch]:
        """The batches of an epoch; `order`: int [N], the rows that a mixture draws for it."""
        how = {"shuffle": shuffle, "order": order, "dealt": self.dealt}
        return [RowBatch(0, rows) for rows in self.lengths.epoch(self.batch_size, seed, epoch, **how)]

    def of(self, rows: np.ndarray) -> list[RowBatch]:
        """Batches of some of the rows (positions)."""
        return self.epoch(0, 0, shuffle=False, order=rows)

    def batch(
        self, dataset: PreferenceDataset, one: RowBatch, own: np.ndarray | None = None
    ) -> tuple[np.ndarray, PreferenceBatch]:
        """(its rows int [B], -1 for fillers; the batch, packed). `own`: see `batches.collate`."""
        rows = self.arranged(one.indices)
        batch = collate(dataset, rows, (self.prompt, self.response), self.batch_size, own)
        return rows, replace(batch, windows=self.pack(rows))

    def arranged(self, rows: np.ndarray) -> np.ndarray:
        """int [B]: the rows of a batch, window after window; -1 where there are fewer."""
        return self.lengths.arranged(completed(rows, self.batch_size)[None], self.windows).reshape(-1)

    def shape_of(self, arranged: np.ndarray) -> int:
        """Which of the shapes a batch of arranged rows has: the cheapest that holds it."""
        windows = arranged.reshape(self.windows, -1)
        needs = [self.lengths.span(*span).need(windows) for span in self.spans]
        return next(i for i, shapes in enumerate(self.shapes) if _holds(shapes, needs).all())

    def pack(self, arranged: np.ndarray) -> tuple[Windows, ...]:
        """The windows of a batch, of each span."""
        shapes, lengths = self.shapes[self.shape_of(arranged)], (self.prompt, self.response)
        own = [self.lengths.span(*span) for span in self.spans]
        return tuple(
            pack(of.prompts[arranged], of.responses[arranged], shape, self.windows, lengths, span)
            for of, shape, span in zip(own, shapes, self.spans, strict=True)
        )


def _holds(shapes: Sequence[WindowShape], needs: Sequence[Need]) -> np.ndarray:
    """bool [...]: whether the shapes of all spans hold what windows need of each."""
    return np.logical_and.reduce([need.within(shape) for need, shape in zip(needs, shapes, strict=True)])


def plan_windows(
    prompt_lengths: np.ndarray,
    response_lengths: np.ndarray,
    *,
    batch_size: int,
    packing: Packing,
    seed: int = 0,
    shuffle: bool = False,
    buckets: int = 4,
    dealt: bool = True,
    drawn: Callable[[int], np.ndarray | None] = lambda epoch: None,
) -> WindowPlan:
    """Choose at most `buckets` shapes for the batches of a run.

    Args:
      prompt_lengths: int [N].
      response_lengths: int [N, K].
      batch_size: B, which W divides.
      packing: its `multiple` divides places, response tokens, and tokens of attention's sequences.
      seed, shuffle: of the run.
      buckets: most shapes.
      dealt: batches have rows of all lengths, and nearly as many tokens each; else rows keep the order in which they
        stand or are drawn, and nothing is shuffled.
      drawn: the rows of an epoch, int [N], where that is not each once.
    """
    (n, k), (windows, spans, multiple) = response_lengths.shape, packing
    spans = spans or ((0, k),)
    lengths = Lengths.of(prompt_lengths, response_lengths)
    redrawn = drawn(0) is not None
    alike = not shuffle and not redrawn  # all epochs are
    count = 1 if alike else min(_EPOCHS, -(-_SAMPLE // -(-n // batch_size)))
    how = {"shuffle": shuffle, "dealt": dealt}
    epochs = [lengths.epoch(batch_size, seed, i, order=drawn(i), **how) for i in range(count)]
    rows = np.stack([completed(rows, batch_size) for rows in itertools.chain(*epochs)])
    made = lengths.arranged(rows, windows)
    needs = [lengths.span(*span).need(made) for span in spans]
    shapes = _usual(needs, buckets if alike else max(1, buckets - 1), multiple)
    if not alike:
        always = _always(lengths, spans, batch_size, windows, multiple, redrawn=redrawn)
        shapes = [always] if buckets == 1 else [*shapes, always]
    first = [Need(*(x[: len(epochs[0])] for x in need)) for need in needs]
    fits = np.stack([_holds(shape, first).all(axis=1) for shape in shapes]).argmax(axis=0)  # [batches of an epoch]
    places, reads = (windows * sum(getattr(one, name) for i in fits for one in shapes[i]) for name in ("size", "reads"))
    return WindowPlan(
        lengths=lengths,
        shapes=tuple(shapes),
        spans=spans,
        prompt=up(int(prompt_lengths.max()), multiple),
        response=up(int(response_lengths.max()), multiple),
        windows=windows,
        batch_size=batch_size,
        dealt=dealt,
        used=tuple(np.unique(fits).tolist()),
        real=float(sum(need.size.sum() for need in first) / places),
        read=float(sum(need.reads.sum() for need in first) / reads),
    )


def _usual(needs: Sequence[Need], most: int, multiple: int) -> list[tuple[WindowShape, ...]]:
    """At most so many shapes that hold all these windows, [batches, W] of each span, cheapest first."""
    sizes, reads = ([getattr(need, name).max(axis=1) for need in needs] for name in ("size", "reads"))
    chosen = plan_buckets(sizes[0], reads[0][:, None], buckets=most, batch_size=1, multiple=multiple)
    found = []
    for bucket, shape in enumerate(chosen.shapes):
        of = chosen.rows == bucket
        rest: list[Shape] = [
            (up(int(size[of].max(initial=0)), multiple), up(int(read[of].max(initial=0)), multiple))
            for size, read in zip(sizes[1:], reads[1:], strict=True)
        ]
        own = [Need(*(x[of] for x in need)) for need in needs]
        found.append(tuple(window_shape(*one, need, multiple) for one, need in zip([shape, *rest], own, strict=True)))
    return found


def _always(
    lengths: Lengths, spans: Sequence[Shape], batch_size: int, windows: int, multiple: int, *, redrawn: bool
) -> tuple[WindowShape, ...]:
    """A shape that holds every window of every epoch.

    The i-th longest row of a window is the (i W)-th longest of its batch or a shorter one, and that is of stratum i W;
    where a mixture draws the rows it may be any. Rows of as many tokens as the first of a stratum may change places
    with it from epoch to epoch.
    """
    n, g = lengths.count, batch_size // windows
    order = np.argsort(-lengths.totals[:-1], kind="stable")
    starts = np.arange(g) * windows * max(1, n // batch_size) * (not redrawn)
    longest_first = -lengths.totals[order]
    starts = np.where(starts < n, np.searchsorted(longest_first, longest_first[np.minimum(starts, n - 1)]), n)
    found = []
    for span in spans:
        own = lengths.span(*span)
        one = own.need(order[:, None])  # of each row alone, longest first
        most = Need(
            *(
                np.append(np.maximum.accumulate(x[::-1])[::-1], np.zeros_like(x[:1]), axis=0)[np.minimum(starts, n)]
                for x in one
            )
        )
        size, reads = (up(int(x.sum()), multiple) for x in (most.size, most.reads))
        views, tails, queries = (-np.sort(-x.reshape(1, -1)) for x in (most.views, most.tails, most.queries))
        queries = np.broadcast_to(queries.max(initial=0), queries.shape)  # a short sequence may have a long response
        need = most._replace(views=views, tails=tails, queries=queries)
        found.append(window_shape(size, reads, need, multiple))
    return tuple(found)
