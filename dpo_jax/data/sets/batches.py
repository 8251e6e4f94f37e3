"""Which rows share a batch, in which shape, in which order.

Every batch shape is compiled once, so there are few: `plan_buckets` chooses shapes (P, R) that need few padded tokens
P + K R a row. A batch holds rows of one bucket. What is left over when a bucket's rows do not fill its last batch moves
to the next larger shape, so an epoch has ceil(N / B) batches, and only its last one is completed by filler rows: every
row counts exactly once an epoch.

All of it is a pure function of the lengths, the seed and the epoch.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.types import PreferenceBatch

CLASSES = 6
"""Most lengths that attention's sequences of a window are padded to."""
_LEVELS = 64  # lengths are told apart on a grid of at most so many steps an axis: it bounds the search, not the result

Shape = tuple[int, int]
Tails = tuple[int, int, int]
"""(n, Q, L): n sequences of at most L tokens, at most Q of which, the last ones, are queries."""


class RowBatch(NamedTuple):
    """One batch to be: `bucket` is an index into the plan's shapes, `indices` int [<= B] are rows of the data set."""

    bucket: int
    indices: np.ndarray


@dataclass(frozen=True)
class BucketPlan:
    """Batch shapes, cheapest first, the last one as large as the largest row.

    Attributes:
      batch_size: B.
      shapes: (P, R) in tokens.
      rows: int [N], the bucket of each row: the cheapest shape that holds it.
      larger: for each shape but the last, the cheapest of the later shapes that holds all that it holds.
      padding: padded tokens of an epoch / real tokens.
    """

    batch_size: int
    shapes: tuple[Shape, ...]
    rows: np.ndarray
    larger: tuple[int, ...]
    padding: float

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return math.ceil(len(self.rows) / self.batch_size)

    def summary(self) -> str:
        """Shapes and padding, for the log."""
        shapes = ", ".join(f"{p}+{r}" for p, r in self.shapes)
        return f"batch shapes (prompt+response tokens) {shapes}; {self.padding:.2f} padded tokens for each real one"

    def epoch(self, seed: int, epoch: int, *, shuffle: bool, order: np.ndarray | None = None) -> list[RowBatch]:
        """The ceil(N / B) batches of an epoch, in order: a pure function of its arguments.

        Without `shuffle`, rows keep their order within a bucket, and batches stand in the order of their first rows.
        `order`: the N rows that the epoch holds, where that is not each once (see `row_mixture.py`).
        """
        n = len(self.rows)
        if order is None:
            order = permutation(n, seed, epoch, 0) if shuffle else np.arange(n)
        filled = _fill(self._members(order), self.larger, self.batch_size)
        batches = [RowBatch(bucket, rows) for bucket, many in enumerate(filled) for rows in many]
        if shuffle:
            return [batches[i] for i in permutation(len(batches), seed, epoch, 1)]
        return sorted(batches, key=lambda batch: int(batch.indices.min()))

    def of(self, rows: np.ndarray) -> list[RowBatch]:
        """Batches of some of the rows (positions), each in its own bucket."""
        return [
            RowBatch(bucket, members[at : at + self.batch_size])
            for bucket, members in enumerate(self._members(rows))
            for at in range(0, len(members), self.batch_size)
        ]

    def _members(self, rows: np.ndarray) -> list[np.ndarray]:
        return [rows[self.rows[rows] == bucket] for bucket in range(len(self.shapes))]

    def batch(
        self, dataset: PreferenceDataset, one: RowBatch, own: np.ndarray | None = None
    ) -> tuple[np.ndarray, PreferenceBatch]:
        """(its rows int [B], -1 for fillers; the batch). `own`: see `collate`."""
        batch = collate(dataset, one.indices, self.shapes[one.bucket], self.batch_size, own)
        return completed(one.indices, self.batch_size), batch


def plan_buckets(
    prompt_lengths: np.ndarray, response_lengths: np.ndarray, *, buckets: int, batch_size: int, multiple: int = 16
) -> BucketPlan:
    """Choose at most `buckets` shapes for rows of these lengths.

    Args:
      prompt_lengths: int [N].
      response_lengths: int [N, K]; K = 0 for sequences without responses, whose R means nothing.
      buckets: upper bound; fewer are used where more would not save padding (with few rows, say).
      batch_size: rows a batch.
      multiple: P and R are multiples of this. 16 keeps padding low; accelerators' matrix units prefer 128.
    """
    k = response_lengths.shape[1]
    needs = np.stack(
        [_round(prompt_lengths, multiple), _round(response_lengths.max(axis=1, initial=0), multiple)], axis=1
    )
    unique, inverse, counts = np.unique(needs, axis=0, return_inverse=True, return_counts=True)
    best: tuple[int, np.ndarray] | None = None
    for n in sorted({min(2**i, buckets, len(unique)) for i in range(buckets.bit_length() + 1)}):
        shapes = _shapes(unique, counts, k, n)
        rows = np.bincount(_cheapest(shapes, unique, k), weights=counts, minlength=n).astype(int)
        batches = [len(b) for b in _fill([np.arange(m) for m in rows], _larger(shapes), batch_size)]
        cost = batch_size * int(np.dot(batches, _cost(shapes, k)))
        if best is None or cost < best[0]:
            best = cost, shapes
    assert best is not None, "a data set has at least one row"
    cost, shapes = best
    return BucketPlan(
        batch_size=batch_size,
        shapes=tuple((int(p), int(r)) for p, r in shapes),
        rows=_cheapest(shapes, unique, k)[inverse.reshape(-1)],
        larger=_larger(shapes),
        padding=cost / int(prompt_lengths.sum() + response_lengths.sum()),
    )


def _round(lengths: np.ndarray, multiple: int) -> np.ndarray:
    """Lengths rounded up to a grid of at most `_LEVELS` multiples of `multiple`, none beyond what the longest needs."""
    largest = -(-max(int(lengths.max()), 1) // multiple) * multiple
    step = multiple * -(-largest // (multiple * _LEVELS))
    return np.minimum(-(-np.maximum(lengths, 1) // step) * step, largest)


def _cost(shapes: np.ndarray, k: int) -> np.ndarray:
    return shapes[:, 0] + k * shapes[:, 1]


def _costs(shapes: np.ndarray, needs: np.ndarray, k: int) -> np.ndarray:
    """int64 [M, n]: the cost of each need [M, 2] in each shape [n, 2]; the largest integer where it does not fit."""
    holds = (needs[:, None, :] <= shapes[None]).all(axis=-1)
    return np.where(holds, _cost(shapes, k), np.iinfo(np.int64).max)


def _cheapest(shapes: np.ndarray, needs: np.ndarray, k: int) -> np.ndarray:
    """For each need, the index of the cheapest shape that holds it."""
    return _costs(shapes, needs, k).argmin(axis=1)


def _larger(shapes: np.ndarray) -> tuple[int, ...]:
    """Shapes are sorted by cost and the last holds everything, so there always is a later one that holds more."""
    return tuple(
        next(j for j in range(i + 1, len(shapes)) if (shapes[j] >= shapes[i]).all()) for i in range(len(shapes) - 1)
    )


def _shapes(needs: np.ndarray, counts: np.ndarray, k: int, n: int) -> np.ndarray:
    """n shapes [n, 2] for `needs` [M, 2], sorted by cost, the last as large as all needs.

    Start from the best cut of the needs, sorted by cost, into n runs (dynamic programming); then move one side of one
    shape at a time while that saves tokens.
    """
    order = np.argsort(_cost(needs, k), kind="stable")
    shapes = _runs(needs[order], counts[order], k, n)
    shapes[-1] = needs.max(axis=0)
    total = np.dot(_costs(shapes, needs, k).min(axis=1), counts)
    improved = True
    while improved:
        improved = False
        for i in range(n - 1):
            others = _costs(np.delete(shapes, i, axis=0), needs, k).min(axis=1)
            for axis in (0, 1):
                sizes = np.unique(needs[:, axis])
                moved = np.repeat(shapes[i : i + 1], len(sizes), axis=0)
                moved[:, axis] = sizes
                totals = counts @ np.minimum(_costs(moved, needs, k), others[:, None])
                if totals.min() < total:
                    shapes[i], total, improved = moved[totals.argmin()], totals.min(), True
    return shapes[np.argsort(_cost(shapes, k), kind="stable")]


def _runs(needs: np.ndarray, counts: np.ndarray, k: int, n: int) -> np.ndarray:
    """Cut `needs` (sorted) into n runs with the least padded tokens; the shape [2] of each run."""
    m = len(needs)
    before = np.concatenate([[0], np.cumsum(counts)])
    best = np.full((n + 1, m + 1), np.inf)
    best[0, 0] = 0
    cut = np.zeros((n + 1, m + 1), int)
    for end in range(1, m + 1):
        # What a run [start, end) costs, for every start.
        shape = np.maximum.accumulate(needs[:end][::-1])[::-1]
        run = (before[end] - before[:end]) * _cost(shape, k)
        for b in range(1, n + 1):
            cost = best[b - 1, :end] + run
            cut[b, end] = start = int(cost.argmin())
            best[b, end] = cost[start]
    shapes, end = [], m
    for b in range(n, 0, -1):
        start = cut[b, end]
        shapes.append(needs[start:end].max(axis=0))
        end = start
    return np.stack(shapes[::-1])


def length_classes(longest: np.ndarray, multiple: int, most: int = CLASSES) -> tuple[Shape, ...]:
    """(n, L) of at most so many classes for n sequences each of at most L tokens, longest first, with least n L^2.

    longest: int [n], tokens that each sequence may have, descending.
    """
    return tuple((n, length) for n, _, length in sequence_classes(longest, longest, multiple, most))


def sequence_classes(longest: np.ndarray, queries: np.ndarray, multiple: int, most: int) -> tuple[Tails, ...]:
    """Of at most so many classes for n sequences that are queries at their end alone, longest first, with least n Q L.

    Args:
      longest: int [n], tokens that each sequence may have, descending.
      queries: int [n], how many of these are queries.
    """
    lengths, asked = (-(-np.maximum(x, 1) // multiple) * multiple for x in (longest, queries))
    sizes, starts = np.unique(-lengths, return_index=True)
    sizes, bounds, count = -sizes, np.append(starts, len(lengths)), len(sizes)
    if not count:
        return ()
    of_size = np.maximum.reduceat(asked, starts)
    cost = np.full((count, count + 1), np.inf)  # of a class of the sizes from one on, before another
    for at in range(count):
        most_asked = np.maximum.accumulate(of_size[at:])
        cost[at, at + 1 :] = (bounds[at + 1 :] - bounds[at]) * sizes[at] * most_asked
    # The cost of all sizes before an end, in so many classes, and where the last of these begins.
    least, begins = np.append(0.0, np.full(count, np.inf)), []
    for _ in range(min(most, count)):
        each = least[:-1, None] + cost
        begins.append(each.argmin(axis=0))
        least = np.append(0.0, each.min(axis=0)[1:])
    end, cuts = count, [count]
    for begin in reversed(begins):
        end = int(begin[end])
        cuts.append(end)
        if end == 0:
            break
    return tuple(
        (int(bounds[b] - bounds[a]), int(of_size[a:b].max()), int(sizes[a])) for a, b in itertools.pairwise(cuts[::-1])
    )


def _fill(members: list[np.ndarray], larger: tuple[int, ...], batch_size: int) -> list[list[np.ndarray]]:
    """Cut each bucket's members into batches; what does not fill one moves to the bucket named by `larger`."""
    members = list(members)
    filled: list[list[np.ndarray]] = []
    for bucket, rows in enumerate(members):
        last = bucket == len(members) - 1
        end = len(rows) if last else len(rows) - len(rows) % batch_size
        filled.append([rows[at : at + batch_size] for at in range(0, end, batch_size)])
        if not last:
            members[larger[bucket]] = np.concatenate([members[larger[bucket]], rows[end:]])
    return filled


def permutation(n: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """A permutation of n by sorting random words: NumPy keeps bit generators' streams fixed for ever, not `shuffle`."""
    words = np.random.Philox(key=np.array([seed, 2 * epoch + purpose], np.uint64)).random_raw(n)
    return np.argsort(words, kind="stable")


def completed(indices: np.ndarray, batch_size: int) -> np.ndarray:
    """int [B]: the rows of a batch, and -1 for each that is missing."""
    return np.append(indices, np.full(batch_size - len(indices), -1))


def collate(
    dataset: PreferenceDataset, indices: np.ndarray, shape: Shape, batch_size: int, own: np.ndarray | None = None
) -> PreferenceBatch:
    """The rows `indices` as one batch of NumPy arrays in the shape (P, R), completed to `batch_size` by filler rows.

    A filler row, or an index of -1, repeats one of the rows, with weight 0 and row number -1: its loss is finite and
    does not count.

    `own`: bool [B], the places whose ids are read (`mesh.own_rows`); those of the others are 0. None: all. Whatever it
    is, lengths, weights and row numbers are those of all rows.
    """
    k = dataset.responses_per_prompt
    p, r = shape
    rows = completed(indices, batch_size)
    real = rows >= 0
    rows = np.where(real, rows, rows[real.argmax()])
    prompts = np.zeros((batch_size, p), np.int32)
    responses = np.zeros((batch_size, k, r), np.int32)
    formats = None if dataset.formats is None else np.zeros((batch_size, k, r), bool)
    for b in range(batch_size) if own is None else np.flatnonzero(own):
        row = rows[b]
        ids = dataset.prompts[row]
        prompts[b, : len(ids)] = ids
        for j in range(k):
            ids = dataset.responses[row * k + j]
            responses[b, j, : len(ids)] = ids
            if formats is not None and dataset.formats is not None:
                formats[b, j, : len(ids)] = dataset.formats[row * k + j]
    arrays: dict[str, Any] = {
        "prompts": prompts,
        "prompt_lengths": dataset.prompt_lengths[rows].astype(np.int32),
        "responses": responses,
        "response_lengths": dataset.response_lengths[rows].astype(np.int32),
        "weights": real.astype(np.float32),
        "rows": np.where(real, dataset.row_numbers[rows], -1).astype(np.int32),
        "format_masks": formats,
        "reference_logps": None if dataset.reference_logps is None else dataset.reference_logps[rows],
        "margins": None if dataset.margins is None else dataset.margins[rows],
        "ranks": None if dataset.ranks is None else dataset.ranks[rows],
        "labels": None if dataset.labels is None else {name: values[rows] for name, values in dataset.labels.items()},
    }
    return PreferenceBatch(**arrays)
