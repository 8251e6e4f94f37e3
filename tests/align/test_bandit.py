"""A problem whose optimum is known: eight answers of one token each, a reward for each, and a reference policy.

The policy that maximises E[r] − β KL(π ‖ π_ref) is π*(a) ∝ π_ref(a) exp(r(a) / β) (Rafailov et al. 2023, Eq. 4), and
the one that maximises E[r] − β KL(π_ref ‖ π) is π*(a) = β π_ref(a) / (λ − r(a)), with λ such that it sums to 1.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import quick_jit

from dpo_jax.align import dpo, online, ppo
from dpo_jax.align.advantages import kl_term
from dpo_jax.config import DPOConfig, OptimizerConfig, PPOConfig
from dpo_jax.types import PreferenceBatch, Rollout

ARMS, BETA = 8, 1.0
_RNG = np.random.default_rng(0)
REWARD = 2 * _RNG.standard_normal(ARMS).astype(np.float32)
REFERENCE = _RNG.standard_normal(ARMS).astype(np.float32)
OPTIMUM = np.asarray(jax.nn.softmax(REFERENCE + REWARD / BETA))


def apply(variables, *args, method=None, packed=False, prefix=None):
    """A hidden state of 1 everywhere, and the logits of the answers as the output matrix."""
    if method == "unembedding":
        return variables["params"]["logits"]["kernel"]
    return jnp.ones((*args[0].shape, 1))


MODEL = SimpleNamespace(apply=apply, config=SimpleNamespace(hidden_size=1))


def start():
    return {"params": {"logits": {"kernel": jnp.asarray(REFERENCE[None])}}}


def distance(state, optimum=OPTIMUM) -> float:
    """Total variation between the policy and the optimum."""
    policy = jax.nn.softmax(state.variables["params"]["logits"]["kernel"][0])
    return float(0.5 * jnp.sum(jnp.abs(policy - optimum)))


def sample(state, key, rows: int, *, reward=REWARD, beta: float = BETA) -> Rollout:
    """One-token answers drawn from the policy, with their rewards."""
    logits = state.variables["params"]["logits"]["kernel"][0]
    arms = jax.random.categorical(key, logits, shape=(rows,))
    return Rollout(
        prompts=jnp.zeros((rows, 1), jnp.int32),
        prompt_lengths=jnp.ones(rows, jnp.int32),
        responses=arms[:, None].astype(jnp.int32),
        response_lengths=jnp.ones(rows, jnp.int32),
        ended=jnp.ones(rows, bool),
        sampler_logps=jax.nn.log_softmax(logits)[arms][:, None],
        old_logps=jax.nn.log_softmax(logits)[arms][:, None],
        reference_logps=jax.nn.log_softmax(REFERENCE)[arms][:, None],
        values=None,
        scores=jnp.asarray(reward)[arms],
        kl_coefficient=jnp.full(rows, beta),
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


def optimum_of_the_reverse(reward, beta: float) -> np.ndarray:
    """β π_ref / (λ − r), by bisection of λ."""
    reference = np.asarray(jax.nn.softmax(REFERENCE), np.float64)
    low, high = reward.max() + 1e-9, reward.max() + 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (beta * reference / (middle - reward)).sum() > 1 else (low, middle)
    return beta * reference / (low - reward)


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3_corrected"])
def test_a_divergence_in_the_loss_reaches_the_optimum_of_its_own_objective(estimator: str) -> None:
    beta, steps, rows = 0.3, 200, 2048
    reward = np.random.default_rng(3).uniform(-1, 1, ARMS).astype(np.float32)
    forward = np.asarray(jax.nn.softmax(REFERENCE + reward / beta))
    reverse = optimum_of_the_reverse(reward.astype(np.float64), beta)
    assert 0.5 * np.abs(forward - reverse).sum() > 0.1, "the two objectives are told apart"
    optimizer = OptimizerConfig(
        learning_rate=0.05, schedule="linear", total_steps=steps, b1=0.0, b2=0.99, clip_norm=None
    )
    config = PPOConfig(
        optimizer=optimizer,
        advantage="rloo",
        kl_coefficient=beta,
        kl_placement="loss",
        kl_estimator=estimator,
        epochs=1,
    )
    state = ppo.init_state(MODEL, start(), config)

    def iteration(state, key):
        return ppo.train_step(state, sample(state, key, rows, reward=reward, beta=beta), config=config)[0], None

    keys = jax.random.split(jax.random.key(1), steps)
    state, _ = quick_jit(lambda state: jax.lax.scan(iteration, state, keys))(state)
    assert distance(state, reverse if estimator == "k3" else forward) < 0.02


# ---------------------------------------------------------------- two tokens, every answer counted

FIRST, SECOND = (jnp.asarray(_RNG.standard_normal(shape), jnp.float32) for shape in ((3,), (3, 3)))
REFERENCE_FIRST, REFERENCE_SECOND = (jnp.asarray(_RNG.standard_normal(shape), jnp.float32) for shape in ((3,), (3, 3)))


def two_tokens(first, second) -> jax.Array:
    """[9, 2]: log-probabilities of the two tokens of each answer."""
    firsts, seconds = jax.nn.log_softmax(first), jax.nn.log_softmax(second, axis=-1)
    return jnp.stack([jnp.repeat(firsts, 3), seconds.reshape(-1)], axis=1)


def expected_gradient(estimator: str) -> tuple[jax.Array, jax.Array]:
    """Of the loss's term, over all nine answers by their probability, with respect to both tokens' logits."""
    old, reference = two_tokens(FIRST, SECOND), two_tokens(REFERENCE_FIRST, REFERENCE_SECOND)

    def term(first, second):
        return jnp.sum(
            jnp.exp(old.sum(axis=1))[:, None] * kl_term(two_tokens(first, second), old, reference, estimator)
        )

    return quick_jit(jax.grad(term, argnums=(0, 1)))(FIRST, SECOND)


def visited(divergence) -> tuple[jax.Array, jax.Array]:
    """Gradient of each token's own divergence, at the prefixes as often as they are visited now."""

    def term(first, second):
        later = [divergence(second[a], REFERENCE_SECOND[a]) for a in range(3)]
        return divergence(first, REFERENCE_FIRST) + jnp.dot(jax.nn.softmax(FIRST), jnp.stack(later))

    return quick_jit(jax.grad(term, argnums=(0, 1)))(FIRST, SECOND)


def divergence_of(logits, reference) -> jax.Array:
    """KL(softmax(logits) ‖ softmax(reference))."""
    logits, reference = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    return jnp.sum(jnp.exp(logits) * (logits - reference))


def of_the_answer(first, second) -> jax.Array:
    """KL of the whole answer of two tokens."""
    logps, reference = two_tokens(first, second).sum(axis=1), two_tokens(REFERENCE_FIRST, REFERENCE_SECOND).sum(axis=1)
    return jnp.sum(jnp.exp(logps) * (logps - reference))


def test_what_each_term_of_the_loss_is_the_gradient_of() -> None:
    for estimator, wanted in (
        ("k1", (jnp.zeros(3), jnp.zeros((3, 3)))),
        ("k2", visited(divergence_of)),
        ("k3", visited(lambda x, reference: divergence_of(reference, x))),
        ("k3_corrected", visited(divergence_of)),
    ):
        for found, exact in zip(expected_gradient(estimator), wanted, strict=True):
            np.testing.assert_allclose(found, exact, atol=1e-6, err_msg=estimator)
    # The first token's own divergence is not what it causes: the gradient of the answer's divergence differs.
    true = quick_jit(jax.grad(of_the_answer))(FIRST, SECOND)
    assert float(jnp.max(jnp.abs(true - expected_gradient("k2")[0]))) > 0.01


def test_in_the_reward_only_k1_is_the_gradient_of_the_answers_divergence() -> None:
    """Σ_y π(y) Σ_t k_t(y) ∇ log π(y), which is what a policy gradient with k taken off the reward goes down."""
    old, reference = two_tokens(FIRST, SECOND), two_tokens(REFERENCE_FIRST, REFERENCE_SECOND)
    true = quick_jit(jax.grad(of_the_answer))(FIRST, SECOND)

    def descent(estimator: str) -> jax.Array:
        price = jnp.exp(old.sum(axis=1)) * ppo.kl_estimate(old, reference, estimator).sum(axis=1)
        return jax.grad(lambda first: jnp.dot(price, two_tokens(first, SECOND).sum(axis=1)))(FIRST)

    np.testing.assert_allclose(descent("k1"), true, atol=1e-6)
    for estimator in ("k2", "k3"):
        assert float(jnp.max(jnp.abs(descent(estimator) - true))) > 0.05


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


# ---------------------------------------------------------------- online: pairs of the policy's own

FIRST_ARM, SECOND_ARM = (x.reshape(-1) for x in np.meshgrid(np.arange(ARMS), np.arange(ARMS), indexing="ij"))


def every_pair(rewards=REWARD):
    """All 64 pairs of answers in the order drawn, each twice: the first wins, the second wins."""
    arms = jnp.asarray(np.tile(np.stack([FIRST_ARM, SECOND_ARM], axis=1), (2, 1)), jnp.int32)
    scores = np.repeat([[1.0, 0.0], [0.0, 1.0]], ARMS**2, axis=0)
    scores[np.tile(FIRST_ARM == SECOND_ARM, 2)] = 0.5  # the same answer twice: a tie
    groups = PreferenceBatch(
        prompts=jnp.zeros((len(arms), 1), jnp.int32),
        prompt_lengths=jnp.ones(len(arms), jnp.int32),
        responses=arms[..., None],
        response_lengths=jnp.ones((len(arms), 2), jnp.int32),
        weights=jnp.ones(len(arms)),
        rows=jnp.arange(len(arms)),
        reference_logps=jax.nn.log_softmax(REFERENCE)[arms],
    )
    margin = jnp.asarray(rewards)[arms[:, 0]] - jnp.asarray(rewards)[arms[:, 1]]
    wins = jax.nn.sigmoid(jnp.where(jnp.arange(len(arms)) < ARMS**2, margin, -margin))  # Bradley and Terry's judge
    return groups, online.best_and_worst(jnp.asarray(scores)), wins


def expected(groups, choice, wins, first, second, **options) -> PreferenceBatch:
    """The batch whose loss is the expected one: a pair counts by the probability that it is drawn and judged so."""
    pairs = online.pairs_of(groups, choice, **options)
    arms = groups.responses[..., 0]
    return dataclasses.replace(pairs, weights=pairs.weights * first[arms[:, 0]] * second[arms[:, 1]] * wins)


@pytest.mark.parametrize("opponent", ["policy", pytest.param("reference", marks=pytest.mark.slow)])
def test_online_dpo_reaches_the_optimum_in_expectation(opponent: str) -> None:
    """Whoever the opponent is: the minimiser of each pair's expected loss is β (u - v) = r - r'."""
    beta, steps = 0.5, 200
    groups, choice, wins = every_pair()
    assert int(choice.tie.sum()) == 2 * ARMS
    optimizer = OptimizerConfig(learning_rate=0.1, schedule="linear", total_steps=steps, clip_norm=None)
    config = DPOConfig(beta=beta, optimizer=optimizer, layout="separate")

    def iteration(state, _):
        policy = jax.nn.softmax(state.variables["params"]["logits"]["kernel"][0])
        other = policy if opponent == "policy" else jax.nn.softmax(REFERENCE)
        return dpo.train_step(state, expected(groups, choice, wins, policy, other), config=config)

    state = dpo.init_state(MODEL, start(), config)
    state, metrics = quick_jit(lambda state: jax.lax.scan(iteration, state, None, steps))(state)
    assert distance(state, np.asarray(jax.nn.softmax(REFERENCE + REWARD / beta))) < 0.02
    assert float(metrics["loss"][-1]) < float(metrics["loss"][0])


def test_exploration_is_xpos_term() -> None:
    """Loss and gradient of XPO's objective over all pairs, the reference's answer standing on either side."""
    alpha, beta = 0.7, 0.5
    groups, choice, wins = every_pair()
    reference = jax.nn.softmax(REFERENCE)
    config = DPOConfig(beta=beta, optimizer=OptimizerConfig(learning_rate=1e-3, clip_norm=None), layout="separate")
    params = {"params": {"logits": {"kernel": jnp.asarray(REFERENCE[None] + FIRST[:1])}}}
    policy = jax.nn.softmax(params["params"]["logits"]["kernel"][0])
    batch = expected(groups, choice, wins, policy, reference, exploration=alpha)
    state = dpo.init_state(MODEL, jax.tree.map(jnp.copy, params), config)
    _, metrics = quick_jit(lambda state, batch: dpo.train_step(state, batch, config=config))(state, batch)

    def objective(logits):
        logps, ratios = jax.nn.log_softmax(logits), jax.nn.log_softmax(logits) - jax.nn.log_softmax(REFERENCE)
        weights = jnp.where(jnp.eye(ARMS, dtype=bool), 0.0, policy[:, None] * reference[None, :])
        margins, wins = beta * (ratios[:, None] - ratios[None, :]), jax.nn.sigmoid(REWARD[:, None] - REWARD[None, :])
        pairs = -wins * jax.nn.log_sigmoid(margins) - (1 - wins) * jax.nn.log_sigmoid(-margins)
        return jnp.sum(weights * (pairs + alpha * logps[None, :])) / jnp.sum(weights)

    loss, gradient = jax.value_and_grad(objective)(params["params"]["logits"]["kernel"][0])
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(jnp.linalg.norm(gradient)), rel=1e-5)


def test_only_ties_teach_nothing() -> None:
    groups, _, _ = every_pair()
    choice = online.best_and_worst(jnp.zeros((2 * ARMS**2, 2)))
    config = DPOConfig(optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=0.0), layout="separate")
    state, metrics = quick_jit(lambda s, b: dpo.train_step(s, b, config=config))(
        dpo.init_state(MODEL, start(), config), online.pairs_of(groups, choice)
    )
    assert (float(metrics["loss"]), float(metrics["grad_norm"]), int(state.step)) == (0, 0, 1)
    assert distance(state, jax.nn.softmax(REFERENCE)) < 1e-6


def test_best_against_worst_of_four() -> None:
    choice = online.best_and_worst(jnp.asarray([[1.0, 3.0, 0.0, 2.0], [2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 0.0, 0.0]]))
    assert choice.chosen.tolist() == [1, 0, 0]
    assert choice.rejected.tolist() == [2, 0, 2]
    assert choice.tie.tolist() == [False, True, False]
