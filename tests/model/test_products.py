"""Matrix products with float32 sums, forward and backward, and what rematerialisation keeps of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.model import products

rng = np.random.default_rng(0)
x = jnp.asarray(rng.normal(size=(2, 5, 32)), jnp.float32)
kernel = jnp.asarray(rng.normal(size=(32, 48)), jnp.float32)
g = jnp.asarray(rng.normal(size=(2, 5, 48)), jnp.float32)


def value_and_gradients(f, dtype, out=None):
    y, back = jax.vjp(lambda x, kernel: f(x, kernel, out), x.astype(dtype), kernel)
    return y, *back(g.astype(y.dtype))


@pytest.mark.parametrize("out", [None, jnp.float32])
def test_products_and_gradients(out):
    exact = value_and_gradients(lambda x, kernel, _: jnp.matmul(x, kernel, precision="highest"), jnp.float32)
    chex.assert_trees_all_close(value_and_gradients(products.matmul, jnp.float32, out), exact, atol=1e-5)
    y, by_x, by_kernel = value_and_gradients(products.matmul, jnp.bfloat16, out)
    chex.assert_type([y, by_x, by_kernel], [out or jnp.bfloat16, jnp.bfloat16, jnp.float32])
    for got, want in zip((y, by_x, by_kernel), exact, strict=True):
        assert 0 < jnp.linalg.norm(got - want) < 5e-3 * jnp.linalg.norm(want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("apart", [False, True])
def test_a_turned_kernel_and_its_gradient_stay_as_they_lie(dtype, apart):
    def made(kernel):
        return products.rounded(kernel, dtype) if apart else kernel

    def plain(x, kernel, out):
        return products.matmul(x, made(kernel), out)

    def turned(x, kernel, out):
        return products.product(x, made(kernel.T), out, turned=True)

    chex.assert_trees_all_close(
        value_and_gradients(turned, dtype, jnp.float32), value_and_gradients(plain, dtype, jnp.float32), rtol=1e-5
    )
    backward = jax.grad(lambda kernel: jnp.sum(products.product(x.astype(dtype), made(kernel), turned=True)))
    assert "transpose[" not in str(jax.make_jaxpr(backward)(kernel.T))


def test_sums_are_float32():
    """1,000 products of 1 after one of 1,024: a sum in bfloat16, whose steps are 8 there, would stay at 1,024."""
    row, column = jnp.ones((1, 1001), jnp.bfloat16).at[0, 0].set(1024), jnp.ones((1001, 1))
    assert products.matmul(row, column, jnp.float32) == 2024


def test_compiled_products_ask_for_float32_sums():
    """Without it the CPU has no fast kernel: forward, and both of the backward pass."""

    def loss(x, kernel):
        return jnp.sum(products.matmul(x, kernel, jnp.float32) ** 2)

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x.astype(jnp.bfloat16), kernel))
    assert text.count("dot_general") == text.count("preferred_element_type=float32") == 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_policy_keeps_products(dtype):
    """The backward pass makes two products and repeats none, though nothing else is kept."""

    def layer(x, kernel):
        return jnp.tanh(products.matmul(jnp.sin(x), kernel))

    def dots(policy):
        kept = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        grad = jax.value_and_grad(lambda x, kernel: jnp.sum(kept(x, kernel).astype(jnp.float32)), argnums=(0, 1))
        return jax.jit(grad).lower(x.astype(dtype), kernel).as_text().count("dot_general")

    assert dots(jax.checkpoint_policies.save_only_these_names(products.SAVED)) == 3
    assert dots(jax.checkpoint_policies.nothing_saveable) == 4


def test_what_is_saved_is_what_was_made():
    y = g.astype(jnp.bfloat16)
    chex.assert_trees_all_equal(products.saved(y), y)
    chex.assert_trees_all_equal(jax.grad(lambda y: jnp.sum(products.saved(y) * y))(y), 2 * y)
