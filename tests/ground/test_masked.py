"""Masked statistics: masked equals sliced, and nothing leaks from a masked-out position, forwards or backwards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import masked

X = jnp.asarray([1.0, 2.0, 3.0, 4.0])
MASK = jnp.asarray([0, 1, 1, 0])


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
def test_masked_equals_sliced(shape):
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal(shape).astype(np.float32), rng.random(shape) < 0.6
    kept = x[mask]
    np.testing.assert_allclose(masked.total(x, mask), kept.sum(), rtol=1e-5)
    np.testing.assert_allclose(masked.mean(x, mask), kept.mean(), rtol=1e-5)
    np.testing.assert_allclose(masked.var(x, mask), kept.var(ddof=1), rtol=1e-5)
    whitened = (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(masked.whiten(x, mask)[mask], whitened, rtol=1e-4, atol=1e-6)


def test_whitening_check_value():
    np.testing.assert_allclose(masked.whiten(X, MASK), [-2.1213203, -0.7071068, 0.7071068, 2.1213203], rtol=1e-6)


def test_whitening_without_the_shift_keeps_the_mean():
    kept = masked.whiten(X, MASK, shift_mean=False)
    np.testing.assert_allclose(masked.mean(kept, MASK), 2.5, rtol=1e-6)
    np.testing.assert_allclose(masked.var(kept, MASK), 1.0, rtol=1e-6)


def test_whitening_a_constant_is_finite():
    chex.assert_tree_all_finite(masked.whiten(jnp.full(4, 3.0), jnp.ones(4)))


@pytest.mark.parametrize("jit", [False, True])
def test_one_position_has_a_finite_variance_and_can_be_whitened(jit):
    one = jnp.asarray([0, 0, 1, 0])
    var, whiten = (jax.jit(f) if jit else f for f in (masked.var, masked.whiten))
    assert float(var(X, one)) == 0
    assert float(whiten(X, one)[2]) == 0
    chex.assert_tree_all_finite(jax.grad(lambda x: jnp.sum(masked.select(masked.whiten(x, one), one)))(X))
    assert np.isnan(float(var(X, jnp.zeros(4)))), "of nothing there is no variance"


def test_total_along_an_axis():
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(masked.total(x, jnp.asarray([[1, 0, 1], [0, 0, 1]]), axis=1), [2, 5])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["select", "total", "mean", "var", "whiten"])
@pytest.mark.parametrize("jit", [False, True])
def test_what_is_masked_out_cannot_leak(name, bad, jit):
    f = getattr(masked, name)
    f = jax.jit(f) if jit else f
    spoilt = X.at[0].set(bad)

    def inside(x):
        """The statistic, or its values where the mask holds."""
        y = f(x, MASK)
        return jnp.sum(jnp.where(MASK, jnp.square(y), 0.0)) if y.ndim else y

    np.testing.assert_array_equal(inside(spoilt), inside(X))
    grads = jax.grad(inside)(spoilt)
    np.testing.assert_array_equal(grads, jax.grad(inside)(X))
    np.testing.assert_array_equal(grads[0], 0)


def test_whiten_gives_finite_values_outside_the_mask():
    chex.assert_tree_all_finite(masked.whiten(X.at[0].set(np.nan).at[3].set(np.inf), MASK))


def test_an_all_masked_mean_is_nan():
    assert np.isnan(masked.mean(X, jnp.zeros(4)))


def test_counts_are_exact_in_bfloat16():
    n = 1001
    np.testing.assert_allclose(masked.mean(jnp.ones(n, jnp.bfloat16), jnp.ones(n)), 1.0, rtol=4e-3)


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        masked.mean(X, jnp.ones((4, 1)))
