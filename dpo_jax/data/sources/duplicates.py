"""Equal and nearly equal texts: prompts among very many, in little memory, and texts one after the other.

Equal: the same 64-bit hash (see `store_writer.prompt_hash`). Nearly equal: the sets of 5-character shingles of the
normalised texts (their first 4,096 characters) have an estimated Jaccard similarity of at least 0.8.

The estimate is one-permutation MinHash (Li, Owen and Zhang 2012) with empty bins filled by rotation (Shrivastava and Li
2014): each shingle is hashed once, its hash picks one of 64 bins, each bin keeps its smallest hash, and the share of
bins in which two texts agree estimates their similarity (standard error 0.05 at 0.8, more for texts of few shingles).
Candidates come from banding (16 bands of 4 bins: two texts of similarity 0.8 share a band with probability 0.9998).
Within a band, a text is compared with the first of each split and with its neighbour in order, so where very many
texts share a band the counts are lower bounds; memory and time stay linear.

Prompts are 141 bytes each in scratch files (`RECORD`). To count them, what is to be compared is dealt into files by its
key, of about `_DEALT` prompts each, and these are sorted one after the other. In memory stay one byte a prompt and one
more for each split; where more than `_DEALT` prompts share a band, 60 bytes for each of them too.

`NearTexts` compares each text with those before it, and every candidate, so that what is dropped does not depend on how
many share a band.
"""

import itertools
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SIMILAR = 0.8
SHINGLE, LOOKED_AT = 5, 4096
BINS, BANDS = 64, 16
_ROWS = BINS // BANDS
_EXAMPLES = 5
_CHUNK, _PAIRS = 2**16, 2**13  # prompts read, and pairs compared, at once

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


RECORD = np.dtype([("bins", "<u2", (BINS,)), ("hash", "<u8"), ("number", "<u4"), ("split", "u1")])
"""A prompt: its signature, 64-bit hash, number of its row and split."""
_KEYED = np.dtype([("key", "<u8"), ("at", "<u8"), ("split", "u1")])
_DEALT = 2**18


def records(texts: Sequence[str], hashes: Sequence[int], splits: Sequence[int], numbers: Sequence[int]) -> np.ndarray:
    """`RECORD` [N] of some prompts: normalised text, 64-bit hash, split, number of the row."""
    found = np.zeros(len(texts), RECORD)
    found["bins"] = signatures(texts)
    found["hash"], found["split"], found["number"] = hashes, splits, numbers
    return found


class _Prompts:
    """The prompts of several files of `RECORD`s, one after another."""

    def __init__(self, files: Sequence[tuple[Path, int]]):
        """`files`: with what is added to the numbers of their rows."""
        self._paths = [path for path, _ in files]
        self._before = np.array([before for _, before in files], np.int64)
        sizes = [path.stat().st_size // RECORD.itemsize for path in self._paths]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(position of the first, `RECORD` [n]) of all prompts."""
        for path, start in zip(self._paths, self._starts[:-1].tolist(), strict=True):
            with path.open("rb") as file:
                while len(part := np.fromfile(file, RECORD, _CHUNK)):
                    yield start, part
                    start += len(part)

    @contextmanager
    def reading(self) -> Iterator[Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]]:
        """Within the block a function from positions to `RECORD` [n], and the numbers of their rows int64 [n]."""
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")).fileno() for path in self._paths]

            def read(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                which = np.searchsorted(self._starts, positions, side="right") - 1
                places = ((positions - self._starts[which]) * RECORD.itemsize).tolist()
                found = [os.pread(files[i], RECORD.itemsize, at) for i, at in zip(which.tolist(), places, strict=True)]
                rows = np.frombuffer(b"".join(found), RECORD)
                return rows, rows["number"] + self._before[which]

            yield read


def count_prompts(
    files: Sequence[tuple[Path, int]],
    splits: int,
    scratch: Path,
    over: Callable[[Callable[[int], "Band"], Iterable[int]], Iterable["Band"]] = map,
) -> Counts:
    """Count equal and nearly equal prompts.

    Args:
      files: of `RECORD`s, with what is added to the numbers of their rows.
      splits: how many there are.
      scratch: an empty folder, which is left empty.
      over: `map`, or that of several processes: a band is one's work.
    """
    prompts, first = _Prompts(files), scratch / "first"
    rows = np.zeros(splits, np.int64)
    for _, part in prompts.chunks():
        rows += np.bincount(part["split"], minlength=splits)
    distinct, shared = _distinct(prompts, splits, scratch, first)
    bands = list(over(partial(_band, files, splits, scratch, first), range(BANDS) if len(prompts) else ()))
    near: dict[tuple[int, int], Near] = {}
    for a, b in itertools.product(range(splits), repeat=2):
        count = sum(int(np.bitwise_count(bits).sum()) for bits in _union([band.has[a, b] for band in bands]))
        found = dict.fromkeys(example for band in bands for example in band.examples.get((a, b), ()))
        examples = {(row, other): similarity for row, other, similarity in found}
        near[a, b] = Near(count, [(*both, s) for both, s in itertools.islice(examples.items(), _EXAMPLES)])
    first.unlink()
    return Counts(rows.tolist(), distinct, shared, near)


def _dealt(
    prompts: _Prompts, scratch: Path, name: str, keyed: Callable[[int, np.ndarray], np.ndarray]
) -> Iterator[Any]:
    """What `keyed` makes of each chunk of prompts, `_KEYED` [n], in parts: each holds all of its keys, in order."""
    count = max(1, -(-len(prompts) // _DEALT))
    paths = [scratch / f"{name}-{i}" for i in range(count)]
    for start, part in prompts.chunks():
        found = keyed(start, part)
        which = (_mixed(found["key"]) >> np.uint64(32)) % np.uint64(count)
        found = found[np.argsort(which, kind="stable")]
        ends = np.cumsum(np.bincount(which.astype(np.int64), minlength=count))
        for path, some in zip(paths, np.split(found, ends[:-1]), strict=True):
            with path.open("ab") as file:
                file.write(some.tobytes())
    for path in paths:
        if path.exists():
            yield np.fromfile(path, _KEYED)
            path.unlink()


def _distinct(
    prompts: _Prompts, splits: int, scratch: Path, path: Path
) -> tuple[list[int], dict[tuple[int, int], int]]:
    """(distinct prompts of each split, those in two of them); `path`: where a byte a prompt says if it is the first."""

    def keyed(start: int, part: np.ndarray) -> np.ndarray:
        found = np.zeros(len(part), _KEYED)
        found["key"], found["at"], found["split"] = part["hash"], start + np.arange(len(part)), part["split"]
        return found

    first, distinct = np.zeros(len(prompts), bool), np.zeros(splits, np.int64)
    shared = dict.fromkeys(itertools.combinations(range(splits), 2), 0)
    for part in _dealt(prompts, scratch, "hash", keyed):
        part = part[np.lexsort((part["split"], part["key"]))]
        new = np.ones(len(part), bool)
        new[1:] = (part["key"][1:] != part["key"][:-1]) | (part["split"][1:] != part["split"][:-1])
        part = part[new]
        first[part["at"]] = True
        distinct += np.bincount(part["split"], minlength=splits)
        of = [part["key"][part["split"] == s] for s in range(splits)]
        for a, b in shared:
            shared[a, b] += int(np.isin(of[a], of[b], assume_unique=True).sum())
    first.tofile(path)
    return distinct.tolist(), shared


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


class Band(NamedTuple):
    """What one band found.

    Attributes:
      has: (split, other split) -> bits of the prompts of the first that have a near one in the other.
      examples: (split, other split), in order -> (row, row, similarity).
    """

    has: dict[tuple[int, int], np.ndarray]
    examples: dict[tuple[int, int], list[tuple[int, int, float]]]


def _union(sets: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The union of sets of bits, a part at a time."""
    for at in range(0, len(sets[0]) if sets else 0, _CHUNK):
        yield np.bitwise_or.reduce([bits[at : at + _CHUNK] for bits in sets])


def _band(files: Sequence[tuple[Path, int]], splits: int, scratch: Path, first: Path, band: int) -> Band:
    """Compare what shares a band; see the module for which pairs that is."""
    prompts, distinct = _Prompts(files), np.fromfile(first, bool)
    has = np.zeros((splits, len(prompts)), bool)  # has[b, i]: prompt i has a near one in split b
    of = np.zeros(len(prompts), np.uint8)
    examples: dict[tuple[int, int], dict[tuple[int, int], float]] = {
        pair: {} for pair in itertools.combinations_with_replacement(range(splits), 2)
    }

    def keyed(start: int, part: np.ndarray) -> np.ndarray:
        mine = np.flatnonzero(distinct[start : start + len(part)])
        found = np.zeros(len(mine), _KEYED)
        columns = np.ascontiguousarray(part["bins"][mine, band * _ROWS : (band + 1) * _ROWS])
        found["key"], found["at"], found["split"] = columns.view(np.uint64)[:, 0], start + mine, part["split"][mine]
        of[start : start + len(part)] = part["split"]
        return found

    with prompts.reading() as read:

        def compare(a: np.ndarray, b: np.ndarray) -> None:
            for start in range(0, len(a), _PAIRS):
                i, j = (x[start : start + _PAIRS]["at"].astype(np.int64) for x in (a, b))
                new = ~(has[of[j], i] & has[of[i], j])
                i, j = i[new], j[new]
                (one, row), (other, row_of_other) = read(i), read(j)
                similarity = (one["bins"] == other["bins"]).mean(axis=1)
                near = (similarity >= SIMILAR) & (one["hash"] != other["hash"])
                i, j, similarity, row, row_of_other = (x[near] for x in (i, j, similarity, row, row_of_other))
                has[of[j], i] = True
                has[of[i], j] = True
                swap = (of[i] > of[j]) | ((of[i] == of[j]) & (i > j))
                i, j = np.where(swap, j, i), np.where(swap, i, j)
                row, row_of_other = np.where(swap, row_of_other, row), np.where(swap, row, row_of_other)
                for pair, kept in examples.items():
                    here = np.flatnonzero((of[i] == pair[0]) & (of[j] == pair[1]))
                    for k in here[: _EXAMPLES - len(kept)]:
                        kept[int(row[k]), int(row_of_other[k])] = float(similarity[k])

        for part in _dealt(prompts, scratch, f"band-{band}", keyed):
            part = part[np.lexsort((part["split"], part["key"]))]
            key, n = part["key"], len(part)
            starts = np.flatnonzero(np.concatenate([np.ones(min(n, 1), bool), key[1:] != key[:-1]]))
            sizes = np.diff(np.concatenate([starts, [n]]))
            many = np.repeat(sizes > 1, sizes)
            group, part = np.repeat(np.arange(len(starts)), sizes)[many], part[many]
            same = group[1:] == group[:-1]
            compare(part[1:][same], part[:-1][same])
            for s in range(splits):
                leader = np.full(len(starts), -1)
                there = np.flatnonzero(part["split"] == s)[::-1]
                leader[group[there]] = there  # the last assignment is the first of the group
                other = leader[group]
                ask = (other >= 0) & (other != np.arange(len(part)))
                compare(part[ask], part[other[ask]])
    return Band(
        {(a, b): np.packbits(has[b] & (of == a)) for a in range(splits) for b in range(splits)},
        {pair: [(*rows, s) for rows, s in found.items()] for pair, found in examples.items()},
    )


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
