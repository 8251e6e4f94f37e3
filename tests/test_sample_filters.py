"""Filters and the draw, against sorting references and exact distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpo_jax.sample import filters


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kept(x: jax.Array) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in np.asarray(x)]


@pytest.mark.parametrize("k", [1, 2, 7, 500, 1000, 2000])
def test_top_k_keeps_the_k_most_likely(k):
    p = jax.nn.softmax(jax.random.normal(jax.random.key(0), (3, 1000)) * 4)
    want = [sorted(np.argsort(-row)[:k].tolist()) for row in np.asarray(p)]
    got = filters.keep_top_k(p, jnp.int32(k))
    assert kept(got) == want
    np.testing.assert_array_equal(np.asarray(got)[np.asarray(got) > 0], np.asarray(p)[np.asarray(got) > 0])


def test_top_k_keeps_all_that_tie_with_the_last_kept():
    p = jnp.asarray([[0.1, 0.2, 0.2, 0.2, 0.3]])
    assert kept(filters.keep_top_k(p, jnp.int32(1))) == [[4]]
    assert kept(filters.keep_top_k(p, jnp.int32(2))) == [[1, 2, 3, 4]]
    assert kept(filters.keep_top_k(p, jnp.int32(4))) == [[1, 2, 3, 4]]
    assert kept(filters.keep_top_k(p, jnp.int32(5))) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.99, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(1), (4, 1000)) * 3)
    want = []
    for row in np.asarray(weights, np.float64):
        order = np.argsort(-row)
        want.append(sorted(order[: np.searchsorted(np.cumsum(row[order]), p * row.sum()) + 1].tolist()))
    assert kept(filters.keep_top_p(weights, jnp.float32(p))) == want


def test_top_p_edges():
    p = jnp.asarray([[0.5, 0.25, 0.125, 0.125]])
    assert kept(filters.keep_top_p(p, jnp.float32(1e-6))) == [[0]], "the likeliest token always stays"
    assert kept(filters.keep_top_p(p, jnp.float32(0.5))) == [[0]], "a set that reaches p exactly is enough"
    assert kept(filters.keep_top_p(p, jnp.float32(0.51))) == [[0, 1]]
    assert kept(filters.keep_top_p(p, jnp.float32(0.76))) == [[0, 1, 2, 3]], "equals stay together"
    assert kept(filters.keep_top_p(p, jnp.float32(1))) == [[0, 1, 2, 3]]
    tiny = jnp.asarray([[1.0, 1e-30, 0.0]])
    assert kept(filters.keep_top_p(tiny, jnp.float32(1))) == [[0, 1]], "p = 1 loses nothing to rounding"
    # Mass that top-k left need not sum to 1: p is a share of it.
    assert kept(filters.keep_top_p(jnp.asarray([[0.1, 0.06, 0.04]]), jnp.float32(0.5))) == [[0]]


def test_draw_is_the_inverse_of_the_cumulative_sum():
    weights = jnp.asarray([[0.0, 1.0, 0.0, 3.0, 0.0]])

    def at(u: float) -> int:
        return int(filters.draw(weights, jnp.asarray([u], jnp.float32))[0])

    assert [at(0.0), at(0.249), at(0.251), at(0.9999999)] == [1, 1, 3, 3]


@pytest.mark.parametrize("vocab", [5, 256, 257, 4096, 49_152])
def test_draw_never_takes_a_token_of_weight_zero(vocab):
    rng = np.random.default_rng(vocab)
    weights = np.exp(8 * rng.standard_normal((64, vocab))).astype(np.float32)
    weights[rng.random(weights.shape) < 0.7] = 0
    weights[:, rng.integers(vocab)] = 1e-12
    edges = np.asarray([0, np.nextafter(0, 1, dtype=np.float32), 1 - 2.0**-24, 0.5], np.float32)
    uniform = np.concatenate([np.repeat(edges, 8), rng.random(32, np.float32)])
    drawn = np.asarray(filters.draw(jnp.asarray(weights), jnp.asarray(uniform)))
    assert (weights[np.arange(64), drawn] > 0).all()


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """p-value of the counts under p, cells of few expected draws pooled."""
    expected = p * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
        assert observed[-1] == 0, "a token outside the filters was drawn"
        observed, expected = observed[:-1], expected[:-1]
    return stats.chisquare(observed, expected).pvalue


@pytest.mark.parametrize(
    ("temperature", "k", "p"), [(1.0, None, None), (0.7, 20, None), (1.0, None, 0.8), (1.5, 50, 0.9), (2.0, 3, 1.0)]
)
def test_picked_tokens_follow_the_filtered_distribution(temperature, k, p):
    vocab, draws = 300, 40_000
    logits = np.asarray(2 * jax.random.normal(jax.random.key(2), (vocab,)), np.float32)
    uniform = jax.vmap(jax.random.uniform)(jax.random.split(jax.random.key(3), draws))
    tokens, logps = filters.pick(
        jnp.broadcast_to(logits, (draws, vocab)),
        uniform,
        temperature=jnp.float32(temperature),
        top_k=None if k is None else jnp.int32(k),
        top_p=None if p is None else jnp.float32(p),
    )
    full = softmax(logits / temperature)
    exact, order = full.copy(), np.argsort(-full)
    if k is not None:
        exact[order[k:]] = 0
    if p is not None and p < 1:
        mass = np.cumsum(exact[order]) / exact.sum()
        exact[order[np.searchsorted(mass, p) + 1 :]] = 0
    exact /= exact.sum()
    assert chi_square(np.bincount(np.asarray(tokens), minlength=vocab), exact) > 1e-3
    np.testing.assert_allclose(np.asarray(logps), np.log(full)[np.asarray(tokens)], atol=1e-5)


def test_greedy_takes_the_lowest_id_among_equals_and_scores_at_temperature_one():
    logits = jnp.asarray([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]])
    tokens, logps = filters.pick(logits, jnp.zeros(2), temperature=None, top_k=None, top_p=None)
    assert tokens.tolist() == [1, 0]
    np.testing.assert_allclose(logps, np.log(softmax(np.asarray(logits)))[[0, 1], [1, 0]], atol=1e-6)


def test_extreme_logits_stay_finite():
    logits = jnp.asarray([[1e4, -1e4, 0.0, -jnp.inf]])
    for temperature in (0.01, 1.0, 100.0):
        tokens, logps = filters.pick(
            logits,
            jnp.asarray([0.5]),
            temperature=jnp.float32(temperature),
            top_k=jnp.int32(4),
            top_p=jnp.float32(0.9),
        )
        assert tokens.tolist() == [0]
        assert np.isfinite(np.asarray(logps)).all()
