"""A problem whose optimum is known: eight answers of one token each, a reward for each, and a reference policy.

The policy that maximises E[r] − β KL(π ‖ π_ref) is π*(a) ∝ π_ref(a) exp(r(a) / β) (Rafailov et al. 2023, Eq. 4).
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import quick_jit

from dpo_jax.align import dpo, ppo
from dpo_jax.config import DPOConfig, OptimizerConfig, PPOConfig
from dpo_jax.types import PreferenceBatch, Rollout

ARMS, BETA = 8, 1.0
_RNG = np.random.default_rng(0)
REWARD = 2 * _RNG.standard_normal(ARMS).astype(np.float32)
REFERENCE = _RNG.standard_normal(ARMS).astype(np.float32)
OPTIMUM = np.asarray(jax.nn.softmax(REFERENCE + REWARD / BETA))


def apply(variables, *args, method=None, packed=False):
    """A hidden state of 1 everywhere, and the logits of the answers as the output matrix."""
    if method == "unembedding":
        return variables["params"]["logits"]["kernel"]
    return jnp.ones((*args[0].shape, 1))


MODEL = SimpleNamespace(apply=apply, config=SimpleNamespace(hidden_size=1))


def start():
    return {"params": {"logits": {"kernel": jnp.asarray(REFERENCE[None])}}}


def distance(state) -> float:
    """Total variation between the policy and the optimum."""
    policy = jax.nn.softmax(state.variables["params"]["logits"]["kernel"][0])
    return float(0.5 * jnp.sum(jnp.abs(policy - OPTIMUM)))


def sample(state, key, rows: int) -> Rollout:
    """One-token answers drawn from the policy, with their rewards."""
    logits = state.variables["params"]["logits"]["kernel"][0]
    arms = jax.random.categorical(key, logits, shape=(rows,))
    return Rollout(
        prompts=jnp.zeros((rows, 1), jnp.int32),
        prompt_lengths=jnp.ones(rows, jnp.int32),
        responses=arms[:, None].astype(jnp.int32),
        response_lengths=jnp.ones(rows, jnp.int32),
        ended=jnp.ones(rows, bool),
        logps=jax.nn.log_softmax(logits)[arms][:, None],
        reference_logps=jax.nn.log_softmax(REFERENCE)[arms][:, None],
        values=None,
        scores=jnp.asarray(REWARD)[arms],
        kl_coefficient=jnp.full(rows, BETA),
        weights=jnp.ones(rows),
        rows=jnp.arange(rows),
    )


def test_the_optimum_is_not_the_beginning() -> None:
    assert distance(SimpleNamespace(variables=start())) > 0.2


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_policy_gradients_reach_the_optimum(advantage: str) -> None:
    steps, rows = 150, 2048
    optimizer = OptimizerConfig(
        learning_rate=0.05, schedule="linear", total_steps=steps, b1=0.0, b2=0.99, clip_norm=None
    )
    own = {"value": "stopped", "value_coefficient": 10.0, "epochs": 2} if advantage == "gae" else {"epochs": 2}
    config = PPOConfig(optimizer=optimizer, advantage=advantage, kl_coefficient=BETA, **own)
    state = ppo.init_state(MODEL, start(), config)

    def iteration(state, key):
        rollout = ppo.measure(state, sample(state, key, rows), config=config)
        return ppo.train_step(state, rollout, config=config)

    keys = jax.random.split(jax.random.key(1), steps)
    state, metrics = quick_jit(lambda state: jax.lax.scan(iteration, state, keys))(state)
    assert distance(state) < 0.02
    assert float(metrics["objective/kl"][0]) == pytest.approx(0, abs=1e-6)
    divergence = float(np.sum(OPTIMUM * (np.log(OPTIMUM) - jax.nn.log_softmax(REFERENCE))))
    assert float(metrics["objective/kl"][-20:].mean()) == pytest.approx(divergence, rel=0.1)


def test_dpo_reaches_the_same_optimum_from_pairs() -> None:
    rows, steps = 50_000, 150
    rng = np.random.default_rng(2)
    pairs = rng.integers(0, ARMS, (rows, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    first_wins = rng.random(len(pairs)) < 1 / (1 + np.exp(REWARD[pairs[:, 1]] - REWARD[pairs[:, 0]]))
    arms = np.where(first_wins[:, None], pairs, pairs[:, ::-1])
    batch = PreferenceBatch(
        prompts=jnp.zeros((len(arms), 1), jnp.int32),
        prompt_lengths=jnp.ones(len(arms), jnp.int32),
        responses=jnp.asarray(arms[..., None], jnp.int32),
        response_lengths=jnp.ones((len(arms), 2), jnp.int32),
        weights=jnp.ones(len(arms)),
        rows=jnp.arange(len(arms)),
        reference_logps=jax.nn.log_softmax(REFERENCE)[arms],
    )
    optimizer = OptimizerConfig(learning_rate=0.1, schedule="linear", total_steps=steps, clip_norm=None)
    config = DPOConfig(beta=BETA, optimizer=optimizer, layout="separate")
    state = dpo.init_state(MODEL, start(), config)
    train = quick_jit(lambda s: jax.lax.scan(lambda s, _: dpo.train_step(s, batch, config=config), s, None, steps))
    state, _ = train(state)
    assert distance(state) < 0.02
