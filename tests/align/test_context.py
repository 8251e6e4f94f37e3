"""Sequences split over devices (`--mesh.context`): the losses and gradients of one device, whatever is trained."""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from pairs import TINY, make_batch, model_and_variables, with_sgd
from windows import make_sequences, packed

from dpo_jax.align import dpo, ppo, reward, sft
from dpo_jax.config import (
    DPOConfig,
    DSFTRun,
    GenerateRun,
    MeshConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
    SampleConfig,
    SFTConfig,
)
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh, put_batch
from dpo_jax.model import attention_xla
from dpo_jax.sample import generate
from dpo_jax.types import Rollout
from dpo_jax.weights.huggingface.heads import as_reward_model

OPTIMIZER = OptimizerConfig(learning_rate=2e-3)
WINDOWED = dataclasses.replace(TINY, sliding_window=9)
MIXED = {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}
LONG = {"data": 2, "fsdp": 1, "context": 4}
PAIRS = partial(make_batch, 8, prompt=16, response=16)


def rollout(seed: int = 0) -> Rollout:
    """Random responses, with made-up numbers of the policy that sampled them."""
    batch, rng = make_batch(8, prompt=16, response=16, responses=1, seed=seed), np.random.default_rng(seed)
    shape = (8, 16)
    return Rollout(
        prompts=batch.prompts,
        prompt_lengths=batch.prompt_lengths,
        responses=batch.responses[:, 0],
        response_lengths=batch.response_lengths[:, 0],
        ended=np.ones(8, bool),
        sampler_logps=rng.normal(-4, 0.1, shape).astype(np.float32),
        old_logps=rng.normal(-4, 0.1, shape).astype(np.float32),
        reference_logps=rng.normal(-4, 0.1, shape).astype(np.float32),
        values=rng.normal(0, 1, shape).astype(np.float32),
        scores=rng.normal(0, 1, 8).astype(np.float32),
        kl_coefficient=np.full(8, 0.05, np.float32),
        weights=np.ones(8, np.float32),
        rows=np.arange(8, dtype=np.int32),
    )


def trained(module: Any, config: Any, batch: Any, mesh: Any, shape: Any = TINY, lora: int = 0, **fields: Any) -> Any:
    """(loss, gradients) of one step of plain gradient descent."""
    model, variables = model_and_variables(shape, mesh=mesh, lora=lora, noise=0.3, **fields)
    if module is reward:
        model, variables = as_reward_model(model, variables)
    state = module.init_state(model, variables, config)
    state = with_sgd(state)
    before = jax.device_get(state.trainable)
    after, metrics = module.jit_train_step(config, mesh)(state, put_batch(mesh, batch))
    found = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, jax.device_get(after.trainable))
    return float(metrics["loss"]), found


CASES = {
    "dpo, shared prompts": (dpo, DPOConfig(reference="live", optimizer=OPTIMIZER), PAIRS(), LONG, {}),
    "dpo, separate, adapters": (
        dpo,
        DPOConfig(reference="live", layout="separate", optimizer=OPTIMIZER),
        PAIRS(),
        MIXED,
        {"lora": 4, "remat": "offload"},
    ),
    "sft, packed, window": (
        sft,
        SFTConfig(optimizer=OPTIMIZER),
        packed(make_sequences(20), 8, 24),
        MIXED,
        {"shape": WINDOWED},
    ),
    "reward": (reward, RewardConfig(optimizer=OPTIMIZER), PAIRS(), LONG, {}),
    # PPO's updates are scaled by the rate beside plain gradient descent, too.
    "ppo, separate critic": (
        ppo,
        PPOConfig(optimizer=OptimizerConfig(learning_rate=1.0), epochs=1, minibatches=1),
        rollout(),
        LONG,
        {},
    ),
}


QUICK = "dpo, shared prompts"


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=n, marks=() if n == QUICK else pytest.mark.slow) for n, case in CASES.items()]
)
def test_the_loss_and_gradients_of_one_device(case):
    module, config, batch, sizes, options = case
    one = trained(module, config, batch, make_mesh(devices=jax.devices()[:1]), **options)
    many = trained(module, config, batch, make_mesh(**sizes), **options)
    assert one[0] == pytest.approx(many[0], rel=2e-5)
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(many[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(a).max(), 1e-6) + 1e-6)


@pytest.mark.slow
def test_four_thousand_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair of 4,096 tokens in one sequence over eight devices; attention goes through its queries in pieces."""
    monkeypatch.setattr(attention_xla, "SCORES", 2**22)
    shape = dataclasses.replace(TINY, num_layers=1, num_heads=8, head_dim=4, max_position=2**12)
    batch = make_batch(1, prompt=2**10, response=3 * 2**9)
    config = DPOConfig(reference="live", optimizer=OPTIMIZER)
    one = trained(dpo, config, batch, make_mesh(devices=jax.devices()[:1]), shape=shape, remat="full")
    many = trained(dpo, config, batch, make_mesh(1, 1, 1, 8), shape=shape, remat="full")
    assert one[0] == pytest.approx(many[0], rel=1e-4)


@pytest.mark.slow
def test_no_device_holds_the_states_of_a_whole_sequence():
    """Of the compiled step: hidden states and logits only for a device's own piece."""
    shape = dataclasses.replace(TINY, hidden_size=40, vocab_size=72)
    model, variables = model_and_variables(shape, mesh=(mesh := make_mesh(1, 1, 1, 4, devices=jax.devices()[:4])))
    config = DPOConfig(reference="live", optimizer=OPTIMIZER)
    batch = make_batch(1, prompt=64, response=64)
    compiled = dpo.jit_train_step(config, mesh).lower(dpo.init_state(model, variables, config), put_batch(mesh, batch))
    shapes = re.findall(r"\bf32\[([\d,]+)\]", compiled.compile().as_text())
    sizes = {tuple(map(int, one.split(","))) for one in shapes}
    assert any(40 in one and 48 in one for one in sizes)  # 192 tokens over four devices
    assert not any(40 in one and (192 in one or 128 in one) for one in sizes)


def test_uneven_sizes_are_refused_with_those_that_fit():
    mesh = make_mesh(1, 1, 1, 8)
    with pytest.raises(InputError, match=r"--mesh.context 8: 4 attention heads .* may be 1, 2, 4$"):
        model_and_variables(mesh=mesh)
    four = make_mesh(2, 1, 1, 4)
    model, variables = model_and_variables(mesh=four)
    config = DPOConfig(optimizer=OPTIMIZER)
    step = dpo.jit_train_step(config, four)
    with pytest.raises(InputError, match=r"sequences of 18 tokens .* may be 1, 2, 3, 6, 9, 18\b"):
        step(dpo.init_state(model, variables, config), put_batch(four, make_batch(8, prompt=6, response=6)))
    for refused in (partial(GenerateRun, prompt="p"), partial(DSFTRun, prompts="p.jsonl", out="o")):
        with pytest.raises(InputError, match=r"--mesh.context 2 has no effect: this command splits no sequence"):
            refused(model="m", mesh=MeshConfig(context=2))


@pytest.mark.slow
def test_sampling_takes_the_devices_of_the_axis_for_rows():
    prompts, drawn = [[1, 2, 3], [4, 5], [6]], []
    for sizes in ({"data": 1, "fsdp": 2, "context": 4}, {"data": 1, "fsdp": 8}):
        mesh = make_mesh(**sizes)
        model, variables = model_and_variables(mesh=mesh)
        drawn.append(generate(model, variables, prompts, jax.random.key(0), config=SampleConfig(6), mesh=mesh))
    np.testing.assert_array_equal(drawn[0].tokens, drawn[1].tokens)
