"""The windows of preference groups: what they need, the sizes of one, and where every token goes.

A window holds B / W rows of a batch, one behind the other, real tokens only (`types.Windows`). Which rows share one,
and which shapes there are, is said elsewhere: of data sets in `group_windows.py`, of what is sampled in
`sampled_windows.py`.

N rows, B rows a batch, W windows a batch, g = B / W rows a window, K responses a row, T places of a window, M of its
response tokens.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.sets.batches import CLASSES, Shape, Tails, length_classes, sequence_classes
from dpo_jax.data.sets.dealing import arrange, compose
from dpo_jax.data.sets.segment_views import slots_of
from dpo_jax.types import PreferenceBatch, Views, Windows

OF_EACH = 5
"""Most classes of whole sequences, and most of others, where there are both."""


class Packing(NamedTuple):
    """How a run wants its batches packed.

    windows: W, in which its rows are: one for each micro-batch of each device.
    spans: see `WindowPlan`; none: all responses together.
    multiple: see `plan_windows`.
    """

    windows: int
    spans: tuple[Shape, ...] = ()
    multiple: int = 16


def up(length: int, multiple: int) -> int:
    """`length` rounded up, at least to one `multiple`."""
    return max(1, -(-length // multiple)) * multiple


@dataclass(frozen=True)
class WindowShape:
    """The sizes of a window of some of a row's responses.

    Attributes:
      size: T.
      reads: M.
      views: (n, L) a class, longest first: attention sees n sequences of at most L tokens, each a prompt and the
        longest of its responses.
      tails: a class each, longest first: the sequences of other responses, whose prompts are queries above.
    """

    size: int
    reads: int
    views: tuple[Shape, ...]
    tails: tuple[Tails, ...] = ()

    @cached_property
    def slots(self) -> np.ndarray:
        """See `segment_views.slots_of`; of `views`."""
        return slots_of(self.views)

    @cached_property
    def tail_slots(self) -> np.ndarray:
        """int [2, n of all tails]: tokens that each sequence may have, and queries among them."""
        return np.stack([slots_of(tuple((n, of[i]) for n, *of in self.tails)) for i in (1, 0)])


class Need(NamedTuple):
    """What windows of some responses need; leading axes as the rows were given.

    Attributes:
      size, reads: tokens; response tokens.
      views: [..., g], tokens of each sequence that attention sees whole, longest first; 0 where there is none.
      tails: [..., g (K - 1)], tokens of each other sequence, longest first; 0 likewise.
      queries: [..., g (K - 1)], tokens of the responses that these end with.
    """

    size: np.ndarray
    reads: np.ndarray
    views: np.ndarray
    tails: np.ndarray
    queries: np.ndarray

    def within(self, shape: WindowShape) -> np.ndarray:
        """bool [...]: whether `shape` holds them."""
        fit = (self.size <= shape.size) & (self.reads <= shape.reads)
        tails = zip((self.tails, self.queries), shape.tail_slots, strict=True)
        for needed, slots in ((self.views, shape.slots), *tails):
            room = np.zeros(max(needed.shape[-1], len(slots)), int)
            room[: len(slots)] = slots
            fit = fit & (needed <= room[: needed.shape[-1]]).all(axis=-1)
        return fit


@dataclass(frozen=True)
class Lengths:
    """Tokens of N rows, and behind them of one that is not there, -1: prompts int [N + 1], responses int [N + 1, K]."""

    prompts: np.ndarray
    responses: np.ndarray

    @classmethod
    def of(cls, prompts: np.ndarray, responses: np.ndarray) -> "Lengths":
        return cls(np.append(prompts, 0), np.concatenate([responses, np.zeros_like(responses[:1])]))

    def span(self, first: int, last: int) -> "Lengths":
        """With some of the responses only; a prompt without any of them is not computed."""
        responses = self.responses[:, first:last]
        return Lengths(np.where((responses > 0).any(axis=1), self.prompts, 0), responses)

    @property
    def reads(self) -> np.ndarray:
        """int [N + 1]: of all responses."""
        return self.responses.sum(axis=1)

    @property
    def totals(self) -> np.ndarray:
        """int [N + 1]: prompt once, and all responses."""
        return self.prompts + self.reads

    @property
    def count(self) -> int:
        """N."""
        return len(self.prompts) - 1

    def epoch(
        self, batch_size: int, seed: int, epoch: int, *, shuffle: bool, order: np.ndarray | None, dealt: bool
    ) -> list[np.ndarray]:
        """See `WindowPlan.epoch` and `plan_windows`."""
        drawn = np.arange(self.count) if order is None else order
        if not dealt:
            return np.split(drawn, range(batch_size, len(drawn), batch_size))
        totals, reads = self.totals[drawn], self.reads[drawn]
        return [drawn[rows] for rows in compose(totals, reads, batch_size, seed=seed, epoch=epoch, shuffle=shuffle)]

    def arranged(self, rows: np.ndarray, windows: int) -> np.ndarray:
        """Of batches of rows, int [M, B], their windows: int [M, W, B / W]."""
        return arrange(self.totals, self.reads, rows, windows)

    def need(self, rows: np.ndarray) -> Need:
        """Of windows of these rows, int [..., g]."""
        responses = self.responses[rows]
        *many, g, k = responses.shape
        by_length = -np.sort(-responses, axis=-1)
        whole = np.where(by_length > 0, self.prompts[rows][..., None] + by_length, 0)
        views = -np.sort(-whole[..., 0], axis=-1)
        tails, queries = (x[..., 1:].reshape(*many, g * (k - 1)) for x in (whole, by_length))
        order = np.lexsort((-queries, -tails))
        tails, queries = (np.take_along_axis(x, order, axis=-1) for x in (tails, queries))
        return Need(self.totals[rows].sum(axis=-1), responses.sum(axis=(-1, -2)), views, tails, queries)


def window_shape(size: int, reads: int, need: Need, multiple: int) -> WindowShape:
    """Of so many places and response tokens, with room for the sequences of all windows of `need`, in few classes."""
    views, tails, queries = (x.max(axis=tuple(range(x.ndim - 1)), initial=0) for x in need[2:])
    most = OF_EACH if len(tails) else CLASSES
    rest = sequence_classes(tails, queries, multiple, most)
    return WindowShape(size, reads, length_classes(views, multiple, most), rest)


# ---------------------------------------------------------------- the windows of a batch


def pack(
    prompt_lengths: np.ndarray,
    response_lengths: np.ndarray,
    shape: WindowShape,
    windows: int,
    padded: Shape,
    span: Shape,
) -> Windows:
    """The windows of a batch's rows, in their order.

    Args:
      prompt_lengths: int [B], 0 where a row is not there or has no response here.
      response_lengths: int [B, K], of the responses of `span` alone; 0 for one that is not there.
      shape: that holds them.
      windows: W.
      padded: (P, R), the sizes of the batch's arrays.
      span: (first, last), which of the batch's responses these are.
    """
    (p, r), (b, k) = padded, response_lengths.shape
    g, sequences = b // windows, _Sequences(shape, windows, k)
    source, positions = (np.zeros((windows, shape.size), np.int32) for _ in range(2))
    real = np.zeros((windows, shape.size), bool)
    reads, targets = (np.zeros((windows, shape.reads), np.int32) for _ in range(2))
    spread, ends = np.zeros((windows, g * k * r), np.int32), np.zeros((windows, g * k), np.int32)
    for w in range(windows):
        at = read = 0
        views: list[_View] = []
        for i in range(g):
            prompt = int(prompt_lengths[w * g + i])
            row, start = i * (p + k * r), at
            source[w, at : at + prompt] = row + np.arange(prompt)
            positions[w, at : at + prompt] = np.arange(prompt)
            at += prompt
            present = [(j, length) for j, length in enumerate(response_lengths[w * g + i].tolist()) if length]
            longest = max(present, key=lambda one: one[1], default=(0, 0))[0]
            for which, (j, length) in enumerate(present):
                own = row + p + j * r + np.arange(length)
                source[w, at : at + length] = own
                positions[w, at : at + length] = prompt + np.arange(length)
                reads[w, read] = start + prompt - 1
                reads[w, read + 1 : read + length] = at + np.arange(length - 1)
                targets[w, read : read + length] = own
                spread[w, (i * k + j) * r :][:length] = read + np.arange(length)
                ends[w, i * k + j] = at + length - 1
                views.append(_View(j == longest, which, start, prompt, at, length))
                at, read = at + length, read + length
        real[w, :at] = True
        sequences.place(w, views)
    arrays: dict[str, Any] = {
        "source": source,
        "positions": positions,
        "real": real,
        "views": sequences.views(),
        "reads": reads,
        "targets": targets,
        "spread": spread,
        "ends": ends,
    }
    return Windows(**arrays, first=span[0], last=span[1])


def pack_batch(batch: PreferenceBatch, packing: Packing) -> PreferenceBatch:
    """A batch of host arrays with its responses packed, its rows in the order in which they stand.

    For batches that no data set's plan holds: their shapes are those that they need.
    """
    (b, k), there = batch.response_lengths.shape, np.asarray(batch.weights)[:, None] > 0
    whole = Lengths.of(np.asarray(batch.prompt_lengths), np.where(there, batch.response_lengths, 0))
    sizes = batch.prompts.shape[1], batch.responses.shape[2]
    made = []
    for span in packing.spans or ((0, k),):
        own = whole.span(*span)
        need = own.need(np.arange(b).reshape(packing.windows, -1))
        places, reads = (up(int(x.max()), packing.multiple) for x in (need.size, need.reads))
        shape = window_shape(places, reads, need, packing.multiple)
        made.append(pack(own.prompts[:-1], own.responses[:-1], shape, packing.windows, sizes, span))
    return replace(batch, windows=tuple(made))


class _View(NamedTuple):
    """One of a prompt's responses, and where the two stand in a window.

    whole: whether the prompt is a query here; which: how many of its responses stand before this one.
    """

    whole: bool
    which: int
    prompt_at: int
    prompt: int
    response_at: int
    response: int

    @property
    def length(self) -> int:
        return self.prompt + self.response


class _Sequences:
    """The `Views` of windows of one shape, window by window. S places of all sequences, Q of their queries."""

    def __init__(self, shape: WindowShape, windows: int, k: int):
        self.shape = shape
        whole, (tails, queries) = shape.slots, shape.tail_slots
        self.first = len(whole)
        self.begins, self.asked = (np.concatenate([[0], np.cumsum([*whole, *x])]) for x in (tails, queries))
        self.along, self.queries = (np.zeros((windows, x[-1]), np.int32) for x in (self.begins, self.asked))
        self.held, self.starts = (np.zeros((windows, len(self.begins) - 1), np.int32) for _ in range(2))
        self.homes = np.full((windows, shape.size, k), self.begins[-1], np.int32)
        self.answers = np.full((windows, shape.size), self.asked[-1], np.int32)

    def place(self, w: int, views: list[_View]) -> None:
        """The sequences of a window, the longest in the first slots."""
        longest = sorted(views, key=lambda one: (-one.length, -one.response))
        whole, tails = [one for one in longest if one.whole], [one for one in longest if not one.whole]
        for slot, one in (*enumerate(whole), *enumerate(tails, self.first)):
            prompt, response = one.prompt_at + np.arange(one.prompt), one.response_at + np.arange(one.response)
            where = self.begins[slot] + np.arange(one.length)
            self.along[w, where] = np.concatenate([prompt, response])
            self.homes[w, prompt, one.which] = where[: one.prompt]
            self.homes[w, response, 0] = where[one.prompt :]
            self.held[w, slot] = one.length
            own = np.concatenate([prompt, response]) if one.whole else response
            self.answers[w, own] = self.asked[slot] + np.arange(len(own))
            self.queries[w, self.answers[w, own]] = own
            self.starts[w, slot] = 0 if one.whole else one.prompt

    def views(self) -> Views:
        """Of all windows."""
        classes = [*((n, size, size) for n, size in self.shape.views), *self.shape.tails]
        ends, many = [np.cumsum([n * of[i] for n, *of in classes])[:-1] for i in (1, 0)], len(self.along)
        ns = np.cumsum([n for n, *_ in classes])[:-1]
        places, queries = (
            tuple(part.reshape(many, n, -1) for part, (n, *_) in zip(np.split(x, at, axis=1), classes, strict=True))
            for x, at in zip((self.along, self.queries), ends, strict=True)
        )
        first = len(self.shape.views)
        arrays: dict[str, Any] = {
            "places": places,
            "lengths": tuple(np.split(self.held, ns, axis=1)),
            "homes": self.homes,
            "tails": queries[first:],
            "starts": tuple(np.split(self.starts, ns, axis=1))[first:],
            "answers": self.answers,
        }
        return Views(**arrays)
