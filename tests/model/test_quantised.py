"""Weights in 8 and 4 bits: what they come to, and steps that train adapters on them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import TINY, gradients, make_batch, model_and_variables, quick_jit, with_sgd

from dpo_jax.align import dpo
from dpo_jax.config import DPOConfig, LoraConfig, OptimizerConfig
from dpo_jax.data.sets.group_packing import Packing, pack_batch
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh, put_batch
from dpo_jax.model import quantised
from dpo_jax.model.llama import Llama
from dpo_jax.model.quantised import LEVELS, Quantised
from dpo_jax.model.variables import abstract_variables, frozen_copy, shardings

WIDE = dataclasses.replace(TINY, hidden_size=128, intermediate_size=256, num_heads=4, head_dim=32)
KINDS = ["int8", "nf4"]
quantise = jax.jit(quantised.quantise, static_argnums=1)
matrix_of = jax.jit(Quantised.whole, static_argnums=1)


def matrix(rows: int = 192, width: int = 512, seed: int = 0) -> jax.Array:
    return 0.02 * jax.random.normal(jax.random.key(seed), (2, rows, width))


def with_exact_scales(q: Quantised, w: jax.Array) -> np.ndarray:
    """The levels of nf4 times scales that were not quantised again."""
    largest = jnp.max(jnp.abs(w.reshape(*w.shape[:-2], -1, 64, w.shape[-1])), axis=-2)
    plain = dataclasses.replace(
        q,
        scales=jnp.zeros_like(q.scales, shape=largest.shape),
        steps=jnp.zeros_like(q.steps),
        middle=jnp.ones_like(q.middle),
    )
    return np.asarray(
        matrix_of(plain).reshape(*largest.shape[:-1], 64, largest.shape[-1]) * largest[..., None, :]
    ).reshape(w.shape)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(("kind", "bits", "error"), [("int8", 8.5, 0.0065), ("nf4", 4.14, 0.096)])
def test_bits_and_error_of_normal_weights(kind: Any, bits: float, error: float) -> None:
    w = matrix()
    q = quantise(w, kind)
    assert (q.kind, q.shape, q.size) == (kind, w.shape, w.size)
    assert sum(x.nbytes for x in jax.tree.leaves(q)) * 8 / w.size <= bits
    off = np.asarray(matrix_of(q) - w)
    assert 0.8 * error < math.sqrt(np.mean(off**2)) / 0.02 < error
    bf16 = matrix_of(q, jnp.bfloat16)
    assert bf16.dtype == jnp.bfloat16
    np.testing.assert_array_equal(bf16, matrix_of(q).astype(jnp.bfloat16))


def test_blocks_lose_less_than_one_scale_for_each_output() -> None:
    w = matrix(1024)
    scales = jnp.max(jnp.abs(w), axis=-2, keepdims=True) / 127
    by_column = float(jnp.linalg.norm(jnp.round(w / scales) * scales - w))
    assert float(jnp.linalg.norm(matrix_of(quantise(w, "int8")) - w)) < 0.8 * by_column


def test_nf4_takes_the_nearest_level_of_its_block() -> None:
    w = matrix(64, 256)[0]
    q = quantise(w, "nf4")
    largest = np.abs(np.asarray(w)).max(axis=0)
    distance = np.abs(np.asarray(w / largest)[..., None] - np.float32(LEVELS))
    np.testing.assert_allclose(
        with_exact_scales(q, w), np.float32(LEVELS)[distance.argmin(-1)] * largest, rtol=1e-6, atol=0
    )


def test_the_levels_themselves_and_zeros_come_back() -> None:
    levels = jnp.tile(jnp.float32(LEVELS), 4)[:, None] * jnp.float32([1.0, 1.0, 0.0])
    for kind in KINDS:
        q = quantise(levels, kind)
        np.testing.assert_allclose(matrix_of(q), levels, atol=1e-6 if kind == "nf4" else 1 / 254)


def test_narrow_inputs_have_smaller_blocks() -> None:
    q = quantise(matrix(96, 24), "nf4")
    assert q.scales.shape == (2, 3, 24)
    assert float(jnp.abs(matrix_of(q) - matrix(96, 24)).max()) < 0.02


def test_the_same_bits_on_a_mesh() -> None:
    mesh, w = make_mesh(fsdp=2, tensor=2, data=2), matrix(256)
    where = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp", "tensor"))
    there = quantise(jax.device_put(w, where), "nf4")
    chex.assert_trees_all_equal(jax.device_get(there), jax.device_get(quantise(w, "nf4")))


def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed (pip)")
    torch = pytest.importorskip("torch")
    w = matrix()[0]
    ours, given = quantise(w, "nf4"), torch.tensor(np.asarray(w).T.copy())
    plain = functional.dequantize_nf4(*functional.quantize_nf4(given, blocksize=64)).numpy().T
    np.testing.assert_array_equal(with_exact_scales(ours, w), plain)
    nested = functional.quantize_nf4(given, blocksize=64, compress_statistics=True)
    theirs = functional.dequantize_nf4(*nested).numpy().T
    errors = [float(np.linalg.norm(x - np.asarray(w))) for x in (matrix_of(ours), theirs)]
    assert errors[0] <= errors[1]


# ---------------------------------------------------------------- steps


@pytest.fixture(scope="module")
def adapted() -> Any:
    return model_and_variables(WIDE, lora=2, noise=0.3)


def kept(variables: Any, kind: str) -> tuple[Any, Any]:
    """The variables with a quantised base, and with the same base made whole."""
    params = frozen_copy(variables["params"], kind, jnp.float32)
    return {**variables, "params": params}, {**variables, "params": quantised.whole(params)}


def run(model: Any, variables: Any, batch: Any, config: DPOConfig) -> tuple[Any, Any]:
    state = with_sgd(dpo.init_state(model, variables, config))
    after, metrics = quick_jit(dpo.train_step, config=config)(state, batch)
    return metrics, gradients(state, after)


CASES = {"nf4": ("shared", 1, "none"), "int8": ("separate", 2, "dots"), "nf4 in windows": ("windows", 2, "full")}


def case(name: str) -> tuple[DPOConfig, Any]:
    """(config, remat)."""
    layout, accumulate, remat = CASES[name]
    return DPOConfig(reference="live", nll_coefficient=0.1, layout=layout, accumulate=accumulate), remat


@pytest.fixture(scope="module")
def few(adapted: Any) -> Callable[[str], tuple[Any, Any]]:
    """(metrics, gradients) of a case's step on quantised weights."""
    model, variables = adapted

    @functools.cache
    def found(name: str) -> tuple[Any, Any]:
        config, remat = case(name)
        batch = pack_batch(make_batch(), Packing(2)) if config.layout == "windows" else make_batch()
        return run(model.clone(remat=remat), kept(variables, name.split()[0])[0], batch, config)

    return found


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_adapters_on_the_whole_weights(adapted: Any, few: Any, name: str) -> None:
    model, variables = adapted
    config, remat = case(name)
    batch = pack_batch(make_batch(), Packing(2)) if config.layout == "windows" else make_batch()
    whole = run(model.clone(remat=remat), kept(variables, name.split()[0])[1], batch, config)
    chex.assert_trees_all_close(few(name)[0], whole[0], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(few(name)[1], whole[1], rtol=1e-5, atol=1e-5 * float(whole[0]["grad_norm"]))


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_mesh_the_same(adapted: Any, few: Any, kind: str) -> None:
    model, variables = adapted
    (config, remat), mesh = case(kind), make_mesh(data=2, fsdp=2, tensor=2)
    model = model.clone(remat=remat)
    alone, _ = few(kind)
    places = shardings(model, mesh)
    there = jax.device_put(variables, places)
    params = frozen_copy(there["params"], kind, jnp.float32)
    expected = shardings(model, mesh, kind)["params"]["layers"]["self_attn"]["q_proj"]["kernel"]
    held = params["layers"]["self_attn"]["q_proj"]["kernel"]
    assert held.codes.sharding == expected.codes
    assert held.scales.sharding == expected.scales
    assert held.codes.sharding.shard_shape(held.codes.shape)[1:] == tuple(n // 2 for n in held.codes.shape[1:])
    state = dpo.init_state(model, {**there, "params": params}, config)
    _, metrics = dpo.jit_train_step(config, mesh)(state, put_batch(mesh, make_batch()))
    for name in ("loss", "grad_norm", "rewards/margins"):
        np.testing.assert_allclose(metrics[name], alone[name], rtol=2e-5, atol=2e-5)


def test_a_block_on_two_devices_is_refused() -> None:
    model = Llama(TINY, lora=LoraConfig(rank=2))
    with pytest.raises(
        InputError, match=r"kernel/scales \(2, 1, .*: its (embed|heads|mlp) axis of 1 does not divide by 2"
    ):
        shardings(model, make_mesh(fsdp=2, data=4), "nf4")


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_whole_matrix_waits_for_the_backward_pass(remat: Any) -> None:
    held, config = {}, DPOConfig(layout="separate")  # a reference has no backward pass
    for layers in (4, 20):
        shape = dataclasses.replace(WIDE, num_layers=layers, vocab_size=32)
        model = Llama(shape, lora=LoraConfig(rank=1), remat=remat)
        size = 4 * sum(x.size for x in jax.tree.leaves(abstract_variables(model)["params"]["layers"]))
        state = with_sgd(dpo.init_state(model, abstract_variables(model, "nf4"), config))
        batch = make_batch(1, prompt=2, response=2, vocab=32)
        step = jax.jit(dpo.train_step, static_argnames="config").lower(state, batch, config=config).compile()
        held[layers] = size, step.memory_analysis().temp_size_in_bytes
    whole, temporaries = (b - a for a, b in zip(*held.values(), strict=True))
    assert temporaries < 0.2 * whole, (temporaries, whole)


def test_adapters_learn_on_quantised_weights_as_on_whole_ones(adapted: Any) -> None:
    model, variables = adapted
    variables = {**variables, "adapters": jax.tree.map(jnp.array, variables["adapters"])}
    config = DPOConfig(reference="live", beta=0.5, optimizer=OptimizerConfig(learning_rate=5e-3))
    step, ends = quick_jit(dpo.train_step, config=config), {}
    for kind in ("float32", *KINDS):
        params = frozen_copy(variables["params"], kind, jnp.float32)
        state, rows = dpo.init_state(model, {**variables, "params": params}, config), []
        for _ in range(12):
            state, metrics = step(state, make_batch())
            rows.append([float(metrics[name]) for name in ("loss", "rewards/accuracies")])
        ends[kind] = rows
    first, last = ends["float32"][0], ends["float32"][-1]
    assert last[0] < 0.5 * first[0]
    for kind, near in (("int8", 0.02), ("nf4", 0.15)):
        assert ends[kind][-1][0] < 0.5 * ends[kind][0][0], ends
        assert ends[kind][-1][1] > ends[kind][0][1]
        np.testing.assert_allclose(np.array(ends[kind])[:, 0], np.array(ends["float32"])[:, 0], atol=near * first[0])
