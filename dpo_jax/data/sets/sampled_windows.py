"""Sampled responses in windows of real tokens, in few shapes though no two rollouts are alike.

The sizes of a window are steps of what it would have if all prompts and responses were full: a sixteenth of its places
and response tokens, one share for both; a quarter of the longest sequence that attention sees; and a quarter of the
longest response, for those in the longer half of the sequences whose prompts are queries in another, and for the rest.
(Where no sequence is, all of them have halves.) So a run has a few shapes, each a function of its rollout's lengths
alone: a run that goes on where it stopped computes what it would have computed.

G groups, K responses each, n groups a batch, U batches, W windows a batch.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from dpo_jax.data.sets.batches import Shape
from dpo_jax.data.sets.group_packing import Lengths, Need, Packing, WindowShape, pack, up
from dpo_jax.types import Windows

_STEPS = 16
_VIEW_STEPS = 4


class Packed(NamedTuple):
    """Batches of groups in windows.

    Attributes:
      groups: int [U, n], those of each batch, window after window.
      windows: of each batch; its arrays are [U, W, ...].
      shape: that all of them have.
      real: share of real tokens in their places.
    """

    groups: np.ndarray
    windows: Windows
    shape: WindowShape
    real: float


def packed(
    prompt_lengths: np.ndarray, response_lengths: np.ndarray, sizes: Shape, batches: np.ndarray, packing: Packing
) -> Packed:
    """Pack batches of groups.

    Args:
      prompt_lengths: int [G].
      response_lengths: int [G, K].
      sizes: (P, R), of the arrays that hold the tokens.
      batches: int [U, n], numbers of groups; those of a batch may change places.
      packing: its windows divide n.
    """
    (p, r), k, (many, n) = sizes, response_lengths.shape[1], batches.shape
    lengths = Lengths.of(prompt_lengths, response_lengths)
    arranged = lengths.arranged(batches, packing.windows)
    need = lengths.need(arranged)
    shape = _shape(need, n // packing.windows, k, (p, r), packing.multiple)
    groups = arranged.reshape(many, n)
    windows = [
        pack(lengths.prompts[one], lengths.responses[one], shape, packing.windows, (p, r), (0, k)) for one in groups
    ]
    return Packed(
        groups=groups,
        windows=jax.tree.map(lambda *x: np.stack(x), *windows),
        shape=shape,
        real=float(need.size.sum() / (need.size.size * shape.size)),
    )


def _shape(need: Need, groups: int, k: int, full: Shape, multiple: int) -> WindowShape:
    """The sizes of windows of so many groups that hold what `need` says, of each."""
    p, r = full
    sizes = np.asarray([groups * (p + k * r), groups * k * r])  # of full windows: places, response tokens
    most = np.asarray([need.size.max(), need.reads.max()])
    share = math.ceil((most * _STEPS / sizes).max())
    places, reads = (up(-(-int(size) * share // _STEPS), multiple) for size in sizes)
    step, fewer = (up(-(-length // _VIEW_STEPS), multiple) for length in (p + r, r))
    if k == 1:
        return WindowShape(places, reads, _halves(need.views, step))
    length = up(int(max(need.views.max(), need.tails.max())), step)
    tails = tuple((n, asked, length) for n, asked in _halves(need.queries, fewer))
    return WindowShape(places, reads, ((groups, length),), tails)


def _halves(longest: np.ndarray, step: int) -> tuple[Shape, ...]:
    """(n, L) of the first half of lengths [..., many] and of the rest; one where L is the same."""
    many, counts = longest.shape[-1], dict[int, int]()
    for half in filter(len, (range((many + 1) // 2), range((many + 1) // 2, many))):
        most = up(int(longest[..., half].max()), step)
        counts[most] = counts.get(most, 0) + len(half)
    return tuple((n, length) for length, n in counts.items())
