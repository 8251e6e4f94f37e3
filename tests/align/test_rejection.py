"""Best of K, the pool, and the curves of the reward against K, against brute force."""

import itertools
import statistics

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.align import rejection


def test_best_of_k_takes_the_first_of_equals_and_nothing_that_is_not_finite() -> None:
    nan, inf = np.nan, np.inf
    scores = [[1, 3, 3, 2], [nan, -5, -inf, inf], [nan, inf, nan, -inf], [2, 2, nan, 2], [nan, nan, 7, nan]]
    best = rejection.best_of(jnp.asarray(scores))
    assert best.index.tolist() == [1, 1, -1, 0, 2]
    assert best.score.tolist() == [3, -5, -inf, 2, 7]
    assert best.tied.tolist() == [False, False, False, True, False]
    with pytest.raises(ValueError, match=r"\[prompts, samples\]"):
        rejection.best_of(jnp.zeros(3))


def test_the_pool_is_the_best_ever() -> None:
    """Against a loop over all samples of all iterations; earlier ones keep their place among equals."""
    rng = np.random.default_rng(0)
    iterations, prompts, samples = 4, 30, 5
    scores = rng.integers(0, 12, (iterations, prompts, samples)).astype(np.float32)
    scores[:, :3][rng.random((iterations, 3, samples)) < 0.8] = np.nan
    temperatures = np.asarray([0.5, 0.5, 1.0, 1.0, 1.5])
    pool = rejection.empty_pool(prompts)
    for t in range(iterations):
        pool = rejection.merge(pool, rejection.of_iteration(jnp.asarray(scores[t]), jnp.asarray(temperatures), t + 1))
        for p in range(prompts):
            found, at = -np.inf, (-1, -1)
            for s, k in itertools.product(range(t + 1), range(samples)):
                if scores[s, p, k] > found:
                    found, at = scores[s, p, k], (s + 1, k)
            assert pool.score[p] == found
            assert (pool.iteration[p], pool.sample[p]) == at
            wanted = temperatures[at[1]] if at[1] >= 0 else np.nan
            np.testing.assert_array_equal(pool.temperature[p], wanted)


def test_the_pool_never_loses_and_does_not_care_how_iterations_are_grouped() -> None:
    rng = np.random.default_rng(1)
    parts = [
        rejection.of_iteration(jnp.asarray(rng.normal(size=(20, 3))), jnp.ones(3), iteration) for iteration in range(3)
    ]
    left = rejection.merge(rejection.merge(parts[0], parts[1]), parts[2])
    right = rejection.merge(parts[0], rejection.merge(parts[1], parts[2]))
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all((left.score >= part.score).all() for part in parts)


@pytest.mark.parametrize("n", [2, 7])
def test_curves_are_the_means_over_all_subsets(n: int) -> None:
    scores = np.random.default_rng(n).normal(size=(3, n)).astype(np.float32)
    counts = range(1, n + 1)
    found = rejection.curve(jnp.asarray(scores), counts)
    for i, k in enumerate(counts):
        subsets = [row[list(chosen)] for row in scores for chosen in itertools.combinations(range(n), k)]
        assert found.maximum[i] == pytest.approx(np.mean([s.max() for s in subsets]), abs=1e-6)
        assert found.median[i] == pytest.approx(np.mean([statistics.median(s) for s in subsets]), abs=1e-6)
    assert found.maximum[0] == pytest.approx(scores.mean(), abs=1e-6)
    assert (np.diff(found.maximum) > 0).all()


def test_curves_are_unbiased() -> None:
    """Of uniform samples the expected maximum of K is K / (K + 1), and the median 1/2, whatever N is."""
    scores = np.random.default_rng(0).random((20_000, 12))
    counts = [1, 2, 4, 12]
    found = rejection.curve(jnp.asarray(scores), counts)
    np.testing.assert_allclose(found.maximum, [k / (k + 1) for k in counts], atol=5e-3)
    np.testing.assert_allclose(found.median, 0.5, atol=5e-3)


def test_weights_of_many_samples_neither_overflow_nor_vanish() -> None:
    for k, r in ((1, 1), (500, 250), (1000, 1000)):
        weights = rejection.order_statistic(1000, k, r)
        assert sum(weights) == pytest.approx(1)
        assert min(weights) >= 0


def test_more_samples_than_there_are() -> None:
    with pytest.raises(ValueError, match="there are 3 samples a prompt"):
        rejection.curve(jnp.zeros((2, 3)), [4])


def test_the_best_temperature_of_each_k() -> None:
    maxima = jnp.asarray([[1.0, 1.2, 1.3], [0.9, 1.25, 1.3], [0.5, 1.0, 1.6]])
    assert rejection.best_temperature(maxima).tolist() == [0, 1, 2]
