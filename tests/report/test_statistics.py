"""Estimates of `report/statistics.py` against their definitions."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from dpo_jax.report.statistics import RESAMPLES, interval, pass_at


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_response() -> None:
    """By hand, C(3, 2) / C(4, 2) = 1/2 of pairs miss the right one of four; by enumeration; without overflow."""
    assert pass_at(2, np.asarray([1]), 4).tolist() == [0.5]
    n, right = 6, np.arange(7)
    for k in range(1, n + 1):
        draws = list(itertools.combinations(range(n), k))
        expected = [np.mean([min(draw) < c for draw in draws]) for c in right]
        np.testing.assert_allclose(pass_at(k, right, n), expected, atol=1e-12)
    far = 1 - math.comb(1900, 100) / math.comb(2000, 100)
    np.testing.assert_allclose(pass_at(100, np.asarray([100]), 2000), far, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 7, 104, 105, 2000])
def test_interval_is_that_of_one_draw(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    means = values[np.random.default_rng(3).integers(n, size=(RESAMPLES, n))].mean(axis=1)
    assert interval(values, seed=3) == tuple(np.quantile(means, [(1 - 0.95) / 2, (1 + 0.95) / 2]))


def test_interval_of_many_values_takes_little_memory() -> None:
    tracemalloc.start()
    interval(np.ones(5000), seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20
