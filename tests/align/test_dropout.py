"""Dropout of what adapters read: which units fall, and where none do."""

import dataclasses
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import gradients, make_batch, model_and_variables, quick_jit, with_sgd

from dpo_jax.align import dpo
from dpo_jax.config import OPEN, DPOConfig, GRPORun, LoraConfig
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh, put_batch
from dpo_jax.model import dropout

PLAIN = DPOConfig(reference="live", layout="shared")
DROPS = dataclasses.replace(PLAIN, dropout=0.25, dropout_seed=3)


@pytest.fixture(scope="module")
def adapted() -> Any:
    return model_and_variables(lora=2, noise=0.3)


def run(adapted: Any, config: DPOConfig, at: int = 0) -> tuple[Any, Any]:
    """Metrics and gradients of the step `at`."""
    state = with_sgd(dpo.init_state(*adapted, config))
    state = dataclasses.replace(state, step=jnp.int32(at))
    after, metrics = quick_jit(dpo.train_step, config=config)(state, make_batch())
    return metrics, gradients(state, after)


def test_a_share_falls_and_the_mean_stays() -> None:
    adapters = {"layers": {"q": {"lora_a": jnp.zeros((2, 16, 2))}, "v": {"lora_a": jnp.zeros((2, 16, 2))}}}
    key, rows = jax.random.key(0), jnp.arange(64)
    made = dropout.collection(adapters, 0.1, key, rows)["layers"]
    x = jnp.ones((64, 50, 16))
    masks = [np.asarray(dropout.dropped(x, one["rows"][i], one["rate"][i])) for one in made.values() for i in (0, 1)]
    for mask in masks:
        assert set(np.unique(mask)) == {0.0, np.float32(1 / 0.9)}
        assert abs((mask == 0).mean() - 0.1) < 0.005
        assert (np.abs((mask == 0).mean(axis=(0, 1)) - 0.1) < 0.03).all()
        assert (np.abs((mask == 0).mean(axis=(1, 2)) - 0.1) < 0.06).all()
    both = [(a == 0) & (b == 0) for a, b in itertools.pairwise(masks)]  # apart in each layer and matrix
    assert all(abs(x.mean() - 0.01) < 0.003 for x in both)
    some = dropout.collection(adapters, 0.1, key, rows[5:7])["layers"]["q"]["rows"]
    np.testing.assert_array_equal(some, made["q"]["rows"][:, 5:7])


def test_the_same_units_in_micro_batches_and_others_each_step(adapted: Any) -> None:
    metrics, slopes = run(adapted, DROPS)
    assert abs(metrics["loss"] - run(adapted, PLAIN)[0]["loss"]) > 1e-3
    pieces, summed = run(adapted, dataclasses.replace(DROPS, accumulate=4))
    chex.assert_trees_all_close(pieces, metrics, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(summed, slopes, rtol=1e-4, atol=1e-5 * float(metrics["grad_norm"]))
    assert abs(metrics["loss"] - run(adapted, DROPS, at=1)[0]["loss"]) > 1e-4


def test_the_same_units_on_a_mesh(adapted: Any) -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    there = model_and_variables(lora=2, noise=0.3, mesh=mesh)
    _, metrics = dpo.jit_train_step(DROPS, mesh)(dpo.init_state(*there, DROPS), put_batch(mesh, make_batch()))
    alone = run(adapted, DROPS)[0]
    np.testing.assert_allclose(metrics["loss"], alone["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], alone["grad_norm"], rtol=1e-4)


def test_no_evaluation_and_no_reference_drops(adapted: Any) -> None:
    batch = make_batch()
    plain, drops = (
        quick_jit(dpo.eval_step, config=config)(dpo.init_state(*adapted, config), batch) for config in (PLAIN, DROPS)
    )
    chex.assert_trees_all_equal(plain, drops)
    # The reference of a step that drops is the base: u and the change since it differ by the policy alone.
    metrics = run(adapted, DROPS)[0]
    gap = metrics["logps/chosen"] - metrics["logps/chosen_change"]
    still = run(adapted, PLAIN)[0]
    np.testing.assert_allclose(gap, still["logps/chosen"] - still["logps/chosen_change"], rtol=1e-5)


def test_refused() -> None:
    with pytest.raises(InputError, match=r"--lora.dropout"):
        LoraConfig(dropout=0.1)
    with pytest.raises(InputError, match=r"--lora.dropout"):
        LoraConfig(rank=2, dropout=1.0)
    with pytest.raises(InputError, match=r"--lora.dropout does not go with PPO"):
        GRPORun(**OPEN, reward="vader", lora=LoraConfig(rank=2, dropout=0.1))
