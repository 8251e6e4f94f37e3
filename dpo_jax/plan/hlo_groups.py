"""Which devices a collective joins, and what of it leaves a slice (a TPU slice, a node of GPUs).

A device is its place in the mesh. Of a group of n devices in S slices, m = n / S in each, a device sends at least, of b
bytes as `hlo.py` counts them, where pieces are summed (or put together) inside a slice before they leave it:

                                inside its slice     to other slices
    all-reduce                  2 b (m - 1) / m      2 b (S - 1) / S / m
    all-gather, reduce-scatter    b (m - 1) / m        b (S - 1) / S / m
    all-to-all                    b (m - 1) / n        b (S - 1) / S
    collective-permute            b x share            b x share of the pairs that leave
    collective-broadcast          b                    b / m
"""

import math
import re
from collections.abc import Sequence

import numpy as np


def groups_of(text: str, devices: int) -> np.ndarray:
    """int [groups, devices of each] of a collective, from its attributes: five ways to write them."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sizes = _numbers(found[3])
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        ids = ids.transpose(_numbers(found[4])) if found[4] else ids
        return ids.reshape(int(found[1]), int(found[2]))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        return _of_mesh(re.findall(r"'([^']+)'=(\d+)", found[1]), found[2])
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,]+\}(?:,\s*\{[\d,]+\})*)\}", text):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])])
    return np.arange(devices)[None]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _of_mesh(axes: Sequence[tuple[str, str]], joined: str) -> np.ndarray:
    """Groups along named axes, or along a part of one: 'x':(p)n is the middle of x cut into p x n x rest."""
    parts = {name: (int(before or 1), int(n or 0)) for name, before, n in _PART.findall(joined)}
    sizes: list[int] = []
    inside: list[int] = []
    for name, size in axes:
        before, n = parts.get(name, (int(size), 1))
        n = n or int(size) // before
        inside.append(len(sizes) + 1)
        sizes += [before, n, int(size) // before // n]
    outside = [i for i in range(len(sizes)) if i not in inside]
    ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(*outside, *inside)
    return ids.reshape(-1, math.prod(sizes[i] for i in inside))


_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def sent(kind: str, groups: np.ndarray, payload: float, slices: Sequence[int]) -> tuple[int, float, float]:
    """(slices of a group, bytes that a device sends inside its slice, bytes that it sends to others).

    `slices`: the slice of each device.
    """
    places, n = np.asarray(slices)[groups], groups.shape[1]
    s = max(len(set(row)) for row in places.tolist())
    if kind == "collective-permute":
        leaving = float(np.mean(places[:, 0] != places[:, -1]))
        return s, payload * (1 - leaving), payload * leaving
    m = n / s
    if kind == "collective-broadcast":
        return s, payload, payload / m * (s > 1)
    if kind in ("all-to-all", "ragged-all-to-all"):
        return s, payload * (m - 1) / n, payload * (s - 1) / s
    passes = 2 if kind == "all-reduce" else 1
    return s, passes * payload * (m - 1) / m, passes * payload * (s - 1) / s / m
