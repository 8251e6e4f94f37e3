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


def noise_of(seed: int, draws: int, vocab: int) -> jax.Array:
    return jax.vmap(lambda key: filters.draw_noise(key, vocab))(jax.random.split(jax.random.key(seed), draws))


@pytest.mark.parametrize("vocab", [5, 256, 257, 4096, 49_152])
def test_draw_never_takes_a_token_of_weight_zero(vocab):
    rng = np.random.default_rng(vocab)
    weights = np.exp(8 * rng.standard_normal((64, vocab))).astype(np.float32)
    weights[rng.random(weights.shape) < 0.7] = 0
    weights[:, rng.integers(vocab)] = 1e-12
    drawn = np.asarray(filters.draw(jnp.asarray(weights), noise_of(0, 64, vocab)))
    assert (weights[np.arange(64), drawn] > 0).all()


def test_draws_in_a_large_vocabulary_follow_the_weights():
    """Of whole blocks, and of tokens inside the heaviest."""
    vocab, draws = 2_000, 40_000
    p = softmax(2 * np.random.default_rng(1).standard_normal(vocab))
    rows = jnp.broadcast_to(jnp.asarray(p, jnp.float32), (draws, vocab))
    counts = np.bincount(np.asarray(jax.jit(filters.draw)(rows, noise_of(4, draws, vocab))), minlength=vocab)
    assert chi_square(counts, p) > 1e-3


def test_rounding_changes_hardly_a_draw():
    """In a flat distribution of 49,152 tokens, at relative errors of 1e-6, as another batch size makes them."""
    rng = np.random.default_rng(2)
    weights = np.exp(0.1 * rng.standard_normal((256, 49_152))).astype(np.float32)
    other = (weights * (1 + 1e-6 * rng.standard_normal(weights.shape))).astype(np.float32)
    noise = noise_of(5, 256, 49_152)
    assert (filters.draw(jnp.asarray(weights), noise) == filters.draw(jnp.asarray(other), noise)).all()


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
    noise = noise_of(3, draws, vocab)
    tokens, logps = filters.pick(
        jnp.broadcast_to(logits, (draws, vocab)),
        noise,
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
    tokens, logps = filters.pick(logits, noise_of(0, 2, 3), temperature=None, top_k=None, top_p=None)
    assert tokens.tolist() == [1, 0]
    np.testing.assert_allclose(logps, np.log(softmax(np.asarray(logits)))[[0, 1], [1, 0]], atol=1e-6)


def test_extreme_logits_stay_finite():
    logits = jnp.asarray([[1e4, -1e4, 0.0, -jnp.inf]])
    for temperature in (0.01, 1.0, 100.0):
        tokens, logps = filters.pick(
            logits,
            noise_of(0, 1, 4),
            temperature=jnp.float32(temperature),
            top_k=jnp.int32(4),
            top_p=jnp.float32(0.9),
        )
        assert tokens.tolist() == [0]
        assert np.isfinite(np.asarray(logps)).all()


ROWS, VOCAB = 6, 40


@pytest.fixture(scope="module")
def histories():
    """Random logits, and texts of few different tokens and unequal lengths, so that much repeats."""
    rng = np.random.default_rng(0)
    lengths = np.array([1, 2, 3, 17, 24, 24], np.int32)
    text = rng.integers(0, 4, (ROWS, 24)).astype(np.int32)
    return (3 * rng.standard_normal((ROWS, VOCAB))).astype(np.float32), text, lengths


def processed(processor, logits, text, lengths):
    """Each row alone through a processor of transformers."""
    torch = pytest.importorskip("torch")
    return np.concatenate(
        [
            processor(torch.tensor(text[i : i + 1, :size], dtype=torch.long), torch.tensor(logits[i : i + 1])).numpy()
            for i, size in enumerate(lengths)
        ]
    )


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p_is_that_of_transformers(histories, p):
    transformers = pytest.importorskip("transformers")
    logits, text, lengths = histories
    want = processed(transformers.MinPLogitsWarper(p), logits, text, lengths)
    weights = jax.nn.softmax(jnp.asarray(logits))
    assert kept(filters.keep_min_p(weights, jnp.float32(p))) == [np.flatnonzero(r).tolist() for r in np.isfinite(want)]


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(histories, penalty):
    transformers = pytest.importorskip("transformers")
    logits, text, lengths = histories
    seen = np.zeros((ROWS, VOCAB), bool)
    for i, size in enumerate(lengths):
        seen[i, text[i, :size]] = True
    want = processed(transformers.RepetitionPenaltyLogitsProcessor(penalty), logits, text, lengths)
    np.testing.assert_allclose(filters.penalise(logits, seen, jnp.float32(penalty)), want, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_repeated_ngrams_are_those_of_transformers(histories, n):
    transformers = pytest.importorskip("transformers")
    logits, text, lengths = histories
    want = processed(transformers.NoRepeatNGramLogitsProcessor(n), logits, text, lengths)
    got = filters.repeats(jnp.asarray(text), jnp.asarray(lengths), jnp.int32(n), VOCAB)
    np.testing.assert_array_equal(got, np.isinf(want))


def test_all_adjustments_together_are_those_of_transformers(histories):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    logits, text, lengths = histories
    prompt = np.array([1, 1, 2, 10, 24, 20])
    bias = np.zeros(VOCAB, np.float32)
    bias[[3, 7]] = [2.5, -np.inf]
    seen = np.zeros((ROWS, VOCAB), bool)
    for i, size in enumerate(lengths):
        seen[i, text[i, :size]] = True
    how = filters.Adjustments(bias, np.float32(1.2), np.int32(2), np.int32(4), np.array([0, 39], np.int32))
    got = filters.adjust(
        jnp.asarray(logits),
        how,
        count=jnp.asarray(lengths - prompt),
        lengths=jnp.asarray(lengths),
        seen=jnp.asarray(seen),
        text=jnp.asarray(text),
    )
    for i in range(ROWS):
        chain = transformers.LogitsProcessorList(
            [
                transformers.SequenceBiasLogitsProcessor([[[3], 2.5], [[7], float("-inf")]]),
                transformers.RepetitionPenaltyLogitsProcessor(1.2),
                transformers.NoRepeatNGramLogitsProcessor(2),
                transformers.MinNewTokensLengthLogitsProcessor(int(prompt[i]), 4, torch.tensor([0, 39])),
            ]
        )
        np.testing.assert_allclose(got[i], processed(chain, logits[i:], text[i:], lengths[i : i + 1])[0], rtol=1e-6)


def test_min_p_and_adjusted_logits_decide_what_is_drawn_and_not_its_log_probability():
    vocab, draws = 60, 20_000
    logits = np.asarray(2 * jax.random.normal(jax.random.key(5), (vocab,)), np.float32)
    adjusted = logits.copy()
    adjusted[:20] -= 3
    noise = noise_of(6, draws, vocab)
    tokens, logps = filters.pick(
        jnp.broadcast_to(logits, (draws, vocab)),
        noise,
        temperature=jnp.float32(0.8),
        top_k=jnp.int32(40),
        top_p=jnp.float32(0.97),
        min_p=jnp.float32(0.02),
        adjusted=jnp.broadcast_to(adjusted, (draws, vocab)),
    )
    exact = softmax(adjusted / 0.8)
    order = np.argsort(-exact)
    exact[order[40:]] = 0
    exact[order[np.searchsorted(np.cumsum(exact[order]) / exact.sum(), 0.97) + 1 :]] = 0
    exact[exact < 0.02 * exact.max()] = 0
    assert chi_square(np.bincount(np.asarray(tokens), minlength=vocab), exact / exact.sum()) > 1e-3
    np.testing.assert_allclose(np.asarray(logps), np.log(softmax(logits / 0.8))[np.asarray(tokens)], atol=1e-5)
