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

from dpo_jax.data.sets.batches import Shape, length_classes
from dpo_jax.data.sets.dealing import arrange, compose
from dpo_jax.data.sets.segment_views import slots_of, views_of
from dpo_jax.types import PreferenceBatch, Windows


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
      views: (n, L) a class, longest first: attention sees n sequences of at most L tokens.
    """

    size: int
    reads: int
    views: tuple[Shape, ...]

    @cached_property
    def slots(self) -> np.ndarray:
        """See `segment_views.slots_of`."""
        return slots_of(self.views)


class Need(NamedTuple):
    """What windows of some responses need; leading axes as the rows were given.

    Attributes:
      size, reads: tokens; response tokens.
      views: [..., g K], tokens of each sequence that attention sees, longest first; 0 where there is none.
    """

    size: np.ndarray
    reads: np.ndarray
    views: np.ndarray

    def within(self, shape: WindowShape) -> np.ndarray:
        """bool [...]: whether `shape` holds them."""
        slots = np.zeros(max(self.views.shape[-1], len(shape.slots)), int)
        slots[: len(shape.slots)] = shape.slots
        fit = (self.views <= slots[: self.views.shape[-1]]).all(axis=-1)
        return fit & (self.size <= shape.size) & (self.reads <= shape.reads)


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
        views = np.where(responses > 0, self.prompts[rows][..., None] + responses, 0)
        views = -np.sort(-views.reshape(*rows.shape[:-1], -1), axis=-1)
        return Need(self.totals[rows].sum(axis=-1), responses.sum(axis=(-1, -2)), views)


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
    g, slots = b // windows, shape.slots
    offsets, total = np.concatenate([[0], np.cumsum(slots)]), int(slots.sum())
    source, positions = (np.zeros((windows, shape.size), np.int32) for _ in range(2))
    real = np.zeros((windows, shape.size), bool)
    reads, targets = (np.zeros((windows, shape.reads), np.int32) for _ in range(2))
    spread, ends = np.zeros((windows, g * k * r), np.int32), np.zeros((windows, g * k), np.int32)
    along, homes = np.zeros((windows, total), np.int32), np.full((windows, shape.size, k), total, np.int32)
    held = np.zeros((windows, len(slots)), np.int32)
    for w in range(windows):
        at = read = 0
        views: list[tuple[int, int, int, int, int]] = []  # length, prompt's place and length, response's place, which
        for i in range(g):
            prompt = int(prompt_lengths[w * g + i])
            row, start = i * (p + k * r), at
            source[w, at : at + prompt] = row + np.arange(prompt)
            positions[w, at : at + prompt] = np.arange(prompt)
            at += prompt
            present = [(j, length) for j, length in enumerate(response_lengths[w * g + i].tolist()) if length]
            for which, (j, length) in enumerate(present):
                own = row + p + j * r + np.arange(length)
                source[w, at : at + length] = own
                positions[w, at : at + length] = prompt + np.arange(length)
                reads[w, read] = start + prompt - 1
                reads[w, read + 1 : read + length] = at + np.arange(length - 1)
                targets[w, read : read + length] = own
                spread[w, (i * k + j) * r :][:length] = read + np.arange(length)
                ends[w, i * k + j] = at + length - 1
                views.append((prompt + length, start, prompt, at, which))
                at, read = at + length, read + length
        real[w, :at] = True
        for slot, (length, start, prompt, response, which) in enumerate(sorted(views, key=lambda one: -one[0])):
            places = np.concatenate([start + np.arange(prompt), response + np.arange(length - prompt)])
            where = offsets[slot] + np.arange(length)
            along[w, where] = places
            homes[w, places[:prompt], which] = where[:prompt]
            homes[w, places[prompt:], 0] = where[prompt:]
            held[w, slot] = length
    arrays: dict[str, Any] = {
        "source": source,
        "positions": positions,
        "real": real,
        "views": views_of(along, held, homes, shape.views),
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
        shape = WindowShape(places, reads, length_classes(need.views.max(axis=0), packing.multiple))
        made.append(pack(own.prompts[:-1], own.responses[:-1], shape, packing.windows, sizes, span))
    return replace(batch, windows=tuple(made))
