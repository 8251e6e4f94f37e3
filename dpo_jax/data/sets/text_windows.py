"""Windows of T tokens cut from documents, every one full, from one source or a mixture of several.

A source is an endless stream of tokens: its documents end to end, in a new order every epoch. Window w of it holds the
tokens w T to (w + 1) T - 1 of the stream, so nothing is dropped and nothing is padded: what is left over at the end of
an epoch goes on into the next one. The windows of an epoch are taken in an order of their own, so a long document does
not fill a whole batch.

A mixture draws window i of the run from source s(i), so that every stretch of windows, long or short, holds the sources
in the proportions of their weights, to a window or two; each source goes through its own epochs. As all windows are
equally long, the shares of windows are shares of tokens.

All of it is a pure function of the documents, the weights, T, the seed and i: a run resumes at a number.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Unpack

import numpy as np

from dpo_jax.data.sets.batches import permutation
from dpo_jax.data.sets.documents import DocumentDataset
from dpo_jax.data.sets.packing import Windows, no_ids
from dpo_jax.data.sets.segment_views import LOOKED_AT, SegmentViews
from dpo_jax.data.sets.steps_loader import RunOptions, StepsLoader, check_seed
from dpo_jax.errors import InputError, exists
from dpo_jax.types import TokenBatch

Documents = Literal["masked", "joined"]
"""What a token sees of its window. masked: its own document, whose piece in this window is a sequence of its own, with
positions from 0. joined: all that stands before it, other documents too, as Llama 2 was pre-trained."""

PERIOD = 100_000
"""A mixture repeats itself after so many windows; a smaller share than one window of them cannot be drawn."""


# ---------------------------------------------------------------- sources and weights

_SEVERAL = re.compile(r":[0-9.]+\s+\S")
"""A weight and then another word: `a.jsonl:0.5 b.jsonl:0.5` that was quoted as one."""


def parse_sources(text: str, option: str = "--data") -> list[tuple[str, float | None]]:
    """`a.jsonl:0.7,b.txt:0.3` -> sources with their weights; a source without a number behind it has None.

    (What exists under its whole name, a colon or a comma in it, is a source of that name.) `option` is for messages.

    Raises `InputError` for a weight that is not a positive number, that only some of the sources have, or that a lone
    source has.
    """
    if exists(text):
        return [(text, None)]
    sources = [_source(part.strip(), option) for part in text.split(",")]
    weighted = [weight is not None for _, weight in sources]
    if any(weighted) and not all(weighted):
        name = sources[weighted.index(False)][0]
        raise InputError(f"{option} {text}: {name} has no weight and others have; write {name}:WEIGHT, or none at all")
    if weighted == [True]:
        raise InputError(f"{option} {text}: the weight has no effect, there is one source; leave it out")
    return sources


def _source(part: str, option: str) -> tuple[str, float | None]:
    name, colon, tail = part.rpartition(":")
    if not colon or exists(part):
        return part, None
    if _SEVERAL.search(part):
        raise InputError(
            f"{option} {part}: several sources in one word, as quotes around them all make it; write them as words of"
            " their own, or with commas between them"
        )
    try:
        weight = float(tail)
    except ValueError:  # `owner/name:split`, `tfds:folder`
        return part, None
    if not (0 < weight < math.inf):
        raise InputError(f"{option} {part}: the weight {tail} must be a positive number; leave the source out instead")
    return name, weight


def shares(sources: Sequence[tuple[str, float]]) -> np.ndarray:
    """Windows of each source in a period, int64 [S], positive, in proportion to the weights. Sum: `PERIOD`.

    Raises `InputError` for a weight that is not positive or so small that its source would never be drawn.
    """
    weights = np.array([weight for _, weight in sources], np.float64)
    for name, weight in sources:
        if not (0 < weight < math.inf):
            raise InputError(f"the weight {weight} of {name} must be a positive number; leave the source out instead")
    exact = weights / weights.max()
    exact = exact / exact.sum() * PERIOD
    counts = np.floor(exact).astype(np.int64)
    largest_rests = np.argsort(counts - exact, kind="stable")[: PERIOD - counts.sum()]
    counts[largest_rests] += 1
    if counts.min() == 0:
        name, weight = sources[int(counts.argmin())]
        raise InputError(f"the weight {weight} of {name} is less than 1/{PERIOD} of all; raise it, or leave it out")
    return counts


class Mixture:
    """Which source the windows of a run come from: i -> (source, number of the window among those of its source)."""

    def __init__(self, sources: Sequence[tuple[str, float]]):
        """`sources`: names (for messages) and weights."""
        self.counts = shares(sources)
        # The j-th of c windows stands at (j + 1/2) / c of the period: each source spreads evenly over it.
        when = np.concatenate([(np.arange(c) + 0.5) / c for c in self.counts])
        order = np.argsort(when, kind="stable")
        self._source = np.repeat(np.arange(len(self.counts)), self.counts)[order].astype(np.int32)
        self._number = np.concatenate([np.arange(c) for c in self.counts])[order]

    def __getitem__(self, i: int) -> tuple[int, int]:
        period, at = divmod(i, PERIOD)
        source = int(self._source[at])
        return source, period * int(self.counts[source]) + int(self._number[at])

    def at(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`self[i]` of many at once: int64 [n], int64 [n]."""
        period, at = np.divmod(i, PERIOD)
        source = self._source[at].astype(np.int64)
        return source, period * self.counts[source] + self._number[at]

    def drawn(self, windows: int) -> np.ndarray:
        """int64 [S]: how many of the first `windows` windows come from each source."""
        periods, rest = divmod(windows, PERIOD)
        return periods * self.counts + np.bincount(self._source[:rest], minlength=len(self.counts))


# ---------------------------------------------------------------- the windows of one source


class Stream:
    """The endless stream of one source, cut into windows."""

    def __init__(
        self,
        data: DocumentDataset,
        length: int,
        *,
        seed: int,
        shuffle: bool,
        source: int = 0,
        first_row: int = 0,
        once: bool = False,
    ):
        """Args:
        length: T.
        source: its place in the mixture, so that equal sources have unequal orders.
        first_row: added to the numbers of its rows.
        once: it ends with its first epoch.
        """
        self.data, self.length = data, length
        self._first_row, self._end = first_row, data.total if once else None
        self._seed, self._shuffle, self._source = seed, shuffle, source
        self._order = functools.lru_cache(maxsize=4)(self._order_of)
        self._windows = functools.lru_cache(maxsize=4)(self._windows_of)

    def _permutation(self, n: int, epoch: int, purpose: int) -> np.ndarray:
        return permutation(n, self._seed, (self._source << 40) + epoch, purpose)

    def _order_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents in the order of an epoch, and where each begins in it (and its end): int64 [N], [N + 1]."""
        order = self._permutation(len(self.data), epoch, 0) if self._shuffle else np.arange(len(self.data))
        return order, np.concatenate([[0], np.cumsum(self.data.lengths[order])])

    def _windows_of(self, epoch: int) -> tuple[int, np.ndarray]:
        """The first window that begins in an epoch, and the order in which those that begin in it are taken."""
        first, end = (-(-e * self.data.total // self.length) for e in (epoch, epoch + 1))
        n = end - first
        return first, self._permutation(n, epoch, 1) if self._shuffle else np.arange(n)

    def pieces(self, k: int, *, read: bool = True) -> Iterator[tuple[np.ndarray, bool, int]]:
        """What the k-th window to be taken holds, in order, as `Windows.fill` takes it: T tokens, all targets.

        `read`: whether its ids are read, and nothing else of its documents; else they are 0.
        """
        first, order = self._windows(k * self.length // self.data.total)
        at = (first + int(order[k - first])) * self.length
        end = at + self.length if self._end is None else min(at + self.length, self._end)
        while at < end:
            epoch, offset = divmod(at, self.data.total)
            documents, starts = self._order(epoch)
            here = int(np.searchsorted(starts, offset, side="right")) - 1
            stop = min(int(starts[here + 1]), offset + end - at)
            document, start = int(documents[here]), int(starts[here])
            ids = self.data.tokens.part(document, offset - start, stop - start) if read else no_ids(stop - offset)
            yield ids, True, self._first_row + int(self.data.row_numbers[document])
            at += stop - offset


def most_pieces(lengths: np.ndarray, window: int) -> int:
    """The most pieces of documents that a window can hold: two cut ones, and the shortest whole ones between."""
    passes = window // int(lengths.sum()) + 2  # a window may reach over the end of an epoch, or of several
    shortest = np.sort(lengths)[:window]
    return int(np.searchsorted(np.cumsum(np.repeat(shortest, passes)), window, side="right")) + 2


# ---------------------------------------------------------------- batches


class TextLoader(StepsLoader[TokenBatch]):
    """Iterator over the `TokenBatch`es (NumPy, global) of a whole run. See `StepsLoader` for positions.

    Batch t holds the windows t B to (t + 1) B - 1. An epoch is as many tokens as all sources hold together, rounded up
    to whole steps.

    Attributes:
      mixture: which source each window comes from.
    """

    def __init__(
        self,
        sources: Sequence[DocumentDataset],
        weights: Sequence[float | None],
        *,
        length: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        documents: Documents = "masked",
        views: int | None = None,
        own: np.ndarray | None = None,
        **run: Unpack[RunOptions],
    ):
        """Args: see `RowOptions` (the shuffle is one of documents and of windows), and:
        sources: at least one.
        weights: of the sources; None for all: in proportion to their tokens, as if they were one.
        length: T.
        documents: see `Documents`.
        views: see `loader.TokenLoader`.
        """
        check_seed(seed)
        named = [(s.source, float(s.total if w is None else w)) for s, w in zip(sources, weights, strict=True)]
        self._sources, self.mixture = sources, Mixture(named)
        self._length, self._batch_size, self._joined = length, batch_size, documents == "joined"
        self._own = np.ones(batch_size, bool) if own is None else own
        # What is added to the row numbers of each source, so that they run on over all of them.
        self._first_rows = [sum(s.last_row for s in sources[:i]) for i in range(len(sources))]
        self._streams = [
            Stream(s, length, seed=seed, shuffle=shuffle, source=i, first_row=first)
            for i, (s, first) in enumerate(zip(sources, self._first_rows, strict=True))
        ]
        self._slots = max(most_pieces(s.lengths, length) for s in sources)
        self._views = None
        super().__init__(
            self._batch_of,
            holds=lambda step: f"windows {step * batch_size} to {(step + 1) * batch_size - 1}",
            steps_per_epoch=math.ceil(sum(s.total for s in sources) / (batch_size * length)),
            identity={
                "data": [s.fingerprint for s in sources],
                "mixture": self.mixture.counts.tolist(),
                "batch_size": batch_size,
                "length": length,
                "seed": seed,
                "shuffle": shuffle,
                "documents": documents,
            },
            **run,
        )
        if views is not None:
            none = np.zeros(batch_size, bool)
            first = (self._windows(step, none) for step in range(min(LOOKED_AT, self.total_steps)))
            self._views = SegmentViews.of_batches(first, views)

    def _batch_of(self, step: int) -> TokenBatch:
        batch = self._windows(step, self._own)
        return batch if self._views is None else self._views.seen(batch)

    def _windows(self, step: int, own: np.ndarray) -> TokenBatch:
        """The windows of a step, those that are not `own` without their ids."""
        made = Windows(self._batch_size, self._length, self._slots, joined=self._joined)
        for row, read in enumerate(own.tolist()):
            source, k = self.mixture[step * self._batch_size + row]
            made.fill(row, self._streams[source].pieces(k, read=read))
        return made.batch()

    def passes(self, steps: int) -> list[float]:
        """How often each source has been gone through after so many steps."""
        drawn = self.mixture.drawn(steps * self._batch_size)
        return [float(n * self._length / s.total) for n, s in zip(drawn, self._sources, strict=True)]

    def summary(self) -> str:
        """For the log: the windows; and each source's share, its epochs in this run, and how its rows are numbered."""
        lines = [
            f"{self.steps_per_epoch} steps an epoch, {self.total_steps} in all; {self._batch_size} full windows of "
            f"{self._length} tokens a step"
        ]
        if len(self._sources) > 1:
            told = zip(self._sources, self.mixture.counts, self._first_rows, self.passes(self.total_steps), strict=True)
            lines += [
                f"{source.source}: {count / PERIOD:.2%} of the tokens, {times:.2f} epochs in this run; messages "
                f"number its rows from {first + 1}"
                for source, count, first, times in told
            ]
        return "\n".join(lines)


@dataclass(frozen=True)
class EvalWindows:
    """Every token of some documents once, in their order, as batches: what held-out figures are computed on.

    Iterating, again and again, yields `TokenBatch`es. The last window of a source is padded, and the last batch is
    completed by empty windows. `own`: see `RowOptions`.
    """

    sources: Sequence[DocumentDataset]
    length: int
    batch_size: int
    documents: Documents = "masked"
    views: int | None = None
    own: np.ndarray | None = None

    def __len__(self) -> int:
        return math.ceil(sum(math.ceil(s.total / self.length) for s in self.sources) / self.batch_size)

    def __iter__(self) -> Iterator[TokenBatch]:
        own = np.ones(self.batch_size, bool) if self.own is None else self.own
        if self.views is None:
            return self._plain(own)
        first = itertools.islice(self._plain(np.zeros(self.batch_size, bool)), LOOKED_AT)
        return map(SegmentViews.of_batches(first, self.views).seen, self._plain(own))

    def _plain(self, own: np.ndarray) -> Iterator[TokenBatch]:
        """Those that are not `own` without their ids."""
        slots = max(most_pieces(s.lengths, self.length) for s in self.sources)
        streams = [Stream(s, self.length, seed=0, shuffle=False, once=True) for s in self.sources]
        windows = [(s, k) for s in streams for k in range(math.ceil(s.data.total / self.length))]
        for start in range(0, len(windows), self.batch_size):
            made = Windows(self.batch_size, self.length, slots, joined=self.documents == "joined")
            for row, (stream, k) in enumerate(windows[start : start + self.batch_size]):
                made.fill(row, stream.pieces(k, read=bool(own[row])))
            yield made.batch()
