"""Estimates of `report/statistics.py` against their definitions."""

import itertools
import math

import numpy as np

from dpo_jax.report.statistics import pass_at


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
