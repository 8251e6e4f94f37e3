"""Packed sequences as attention sees them: which places, in which shapes."""

import numpy as np
import pytest

from dpo_jax.data.sets.segment_views import SegmentViews
from dpo_jax.types import TokenBatch


def batch_of(seed: int, *, windows: int = 4, length: int = 40, longest: int = 30) -> TokenBatch:
    """Windows filled with sequences of random lengths, the end of each left over."""
    rng = np.random.default_rng(seed)
    segments, positions = np.zeros((windows, length), np.int32), np.zeros((windows, length), np.int32)
    for w in range(windows - (seed == 3)):  # the last window of one batch is empty
        at = number = 0
        while at < length - 3:
            n = min(int(rng.integers(1, longest)), length - 2 - at)
            number += 1
            segments[w, at : at + n], positions[w, at : at + n] = number, np.arange(n)
            at += n
    tokens = rng.integers(0, 99, segments.shape).astype(np.int32)
    return TokenBatch(tokens, segments, positions, segments > 0, np.full((windows, length), -1, np.int32))


def expected(batch: TokenBatch, units: int) -> list[list[list[int]]]:
    """The tokens of each sequence, unit by unit."""
    found: list[list[list[int]]] = []
    for unit in np.split(np.arange(len(batch.tokens)), units):
        found.append([])
        for w in unit:
            for number in range(1, batch.segments[w].max() + 1):
                found[-1].append(batch.tokens[w][batch.segments[w] == number].tolist())
    return found


@pytest.mark.parametrize("units", [1, 2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_every_sequence_is_seen_once(seed: int, units: int) -> None:
    views = SegmentViews.of_batches(map(batch_of, range(5)), units, multiple=8)
    batch = batch_of(seed) if seed < 7 else batch_of(7, longest=3)  # many more than there were
    seen = views.seen(batch).views
    assert seen is not None
    tokens, positions = batch.tokens.reshape(units, -1), batch.positions.reshape(units, -1)
    for unit, sequences in enumerate(expected(batch, units)):
        got = []
        flat = np.concatenate([x[unit].reshape(-1) for x in seen.places])
        for places, lengths in zip(seen.places, seen.lengths, strict=True):
            for at, n in zip(places[unit], lengths[unit], strict=True):
                if n:
                    assert (positions[unit, at[:n]] == np.arange(n)).all()
                    got.append(tokens[unit, at[:n]].tolist())
        assert sorted(got) == sorted(sequences)
        real = batch.segments.reshape(units, -1)[unit] > 0
        assert (flat[seen.homes[unit, real, 0]] == np.flatnonzero(real)).all()
        assert (seen.homes[unit, ~real, 0] == len(flat)).all()


def test_shapes_pad_little_and_what_none_holds_has_its_own() -> None:
    views = SegmentViews.of_batches(map(batch_of, range(5)), 1, multiple=8)
    shapes = {tuple(x.shape for x in views.seen(batch_of(i)).views.places) for i in range(5)}  # type: ignore[union-attr]
    assert len(shapes) == 1
    assert sum(n * length for n, length in views.shapes[0]) < 2.5 * 4 * 40
    more = batch_of(9, longest=14)
    assert [tuple(x.shape[1:] for x in views.seen(more).views.places)] == [views.shapes[1]]  # type: ignore[union-attr]
    most = views.seen(batch_of(9, longest=2)).views
    assert most is not None
    own = tuple(x.shape[1:] for x in most.places)
    assert own not in views.shapes
    assert sum(n * length for n, length in own) < 8 * 4 * 40  # of sequences of one token, each in eight places
