"""Batches of which a process reads only its own rows: together they are the whole batch, and nothing is read twice."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import runs

from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.documents import DocumentDataset
from dpo_jax.data.sets.group_packing import Packing
from dpo_jax.data.sets.loader import PreferenceLoader, TokenLoader, eval_batches
from dpo_jax.data.sets.sequences import SequenceDataset
from dpo_jax.data.sets.text_windows import EvalWindows, TextLoader
from dpo_jax.data.tokens.ragged import Ragged, StoredRagged
from dpo_jax.mesh import own_rows, put_batch

B = 8
HALVES = [np.arange(B) < B // 2, np.arange(B) >= B // 2]
IDS = {"prompts", "responses", "tokens"}
"""Fields of a batch that hold ids."""


class Read(np.ndarray):
    """A file that knows how many of its ids were read."""

    ids = 0

    def __getitem__(self, key: Any) -> Any:
        got = np.asarray(super().__getitem__(key))
        Read.ids += got.size
        return got


@pytest.fixture(autouse=True)
def nothing_read() -> None:
    Read.ids = 0


def some(n: int, rng: np.random.Generator, longest: int = 30) -> StoredRagged:
    lengths = rng.integers(2, longest, n)
    ids = rng.integers(1, 999, lengths.sum()).astype(np.uint16).view(Read)
    return StoredRagged.stored(ids, str(n), lengths, lengths)


def told(n: int) -> dict[str, Any]:
    return {
        "row_numbers": np.arange(1, n + 1, dtype=np.int32),
        "source": "s",
        "rows_read": n,
        "dropped": Counter(),
    }


def pairs(n: int) -> PreferenceDataset:
    rng = np.random.default_rng(0)
    return PreferenceDataset(prompts=some(n, rng), responses=some(2 * n, rng), formats=None, extras={}, **told(n))


def texts(n: int, longest: int = 90) -> DocumentDataset:
    return DocumentDataset(tokens=some(n, np.random.default_rng(1), longest), unknown=0, **told(n))


def dialogues(n: int) -> SequenceDataset:
    tokens = some(n, np.random.default_rng(2))
    own = Ragged.of([tokens[i] for i in range(n)], np.int32)
    return SequenceDataset(tokens=own, targets=Ragged(own.values % 2 == 0, own.starts), **told(n))


def compared(whole: Any, parts: list[Any]) -> None:
    """Each part has the ids of its half and zeros elsewhere, and all else of the whole batch."""
    for field in dataclasses.fields(whole):
        value = getattr(whole, field.name)
        for half, part in zip(HALVES, parts, strict=True):
            mine = getattr(part, field.name)
            if field.name in IDS:
                assert np.array_equal(mine[half], value[half])
                assert not mine[~half].any()
            else:
                same = jax.tree.map(lambda x, y: np.array_equal(x, y), mine, value)
                assert all(jax.tree.leaves(same)), field.name


MADE: dict[str, Callable[[np.ndarray | None], Any]] = {
    "buckets": lambda own: PreferenceLoader(pairs(60), batch_size=B, seed=1, epochs=2, own=own),
    "windows": lambda own: PreferenceLoader(
        pairs(60), packing=Packing(2), batch_size=B, seed=1, epochs=2, workers=0, own=own
    ),
    "packed dialogues": lambda own: TokenLoader(dialogues(90), window=64, views=2, batch_size=B, seed=1, own=own),
    "padded dialogues": lambda own: TokenLoader(dialogues(60), window=None, batch_size=B, seed=1, own=own),
    "documents": lambda own: TextLoader(
        [texts(50), texts(9)], [0.7, 0.3], length=64, views=2, batch_size=B, seed=1, epochs=2, own=own
    ),
    "every row": lambda own: [b for _, b in PreferenceLoader(pairs(60), batch_size=B, seed=1, own=own).every_row()],
    "held-out rows": lambda own: [b for _, b in eval_batches(pairs(60), B, 4, own=own)],
    "held-out documents": lambda own: list(EvalWindows([texts(50)], 64, B, views=2, own=own)),
}


@pytest.mark.parametrize("kind", MADE)
def test_the_parts_of_a_batch_are_the_batch(kind: str) -> None:
    wholes, *halves = (list(MADE[kind](own)) for own in (None, *HALVES))
    assert len(wholes) > 2
    for whole, *parts in zip(wholes, *halves, strict=True):
        compared(whole, parts)


@pytest.mark.parametrize("kind", [kind for kind in MADE if "dialogues" not in kind])
def test_each_part_reads_its_share(kind: str) -> None:
    counts = []
    for own in (None, *HALVES):
        Read.ids = 0
        list(MADE[kind](own))
        counts.append(Read.ids)
    whole, *parts = counts
    assert sum(parts) == whole > 0
    assert max(parts) < 0.65 * whole


def test_of_a_long_document_a_window_reads_its_own_part() -> None:
    data = replace(texts(2, longest=4000))
    loader = TextLoader([data], [None], length=64, batch_size=1, seed=1, workers=0)
    Read.ids = 0
    next(loader)
    assert Read.ids == 64


def test_parts_of_sequences() -> None:
    rng = np.random.default_rng(3)
    stored = some(20, rng)
    for ends, lead in ((False, None), (True, None), (True, int(stored[0][0]))):
        cut = replace(stored, kept=np.maximum(stored.whole - rng.integers(0, 9, 20), 1), ends=ends, lead=lead)
        for i in range(20):
            for start, stop in ((0, 99), (1, 4), (2, 2), (0, len(cut[i]))):
                assert cut.part(i, start, stop).tolist() == cut[i][start:stop].tolist()
        assert cut.last.tolist() == [cut[i][-1] for i in range(20)]


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 4), (1, 2, 2, 2)])
def test_own_rows_are_those_that_are_put(sizes: tuple[int, ...]) -> None:
    """Of one process all; `tests/processes/test_run_own_rows.py` has two."""
    mesh = runs.small_mesh(*sizes)
    own = own_rows(mesh, B)
    assert own.all()
    rows = put_batch(mesh, np.arange(B))
    held = {int(row) for shard in rows.addressable_shards for row in np.asarray(shard.data)}
    assert held == set(np.flatnonzero(own).tolist())
