"""PPO's quantities against the check values, a plain Python loop, and the sentences that define them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.align import ppo
from dpo_jax.align.advantages import group_relative, leave_one_out, next_kl_coefficient
from dpo_jax.config import PPOLossConfig
from dpo_jax.errors import InputError

R = jnp.array([[-0.01, 0.02, -0.03, 0.99]])
V = jnp.array([[0.1, 0.2, 0.3, 0.4]])
ALL = jnp.ones((1, 4), bool)


def test_gae_check_values() -> None:
    advantages, returns = ppo.gae(R, V, ALL, gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages, [[0.77302625, 0.718975, 0.6305, 0.59]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[0.87302625, 0.918975, 0.9305, 0.99]], rtol=1e-6)


def loop_gae(rewards, values, mask, gamma, lam):
    """GAE of one row in plain Python: over the list of valid positions."""
    advantages = np.zeros(len(rewards))
    valid = [t for t in range(len(rewards)) if mask[t]]
    running = following = 0.0
    for t in reversed(valid):
        running = rewards[t] + gamma * following - values[t] + gamma * lam * running
        following = values[t]
        advantages[t] = running
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_plain_loop_on_ragged_masks(gamma: float, lam: float) -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.standard_normal((2, 32, 17))
    mask = rng.random((32, 17)) < 0.6
    mask[0] = True
    mask[1] = False
    rewards[~mask], values[~mask] = np.nan, np.inf
    advantages, returns = jax.jit(ppo.gae, static_argnames=("gamma", "lam"))(
        jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(mask), gamma=gamma, lam=lam
    )
    expected = np.stack([loop_gae(*row, gamma, lam) for row in zip(rewards, values, mask, strict=True)])
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, expected + np.where(mask, values, 0), 0), atol=1e-5)
    chex.assert_tree_all_finite((advantages, returns))


def test_kl_estimators() -> None:
    logps, reference = jnp.array([-1.5, -1.0, -2.0]), jnp.array([-1.0, -1.0, -2.25])
    np.testing.assert_allclose(ppo.kl_estimate(logps, reference), [-0.5, 0.0, 0.25])
    np.testing.assert_allclose(ppo.kl_estimate(logps, reference, "k2"), [0.125, 0.0, 0.03125])
    np.testing.assert_allclose(ppo.kl_estimate(logps, reference, "k3"), [0.1487212707, 0.0, 0.0288007831], rtol=1e-5)


def test_estimators_have_the_divergence_as_their_mean() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    logps, reference = jnp.log(jnp.asarray(p)), jnp.log(jnp.asarray(q))
    exact = float(np.sum(p * np.log(p / q)))
    for name in ("k1", "k3"):
        assert float(jnp.sum(p * ppo.kl_estimate(logps, reference, name))) == pytest.approx(exact, rel=1e-5)


def test_a_score_arrives_whole_and_on_the_terminator() -> None:
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    rewards = ppo.token_rewards(jnp.array([0.7, -0.2]), jnp.ones((2, 4)), mask, kl_coefficient=0.1)
    np.testing.assert_allclose(rewards, [[-0.1, -0.1, 0.6, 0], [-0.3, 0, 0, 0]], rtol=1e-6)
    free = ppo.token_rewards(jnp.array([0.7, -0.2]), jnp.full((2, 4), jnp.nan), mask, kl_coefficient=0.0)
    np.testing.assert_array_equal(free[~mask], 0)
    none = ppo.token_rewards(jnp.array([0.7, -0.2], jnp.float32), jnp.zeros((2, 4)), mask, kl_coefficient=0.1)
    assert none[0, 2] == np.float32(0.7)
    with pytest.raises(TypeError, match="int32"):
        ppo.token_rewards(jnp.array([1, 0]), jnp.zeros((2, 4)), mask, kl_coefficient=0.1)


def test_policy_loss() -> None:
    mask = jnp.array([[1, 1, 1, 0]])
    old = jnp.log(jnp.array([[0.5, 0.5, 0.5, 0.5]]))
    new = jnp.log(jnp.array([[0.5, 0.75, 0.3, 0.5]]))  # ratios 1, 1.5, 0.6
    advantages = jnp.array([[2.0, 1.0, -1.0, jnp.nan]])
    # -2 · 1; a good action stops counting above 1.2; of a bad one the clipped ratio 0.8 is the worse
    expected = (-2.0 - 1.2 + 0.8) / 3
    assert float(ppo.policy_loss(new, old, advantages, mask, 0.2)) == pytest.approx(expected, rel=1e-6)
    slope = jax.grad(ppo.policy_loss)(new, old, advantages, mask, 0.2)
    np.testing.assert_allclose(slope, [[-2 / 3, 0, 0, 0]], rtol=1e-6)


def test_value_loss() -> None:
    mask = jnp.array([[1, 1, 0]])
    values, old, returns = jnp.array([[1.0, 0.1, 9.0]]), jnp.array([[0.0, 0.0, 0.0]]), jnp.array([[1.0, 0.5, jnp.nan]])
    # clipped to 0.2, the first is 0.8 off; the second is 0.4 off either way
    assert float(ppo.value_loss(values, old, returns, mask, 0.2)) == pytest.approx(0.5 * (0.64 + 0.16) / 2, rel=1e-6)


def test_critic_free_advantages() -> None:
    np.testing.assert_allclose(leave_one_out(jnp.array([1.0, 2.0, 6.0, 0, 0, 3.0]), 3), [-3, -1.5, 4.5, -1.5, -1.5, 3])
    scores = jnp.array([1.0, 3.0, 5.0, 5.0])
    np.testing.assert_allclose(group_relative(scores, 2), [-(2**-0.5), 2**-0.5, 0, 0], atol=1e-3)


def test_the_coefficient_follows_the_divergence() -> None:
    def move(kl: float) -> float:
        return float(next_kl_coefficient(0.2, kl, 64, target=6.0, horizon=10_000))

    assert move(6.0) == pytest.approx(0.2)
    assert move(6.6) == pytest.approx(0.2 * (1 + 0.1 * 64 / 10_000))
    assert move(60.0) == move(7.2) > 0.2 > move(4.8) == move(0.0)


def test_options_without_effect_are_refused() -> None:
    for options, message in [
        ({"advantage": "rloo", "gamma": 0.9}, "gamma has no effect"),
        ({"advantage": "grpo", "whiten_rewards": True}, "whiten_rewards has no effect"),
        ({"advantage": "rloo", "group_size": 1}, "at least 2 responses"),
        ({"kl_horizon": 10}, "kl_horizon has no effect"),
        ({"kl_target": 6.0, "kl_coefficient": 0.0}, "must be positive"),
        ({"clip": 1.5}, r"must lie in \(0, 1\)"),
    ]:
        with pytest.raises(InputError, match=message):
            PPOLossConfig(**options)
