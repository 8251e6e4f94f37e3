"""Steps on windows of real tokens: the losses and gradients of whole sequences, and nothing of padding."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import TINY, gradients, make_batch, model_and_variables, pad, quick_jit, with_sgd

from dpo_jax.align import dpo, reward
from dpo_jax.config import DPOConfig, OptimizerConfig, RewardConfig
from dpo_jax.data.sets.group_packing import Packing, pack_batch
from dpo_jax.mesh import make_mesh, put_batch
from dpo_jax.model.variables import shardings
from dpo_jax.types import PreferenceBatch, Windows

KTO = ((0, 2), (2, 3))
LIVE = DPOConfig(reference="live", nll_coefficient=0.1)


@functools.cache
def weights(lora: int) -> tuple[Any, Any]:
    return model_and_variables(lora=lora, noise=0.3)


@pytest.fixture(scope="module")
def adapted() -> Any:
    """A state, of one reference as of another: its base."""
    return start(*weights(4))


@pytest.fixture(scope="module")
def small() -> Any:
    return model_and_variables(dataclasses.replace(TINY, num_layers=1))


@pytest.fixture(scope="module")
def small_state(small: Any) -> Any:
    return start(*small)


@pytest.fixture(scope="module")
def full() -> tuple[Any, Any, Any]:
    """(model, variables, state)."""
    return *weights(0), start(*weights(0))


def start(model: Any, variables: Any, config: Any = LIVE, algorithm: Any = dpo) -> Any:
    return with_sgd(algorithm.init_state(model, variables, config))


@functools.cache
def step_of(config: Any, algorithm: Any) -> Callable[..., Any]:
    return quick_jit(algorithm.train_step, config=config)


def run(state: Any, batch: PreferenceBatch, config: Any, algorithm: Any = dpo) -> tuple[Any, Any]:
    """(metrics, gradients) of one step."""
    after, metrics = step_of(config, algorithm)(state, batch)
    return metrics, gradients(state, after)


def assert_same(windows: tuple[Any, Any], separate: tuple[Any, Any]) -> None:
    """Losses to 1e-5 and gradients to 1e-5 of their norm, in float32."""
    chex.assert_trees_all_close(windows[0], separate[0], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(windows[1], separate[1], rtol=1e-4, atol=1e-5 * float(separate[0]["grad_norm"]))


def with_a_filler(batch: PreferenceBatch) -> PreferenceBatch:
    """Its third row does not count."""
    weights = batch.weights.copy()
    weights[2] = 0
    return dataclasses.replace(batch, weights=weights)


@pytest.mark.parametrize("windows", [1, 2, 8])
@pytest.mark.parametrize("reference", ["live", "cached"])
def test_steps_equal_those_of_whole_sequences(adapted: Any, reference: Any, windows: int) -> None:
    batch, config = with_a_filler(make_batch()), dataclasses.replace(LIVE, reference=reference)
    separate = run(adapted, batch, dataclasses.replace(config, layout="separate"))
    assert_same(run(adapted, pack_batch(batch, Packing(windows)), config), separate)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_full_weights_with_accumulation_and_any_remat(full: Any, remat: Any) -> None:
    model, variables, state = full
    batch = with_a_filler(make_batch())
    separate = run(state, batch, dataclasses.replace(LIVE, layout="separate"))
    packed = pack_batch(batch, Packing(4))
    state = start(model.clone(remat=remat), variables)
    assert_same(run(state, packed, dataclasses.replace(LIVE, accumulate=2)), separate)


def test_kto_packs_mismatched_responses_apart(adapted: Any) -> None:
    batch = make_batch(responses=3)
    lengths = batch.response_lengths.copy()
    lengths[[0, 4], 1] = lengths[3, 0] = lengths[5, 2] = 0
    batch = dataclasses.replace(batch, response_lengths=lengths)
    config = DPOConfig(loss="kto", reference="live")
    separate = run(adapted, batch, dataclasses.replace(config, layout="separate"))
    packed = pack_batch(batch, Packing(2, KTO))
    assert_same(run(adapted, packed, dataclasses.replace(config, accumulate=2)), separate)


def test_reference_log_probabilities_of_every_span(small: Any) -> None:
    model, variables = small
    batch, config = make_batch(responses=3), DPOConfig()
    of = quick_jit(lambda b: dpo.reference_logps(model.apply, variables, b, config=config))
    np.testing.assert_allclose(of(pack_batch(batch, Packing(2, KTO))), of(batch), rtol=1e-5)


@pytest.mark.parametrize("options", [{"ld_alpha": 0.5}, {"use_weighting": True}, {"mask_format_tokens": True}], ids=str)
def test_what_is_summed_may_be_changed(small_state: Any, options: Any) -> None:
    config = dataclasses.replace(LIVE, **options)
    separate = run(small_state, make_batch(), dataclasses.replace(config, layout="separate"))
    assert_same(run(small_state, pack_batch(make_batch(), Packing(2)), config), separate)


def test_reward_models_of_several_replies(small: Any) -> None:
    model, variables = small
    batch = dataclasses.replace(make_batch(responses=4), format_masks=None, reference_logps=None)
    lengths = batch.response_lengths.copy()
    lengths[1, 3] = lengths[4, 2] = 0
    batch = dataclasses.replace(batch, response_lengths=lengths)
    config = RewardConfig(layout="separate", centering=0.1)
    state = start(model, variables, config, reward)
    separate = run(state, batch, config, reward)
    packed = pack_batch(batch, Packing(4))
    assert_same(run(state, packed, RewardConfig(centering=0.1, accumulate=2), reward), separate)


def poisoned(windows: Windows, lengths: np.ndarray, response: int) -> Windows:
    """With other valid numbers wherever an index means nothing. `lengths`: of the batch's responses, [B, K]."""
    random = np.random.default_rng(0)

    def junk(x: np.ndarray, real: np.ndarray, below: int) -> np.ndarray:
        return np.where(real, x, random.integers(0, below, x.shape)).astype(np.int32)

    W, T = windows.source.shape
    real = (np.arange(response) < lengths[..., None]).reshape(W, -1)
    read = np.arange(windows.reads.shape[1]) < real.sum(axis=1, keepdims=True)
    views = windows.views
    at = [np.arange(x.shape[2]) < n[..., None] for x, n in zip(views.places, views.lengths, strict=True)]
    whole = len(views.places) - len(views.tails)
    asked = [n - start for n, start in zip(views.lengths[whole:], views.starts, strict=True)]
    ends = [np.arange(x.shape[2]) < n[..., None] for x, n in zip(views.tails, asked, strict=True)]
    assert all((~x).any() for x in (windows.real, real, read, *at, *ends))
    rows = int(windows.source.max())
    return windows.replace(
        source=junk(windows.source, windows.real, rows),
        positions=junk(windows.positions, windows.real, 9999),
        reads=junk(windows.reads, read, T),
        targets=junk(windows.targets, read, rows),
        spread=junk(windows.spread, real, windows.reads.shape[1]),
        views=views.replace(
            places=tuple(junk(x, y, T) for x, y in zip(views.places, at, strict=True)),
            tails=tuple(junk(x, y, T) for x, y in zip(views.tails, ends, strict=True)),
            starts=tuple(junk(x, n > 0, T) for x, n in zip(views.starts, views.lengths[whole:], strict=True)),
        ),
    )


def test_nothing_that_stands_at_padding_is_read(small_state: Any) -> None:
    batch = pad(make_batch(), 5, 9)  # which holds ids outside the vocabulary
    packed = pack_batch(batch, Packing(2, multiple=64))
    (windows,) = packed.windows or ()
    other = dataclasses.replace(packed, windows=(poisoned(windows, batch.response_lengths, batch.responses.shape[2]),))
    chex.assert_trees_all_equal(run(small_state, other, LIVE), run(small_state, packed, LIVE))


def test_bfloat16_is_as_near_to_float32_as_whole_sequences_are(full: Any) -> None:
    model, variables, state = full
    batch = make_batch()
    exact, _ = run(state, batch, dataclasses.replace(LIVE, layout="separate"))
    rough = start(model.clone(dtype=jnp.bfloat16), variables)
    separate, g = run(rough, batch, dataclasses.replace(LIVE, layout="separate"))
    windows, h = run(rough, pack_batch(batch, Packing(2)), LIVE)
    for name in ("loss", "logps/chosen", "logps/rejected", "grad_norm"):
        off = abs(float(separate[name] - exact[name]))
        assert abs(float(windows[name] - exact[name])) < 2 * off + 2e-2 * abs(float(exact[name])), name
    norm = float(separate["grad_norm"])
    assert max(np.linalg.norm(a - b) for a, b in zip(*map(jax.tree.leaves, (g, h)), strict=True)) < 0.05 * norm


# ---------------------------------------------------------------- devices

MESHES = [{"fsdp": 4, "tensor": 2}, {"data": 8, "fsdp": 1}, {"fsdp": 2, "tensor": 2, "context": 2}]


def losses(mesh: Any, *, layout: Any, accumulate: int, lora: int) -> list[float]:
    """Of three steps."""
    rule = OptimizerConfig(learning_rate=2e-3)
    config = dataclasses.replace(LIVE, layout=layout, accumulate=accumulate, optimizer=rule)
    model, variables = weights(lora)
    variables = jax.device_put(jax.tree.map(np.array, variables), shardings(model, mesh))  # the step uses them up
    state, step, out = dpo.init_state(model, variables, config), dpo.jit_train_step(config, mesh), []
    for seed in (0, 2, 3):  # whose windows have one shape
        batch = make_batch(16, seed=seed)
        if layout == "windows":
            batch = pack_batch(batch, Packing(8))
        state, metrics = step(state, put_batch(mesh, batch))
        out.append(float(metrics["loss"]))
    return out


@pytest.fixture(scope="module")
def of_whole_sequences() -> dict[int, list[float]]:
    one = make_mesh(devices=jax.devices()[:1])
    return {lora: losses(one, layout="separate", accumulate=1, lora=lora) for lora in (0, 4)}


@pytest.mark.parametrize(
    ("sizes", "accumulate", "lora"),
    [
        (MESHES[0], 2, 0),
        pytest.param(MESHES[0], 1, 4, marks=pytest.mark.slow),
        pytest.param(MESHES[1], 1, 0, marks=pytest.mark.slow),
        (MESHES[2], 2, 4),
    ],
    ids=str,
)
def test_any_mesh_gives_the_losses_of_whole_sequences_on_one_device(
    sizes: dict[str, int], accumulate: int, lora: int, of_whole_sequences: Any
) -> None:
    got = losses(make_mesh(**sizes), layout="windows", accumulate=accumulate, lora=lora)
    np.testing.assert_allclose(got, of_whole_sequences[lora], atol=1e-5)
