"""Equal and nearly equal texts: prompts among very many, in little memory, and texts one after the other.

Equal: the same 64-bit hash (see `store_writer.prompt_hash`). Nearly equal: the sets of 5-character shingles of the
normalised texts (their first 4,096 characters) have an estimated Jaccard similarity of at least 0.8.

The estimate is one-permutation MinHash (Li, Owen and Zhang 2012) with empty bins filled by rotation (Shrivastava and Li
2014): each shingle is hashed once, its hash picks one of 64 bins, each bin keeps its smallest hash, and the share of
bins in which two texts agree estimates their similarity (standard error 0.05 at 0.8, more for texts of few shingles).
Candidates come from banding (16 bands of 4 bins: two texts of similarity 0.8 share a band with probability 0.9998).
Within a band, a text is compared with the first of each split and with its neighbour in order, so where very many
texts share a band the counts are lower bounds; memory and time stay linear.

Signatures (128 bytes a text) go to a scratch file; what stays in memory is 13 bytes a text, and about 40 more while
counting.

`NearTexts` compares each text with those before it, and every candidate, so that what is dropped does not depend on how
many share a band.
"""

import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SIMILAR = 0.8
SHINGLE, LOOKED_AT = 5, 4096
BINS, BANDS = 64, 16
_ROWS = BINS // BANDS
_EXAMPLES = 5
_CHUNK = 2**15  # pairs of signatures compared at once

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_BASE = np.uint64(0x9E3779B97F4A7C15)
_EMPTY = np.uint64(2**64 - 1)


def plain(text: str) -> str:
    """Without what a copy may differ in: NFKC, case, runs of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True)
class Near:
    """Nearly equal prompts of two splits (or within one).

    `count`: distinct prompts of the first split with such a one in the second. `examples`: (row, row, similarity).
    """

    count: int
    examples: list[tuple[int, int, float]]


@dataclass(frozen=True)
class Counts:
    """What was found.

    Attributes:
      rows, distinct: of each split, rows and distinct prompts.
      shared: (split, other split) -> distinct prompts that stand in both.
      near: (split, other split) -> `Near`, for the same split too; equal prompts do not count.
    """

    rows: list[int]
    distinct: list[int]
    shared: dict[tuple[int, int], int]
    near: dict[tuple[int, int], Near]


class PromptIndex:
    """Takes prompts in chunks, then counts."""

    def __init__(self, scratch: Path):
        """`scratch`: a file to write signatures to; it is removed by `count`."""
        self._path = scratch
        self._file = open(scratch, "wb")  # noqa: SIM115 - closed by `count`, or with the process
        self._hashes, self._splits, self._numbers = array("Q"), array("B"), array("I")

    def add(self, texts: Sequence[str], hashes: Sequence[int], splits: Sequence[int], numbers: Sequence[int]) -> None:
        """Some more prompts: normalised text, 64-bit hash, split, number of the row."""
        self._hashes.extend(hashes)
        self._splits.extend(splits)
        self._numbers.extend(numbers)
        self._file.write(signatures(texts).tobytes())

    def count(self, splits: int) -> Counts:
        """Count among `splits` splits. Raises OSError when the scratch file cannot be written."""
        self._file.close()
        hashes, split = np.array(self._hashes, np.uint64), np.array(self._splits, np.uint8)
        numbers = np.array(self._numbers, np.int64)
        first = _first_of_each(hashes, split)
        rows = np.bincount(split, minlength=splits)[:splits].tolist()
        distinct = np.bincount(split[first], minlength=splits)[:splits].tolist()
        of = [np.unique(hashes[split == s]) for s in range(splits)]
        shared = {
            (a, b): int(np.isin(of[a], of[b], assume_unique=True).sum())
            for a in range(splits)
            for b in range(a + 1, splits)
        }
        found = np.memmap(self._path, np.uint16, "r", shape=(len(hashes), BINS)) if len(hashes) else np.zeros((0, BINS))
        near = _near(found, first, hashes, split, numbers, splits)
        del found
        self._path.unlink()
        return Counts(rows, distinct, shared, near)


def _first_of_each(hashes: np.ndarray, split: np.ndarray) -> np.ndarray:
    """int64, sorted: position of the first row of each distinct (split, prompt)."""
    order = np.lexsort((split, hashes))
    new = np.ones(len(order), bool)
    new[1:] = (hashes[order[1:]] != hashes[order[:-1]]) | (split[order[1:]] != split[order[:-1]])
    return np.sort(order[new])


def signatures(texts: Sequence[str]) -> np.ndarray:
    """uint16 [N, BINS]: the MinHash signatures of normalised texts."""
    padded = [text[:LOOKED_AT].ljust(SHINGLE) for text in texts]
    lengths = np.array([len(text) for text in padded], np.int64)
    letters = np.frombuffer("".join(padded).encode("utf-32-le"), np.uint32).astype(np.uint64)
    ends = np.cumsum(lengths)
    owner = np.repeat(np.arange(len(padded)), lengths)
    inside = np.arange(len(letters)) + SHINGLE <= ends[owner] if len(padded) else np.zeros(0, bool)
    value = np.zeros(max(len(letters) - SHINGLE + 1, 0), np.uint64)
    for i in range(SHINGLE):
        value = value * _BASE + letters[i : i + len(value)]
    inside = inside[: len(value)]
    value, owner = _mixed(value[inside]), owner[: len(inside)][inside]
    smallest = np.full(len(padded) * BINS, _EMPTY)
    np.minimum.at(smallest, owner * BINS + (value >> np.uint64(58)).astype(np.int64), value)
    return _filled(smallest.reshape(-1, BINS))


def _mixed(value: np.ndarray) -> np.ndarray:
    """A good 64-bit hash of 64-bit values (the finaliser of SplitMix64)."""
    value = (value ^ (value >> np.uint64(30))) * _MIX[0]
    value = (value ^ (value >> np.uint64(27))) * _MIX[1]
    return value ^ (value >> np.uint64(31))


def _filled(smallest: np.ndarray) -> np.ndarray:
    """Each empty bin takes the value of the next one to its right that is not, around the end, with the distance."""
    twice = np.concatenate([smallest, smallest], axis=1)
    places = np.where(twice == _EMPTY, 4 * BINS, np.arange(2 * BINS))
    following = np.minimum.accumulate(places[:, ::-1], axis=1)[:, ::-1][:, :BINS]
    values = np.take_along_axis(twice, np.minimum(following, 2 * BINS - 1), axis=1)
    distance = (following - np.arange(BINS)).astype(np.uint64)
    return (_mixed(values + distance * _BASE) & np.uint64(0xFFFF)).astype(np.uint16)


def _near(
    found: np.ndarray, first: np.ndarray, hashes: np.ndarray, split: np.ndarray, numbers: np.ndarray, splits: int
) -> dict[tuple[int, int], Near]:
    """Compare what shares a band; see the module for which pairs that is."""
    n = len(first)
    split, hashes, numbers = split[first], hashes[first], numbers[first]
    has = np.zeros((splits, n), bool)  # has[b, i]: text i has a near one in split b
    examples: dict[tuple[int, int], dict[tuple[int, int], float]] = {
        (a, b): {} for a in range(splits) for b in range(a, splits)
    }

    def compare(a: np.ndarray, b: np.ndarray) -> None:
        for start in range(0, len(a), _CHUNK):
            i, j = a[start : start + _CHUNK], b[start : start + _CHUNK]
            new = (hashes[i] != hashes[j]) & ~(has[split[j], i] & has[split[i], j])
            i, j = i[new], j[new]
            similarity = (found[first[i]] == found[first[j]]).mean(axis=1)
            near = similarity >= SIMILAR
            i, j, similarity = i[near], j[near], similarity[near]
            has[split[j], i] = True
            has[split[i], j] = True
            swap = (split[i] > split[j]) | ((split[i] == split[j]) & (i > j))
            i, j = np.where(swap, j, i), np.where(swap, i, j)
            for pair, kept in examples.items():
                for k in np.flatnonzero((split[i] == pair[0]) & (split[j] == pair[1]))[: _EXAMPLES - len(kept)]:
                    kept[int(numbers[i[k]]), int(numbers[j[k]])] = float(similarity[k])

    for band in range(BANDS if n else 0):
        columns = found[:, band * _ROWS : (band + 1) * _ROWS]
        key = np.ascontiguousarray(columns[first]).view(np.uint64)[:, 0]
        order = np.lexsort((split, key))
        key = key[order]
        starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
        sizes = np.diff(np.concatenate([starts, [n]]))
        many = np.repeat(sizes > 1, sizes)
        if not many.any():
            continue
        group = np.repeat(np.arange(len(starts)), sizes)[many]
        order = order[many]
        same = group[1:] == group[:-1]
        compare(order[1:][same], order[:-1][same])
        for s in range(splits):
            leader = np.full(len(starts), -1)
            there = np.flatnonzero(split[order] == s)[::-1]
            leader[group[there]] = order[there]  # the last assignment is the first of the group
            other = leader[group]
            ask = (other >= 0) & (other != order)
            compare(order[ask], other[ask])
    return {
        (a, b): Near(int(has[b, split == a].sum()), [(*rows, s) for rows, s in examples.get((a, b), {}).items()])
        for a in range(splits)
        for b in range(splits)
    }


# ---------------------------------------------------------------- one after the other


class NearTexts:
    """Texts that were kept, and what is nearly equal to one of them."""

    def __init__(self, similar: float = SIMILAR):
        """`similar`: the share of bins from which on two texts are nearly equal, in (0, 1]."""
        self._similar = similar
        self._found: list[tuple[str, np.ndarray]] = []
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]
        self._equal: dict[str, str] = {}

    def near(self, text: str, name: str, *, keep: bool = True) -> tuple[str, float] | None:
        """(name of a kept text nearly equal to this one, estimated similarity), or None: then this one is kept, too.

        keep: False only asks.
        """
        text = plain(text)
        if text in self._equal:
            return self._equal[text], 1.0
        [signature] = signatures([text])
        keys = [part.tobytes() for part in np.split(signature, BANDS)]
        others = sorted({i for band, key in zip(self._bands, keys, strict=True) for i in band.get(key, ())})
        for i in others:
            similarity = float((self._found[i][1] == signature).sum()) / BINS
            if similarity >= self._similar:
                return self._found[i][0], similarity
        if keep:
            self._equal[text] = name
            for band, key in zip(self._bands, keys, strict=True):
                band.setdefault(key, []).append(len(self._found))
            self._found.append((name, signature))
        return None

    def keep(self, texts: Sequence[str], name: str) -> None:
        """Keep all of them, whatever they are close to."""
        for text in texts:
            self.near(text, name)
