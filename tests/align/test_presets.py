"""Every preset of PPO's family: PyTorch's numbers on ragged groups, enumeration, the optimum of its own objective."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import quick_jit
from test_bandit import ARMS, MODEL, REFERENCE, distance, optimum_of_the_reverse, sample, start, two_tokens

from dpo_jax.align import ppo
from dpo_jax.align.advantages import critic_free, flat_groups
from dpo_jax.align.figures import defined
from dpo_jax.align.surrogates import Rule, log_ratios, policy_terms, row_weights
from dpo_jax.config import PRESETS, GRPORun, OptimizerConfig, PPOConfig, PPOLossConfig, SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.types import Rollout

EVERY = tuple(PRESETS)
GROUP, ROWS, LONGEST, WIDTH = 4, 8, 5, 6
V = 7
ROOT = Path(__file__).resolve().parents[2]


def config(preset: str, **options: Any) -> PPOConfig:
    optimizer = OptimizerConfig(
        learning_rate=options.pop("rate", 0.05), schedule="constant", clip_norm=None, b1=0.0, b2=0.999
    )
    if PPOLossConfig(preset=preset).group > 1:
        options.setdefault("group_size", GROUP)
    return PPOConfig(preset=preset, optimizer=optimizer, max_response=options.pop("longest", LONGEST), **options)


# ---------------------------------------------------------------- a policy whose logits depend on the token before


def apply(variables, *args, method=None, packed=False, prefix=None):
    """The token before as a one-hot state; the table of logits as the output matrix."""
    if method == "unembedding":
        return variables["params"]["table"]["kernel"]
    return jax.nn.one_hot(args[0], V)


MARKOV = SimpleNamespace(apply=apply, config=SimpleNamespace(hidden_size=V))


def table() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((V, V)).astype(np.float32)


def ragged(seed: int = 0) -> Rollout:
    """Two groups of four responses of one to five tokens, one of them cut."""
    rng = np.random.default_rng(seed)
    lengths = np.array([3, 5, 1, 2, 4, 1, 5, 3], np.int32)
    mask = np.arange(WIDTH) < lengths[:, None]
    responses = rng.integers(0, V, (ROWS, WIDTH)).astype(np.int32)
    prompts = np.repeat(rng.integers(0, V, (ROWS // GROUP, 1)), GROUP, axis=0).astype(np.int32)
    logps = reference_logps(table(), prompts, responses)
    old = np.where(mask, logps + 0.1 * rng.standard_normal(logps.shape), 0).astype(np.float32)
    return Rollout(
        prompts=prompts,
        prompt_lengths=np.ones(ROWS, np.int32),
        responses=responses,
        response_lengths=lengths,
        ended=lengths < 5,
        sampler_logps=old,
        old_logps=old,
        reference_logps=np.where(mask, old + 0.3 * rng.standard_normal(old.shape), 0).astype(np.float32),
        values=np.where(mask, 0.3 * rng.standard_normal(old.shape), 0).astype(np.float32),
        scores=rng.standard_normal(ROWS).astype(np.float32),
        kl_coefficient=np.full(ROWS, 0.1, np.float32),
        weights=np.ones(ROWS, np.float32),
        rows=np.arange(ROWS, dtype=np.int32),
        greedy_scores=np.repeat(rng.standard_normal(ROWS // GROUP), GROUP).astype(np.float32),
    )


def reference_logps(kernel, prompts, responses):
    before = np.concatenate([prompts, responses[:, :-1]], axis=1)
    logits = kernel[before].astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logps, responses[..., None], axis=-1)[..., 0]


def torch_loss(torch, preset: str, kernel, r: Rollout):
    """The loss of one update on the whole rollout, row by row, as the paper of each preset writes it."""
    before = torch.tensor(np.concatenate([r.prompts, np.asarray(r.responses)[:, :-1]], axis=1), dtype=torch.long)
    logits = torch.log_softmax(kernel[before], dim=-1)
    taken = torch.tensor(np.asarray(r.responses), dtype=torch.long)[..., None]
    every = torch.gather(logits, -1, taken)[..., 0]
    n = [int(x) for x in r.response_lengths]
    new = [every[i, : n[i]] for i in range(ROWS)]
    as_tensor = lambda x: [torch.tensor(np.asarray(x)[i, : n[i]], dtype=torch.float64) for i in range(ROWS)]  # noqa: E731
    old, ref, values = as_tensor(r.logps), as_tensor(r.reference_logps), as_tensor(r.values)
    score = torch.tensor(np.asarray(r.scores), dtype=torch.float64)
    in_reward = 0.1 if preset in ("ppo", "rloo", "reinforce++", "remax") else 0.0
    if preset == "dapo":  # the ramp begins one token before the longest of five
        score = score - torch.tensor([min(max(x - 4, 0), 1) for x in n], dtype=torch.float64)
    rewards = [-in_reward * (old[i] - ref[i]) for i in range(ROWS)]
    for i in range(ROWS):
        rewards[i][-1] += score[i]
    total = torch.stack([x.sum() for x in rewards])
    groups = [list(range(g, g + GROUP)) for g in range(0, ROWS, GROUP)]
    group_of = [groups[i // GROUP] for i in range(ROWS)]
    returns: Any = None
    if preset == "ppo":
        advantages, returns = [], []
        for i in range(ROWS):
            a, running = torch.zeros(n[i], dtype=torch.float64), 0.0
            for t in reversed(range(n[i])):
                following = values[i][t + 1] if t + 1 < n[i] else 0.0
                running = rewards[i][t] + following - values[i][t] + 0.95 * running
                a[t] = running
            advantages.append(a)
            returns.append(a + values[i])
        flat = torch.cat(advantages)
        advantages = [(a - flat.mean()) / torch.sqrt(flat.var() + 1e-8) for a in advantages]
    elif preset == "reinforce++":
        to_go = [torch.flip(torch.cumsum(torch.flip(x, [0]), 0), [0]) for x in rewards]
        flat = torch.cat(to_go)
        advantages = [(x - flat.mean()) / (flat.std() + 1e-4) for x in to_go]
    else:
        one = []
        for i in range(ROWS):
            mine = total[group_of[i]]
            if preset == "rloo":
                one.append(total[i] - (mine.sum() - total[i]) / (GROUP - 1))
            elif preset == "remax":
                one.append(total[i] - float(r.greedy_scores[i]))
            elif preset == "dr_grpo":
                one.append(total[i] - mine.mean())
            else:
                one.append((total[i] - mine.mean()) / (mine.std() + 1e-4))
        advantages = [one[i].expand(n[i]) for i in range(ROWS)]
    terms = []
    for i in range(ROWS):
        log_ratio, a = new[i] - old[i], advantages[i]
        if preset == "gspo":
            log_ratio = log_ratio.mean().expand(n[i])
        ratio = torch.exp(log_ratio)
        low, high = {"gspo": (3e-4, 4e-4), "dapo": (0.2, 0.28)}.get(preset, (0.2, 0.2))
        if preset in ("rloo", "remax"):
            term = -a * new[i]
        elif preset == "cispo":
            term = -torch.clamp(ratio, max=5.0).detach() * a * new[i]
        else:
            term = -torch.minimum(a * ratio, a * torch.clamp(ratio, 1 - low, 1 + high))
        if preset == "grpo":
            term = term + 0.1 * (torch.exp(ref[i] - new[i]) - (ref[i] - new[i]) - 1)
        terms.append(term)
    if preset in ("grpo", "gspo"):
        return torch.stack([x.mean() for x in terms]).mean()
    if preset in ("dapo", "cispo"):
        return torch.stack([torch.cat([terms[i] for i in g]).mean() for g in groups]).mean()
    if preset in ("rloo", "remax"):
        return torch.stack([x.sum() for x in terms]).mean()
    if preset == "dr_grpo":
        return torch.stack([x.sum() / LONGEST for x in terms]).mean()
    return torch.cat(terms).mean()


@pytest.mark.parametrize("preset", EVERY)
def test_two_epochs_are_pytorch_s(preset: str) -> None:
    """Losses, gradients and weights of two passes, under Adam without momentum: the second sees ratios that moved."""
    torch = pytest.importorskip("torch")
    rollout, rate = ragged(), 0.05
    options: dict[str, Any] = {"value": "stopped", "value_coefficient": 0.0} if preset == "ppo" else {}
    options |= {"kl_coefficient": 0.1} if preset in ("grpo", "ppo", "rloo", "reinforce++", "remax") else {}
    options |= {"overlong_buffer": 1} if preset == "dapo" else {}
    options |= {"group_size": GROUP}
    c = config(preset, epochs=2, rate=rate, **options)
    rollout = dataclasses.replace(rollout, kl_coefficient=np.full(ROWS, c.kl_price, np.float32))
    variables = {"params": {"table": {"kernel": jnp.asarray(table())}}}
    state = ppo.init_state(MARKOV, variables, c)
    new, metrics = quick_jit(lambda s, r: ppo.train_step(s, r, config=c))(state, rollout)

    kernel = torch.tensor(table(), dtype=torch.float64, requires_grad=True)
    second, losses, norms = torch.zeros_like(kernel), [], []
    b2, eps = c.optimizer.b2, c.optimizer.eps
    for step in (1, 2):
        loss = torch_loss(torch, preset, kernel, rollout)
        (slope,) = torch.autograd.grad(loss, kernel)
        losses.append(float(loss.detach()))
        norms.append(float(slope.norm()))
        second = b2 * second + (1 - b2) * slope**2
        move = slope / (torch.sqrt(second / (1 - b2**step)) + eps)
        kernel = (kernel - rate * move).detach().requires_grad_(True)
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), abs=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(np.mean(norms), rel=1e-4, abs=1e-6)
    moved = np.abs(np.asarray(new.trainable["params"]["table"]["kernel"]) - kernel.detach().numpy())
    assert moved.max() < 2e-4  # entries with a slope near 0 are divided by it


@pytest.mark.parametrize("preset", ["dapo", "gspo", "dr_grpo", "rloo"])
def test_accumulation_and_padding_change_nothing(preset: str) -> None:
    rollout = ragged()
    found = []
    for k, extra in ((1, 0), (4, 3)):
        c = config(preset, epochs=2, minibatches=2, accumulate=k)
        wide = jax.tree.map(lambda x, e=extra: x if x.ndim == 1 else np.pad(x, ((0, 0), (0, e))), rollout)
        state = ppo.init_state(MARKOV, {"params": {"table": {"kernel": jnp.asarray(table())}}}, c)
        new, metrics = quick_jit(lambda s, r, c=c: ppo.train_step(s, r, config=c))(state, wide)
        found.append((np.asarray(new.trainable["params"]["table"]["kernel"]), float(metrics["loss"])))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=2e-5)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-5)


def test_mini_batches_have_the_whole_gradient_as_their_mean() -> None:
    """The group average: halves of a rollout, however groups are split, each counting by its share of the groups."""
    rollout = ragged()
    tokens = jnp.asarray(rollout.response_lengths, jnp.float32)
    of_group, rows = jnp.repeat(jnp.sum(tokens.reshape(-1, GROUP), axis=1), GROUP), jnp.full(ROWS, float(GROUP))
    for averaging in ("sequence", "group", "sum", "constant"):
        whole = row_weights(averaging, tokens, of_group, rows, LONGEST)
        order = np.array([0, 5, 2, 7, 4, 1, 6, 3])
        halves = [row_weights(averaging, tokens[at], of_group[at], rows[at], LONGEST) for at in (order[:4], order[4:])]
        np.testing.assert_allclose(jnp.concatenate(halves) / 2, whole[order], rtol=1e-6, err_msg=averaging)


# ---------------------------------------------------------------- the bandit

REWARDS = np.random.default_rng(3).uniform(-1, 1, ARMS).astype(np.float32)


CASES = {
    "ppo": ({"value": "stopped", "value_coefficient": 10.0, "whiten_advantages": False, "epochs": 2}, "forward"),
    "rloo": ({}, "forward"),
    "remax": ({}, "forward"),
    "dr_grpo": ({"kl_placement": "loss", "kl_estimator": "k3_corrected"}, "forward_k"),
    "grpo": ({"scale": "none"}, "reverse_k"),
}


@pytest.mark.parametrize("preset", list(CASES))
def test_unnormalised_presets_reach_the_optimum_of_their_own_objective(preset: str) -> None:
    """Within .02: E[r] - beta KL(pi, ref), or KL(ref, pi) for grpo's k3; a group mean makes r of r (K - 1) / K."""
    beta, steps, rows = 0.3, 200, 2048
    options, kind = CASES[preset]
    share = (GROUP - 1) / GROUP if kind.endswith("_k") else 1.0
    goal = np.asarray(jax.nn.softmax(REFERENCE + share * REWARDS / beta))
    if kind.startswith("reverse"):
        goal = optimum_of_the_reverse(share * REWARDS.astype(np.float64), beta)
    optimizer = OptimizerConfig(
        learning_rate=0.05, schedule="linear", total_steps=steps, b1=0.0, b2=0.99, clip_norm=None
    )
    sized = {} if preset in ("ppo", "remax") else {"group_size": GROUP}
    c = PPOConfig(preset=preset, optimizer=optimizer, kl_coefficient=beta, max_response=1, **sized, **options)
    state = ppo.init_state(MODEL, start(), c)

    def iteration(state, key):
        rollout = sample(state, key, rows, reward=REWARDS, beta=beta)
        if preset == "remax":
            best = jnp.argmax(state.variables["params"]["logits"]["kernel"][0])
            rollout = dataclasses.replace(rollout, greedy_scores=jnp.full(rows, jnp.asarray(REWARDS)[best]))
        return ppo.train_step(state, ppo.measure(state, rollout, config=c), config=c)[0], None

    keys = jax.random.split(jax.random.key(1), steps)
    state, _ = quick_jit(lambda state: jax.lax.scan(iteration, state, keys))(state)
    found = distance(state, goal)
    print(f"{preset}: {found:.4f}")
    assert found < 0.02


@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo", "cispo", "reinforce++"])
def test_normalised_presets_have_the_exact_expected_gradient(preset: str) -> None:
    """All 8^4 groups, each by its probability: the mean of the preset's gradient against sum_y P(y) A(y) d log pi."""
    logits = jnp.asarray(REFERENCE, jnp.float32)
    arms = np.array(list(itertools.product(range(ARMS), repeat=4)))
    c = config(preset, group_size=4, kl_coefficient=0.0)

    def loss(logits):
        logps = jax.nn.log_softmax(logits)[arms].reshape(-1, 1)
        old, mask = jax.lax.stop_gradient(logps), jnp.ones((arms.size, 1), bool)
        rewards = jnp.asarray(REWARDS)[arms].reshape(-1, 1)
        if preset == "reinforce++":  # its batch is the group here
            advantages = jax.vmap(lambda r: critic_free(r, jnp.ones((4, 1), bool), c))(rewards.reshape(-1, 4, 1))
            advantages = advantages.reshape(-1, 1)
        else:
            advantages = critic_free(rewards, mask, c)
        rule = ppo.rule_of(c)
        terms = policy_terms(logps, log_ratios(logps, old, mask, rule.ratio), advantages, rule)
        probability = jax.lax.stop_gradient(jnp.exp(logps.reshape(-1, 4).sum(axis=1)))
        return jnp.sum(probability * terms.reshape(-1, 4).mean(axis=1))

    found = quick_jit(jax.grad(loss))(logits)
    policy = np.exp(np.asarray(REFERENCE, np.float64))
    policy /= policy.sum()
    rewards = REWARDS.astype(np.float64)[arms]
    standard = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    probability = policy[arms].prod(1)
    exact = np.zeros(ARMS)
    for k in range(4):
        scores = np.eye(ARMS)[arms[:, k]] - policy
        exact -= (probability * standard[:, k]) @ scores / 4
    np.testing.assert_allclose(found, exact, atol=1e-3)
    print(f"{preset}: {np.abs(np.asarray(found) - exact).max():.1e}")
    assert np.abs(exact).max() > 0.02


def test_two_tokens_by_enumeration() -> None:
    """Sums with a leave-one-out baseline have the gradient of the expected reward; Dr. GRPO's (K - 1) / K / L of it."""
    rng = np.random.default_rng(5)
    first, second = (
        jnp.asarray(rng.standard_normal(3), jnp.float32),
        jnp.asarray(rng.standard_normal((3, 3)), jnp.float32),
    )
    reward = jnp.asarray(rng.standard_normal(9), jnp.float32)
    pairs = np.array(list(itertools.product(range(9), repeat=2)))

    def loss(first, preset):
        c = config(preset, group_size=2, kl_coefficient=0.0, longest=2)
        logps = two_tokens(first, second)[pairs].reshape(-1, 2)
        mask = jnp.ones(logps.shape, bool)
        rewards = jnp.zeros(logps.shape).at[:, 1].set(reward[pairs].reshape(-1))
        advantages = critic_free(rewards, mask, c)
        rule = ppo.rule_of(c)
        terms = policy_terms(logps, log_ratios(logps, jax.lax.stop_gradient(logps), mask), advantages, rule)
        probability = jax.lax.stop_gradient(jnp.exp(logps.sum(1).reshape(-1, 2).sum(1)))
        mean = terms.sum(1).reshape(-1, 2).mean(1) / (2 if preset == "dr_grpo" else 1)
        return jnp.sum(probability * mean)

    true = jax.grad(lambda x: jnp.dot(jnp.exp(two_tokens(x, second).sum(1)), reward))(first)
    np.testing.assert_allclose(jax.grad(loss)(first, "rloo"), -true, atol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(first, "dr_grpo"), -true / 2 / 2, atol=1e-5)


# ---------------------------------------------------------------- pieces


def test_rules_by_hand() -> None:
    old = jnp.zeros((1, 2))
    new, mask = jnp.log(jnp.array([[2.0, 0.5]])), jnp.ones((1, 2), bool)
    up, down = jnp.ones((1, 2)), -jnp.ones((1, 2))
    np.testing.assert_allclose(log_ratios(new, old, mask, "sequence"), 0, atol=1e-7)
    wide = Rule(low=0.1, high=0.3)
    np.testing.assert_allclose(policy_terms(new, new, up, wide), [[-1.3, -0.5]], rtol=1e-6)
    np.testing.assert_allclose(policy_terms(new, new, down, wide), [[2.0, 0.9]], rtol=1e-6)
    np.testing.assert_allclose(policy_terms(new, new, 3 * down, Rule(dual=1.5)), [[4.5, 2.4]], rtol=1e-6)
    cispo = Rule(surrogate="cispo", low=1.0, high=0.5)
    slope = jax.grad(lambda x: policy_terms(x, x, up, cispo).sum())(new)
    np.testing.assert_allclose(slope, [[-1.5, -0.5]], rtol=1e-6)
    each = jax.grad(lambda x: policy_terms(x, log_ratios(x, old, mask, "sequence_token"), 2 * up, Rule()).sum())(new)
    np.testing.assert_allclose(each, [[-2.0, -2.0]], rtol=1e-6)
    far = jax.grad(lambda x: policy_terms(x, log_ratios(x, old, mask), up, Rule()).sum())(jnp.full((1, 2), 95.0))
    np.testing.assert_array_equal(far, 0)


@pytest.mark.parametrize("preset", EVERY)
def test_one_token_and_equal_scores_stay_finite(preset: str) -> None:
    rollout = ragged()
    size = GROUP if PPOLossConfig(preset=preset).group > 1 else 1
    short = jax.tree.map(lambda x: x[:size], rollout)
    ones = np.ones(size, np.int32)
    short = dataclasses.replace(short, response_lengths=ones, scores=np.full(size, 0.7, np.float32))
    c = config(preset, **({"value": "stopped"} if preset == "ppo" else {}), epochs=1)
    state = ppo.init_state(MARKOV, {"params": {"table": {"kernel": jnp.asarray(table())}}}, c)
    new, metrics = quick_jit(lambda s, r: ppo.train_step(s, r, config=c))(state, short)
    kept = defined({key: float(value) for key, value in metrics.items() if value.ndim == 0})
    assert np.isfinite(list(kept.values())).all()
    assert np.isfinite(np.asarray(new.trainable["params"]["table"]["kernel"])).all()
    assert int(new.step) == 1
    if preset not in ("ppo",):
        assert kept["frac_reward_zero_std"] == float(size > 1)
        assert kept["rollout/learned"] == float(preset != "dapo")


def test_groups_and_responses_that_are_left_out() -> None:
    rollout = ragged()
    scores = np.array(rollout.scores)
    scores[:GROUP] = 1.0
    rollout = dataclasses.replace(rollout, scores=scores, kl_coefficient=np.zeros(ROWS, np.float32))
    assert np.asarray(flat_groups(rollout, GROUP)).tolist() == [True] * 4 + [False] * 4
    c = config("dr_grpo", zero_variance="leave_out", overlong="mask", averaging="sequence")
    half = jax.tree.map(lambda x: x[[4, 5, 7, 7]], rollout)  # row 6 was cut
    state = ppo.init_state(MARKOV, {"params": {"table": {"kernel": jnp.asarray(table())}}}, c)
    _, metrics = quick_jit(lambda s, r: ppo.train_step(s, r, config=c))(state, rollout)
    assert float(metrics["rollout/learned"]) == 3 / 8
    assert float(metrics["frac_reward_zero_std"]) == 0.5
    assert float(metrics["completions/clipped_ratio"]) == 2 / 8
    mean = scores[4:].mean()
    ratios = [np.exp(reference_logps(table(), half.prompts, half.responses) - half.logps)[i] for i in range(3)]
    expected = -np.mean(
        [
            np.minimum(a * r, a * np.clip(r, 0.8, 1.2))[:n].mean()
            for r, a, n in zip(ratios, half.scores[:3] - mean, half.response_lengths[:3], strict=True)
        ]
    )
    assert float(metrics["loss"]) == pytest.approx(expected, abs=1e-5)


def test_choices_that_say_two_things_or_nothing_are_refused() -> None:
    for options, message in [
        ({"preset": "grpo", "advantage": "rloo"}, "says two things; write --ppo.advantage leave_one_out"),
        ({"preset": "ppo", "scale": "group"}, "scale has no effect"),
        ({"preset": "rloo", "clip": 0.2}, "clip has no effect with --ppo.surrogate reinforce"),
        ({"preset": "cispo", "dual_clip": 3.0}, "dual_clip has no effect"),
        ({"preset": "grpo", "kl_estimator": "k1"}, "k1 as a term of the loss has gradient 0"),
        ({"preset": "rloo", "kl_estimator": "k3"}, "k3 taken off the rewards"),
        ({"preset": "dr_grpo", "gamma": 0.9}, "gamma has no effect"),
        ({"preset": "grpo", "clip": 0.1, "clip_low": 0.1, "clip_high": 0.2}, "clip has no effect"),
        ({"preset": "remax", "zero_variance": "leave_out"}, "needs at least 2 responses"),
        ({"preset": "grpo", "resample_rounds": 3}, "resample_rounds has no effect"),
        ({"preset": "grpo", "dual_clip": 1.0}, "greater than 1"),
    ]:
        with pytest.raises(InputError, match=message):
            PPOLossConfig(**options)
    given: dict[str, Any] = {"model": "m", "data": "d", "out": "o", "reward": "length"}
    with pytest.raises(InputError, match="grpo has no value model"):
        GRPORun(**given, ppo=PPOLossConfig(preset="ppo"))
    with pytest.raises(InputError, match="--safety_reward standardises"):
        GRPORun(**given, safety_reward="length", ppo=PPOLossConfig(preset="dapo"))
    ppo_options = PPOLossConfig(preset="dapo", overlong_buffer=9)
    with pytest.raises(InputError, match="overlong_buffer 9 is longer"):
        GRPORun(**given, ppo=ppo_options, sample=SampleConfig(max_new_tokens=8))
    run = GRPORun(**given)
    assert (run.ppo.algorithm(), run.ppo.passes, run.ppo.kl_choice, run.ppo.group) == ("grpo", 1, "k3", 8)


def test_a_single_clip_beside_a_preset_is_both_sides() -> None:
    assert PPOLossConfig(preset="dapo").clip_range == (0.2, 0.28)
    assert PPOLossConfig(preset="dapo", clip=0.1).clip_range == (0.1, 0.1)
    assert PPOLossConfig(preset="gspo", clip_high=1e-3).clip_range == (3e-4, 1e-3)
    assert PPOLossConfig(clip=0.3).clip_range == (0.3, 0.3)


def test_the_documents_table_is_the_codes() -> None:
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs" / "grpo.md").read_text().splitlines()]
    table = {row[0].strip().strip("`"): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 3}
    for name, preset in PRESETS.items():
        written = ", ".join(f"{option} {value}" for option, value in preset.options.items())
        assert table[name] == [written, preset.source], name
