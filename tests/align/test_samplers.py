"""The sampler's log-probabilities and the trainer's own: which ratio is taken, what differs, what is weighted."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_bandit import ARMS, MODEL, REFERENCE, REWARD, start
from test_presets import MARKOV, config as preset_config, ragged, table

from dpo_jax.align import ppo
from dpo_jax.align.surrogates import importance_weights
from dpo_jax.config import GRPORun, OptimizerConfig, PPOConfig, PPOLossConfig, SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.types import Rollout

MASK = np.array([[True, True, False], [True, True, True]])
DIFFERENCE = np.log(np.array([[2.0, 4.0, 1.0], [0.5, 3.0, 1.0]], np.float32))
SAMPLER = np.linspace(0.5, -0.5, ARMS).astype(np.float32)


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ("none", [[1, 1], [1, 1, 1]]),
        ("token_truncate", [[2, 3], [0.5, 3, 1]]),
        ("token_mask", [[2, 0], [0.5, 3, 1]]),
        ("sequence_truncate", [[3, 3], [1.5, 1.5, 1.5]]),
        ("sequence_mask", [[0, 0], [1.5, 1.5, 1.5]]),
    ],
)
def test_weights_by_hand(correction, expected) -> None:
    found = np.asarray(importance_weights(DIFFERENCE, MASK, correction, 3.0001))
    for row, mask, values in zip(found, MASK, expected, strict=True):
        np.testing.assert_allclose(row[mask], values, rtol=1e-4)


def test_the_largest_weight_is_finite() -> None:
    far = jnp.full((1, 3), 95.0)
    for correction in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        assert np.isfinite(importance_weights(far, MASK[:1], correction, 3.0)).all()


def every_arm(drawn: np.ndarray, sampler: np.ndarray, old: jax.Array | None) -> Rollout:
    """Each arm once, its reward times how often `drawn` takes it: the mean over the rows is the expectation."""
    column = np.arange(ARMS, dtype=np.int32)[:, None]
    return Rollout(
        prompts=np.zeros((ARMS, 1), np.int32),
        prompt_lengths=np.ones(ARMS, np.int32),
        responses=column,
        response_lengths=np.ones(ARMS, np.int32),
        ended=np.ones(ARMS, bool),
        sampler_logps=sampler[column],
        old_logps=None if old is None else np.asarray(old)[column],
        reference_logps=np.asarray(jax.nn.log_softmax(REFERENCE))[column],
        values=None,
        scores=(ARMS * np.exp(drawn) * REWARD).astype(np.float32),
        kl_coefficient=np.zeros(ARMS, np.float32),
        weights=np.ones(ARMS, np.float32),
        rows=np.arange(ARMS, dtype=np.int32),
    )


def test_what_another_policy_drew_gives_the_policys_own_gradient() -> None:
    """By enumeration: Σ_a μ_a (π_a / μ_a) r_a ∇ log π_a, with and without the log-probabilities stored."""
    own, other = (np.asarray(jax.nn.log_softmax(jnp.asarray(x))) for x in (REFERENCE, SAMPLER))
    optimizer = OptimizerConfig(learning_rate=1e-3, clip_norm=None)
    plain = PPOConfig(optimizer=optimizer, advantage="none", averaging="sum", epochs=1, kl_coefficient=0.0)
    weighted = dataclasses.replace(plain, sampler_correction="token_truncate", sampler_cap=100.0)
    exact = np.asarray(jax.grad(lambda x: jax.nn.softmax(x) @ REWARD)(jnp.asarray(REFERENCE, jnp.float32)))

    def norm(config: PPOConfig, rollout: Rollout) -> float:
        state = ppo.init_state(MODEL, start(), config)
        return float(ppo.train_step(state, rollout, config=config)[1]["grad_norm"])

    true = float(np.linalg.norm(exact))
    assert norm(plain, every_arm(own, own, None)) == pytest.approx(true, rel=1e-4)
    assert norm(weighted, every_arm(other, other, None)) == pytest.approx(true, rel=1e-4)
    assert norm(weighted, every_arm(other, other, own)) == pytest.approx(true, rel=1e-4)
    assert norm(plain, every_arm(other, other, None)) != pytest.approx(true, rel=1e-2)


def test_one_update_needs_no_pass_and_a_second_one_is_clipped() -> None:
    """What `measure` stores, and that in the second epoch the ratio has moved away from 1."""
    variables, rollout = {"params": {"table": {"kernel": jnp.asarray(table())}}}, ragged()
    once, twice = (preset_config("grpo", epochs=epochs, rate=0.3) for epochs in (1, 2))
    state = ppo.init_state(MARKOV, variables, once)
    free = dataclasses.replace(rollout, values=None)
    stored = ppo.measure(state, free, config=twice)
    assert ppo.measure(state, free, config=once).old_logps is None
    assert stored.old_logps is not None
    new, metrics = ppo.train_step(state, dataclasses.replace(free, old_logps=None), config=once)
    same, _ = ppo.train_step(state, stored, config=once)
    chex.assert_trees_all_close(new.trainable, same.trainable, atol=1e-6)
    assert float(metrics["val/ratio"]) == 1
    assert float(metrics["clip_ratio/region_mean"]) == 0

    _, second = ppo.train_step(state, stored, config=twice)
    assert float(second["policy/ratio_q95"]) > 1.2
    assert float(second["clip_ratio/region_mean"]) > 0.05
    with pytest.raises(InputError, match="old_logps"):
        ppo.train_step(state, dataclasses.replace(stored, old_logps=None), config=twice)

    # What differs is told of each token once, whatever the number of updates.
    mask = np.arange(rollout.responses.shape[1]) < np.asarray(rollout.response_lengths)[:, None]
    apart = np.abs(np.asarray(stored.old_logps) - np.asarray(rollout.sampler_logps))[mask]
    for figures in (metrics, second):
        name = "sampling/sampling_logp_difference"
        assert float(figures[f"{name}/mean"]) == pytest.approx(apart.mean(), rel=1e-4)
        assert float(figures[f"{name}/max"]) == pytest.approx(apart.max(), rel=1e-4)
        assert float(figures[f"{name}/q95"]) == pytest.approx(np.quantile(apart, 0.95), rel=1e-4)
        assert "sampling/importance_sampling_ratio/mean" not in figures


def test_what_is_cut_is_counted() -> None:
    rollout = dataclasses.replace(ragged(), values=None, old_logps=None)
    kernel = jnp.asarray(table())
    ratio = None
    for correction in ("token_truncate", "token_mask"):
        options = preset_config("grpo", sampler_correction=correction, sampler_cap=1.05)
        state = ppo.init_state(MARKOV, {"params": {"table": {"kernel": kernel}}}, options)
        _, metrics = ppo.train_step(state, rollout, config=options)
        name = "sampling/importance_sampling_ratio"
        cut = float(metrics[f"{name}/cut"])
        assert 0 < cut < 1
        assert ratio in (None, cut)
        ratio = cut
        assert float(metrics[f"{name}/max"]) == pytest.approx(1.05, rel=0.05)
        assert (float(metrics[f"{name}/min"]) == 0) == (correction == "token_mask")


def test_options() -> None:
    assert not PPOLossConfig(preset="grpo").stores_old_logps
    assert PPOLossConfig(preset="grpo", epochs=2).stores_old_logps
    assert PPOLossConfig(preset="rloo").stores_old_logps  # its rewards hold the KL divergence
    assert not PPOLossConfig(preset="rloo", kl_coefficient=0.0).stores_old_logps
    with pytest.raises(InputError, match=r"--ppo\.sampler_cap has no effect with --ppo\.sampler_correction none"):
        PPOLossConfig(sampler_cap=2.0)
    with pytest.raises(InputError, match=r"--ppo\.sampler_cap .+ must be positive"):
        PPOLossConfig(sampler_correction="token_mask", sampler_cap=0.0)
    assert GRPORun(model="m", out="o", reward="length", sample=SampleConfig(weights="int8")).sample.weights == "int8"
