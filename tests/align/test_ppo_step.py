"""The PPO step: what holds of every update, PyTorch's numbers, device counts, and a problem with a known optimum."""

import dataclasses
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import quick_jit, toy_policy

from dpo_jax.align import ppo
from dpo_jax.align.figures import defined
from dpo_jax.config import LoraConfig, OptimizerConfig, PPOConfig
from dpo_jax.errors import InputError
from dpo_jax.mesh import Replicated, make_mesh, put_batch
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.groups import response_logps
from dpo_jax.model.llama import Llama
from dpo_jax.model.variables import init_adapters, init_variables
from dpo_jax.types import PreferenceBatch, Rollout

SHAPE = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)
B, P, R = 8, 5, 6


@cache
def weights(lora: int = 0, seed: int = 0):
    """A policy that compiles at once; with adapters, a Llama."""
    if not lora:
        return toy_policy(seed, vocab=32)
    model = Llama(SHAPE, lora=LoraConfig(rank=lora))
    variables = init_variables(model, jax.random.key(seed))
    # B is 0 at the start: moved, so that the adapters are felt.
    return model, {**variables, "adapters": jax.tree.map(lambda x: x + 0.02, init_adapters(model, jax.random.key(1)))}


def logps_of(model, variables, rollout, temperature=1.0):
    return _logps_of(model.apply, variables, rollout, temperature)


@partial(jax.jit, static_argnums=(0, 3))
def _logps_of(apply, variables, rollout, temperature):
    batch = PreferenceBatch(
        prompts=rollout.prompts,
        prompt_lengths=rollout.prompt_lengths,
        responses=rollout.responses[:, None],
        response_lengths=rollout.response_lengths[:, None],
        weights=rollout.weights,
        rows=rollout.rows,
    )
    return response_logps(apply, variables, batch, layout="separate", temperature=temperature)[:, 0]


def make_rollout(model, variables, *, temperature=1.0, seed=0, fillers=0, reference=None) -> Rollout:
    """Random tokens with the log-probabilities that the policy gives them, and a reference apart from it."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, R + 1, B)
    lengths[0] = R
    rollout = Rollout(
        prompts=rng.integers(3, 32, (B, P)).astype(np.int32),
        prompt_lengths=rng.integers(1, P + 1, B).astype(np.int32),
        responses=rng.integers(3, 32, (B, R)).astype(np.int32),
        response_lengths=lengths.astype(np.int32),
        ended=lengths < R,
        sampler_logps=np.zeros((B, R), np.float32),
        reference_logps=np.zeros((B, R), np.float32),
        values=None,
        scores=rng.standard_normal(B).astype(np.float32),
        kl_coefficient=np.full(B, 0.1, np.float32),
        weights=(np.arange(B) < B - fillers).astype(np.float32),
        rows=np.where(np.arange(B) < B - fillers, np.arange(B) + 1, -1).astype(np.int32),
    )
    logps = np.asarray(logps_of(model, variables, rollout, temperature))
    if reference is None:
        noise = 0.3 * rng.standard_normal((B, R)).astype(np.float32)
        reference = np.where(logps != 0, logps + noise, 0)
    return dataclasses.replace(
        rollout, sampler_logps=logps, old_logps=logps, reference_logps=np.asarray(reference, np.float32)
    )


def config(**options) -> PPOConfig:
    rate = options.pop("learning_rate", 1e-2)
    return PPOConfig(optimizer=OptimizerConfig(learning_rate=rate, clip_norm=None), **options)


def start(options: PPOConfig, *, lora=0, **rollout_options):
    model, variables = weights(lora)
    rollout = make_rollout(model, variables, temperature=options.temperature, **rollout_options)
    state = ppo.init_state(model, variables, options)
    return state, ppo.measure(state, rollout, config=options)


def run(options: PPOConfig, state, rollout):
    return quick_jit(lambda s, r: ppo.train_step(s, r, config=options))(state, rollout)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_first_update_sees_ratio_one_and_no_divergence(temperature: float) -> None:
    options = config(epochs=1, temperature=temperature)
    state, rollout = start(options)
    same = dataclasses.replace(rollout, reference_logps=rollout.logps)
    _, metrics = run(options, state, same)
    assert float(metrics["val/ratio"]) == pytest.approx(1, abs=1e-6)
    assert float(metrics["sampling/sampling_logp_difference/max"]) < 1e-5
    assert float(metrics["objective/kl"]) == 0
    assert float(metrics["policy/clipfrac_avg"]) == 0
    assert float(metrics["objective/non_score_reward"]) == pytest.approx(0, abs=1e-6)


def test_the_ratio_moves_and_clipping_acts() -> None:
    options = config(epochs=4, minibatches=2, learning_rate=3e-2)
    state, rollout = start(options)
    _, metrics = run(options, state, rollout)
    assert float(metrics["sampling/sampling_logp_difference/max"]) < 1e-5
    assert float(metrics["val/ratio_var"]) > 1e-3
    assert float(metrics["policy/clipfrac_avg"]) > 0.05
    assert float(metrics["val/clipfrac_avg"]) > 0.05
    assert float(metrics["policy/ratio_q05"]) < 1 < float(metrics["policy/ratio_q95"])


@pytest.mark.slow
def test_updates_stop_at_a_divergence() -> None:
    options = config(epochs=4, learning_rate=3e-2)
    state, rollout = start(options)
    moved, free = run(options, state, rollout)
    halted, stopped = run(dataclasses.replace(options, stop_kl=1e-4), state, rollout)
    once, _ = run(dataclasses.replace(options, epochs=1), state, rollout)
    assert (float(free["policy/updates"]), float(stopped["policy/updates"])) == (1.0, 0.25)
    chex.assert_trees_all_close(halted.trainable, once.trainable, rtol=1e-6)
    assert not np.allclose(*(jax.tree.leaves(s.trainable["params"])[0] for s in (halted, moved)))


def test_the_rollout_is_read_and_not_computed_again() -> None:
    options = config(epochs=1)
    state, rollout = start(options)
    other = dataclasses.replace(rollout, old_logps=jnp.where(rollout.logps != 0, rollout.logps - 0.1, 0))
    _, metrics = run(options, state, other)
    assert float(metrics["val/ratio"]) == pytest.approx(np.exp(0.1), rel=1e-5)


def test_rewards_are_shaped_in_the_order_that_is_said() -> None:
    options = config(epochs=1, score_clip=0.5, missing_eos_penalty=1.0)
    state, rollout = start(options, fillers=2)
    _, metrics = run(options, state, rollout)
    real = np.arange(B) < B - 2
    shaped = np.clip(rollout.scores, -0.5, 0.5) - np.where(rollout.ended, 0, 1.0)
    mask = (np.arange(R) < np.asarray(rollout.response_lengths)[:, None]) & real[:, None]
    kl = np.where(mask, rollout.logps - rollout.reference_logps, 0).sum(1)
    assert float(metrics["objective/scores"]) == pytest.approx(rollout.scores[real].mean(), rel=1e-5)
    assert float(metrics["objective/kl"]) == pytest.approx(kl[real].mean(), rel=1e-4)
    assert float(metrics["objective/rlhf_reward"]) == pytest.approx((shaped - 0.1 * kl)[real].mean(), rel=1e-4)
    assert float(metrics["val/num_eos_tokens"]) == (np.asarray(rollout.ended) & real).sum()


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_a_constant_reward_stays_finite(advantage) -> None:
    options = config(epochs=1, advantage=advantage, whiten_advantages=True, kl_coefficient=0.0, layout="separate")
    state, rollout = start(options)
    flat = dataclasses.replace(rollout, scores=np.full(B, 0.7, np.float32), kl_coefficient=np.zeros(B, np.float32))
    new, metrics = run(options, state, flat)
    chex.assert_tree_all_finite(new.trainable)
    assert np.isfinite(float(metrics["loss"]))


def test_updates_on_one_token_have_no_variance_to_report() -> None:
    options = config(epochs=1, minibatches=8, value="stopped")
    state, rollout = start(options)
    short = dataclasses.replace(rollout, response_lengths=np.where(np.arange(B) < 7, 1, R).astype(np.int32))
    for name, ready, several in (("some", short, 1), ("none", jax.tree.map(lambda x: x[:1], short), 0)):
        new, metrics = run(dataclasses.replace(options, minibatches=len(ready.rows)), state, ready)
        assert int(new.step) == 1, name
        kept = defined({key: float(value) for key, value in metrics.items() if value.ndim == 0})
        assert float(metrics["weights/val/ratio_var"]) == several
        assert ("val/ratio_var" in kept) == bool(several)
        assert np.isfinite(list(kept.values())).all(), name


@pytest.mark.parametrize(
    ("value", "lora"),
    [("separate", 0), ("shared", 0), ("stopped", 0), pytest.param("separate", 2, marks=pytest.mark.slow)],
)
def test_value_models(value, lora: int) -> None:
    options = config(epochs=2, value=value)
    state, rollout = start(options, lora=lora)
    chex.assert_trees_all_close(rollout.values, jnp.zeros((B, R)))
    new, metrics = run(options, state, rollout)
    after = ppo.measure(new, rollout, config=options).values
    assert float(jnp.max(jnp.abs(after))) > 0
    assert float(metrics["loss/value_avg"]) > 0
    if lora:
        assert set(state.frozen) == {"params"}
        kept = jax.tree.map(lambda x: x.shape, state.trainable)
        assert not any("embed" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(kept))
    # Without a policy gradient, does the trunk move?
    quiet = dataclasses.replace(rollout, scores=np.zeros(B, np.float32), kl_coefficient=np.zeros(B, np.float32))
    head = jax.tree.map(lambda x: x + 0.1, state.trainable["heads" if value != "separate" else "value"])
    warm = dataclasses.replace(
        state, trainable={**state.trainable, ("heads" if value != "separate" else "value"): head}
    )
    quiet = dataclasses.replace(quiet, values=jnp.zeros((B, R)))
    flat = dataclasses.replace(options, epochs=1, whiten_advantages=False)
    later, _ = run(flat, warm, quiet)
    name = "adapters" if lora else "params"
    moved = [
        float(jnp.max(jnp.abs(a - b)))
        for a, b in zip(*(jax.tree.leaves(s.trainable[name]) for s in (warm, later)), strict=True)
    ]
    assert (max(moved) > 0) == (value == "shared")


def test_a_reward_model_as_the_beginning_of_the_values() -> None:
    options = config(epochs=1)
    model, variables = weights()
    _, judge = weights(seed=3)
    judge = {**judge, "heads": {"score": {"kernel": jnp.ones((8, 1))}}}
    state = ppo.init_state(model, variables, options, value=judge)
    rollout = ppo.measure(state, make_rollout(model, variables), config=options)
    assert rollout.values is not None
    assert float(jnp.std(rollout.values)) > 0.1
    with pytest.raises(InputError, match="has no effect"):
        ppo.init_state(model, variables, config(value="shared"), value=judge)


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_accumulation_padding_and_fillers_change_nothing(advantage) -> None:
    group = {} if advantage == "gae" else {"group_size": 2}
    # The toy policy knows whole rows only; what shares a prompt: test_ppo_shared.py.
    group |= {"layout": "separate"}
    options = config(epochs=2, minibatches=2, advantage=advantage, entropy_coefficient=0.01, **group)
    state, rollout = start(options)
    one, metrics = run(options, state, rollout)
    four, same = run(dataclasses.replace(options, accumulate=4), state, rollout)
    chex.assert_trees_all_close(one.trainable, four.trainable, atol=1e-5)
    chex.assert_trees_all_close(metrics, same, atol=1e-4)

    def pad(x):
        return x if x.ndim == 1 else jnp.pad(x, ((0, 0), (0, 3)), constant_values=1)

    wide = jax.tree.map(pad, rollout)
    padded, _ = run(options, state, wide)
    chex.assert_trees_all_close(one.trainable, padded.trainable, atol=1e-5)


def test_not_finite_is_not_learned() -> None:
    options = config(epochs=2)
    state, rollout = start(options)
    scores = np.array(rollout.scores)
    scores[2] = np.nan
    new, metrics = run(options, state, dataclasses.replace(rollout, scores=scores))
    chex.assert_trees_all_equal(new.trainable, state.trainable)
    assert int(new.step) == 0
    assert [r for r in np.asarray(metrics["rows/nonfinite"]) if r >= 0] == [3]


def test_nothing_is_learned_after_an_update_that_is_not_finite() -> None:
    """The first update, at an absurd rate, is made; the second finds no finite gradient any more."""
    options = config(epochs=3, learning_rate=1e38)
    state, rollout = start(options)
    new, metrics = run(options, state, rollout)
    once, _ = run(dataclasses.replace(options, epochs=1), state, rollout)
    chex.assert_trees_all_equal((new.trainable, new.opt_state), (once.trainable, once.opt_state))
    assert not np.isfinite(float(metrics["grad_norm"]))
    assert float(metrics["policy/updates"]) == pytest.approx(1 / 3)
    assert (int(new.step), int(once.step)) == (0, 1)


def test_bad_rollouts_are_refused() -> None:
    options = config(minibatches=3)
    state, rollout = start(options)
    with pytest.raises(InputError, match=r"does not split into --ppo\.minibatches 3"):
        ppo.train_step(state, rollout, config=options)
    with pytest.raises(InputError, match="no values"):
        ppo.train_step(state, dataclasses.replace(rollout, values=None), config=config())
    with pytest.raises(InputError, match="groups of 3"):
        ppo.train_step(state, rollout, config=config(advantage="rloo", group_size=3))


@pytest.mark.slow
def test_devices_change_nothing() -> None:
    options = config(epochs=2)
    model = Llama(dataclasses.replace(SHAPE, num_kv_heads=2))
    rollout = make_rollout(model, init_variables(model, jax.random.key(0)))
    results = []
    for mesh in (make_mesh(1, 1, 1, devices=jax.devices()[:1]), make_mesh(2, 2, 2)):
        placed = init_variables(model, jax.random.key(0), mesh=mesh)
        with jax.set_mesh(mesh):
            state = ppo.init_state(model, placed, options)
        ready = Replicated(partial(ppo.measure, config=options), mesh)(state, put_batch(mesh, rollout))
        new, metrics = ppo.jit_train_step(options, mesh)(state, ready)
        results.append(jax.device_get((new.trainable, metrics)))
    chex.assert_trees_all_close(*results, atol=2e-5)


# ---------------------------------------------------------------- PyTorch


def test_one_update_is_pytorch_s(tmp_path) -> None:
    """Loss parts and gradient norm of one update, with transformers' Llama and the losses written out in torch."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from dpo_jax.weights.pretrained import load_pretrained

    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
        )
    )  # fmt: skip
    hf.save_pretrained(tmp_path)
    model, variables = load_pretrained(str(tmp_path))
    options = config(epochs=1, temperature=0.8, value="shared", value_coefficient=0.3, entropy_coefficient=0.02)
    rollout = make_rollout(model, variables, temperature=0.8)
    state = ppo.init_state(model, variables, options)
    rng = np.random.default_rng(5)
    kernel = 0.2 * rng.standard_normal((16, 1)).astype(np.float32)
    state = dataclasses.replace(
        state, trainable={**state.trainable, "heads": {"value": {"kernel": jnp.asarray(kernel)}}}
    )
    mask = np.arange(R) < rollout.response_lengths[:, None]
    old_values = np.where(mask, rng.standard_normal((B, R)), 0).astype(np.float32)
    # As if the policy had moved since it sampled: some ratios are clipped.
    old = np.where(mask, rollout.logps + 0.3 * rng.standard_normal((B, R)), 0).astype(np.float32)
    rollout = dataclasses.replace(rollout, values=old_values, old_logps=old)
    _, metrics = run(options, state, rollout)

    # ---- the same in torch and plain numpy, one sequence at a time
    rewards = np.where(mask, -0.1 * (old - rollout.reference_logps), 0)
    rewards[np.arange(B), rollout.response_lengths - 1] += rollout.scores
    advantages = np.zeros((B, R))
    for i, n in enumerate(rollout.response_lengths):
        running = 0.0
        for t in reversed(range(n)):
            following = old_values[i, t + 1] if t + 1 < n else 0.0
            running = rewards[i, t] + following - old_values[i, t] + 0.95 * running
            advantages[i, t] = running
    returns = torch.tensor((advantages + old_values)[mask])
    flat = advantages[mask]
    whitened = torch.tensor((flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8))
    head = torch.tensor(kernel, requires_grad=True)
    logps, values, entropies = [], [], []
    for i, n in enumerate(rollout.response_lengths):
        p = rollout.prompt_lengths[i]
        ids = torch.tensor([[*rollout.prompts[i, :p].tolist(), *rollout.responses[i, :n].tolist()]])
        out = hf(ids, output_hidden_states=True)
        log_p = torch.log_softmax(out.logits[0, p - 1 : -1].double() / 0.8, dim=-1)
        logps.append(log_p[torch.arange(n), ids[0, p:]])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
        values.append((out.hidden_states[-1][0, p - 1 : -1] @ head)[:, 0])
    new, value = torch.cat(logps), torch.cat(values)
    ratio = torch.exp(new - torch.tensor(old[mask]))
    policy = torch.maximum(-whitened * ratio, -whitened * ratio.clamp(0.8, 1.2)).mean()
    before = torch.tensor(old_values[mask])
    near = torch.clamp(value, before - 0.2, before + 0.2)
    value_part = 0.5 * torch.maximum((value - returns) ** 2, (near - returns) ** 2).mean()
    entropy = torch.cat(entropies).mean()
    loss = policy + 0.3 * value_part - 0.02 * entropy
    loss.backward()
    gradients = [p.grad for p in hf.parameters()] + [head.grad]
    norm = torch.sqrt(sum((g**2).sum() for g in gradients))
    expected = {
        "loss/policy_avg": policy, "loss/value_avg": value_part, "policy/entropy_avg": entropy, "loss": loss,
        "grad_norm": norm,
    }  # fmt: skip
    for name, figure in expected.items():
        assert float(metrics[name]) == pytest.approx(float(figure.detach()), rel=1e-4), name
    assert 0 < float(metrics["policy/clipfrac_avg"]) < 1
