"""Two slices, `data` between them: what crosses, counted in the compiled step; and the figures of one mesh."""

from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from pairs import TINY, make_batch, model_and_variables
from test_context import rollout, trained
from windows import make_sequences, packed

from dpo_jax import mesh as meshes
from dpo_jax.align import dpo, ppo, reward, sft
from dpo_jax.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from dpo_jax.mesh import make_mesh, put_batch
from dpo_jax.plan import hlo
from dpo_jax.weights.huggingface.heads import as_reward_model

SLICES = [0] * 4 + [1] * 4
SMALL = 1024
"""Bytes: counts, losses and figures of rows cross too, and PPO's rows, which are dealt anew."""
PAIRS = make_batch(16, prompt=16, response=16)
CASES: dict[str, tuple[Any, Any, Any, int]] = {
    "dpo": (dpo, DPOConfig(reference="live", accumulate=2), PAIRS, 0),
    "dpo, adapters": (dpo, DPOConfig(accumulate=2), PAIRS, 4),
    "sft": (sft, SFTConfig(accumulate=2), packed(make_sequences(40), 16, 24), 0),
    "reward": (reward, RewardConfig(accumulate=2), PAIRS, 0),
    "ppo": (ppo, PPOConfig(epochs=1, minibatches=1), rollout(), 0),
}
QUICK = ("dpo", "dpo, adapters")


def crossing(case: tuple[Any, Any, Any, int], mesh: Any) -> tuple[hlo.Traffic, float]:
    """What the compiled step moves, and the bytes of a device's piece of the gradients."""
    module, config, batch, lora = case
    model, variables = model_and_variables(TINY, mesh=mesh, lora=lora)
    if module is reward:
        model, variables = as_reward_model(model, variables)
    state = module.init_state(model, variables, config)
    lowered = module.jit_train_step(config, mesh).lower(state, put_batch(mesh, batch))
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    return hlo.read_traffic(compiled.as_text(), slices=SLICES), meshes.device_bytes(state.trainable)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_only_gradients_cross_and_once(name: str) -> None:
    """A device sends its own piece once, 2 b (S - 1) / S bytes with S = 2, however many micro-batches there are."""
    found, piece = crossing(CASES[name], make_mesh(data=2, fsdp=4))
    assert found.unknown_loops == 2  # those of `apply_update`, which run once or never
    assert found.collectives["all-reduce", 2, 2].payload == found.collectives["all-reduce", 2, 2].crosses == piece
    assert piece < found.crosses < piece + SMALL


def test_before_they_crossed_once_a_micro_batch() -> None:
    """The same step where the compiler alone decides."""
    one, _ = crossing(CASES["dpo"], make_mesh(data=2, fsdp=4))
    with mock.patch.object(meshes, "sum_over_copies", lambda function, rows: function(rows)):
        before, piece = crossing(CASES["dpo"], make_mesh(data=2, fsdp=4))
    assert before.crosses > 4 * piece > 2 * one.crosses
    counts = [sum(c.count for (_, _, s), c in t.collectives.items() if s > 1) for t in (before, one)]
    assert counts[0] > 10 * counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_gradients_of_one_mesh(name: str) -> None:
    module, config, batch, lora = CASES[name]
    one = trained(module, config, batch, make_mesh(fsdp=8), lora=lora)
    two = trained(module, config, batch, make_mesh(data=2, fsdp=4), lora=lora)
    assert one[0] == pytest.approx(two[0], rel=2e-6)
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(two[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(a).max(), 1e-6) + 1e-6)
