"""Responses that share a prompt in PPO's step, or a window, give the numbers of whole rows, however they are cut."""

import dataclasses
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pairs import quick_jit

from dpo_jax.align import ppo, update
from dpo_jax.config import Layout, LoraConfig, OptimizerConfig, PPOConfig
from dpo_jax.mesh import Replicated, make_mesh, put_batch
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.model.variables import init_adapters, init_variables
from dpo_jax.train.rollout_packing import RolloutPacking
from dpo_jax.types import Rollout

SHAPE = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)
B, K, P, R = 16, 4, 7, 6


def rollout_of(*, turns: bool = False) -> Rollout:
    """Four groups of four ragged responses with a filler; `turns`: an environment speaks in them."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, R + 1, B).astype(np.int32)
    mask = np.arange(R) < lengths[:, None]
    logps = np.where(mask, -rng.uniform(1, 4, (B, R)), 0).astype(np.float32)
    own = rng.random((B, R)) < 0.6
    own[np.arange(B), lengths - 1] = True
    return Rollout(
        prompts=np.repeat(rng.integers(0, 32, (B // K, P)), K, axis=0).astype(np.int32),
        prompt_lengths=np.repeat(rng.integers(1, P + 1, B // K), K).astype(np.int32),
        responses=rng.integers(0, 32, (B, R)).astype(np.int32),
        response_lengths=lengths,
        ended=lengths < R,
        sampler_logps=logps,
        reference_logps=np.zeros((B, R), np.float32),
        values=None,
        scores=rng.standard_normal(B).astype(np.float32),
        kl_coefficient=np.full(B, 0.1, np.float32),
        weights=(np.arange(B) < B - 1).astype(np.float32),
        rows=np.where(np.arange(B) < B - 1, np.arange(B), -1).astype(np.int32),
        own=own if turns else None,
    )


@cache
def policy(lora: int, mesh=None):
    model = Llama(SHAPE, lora=LoraConfig(rank=lora))
    variables = init_variables(model, jax.random.key(0), mesh=mesh)
    if lora:
        variables["adapters"] = jax.tree.map(lambda x: x + 0.02, init_adapters(model, jax.random.key(1)))
    return model, variables


def result(config: PPOConfig, rollout: Rollout, lora: int = 0, mesh=None, piece: int | None = None, packs=False):
    """What the reference pass, the measurement (so many rows at once) and the updates give; the weights as a sum of
    gradients. `packs`: whether the updates are to have windows.
    """
    model, variables = policy(lora, mesh)
    other = {**variables, "params": jax.tree.map(lambda x: 1.1 * x, variables["params"])}
    state = ppo.init_state(model, variables, config)
    state = dataclasses.replace(state, tx=optax.sgd(1.0), opt_state=optax.sgd(1.0).init(state.trainable))
    head = "value" if config.critic == "separate" else "heads"
    if config.critic is not None:
        moved = jax.tree.map(lambda x: x + 0.05, state.trainable[head])
        state = dataclasses.replace(state, trainable={**state.trainable, head: moved})

    def measure(state, other, rollout):
        reference = ppo.reference_logps(model.apply, other, rollout, config)
        ready = ppo.measure(state, rollout, config=config)
        return reference, ready.old_logps, ready.values

    packing = RolloutPacking(config, mesh, piece or B)
    order, parts = packing.pieces(rollout)
    measured = quick_jit(measure) if mesh is None else Replicated(measure, mesh)
    found = [jax.device_get(measured(state, other, put_batch(mesh, part))) for part in parts]
    reference, old, values = (
        None if x[0] is None else np.concatenate(x)[np.argsort(order)] for x in zip(*found, strict=True)
    )
    ready = dataclasses.replace(rollout, reference_logps=reference, old_logps=old, values=values)
    packed = packing.with_updates(ready, int(state.step))
    assert (packed.updates is not None) == packs
    step = partial(ppo.train_step, config=config)
    new, metrics = (quick_jit(step) if mesh is None else Replicated(step, mesh))(state, put_batch(mesh, packed))
    rate = config.optimizer.learning_rate
    gradients = jax.tree.map(lambda a, b: np.asarray(a - b) / rate, state.trainable, new.trainable)
    return jax.device_get((gradients, (ready.reference_logps, ready.old_logps, ready.values), metrics))


def config(**options) -> PPOConfig:
    optimizer = OptimizerConfig(learning_rate=0.1, clip_norm=None)
    return PPOConfig(optimizer=optimizer, group_size=K, temperature=0.9, entropy_coefficient=0.01, **options)


@cache
def in_one(options: PPOConfig, lora: int, turns: bool):
    return result(options, rollout_of(turns=turns), lora)


def whole_rows(options: PPOConfig, lora: int = 0, *, turns: bool = False):
    """What `result` gives of whole rows without micro-batches, which several tests compare theirs with."""
    return in_one(dataclasses.replace(options, accumulate=1, layout="separate"), lora, turns)


def close(one, other) -> None:
    for a, b in zip(one[:2], other[:2], strict=True):
        chex.assert_trees_all_close(a, b, atol=1e-5)
    chex.assert_trees_all_close(one[2], other[2], atol=1e-5, rtol=1e-5)
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(one[0])) > 1e-2


CASES = {
    "separate values, two epochs": ({"epochs": 2, "value": "separate"}, 0, False),
    "values on the policy's trunk": ({"epochs": 2, "value": "shared", "minibatches": 2}, 0, True),
    "grpo": ({"preset": "grpo", "epochs": 2, "minibatches": 2}, 0, False),
    "rloo": ({"preset": "rloo"}, 0, True),
    "LoRA with values": ({"epochs": 2, "value": "separate"}, 2, False),
}


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        *((case, "windows") for case in CASES),
        ("grpo", "shared"),
        ("values on the policy's trunk", "shared"),
        pytest.param("separate values, two epochs", "shared", marks=pytest.mark.slow),
        pytest.param("rloo", "shared", marks=pytest.mark.slow),
        pytest.param("LoRA with values", "shared", marks=pytest.mark.slow),
    ],
)
def test_shared_prompts_and_windows_give_the_numbers_of_whole_rows(case: str, layout: Layout) -> None:
    options, lora, turns = CASES[case]
    rollout, packs = rollout_of(turns=turns), layout == "windows"
    whole = whole_rows(config(**options), lora, turns=turns)
    close(result(config(layout=layout, **options), rollout, lora, piece=B // 2, packs=packs), whole)


@pytest.mark.parametrize(("accumulate", "packs"), [(2, True), pytest.param(4, False, marks=pytest.mark.slow)])
def test_windows_of_micro_batches(accumulate: int, packs: bool) -> None:
    """Of four groups in two mini-batches, each micro-batch has a window of one; of half a group there is none."""
    options = config(preset="grpo", epochs=2, minibatches=2, accumulate=accumulate)
    close(result(options, rollout_of(), packs=packs), whole_rows(options))


def test_windows_of_lone_responses() -> None:
    options = dataclasses.replace(config(epochs=2, minibatches=2, accumulate=2), group_size=1)
    close(result(options, rollout_of(), packs=True), whole_rows(options))


@pytest.mark.parametrize(
    "accumulate", [4, pytest.param(2, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_micro_batches_keep_what_shares_a_prompt_together(accumulate: int) -> None:
    """Of four groups in two mini-batches, micro-batches hold one group, half a group, a lone response."""
    options = config(preset="grpo", epochs=2, minibatches=2, accumulate=accumulate, layout="shared")
    assert ppo.sharing(options, B, 2 * accumulate) == {2: 4, 4: 2, 8: 1}[accumulate]
    close(result(options, rollout_of()), whole_rows(options))


@pytest.mark.slow
def test_devices_change_nothing() -> None:
    """Two devices split the batch, two each layer, two its heads."""
    options = config(epochs=2, value="separate")
    whole = whole_rows(options)
    close(result(options, rollout_of(), mesh=make_mesh(1, 4, 2), packs=True), whole)
    split = result(dataclasses.replace(options, accumulate=4), rollout_of(), mesh=make_mesh(2, 2, 2))
    close(split, whole)


def test_each_prompt_goes_through_the_layers_once() -> None:
    """The tokens that the model is given: P + K R a group, and K (P + R) in whole rows."""
    seen = []

    def apply(variables, *args, method=None, **_):
        if method == "unembedding":
            return jnp.ones((4, 32))
        seen.append(args[0].size)
        return jnp.ones((*args[0].shape, 4))

    state = ppo.init_state(*policy(0), config(preset="grpo"))
    state = dataclasses.replace(state, apply_fn=apply)
    for layout, tokens in (("shared", B // K * (P + K * R)), ("separate", B * (P + R))):
        seen.clear()
        options = config(preset="grpo", epochs=2, layout=layout)
        jax.eval_shape(partial(ppo.measure, config=options), state, rollout_of())
        ready = dataclasses.replace(rollout_of(), old_logps=jnp.zeros((B, R)))
        jax.eval_shape(partial(ppo.train_step, config=options), state, ready)
        assert set(seen) == {tokens}, layout


def test_how_many_stay_together() -> None:
    assert update.together(64, 8, 8) == 8
    assert update.together(64, 8, 16) == 4
    assert update.together(64, 8, 64) == 1
    assert update.together(48, 6, 16) == 3
    assert update.together(64, 1, 8) == 1


def test_mini_batches_take_whole_groups_where_they_divide() -> None:
    options = config(preset="grpo", epochs=2, minibatches=4)
    orders = [np.asarray(ppo.order(options, step, B)).reshape(2, 4, K) for step in range(3)]
    for order in (order for both in orders for order in both):
        assert sorted(order.ravel().tolist()) == list(range(B))
        assert (order - order[:, :1] == np.arange(K)).all()
    firsts = {tuple(order[:, 0].tolist()) for both in orders for order in both}
    assert len(firsts) > 3, "shuffled in every pass of every step"
