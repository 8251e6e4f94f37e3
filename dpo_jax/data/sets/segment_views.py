"""Sequences that share a window, as attention sees them: each a plain causal one, so that every kernel can run.

All windows of a micro-batch on a device are taken together, one behind the other, for so many sequences vary little
from batch to batch. How many of which length there may be is looked up in the first batches of a run, with some room; a
batch that holds more has a second shape with more room, and one that even this does not hold a shape of its own, which
is compiled for it.

B windows of T places, U pieces of a batch (micro-batches x devices) of B / U windows each.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_jax.data.sets.batches import Shape, length_classes
from dpo_jax.types import TokenBatch, Views

LOOKED_AT = 64
"""Batches whose lengths decide the shapes."""
_ROOMS = (0.1, 0.5)  # sequences more than there were, of each class of a shape; at least one


@dataclass(frozen=True)
class SegmentViews:
    """The shapes of a run's views.

    Attributes:
      units: U.
      shapes: the usual one, and one with more room: (n, L) a class, longest first.
      multiple: divides every L.
    """

    units: int
    shapes: tuple[tuple[Shape, ...], ...]
    multiple: int

    @classmethod
    def of_batches(cls, batches: Iterable[TokenBatch], units: int, *, multiple: int = 16) -> "SegmentViews":
        """From the first batches of a run, of host arrays."""
        found = [of for batch in batches for _, of in _runs(batch, units)]
        classes = length_classes(_longest(found), multiple)
        shapes = tuple(tuple((n + max(1, int(room * n)), size) for n, size in classes) for room in _ROOMS)
        return cls(units, shapes, multiple)

    def seen(self, batch: TokenBatch) -> TokenBatch:
        """`batch`, of host arrays, with its views. Their shape is a function of the run's first batches and of it."""
        runs = _runs(batch, self.units)
        own = length_classes(_longest([lengths for _, lengths in runs]), self.multiple)
        shape = next(one for one in (*self.shapes, own) if all(_fits(lengths, one) for _, lengths in runs))
        return dataclasses.replace(batch, views=_views(runs, shape, batch.tokens.size // self.units))


def _runs(batch: TokenBatch, units: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(first places, lengths) of the sequences of each unit, whose windows stand one behind the other."""
    found = []
    for windows in np.asarray(batch.segments).reshape(units, -1, batch.tokens.shape[1]):
        begins = np.diff(windows, axis=1, prepend=0) != 0
        begins[:, 0] = True
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=windows.size)
        real = windows.reshape(-1)[starts] > 0
        found.append((starts[real], lengths[real]))
    return found


def _longest(found: list[np.ndarray]) -> np.ndarray:
    """Lengths that hold those of each of `found`, longest first; at least one."""
    longest = np.ones(max([1, *map(len, found)]), int)
    for of in found:
        longest[: len(of)] = np.maximum(longest[: len(of)], -np.sort(-of))
    return longest


def _fits(lengths: np.ndarray, shape: tuple[Shape, ...]) -> bool:
    slots = slots_of(shape)
    return len(lengths) <= len(slots) and bool((-np.sort(-lengths) <= slots[: len(lengths)]).all())


def _views(runs: list[tuple[np.ndarray, np.ndarray]], shape: tuple[Shape, ...], size: int) -> Views:
    """The views of units of `size` places each, in a shape that holds them: the longest sequence in the first slot."""
    slots = slots_of(shape)
    offsets = np.concatenate([[0], np.cumsum(slots)])
    along = np.zeros((len(runs), offsets[-1]), np.int32)
    held = np.zeros((len(runs), len(slots)), np.int32)
    homes = np.full((len(runs), size, 1), offsets[-1], np.int32)
    for unit, (starts, lengths) in enumerate(runs):
        order = np.argsort(-lengths, kind="stable")
        held[unit, : len(order)] = lengths[order]
        for slot, i in enumerate(order):
            here = np.arange(int(lengths[i]))
            along[unit, offsets[slot] + here] = starts[i] + here
            homes[unit, starts[i] + here, 0] = offsets[slot] + here
    return views_of(along, held, homes, shape)


def slots_of(shape: tuple[Shape, ...]) -> np.ndarray:
    """int [n of all classes]: tokens that each sequence may have, longest first."""
    counts, lengths = np.asarray(shape, int).reshape(-1, 2).T
    return np.repeat(lengths, counts)


def views_of(along: np.ndarray, held: np.ndarray, homes: np.ndarray, shape: tuple[Shape, ...]) -> Views:
    """Views in the classes of a shape; every place of a sequence is a query in it.

    along: int [W, all n L], `Views.places` of the classes one behind the other.
    held: int [W, all n], `Views.lengths` likewise.
    """
    cuts, ns = np.cumsum([n * length for n, length in shape])[:-1], np.cumsum([n for n, _ in shape])[:-1]
    parts = zip(np.split(along, cuts, axis=1), shape, strict=True)
    arrays: dict[str, Any] = {
        "places": tuple(part.reshape(len(along), *one) for part, one in parts),
        "lengths": tuple(np.split(held, ns, axis=1)),
        "homes": homes,
        "answers": homes[..., 0],
    }
    return Views(**arrays, tails=(), starts=())
