"""The step of supervised fine-tuning on meshes: the same losses. And what the compiled step holds, and how it grows."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import TINY, model_and_variables, quick_jit
from test_dpo_devices import WIDE, shapes_of
from windows import make_sequences, packed

from dpo_jax.align import sft
from dpo_jax.config import OptimizerConfig, SFTConfig
from dpo_jax.mesh import make_mesh, put_batch
from dpo_jax.model import llama, variables as model_variables

EXACT = SFTConfig(optimizer=OptimizerConfig(learning_rate=2e-3))
SAMPLED = dataclasses.replace(EXACT, loss="sampled", negatives=24, proposal="log_uniform", accumulate=2)
FIGURES = ("loss", "grad_norm", "tokens", "target_tokens")


def figures(mesh, config: SFTConfig, lora: int = 0) -> list[dict[str, float]]:
    """The figures of each of four steps on `mesh`; some windows of the batches are empty."""
    model, variables = model_and_variables(mesh=mesh, lora=lora, noise=0.3)
    state, step, out = sft.init_state(model, variables, config), sft.jit_train_step(config, mesh), []
    for i in range(4):
        batch = packed(make_sequences(40, seed=i), 16, 24)
        assert not batch.targets[batch.segments > 0].all()
        state, metrics = step(state, put_batch(mesh, batch))
        out.append({name: float(metrics[name]) for name in FIGURES})
    return out


def assert_same(a: list[dict[str, float]], b: list[dict[str, float]]) -> None:
    assert np.ptp([row["loss"] for row in a]) > 1e-2
    for left, right in zip(a, b, strict=True):
        np.testing.assert_allclose([left[n] for n in FIGURES], [right[n] for n in FIGURES], rtol=2e-5)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"fsdp": 8}, marks=pytest.mark.slow)], ids=str
)
def test_any_mesh_gives_the_figures_of_one_device(sizes):
    one = figures(make_mesh(devices=jax.devices()[:1]), EXACT)
    assert_same(one, figures(make_mesh(**sizes), EXACT))


@pytest.mark.slow
def test_the_sampled_loss_with_adapters_and_accumulation_on_a_mesh():
    one = figures(make_mesh(devices=jax.devices()[:1]), SAMPLED, lora=4)
    assert_same(one, figures(make_mesh(data=2, fsdp=2, tensor=2), SAMPLED, lora=4))


def test_evaluation_on_a_mesh_gives_every_window():
    batch, sums = packed(make_sequences(12), 8, 24), []
    for where in (make_mesh(data=2, fsdp=2, tensor=2), make_mesh(devices=jax.devices()[:1])):
        model, variables = model_and_variables(mesh=where)
        state = sft.init_state(model, variables, EXACT)
        sums.append(jax.device_get(sft.jit_eval_step(EXACT, where)(state, put_batch(where, batch))))
    assert set(sums[0]) == {"nll", "correct", "entropy", "target_tokens"}
    for name, values in sums[0].items():
        assert values.shape == (8,)
        np.testing.assert_allclose(values, sums[1][name], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the compiled step


@pytest.mark.parametrize("loss", ["exact", "sampled"])
def test_no_array_of_batch_time_vocabulary(loss):
    """Neither under that shape nor flattened: no array of the step, forwards or backwards, has so many elements."""
    windows, length = 6, 22
    model, variables = model_and_variables(WIDE)
    config = SFTConfig(loss=loss, negatives=300 if loss == "sampled" else None)
    state = sft.init_state(model, variables, config)
    batch = packed(make_sequences(12, vocab=389), windows, length)
    text = quick_jit(sft.train_step, config=config).lower(state, batch).compile().as_text()
    shapes = shapes_of(text)
    assert (WIDE.hidden_size, 389) in shapes or (389, WIDE.hidden_size) in shapes
    width = 389 if loss == "exact" else 300
    assert max(math.prod(s) for s in shapes if width in s) < windows * length * width
    if loss == "sampled":  # of the whole vocabulary only the head itself
        assert max(math.prod(s) for s in shapes if 389 in s) == 389 * WIDE.hidden_size


def lowered(layers: int) -> str:
    """StableHLO of the step for a model of so many layers, from shapes alone."""
    model = llama.Llama(dataclasses.replace(TINY, num_layers=layers))
    state = sft.init_state(model, model_variables.abstract_variables(model), EXACT)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.asarray(x).dtype), packed(make_sequences(12), 6, 22)
    )
    return jax.jit(partial(sft.train_step, config=EXACT)).lower(state, batch).as_text()


def test_the_program_does_not_grow_with_depth():
    few, many = lowered(4), lowered(32)
    assert len(many.splitlines()) == len(few.splitlines())
    assert len(many) < 1.05 * len(few)
