"""The estimated softmax against the exact one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.align.sampled_softmax import Negatives, draw, sampled_logps
from dpo_jax.model.logprobs import token_logps, token_scores
from dpo_jax.model.products import Shaped

V, D = 50, 8
KEYS = jax.random.split(jax.random.key(0), 3)
HIDDEN = jax.random.normal(KEYS[0], (3, 7, D))
HEAD = jax.random.normal(KEYS[1], (D, V))
TARGETS = jax.random.randint(KEYS[2], (3, 7), 0, V)
EXACT = token_logps(HIDDEN, HEAD, TARGETS)


def mean_and_gradients(logps):
    """A jitted function: the mean of the log-probabilities, its gradients with respect to hidden states and head."""
    return jax.jit(jax.value_and_grad(lambda h, w, *rest: jnp.mean(logps(h, w, TARGETS, *rest)), argnums=(0, 1)))


ESTIMATE = mean_and_gradients(partial(sampled_logps, budget_bytes=2**20))
EVERY = Negatives(ids=jnp.arange(V), log_expected=jnp.zeros(V))


@pytest.fixture(scope="module")
def exact():
    return mean_and_gradients(token_logps)(HIDDEN, HEAD)


def test_every_id_once_is_the_exact_softmax(exact):
    one_by_one = mean_and_gradients(partial(sampled_logps, budget_bytes=1))
    for estimate in (ESTIMATE, one_by_one):
        got = estimate(HIDDEN, HEAD, EVERY)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("logps", [token_logps, partial(sampled_logps, negatives=EVERY, budget_bytes=2**20)])
def test_a_tied_head_is_read_as_it_lies(logps):
    """The embedding [V, D] in place of its transpose: the same values, and the gradient transposed."""
    f = jax.value_and_grad(lambda h, w, tied: jnp.mean(logps(h, Shaped(w, 1.5, 8.0, tied), TARGETS)), argnums=(0, 1))
    (value, (by_hidden, by_head)), (tied, (by_state, by_embedding)) = f(HIDDEN, HEAD, False), f(HIDDEN, HEAD.T, True)
    assert Shaped(HEAD.T, tied=True).shape == HEAD.shape
    for a, b in ((tied, value), (by_state, by_hidden), (by_embedding.T, by_head)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("proposal", ["uniform", "log_uniform"])
def test_the_estimate_of_z_is_unbiased(proposal):
    """Σ_v Q(v) Ẑ(v) = Z exactly, for one draw: the correction and the collisions are right."""
    sampled = draw(jax.random.key(0), V, 1, proposal)
    log_q = {
        "uniform": np.full(V, -np.log(V)),
        "log_uniform": np.log(np.log((np.arange(V) + 2) / (np.arange(V) + 1)) / np.log(V + 1)),
    }[proposal]
    np.testing.assert_allclose(np.exp(log_q).sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(sampled.log_expected, log_q[sampled.ids], rtol=1e-5)
    at_target = jnp.sum(HIDDEN * HEAD.T[TARGETS], axis=-1)
    ones = Negatives(ids=jnp.arange(V)[:, None], log_expected=jnp.asarray(log_q, jnp.float32)[:, None])
    logps = jax.vmap(lambda one: sampled_logps(HIDDEN, HEAD, TARGETS, one, budget_bytes=2**20))(ones)
    z = np.tensordot(np.exp(log_q), np.exp(at_target - logps), axes=1)
    np.testing.assert_allclose(z, np.exp(at_target - EXACT), rtol=1e-4)


def test_a_sample_of_nothing_but_the_target_is_finite():
    hidden, targets = HIDDEN[:1, :1], TARGETS[:1, :1]
    only = Negatives(ids=jnp.broadcast_to(targets[0], (3,)), log_expected=jnp.zeros(3))
    logps, gradients = jax.value_and_grad(
        lambda h, w: jnp.sum(sampled_logps(h, w, targets, only, budget_bytes=2**20)), argnums=(0, 1)
    )(hidden, HEAD)
    assert logps == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("proposal", ["uniform", "log_uniform"])
def test_ids_come_as_often_as_expected(proposal):
    keys = jax.random.split(jax.random.key(1), 4000)
    many = jax.vmap(lambda key: draw(key, V, 20, proposal))(keys)
    expected = np.exp(draw(jax.random.key(2), V, 20, proposal).log_expected)
    assert many.ids.min() == 0
    assert many.ids.max() == V - 1
    counts = np.bincount(np.asarray(many.ids).ravel(), minlength=V) / 4000
    of_id = dict(zip(np.asarray(many.ids).ravel().tolist(), np.exp(many.log_expected).ravel().tolist(), strict=True))
    np.testing.assert_allclose(counts, [of_id[v] for v in range(V)], atol=0.06)
    assert np.ptp(expected) == 0 if proposal == "uniform" else np.ptp(expected) > 1


@pytest.mark.parametrize("proposal", ["uniform", "log_uniform"])
def test_loss_and_gradients_approach_the_exact_ones(proposal, exact):
    """The error falls about like 1 / sqrt(k). (Draws repeat ids, so there may be more of them than ids.)"""
    errors = {}
    for k in (300, 30_000):
        found = [ESTIMATE(HIDDEN, HEAD, draw(jax.random.key(seed), V, k, proposal)) for seed in range(4)]
        errors[k] = [
            np.sqrt(np.mean([np.sum((a - b) ** 2) for a in several]) / np.sum(b**2))
            for b, *several in zip(*map(jax.tree.leaves, (exact, *found)), strict=True)
        ]
    for few, many in zip(errors[300], errors[30_000], strict=True):
        assert many < 0.02
        assert many < few / 4


def test_scores_beside_the_log_probabilities():
    z = jnp.matmul(HIDDEN, HEAD, precision="highest")
    scores = token_scores(HIDDEN, HEAD, TARGETS)
    np.testing.assert_array_equal(scores.logps, EXACT)
    np.testing.assert_array_equal(scores.correct, jnp.argmax(z, axis=-1) == TARGETS)
    greedy = token_scores(HIDDEN, HEAD, jnp.argmax(z, axis=-1))
    assert greedy.correct.all()
    p = jax.nn.softmax(z)
    np.testing.assert_allclose(scores.entropy, -jnp.sum(p * jnp.log(p), axis=-1), rtol=1e-4)
    even = token_scores(jnp.zeros_like(HIDDEN), HEAD, TARGETS)
    assert not even.correct.any()  # a tie decides nothing
    np.testing.assert_allclose(even.entropy, np.log(V), rtol=1e-6)
    gradient = jax.grad(lambda h: jnp.sum(token_scores(h, HEAD, TARGETS).entropy))(HIDDEN)
    np.testing.assert_array_equal(gradient, 0)
