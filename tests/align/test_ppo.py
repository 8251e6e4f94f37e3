"""PPO's quantities against the check values, a plain Python loop, and the sentences that define them."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import masked
from dpo_jax.align import ppo
from dpo_jax.align.advantages import critic_free, kl_term, learning_targets, leave_one_out, next_kl_coefficient
from dpo_jax.align.rewards import standardised
from dpo_jax.config import PPOConfig, PPOLossConfig, PPORun, RejectionRun, SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.types import Rollout

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


@pytest.mark.parametrize("delta", [-1e4, -95.0, -90.0, -41.0, 41.0, 90.0, 1e4])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_corrected"])
def test_kl_terms_and_their_gradients_are_finite_far_from_the_reference(estimator: str, delta: float) -> None:
    for old in (0.0, -95.0, 95.0):
        value, slope = jax.value_and_grad(lambda x, o=old: kl_term(x, x - o, jnp.float32(0), estimator))(delta)
        assert np.isfinite([value, slope]).all()
        moved = jax.grad(lambda x, o=old: kl_term(x, jnp.float32(o), jnp.float32(0), estimator))(delta)
        assert np.isfinite(moved)
    if estimator == "k3" and delta < 0:
        assert float(slope) < -1e9, "the pull back is not lost"


def test_k3_keeps_its_digits_where_its_two_forms_meet() -> None:
    delta = np.concatenate([np.linspace(-30, 3, 67), [-1.001, -1.0, -0.999, -1e-3, 1e-3, 0]])
    exact = np.expm1(-delta) + delta
    found = jax.vmap(jax.value_and_grad(lambda x: ppo.kl_estimate(x, jnp.float32(0), "k3")))(jnp.float32(delta))
    np.testing.assert_allclose(found[0], exact, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(found[1], -np.expm1(-delta), rtol=2e-5, atol=1e-6)


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


@pytest.mark.parametrize("far", [87.0, 89.0, 95.0, 1e4])
def test_what_is_clipped_has_no_gradient_however_far_it_is(far: float) -> None:
    mask, old = jnp.ones((1, 3), bool), jnp.zeros((1, 3))
    new = jnp.array([[far, -far, far]])
    advantages = jnp.array([[1.0, -1.0, 0.0]])
    value, slope = jax.value_and_grad(ppo.policy_loss)(new, old, advantages, mask, 0.2)
    assert float(value) == pytest.approx((-1.2 + 0.8) / 3, rel=1e-6)
    np.testing.assert_array_equal(slope, 0)
    worse, pull = jax.value_and_grad(ppo.policy_loss)(new, old, -jnp.abs(advantages), mask, 0.2)
    assert np.isfinite(worse)
    assert np.isfinite(pull).all()
    assert float(pull[0, 0]) > 0


def test_value_loss() -> None:
    mask = jnp.array([[1, 1, 0]])
    values, old, returns = jnp.array([[1.0, 0.1, 9.0]]), jnp.array([[0.0, 0.0, 0.0]]), jnp.array([[1.0, 0.5, jnp.nan]])
    # clipped to 0.2, the first is 0.8 off; the second is 0.4 off either way
    assert float(ppo.value_loss(values, old, returns, mask, 0.2)) == pytest.approx(0.5 * (0.64 + 0.16) / 2, rel=1e-6)


def test_critic_free_advantages() -> None:
    np.testing.assert_allclose(leave_one_out(jnp.array([1.0, 2.0, 6.0, 0, 0, 3.0]), 3), [-3, -1.5, 4.5, -1.5, -1.5, 3])
    scores = jnp.array([1.0, 3.0, 5.0, 5.0])
    found = critic_free(scores[:, None], jnp.ones((4, 1), bool), PPOLossConfig(advantage="grpo", group_size=2))
    np.testing.assert_allclose(found[:, 0], [-(2**-0.5), 2**-0.5, 0, 0], atol=1e-3)


@pytest.mark.parametrize("score", [0.1, 12.34, 1000.1])
@pytest.mark.parametrize("advantage", ["group_mean", "leave_one_out", "batch_mean"])
def test_equal_scores_teach_exactly_nothing(advantage: str, score: float) -> None:
    """The rounding of their mean would be divided by next to nothing."""
    for k in (7, 8, 16):
        rewards, mask = np.zeros((k, 3), np.float32), np.ones((k, 3), bool)
        rewards[:, 2] = score
        group: dict[str, Any] = {} if advantage == "batch_mean" else {"group_size": k}
        scale: Any = "batch" if advantage == "batch_mean" else "group"
        config = PPOConfig(advantage=advantage, scale=scale, **group)  # type: ignore
        assert not np.any(critic_free(jnp.asarray(rewards), jnp.asarray(mask), config))
    assert not np.any(masked.whiten(jnp.full(7, score), jnp.ones(7, bool)))
    said = jnp.asarray([[True] * 7 + [False], [True] * 8])
    assert not np.any(standardised(jnp.stack([jnp.full(8, score), jnp.full(8, score / 3)]), said, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantage": "greedy", "score_clip": 1.0}, "--ppo.score_clip does not go with --ppo.advantage greedy"),
        ({"advantage": "greedy", "normalize_scores": True}, "normalize_scores does not go with"),
        ({"advantage": "greedy", "missing_eos_penalty": 1.0}, "missing_eos_penalty does not go with"),
        ({"advantage": "greedy", "overlong": "ramp"}, "--ppo.overlong ramp does not go with"),
        ({"preset": "dapo", "kl_placement": "loss"}, "--ppo.kl_placement has no effect: --ppo.kl_coefficient is 0"),
        ({"preset": "grpo", "kl_coefficient": 0.0, "kl_estimator": "k2"}, "--ppo.kl_estimator has no effect"),
        ({"preset": "grpo", "stop_kl": 0.1}, "--ppo.stop_kl has no effect with one update a rollout"),
        ({"preset": "grpo", "group_size": 0}, "--ppo.group_size 0 must be at least 1"),
    ],
)
def test_options_beside_each_other_that_do_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PPOConfig(**options)


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
        ({"advantage": "grpo", "kl_estimator": "k1"}, "k1 as a term of the loss has gradient 0"),
        ({"kl_placement": "loss", "kl_estimator": "k1", "kl_target": 6.0}, "k1 as a term of the loss has gradient 0"),
        ({"kl_estimator": "k2"}, "k2 taken off the rewards gives the gradient of no divergence"),
        ({"advantage": "rloo", "kl_estimator": "k3"}, "k3 taken off the rewards"),
        ({"advantage": "grpo", "kl_placement": "reward", "kl_estimator": "k3_corrected"}, "k3_corrected taken off"),
    ]:
        with pytest.raises(InputError, match=message):
            PPOLossConfig(**options)


def test_what_is_not_given_follows_from_the_advantage() -> None:
    grpo, rloo, gae = (PPOLossConfig(advantage=name) for name in ("grpo", "rloo", "gae"))
    assert (grpo.kl_choice, grpo.kl_in_loss, grpo.passes, grpo.updates) == ("k3", True, 1, 1)
    assert (rloo.kl_choice, rloo.kl_in_loss, rloo.passes) == ("k1", False, 4)
    assert (gae.kl_choice, gae.kl_in_loss, gae.passes) == ("k1", False, 4)
    assert PPOLossConfig(advantage="grpo", kl_placement="reward").kl_choice == "k1"
    assert PPOLossConfig(advantage="grpo", epochs=3, minibatches=2).updates == 6


@pytest.mark.parametrize(
    "option",
    [
        {"top_k": 5},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"no_repeat_ngram": 3},
        {"logit_bias": ((4, 1.0),)},
        {"min_new_tokens": 2},
    ],
)
def test_sampling_that_the_update_does_not_know_of_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"--sample\.{next(iter(option))} does not go with PPO"):
        PPORun(model="m", data="d", out="o", reward="vader", sample=SampleConfig(max_new_tokens=8, **option))
    RejectionRun(model="m", data="d", out="o", reward="vader", sample=SampleConfig(max_new_tokens=8, **option))


def test_narrow_weights_and_caches_of_the_sampler_are_not_refused() -> None:
    sample = SampleConfig(max_new_tokens=8, weights="int8", cache="bfloat16")
    PPORun(model="m", data="d", out="o", reward="vader", sample=sample)


def test_what_an_environment_says_carries_nothing():
    """Tokens of others between the policy's: no reward, no KL, no advantage; the score stands on its last token."""
    own = np.asarray([[True, True, False, False, True, False], [True, False, False, False, False, False]])
    rollout = Rollout(
        prompts=np.zeros((2, 1), np.int32),
        prompt_lengths=np.ones(2, np.int32),
        responses=np.zeros((2, 6), np.int32),
        response_lengths=np.asarray([5, 1], np.int32),
        ended=np.ones(2, bool),
        sampler_logps=np.full((2, 6), -1.0, np.float32),
        old_logps=np.full((2, 6), -1.0, np.float32),
        reference_logps=np.asarray([[-1.5, -1.0, np.nan, 7.0, -0.5, np.nan], [-1.0] * 6], np.float32),
        values=None,
        scores=np.asarray([2.0, 1.0], np.float32),
        kl_coefficient=np.full(2, 0.1, np.float32),
        weights=np.ones(2, np.float32),
        rows=np.arange(2, dtype=np.int32),
        own=own,
    )
    config = PPOConfig(advantage="none", returns="to_go", gamma=0.5, kl_coefficient=0.1)
    targets = learning_targets(rollout, config)
    np.testing.assert_array_equal(targets.learned, own)
    # KL of .5, 0 and -.5 at .1 a nat: rewards -.05, 0, 2.05; discounted by tokens of the policy alone.
    np.testing.assert_allclose(targets.rewards, [[-0.05, 0, 0, 0, 2.05, 0], [1.0, 0, 0, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(
        targets.advantages, [[-0.05 + 0.25 * 2.05, 0.5 * 2.05, 0, 0, 2.05, 0], [1.0, 0, 0, 0, 0, 0]], atol=1e-6
    )
