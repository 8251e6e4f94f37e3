"""Which sequences share a window, and what a batch of windows holds."""

import numpy as np
import pytest
from sequences import dataset, lengths

from dpo_jax.data.sets.packing import WindowBatch, best_fit, collate, plan_windows
from dpo_jax.errors import InputError


def members(batches: list[WindowBatch]) -> list[list[int]]:
    return [window.tolist() for batch in batches for window in batch.windows]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("window", [None, 100, 256, 1000, 2060])
@pytest.mark.parametrize("n", [1, 8, 103, 500])
def test_every_sequence_once_an_epoch_and_no_window_overfull(n: int, window: int | None, shuffle: bool) -> None:
    sizes = lengths(n, window or 300, seed=n)
    plan = plan_windows(sizes, window=window, batch_size=4)
    for epoch in (0, 1, 7):
        batches = plan.epoch(3, epoch, shuffle=shuffle)
        assert len(batches) == plan.steps
        assert [len(b.windows) for b in batches[:-1]] == [4] * (plan.steps - 1) or window is None
        assert sum(len(b.windows) < 4 for b in batches) <= 1
        assert sorted(i for m in members(batches) for i in m) == list(range(n))
        assert max(map(len, members(batches))) <= plan.sequences
        for batch in batches:
            assert batch.size in plan.sizes
            assert batch.size % 16 == 0
            assert all(sizes[w].sum() <= batch.size for w in batch.windows)
    if window is None:
        assert plan.sequences == 1
        assert len(plan.sizes) <= 4
    else:
        assert plan.sizes == (-(-window // 16) * 16,)


def test_padding_is_that_of_the_batches_and_small() -> None:
    sizes = lengths(2000, 512)
    for window in (None, 512, 2048):
        plan = plan_windows(sizes, window=window, batch_size=4)
        batches = plan.epoch(0, 0, shuffle=True)
        assert plan.padding == pytest.approx(sum(4 * b.size for b in batches) / sizes.sum())
        assert plan.padding < (1.6 if window is None else 1.05)


def test_windows_and_their_company_change_from_epoch_to_epoch() -> None:
    plan = plan_windows(lengths(2000, 512), window=512, batch_size=4)

    def company(seed: int, epoch: int) -> list[list[int]]:
        return members(plan.epoch(seed, epoch, shuffle=True))

    assert company(0, 0) == company(0, 0)
    orders = [company(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(order) for order in orders}) == 4
    together = [{frozenset(window) for window in order} for order in orders]
    assert len(together[0] & together[1]) < 0.2 * len(together[0])
    assert members(plan.epoch(0, 0, shuffle=False)) == members(plan.epoch(5, 9, shuffle=False))


def test_the_order_is_pinned() -> None:
    """A resumed run meets the order it was started with, whatever NumPy's version."""
    plan = plan_windows(np.asarray([9, 16, 5, 7, 3, 9]), window=16, batch_size=2)
    assert members(plan.epoch(0, 0, shuffle=False)) == [[0, 2], [1], [5, 3], [4]]
    assert members(plan.epoch(0, 0, shuffle=True)) == [[4], [5, 3], [0, 2], [1]]


def test_best_fit_takes_the_fullest_bin() -> None:
    assert best_fit(np.asarray([6, 5, 4, 4, 1, 10]), 10).tolist() == [0, 1, 0, 1, 1, 2]
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = np.sort(rng.integers(1, 33, rng.integers(1, 200)))[::-1]
        bins = best_fit(sizes, 32)
        room = np.full(len(sizes), 32)
        for size, where in zip(sizes, bins, strict=True):  # the rule, bin by bin
            used = room < 32
            fitting = room[used & (room >= size)]
            assert room[where] == (fitting.min() if len(fitting) else 32)
            room[where] -= size
        assert sorted(set(bins.tolist())) == list(range(bins.max() + 1))
        assert bins.max() + 1 <= np.ceil(11 / 9 * np.ceil(sizes.sum() / 32) + 1)


def test_many_sequences_are_packed_quickly() -> None:
    sizes = lengths(200_000, 4096)
    plan = plan_windows(sizes, window=4096, batch_size=8)
    assert plan.padding < 1.02
    assert len(plan.epoch(0, 0, shuffle=True)) == plan.steps


def test_a_sequence_longer_than_the_window_is_refused() -> None:
    with pytest.raises(InputError, match=r"a sequence of 101 tokens .* a window of 100; take a larger"):
        plan_windows(np.asarray([3, 101]), window=100, batch_size=2)


@pytest.mark.parametrize("window", [None, 256])
def test_collate_gives_every_sequence_back(window: int | None) -> None:
    data = dataset()
    plan = plan_windows(data.lengths, window=window, batch_size=8)
    seen: list[int] = []
    for windows in plan.epoch(1, 0, shuffle=True):
        batch = collate(data, windows, batch_size=8, sequences=plan.sequences)
        assert batch.tokens.shape == batch.targets.shape == (8, windows.size)
        assert batch.rows.shape == (8, plan.sequences)
        assert {a.dtype.name for a in (batch.tokens, batch.segments, batch.positions, batch.rows)} == {"int32"}
        assert batch.targets.dtype == bool
        assert not batch.targets[batch.positions == 0].any()
        assert not batch.targets[batch.segments == 0].any()
        for b in range(8):
            held = [row for row in batch.rows[b].tolist() if row >= 0]
            assert batch.rows[b, len(held) :].tolist() == [-1] * (plan.sequences - len(held))
            assert batch.segments[b].max() == len(held)
            for segment, row in enumerate(held, 1):
                at = batch.segments[b] == segment
                np.testing.assert_array_equal(batch.tokens[b, at], data.tokens[row - 1001])
                np.testing.assert_array_equal(batch.targets[b, at], data.targets[row - 1001])
                np.testing.assert_array_equal(batch.positions[b, at], np.arange(at.sum()))
            seen += held
    assert sorted(seen) == data.row_numbers.tolist()


def test_empty_windows_complete_the_last_batch() -> None:
    data = dataset(5, longest=64)
    plan = plan_windows(data.lengths, window=64, batch_size=16)
    [windows] = plan.epoch(0, 0, shuffle=True)
    batch = collate(data, windows, batch_size=16, sequences=plan.sequences)
    empty = np.arange(16) >= len(windows.windows)
    assert empty.any()
    for array in (batch.tokens, batch.segments, batch.positions, batch.targets):
        assert not array[empty].any()
    assert (batch.rows[empty] == -1).all()
