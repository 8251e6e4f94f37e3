"""Weights laid out for sampling: the same text, no weight gathered for a token, a copy that is given up."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest

from dpo_jax.config import LoraConfig, SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.mesh import device_bytes, make_mesh
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.model.variables import init_adapters, init_variables
from dpo_jax.sample import beam_search, engine, generate, prepare, serve, with_layout

SHAPE = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4
)
PROMPTS = [[3, 4, 5, 6], [7, 8], [9, 10, 11], [12]]
DRAWN = SampleConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def split():
    mesh = make_mesh(1, 4, 2)
    model = Llama(SHAPE)
    return model, jax.tree.map(lambda x: 8 * x, init_variables(model, jax.random.key(0), mesh=mesh)), mesh


def gathered_for_a_token(text: str) -> tuple[int, int]:
    """All-gathers in the loop over tokens of a program: of weights (within the model), and of all things."""
    found = re.findall(r' all-gather(?:-start)?\(.*op_name="jit\(_generate\)/while/body/([^"]*)"', text)
    return sum("Llama" in name for name in found), len(found)


def compiled(model, variables, mesh, config: SampleConfig) -> str:
    """The program of `generate`."""
    caught = []
    original = engine._generate

    def lower(*args, **options):
        caught.append(original.lower(*args, **options).compile().as_text())
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_generate", lower)
        weights = prepare(model, variables, config, mesh=mesh)
        generate(model, weights, PROMPTS, jax.random.key(1), config=config, samples=2, mesh=mesh)
    return caught[0]


@pytest.mark.parametrize("weights", [None, "int8"])
def test_no_token_gathers_weights(split, weights) -> None:
    model, variables, mesh = split
    found = {}
    for layout in ("training", "gathered", "tensor"):
        config = dataclasses.replace(DRAWN, layout=layout, weights=weights)
        found[layout] = gathered_for_a_token(compiled(model, variables, mesh, config))
    assert found["training"][0] >= 14, "seven matrices in each of two layers"
    assert found["gathered"][0] == 0
    assert found["tensor"][0] == 0


def test_rows_of_their_own_gather_nothing(split) -> None:
    model, _, _ = split
    mesh = make_mesh(1, 8, 1)
    variables = init_variables(model, jax.random.key(0), mesh=mesh)
    assert gathered_for_a_token(compiled(model, variables, mesh, dataclasses.replace(DRAWN, layout="gathered")))[1] == 0


@pytest.mark.parametrize("layout", ["gathered", "tensor"])
def test_the_same_text(split, layout: Any) -> None:
    model, variables, mesh = split
    laid = dataclasses.replace(DRAWN, layout=layout)
    plain = dataclasses.replace(DRAWN, layout="training")
    key = jax.random.key(1)
    one, other = (
        generate(model, variables, PROMPTS, key, config=config, samples=2, mesh=mesh) for config in (laid, plain)
    )
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)
    ready = prepare(model, variables, laid, mesh=mesh)
    again = generate(model, ready, PROMPTS, key, config=laid, samples=2, mesh=mesh)
    np.testing.assert_array_equal(one.tokens, again.tokens)
    requests = [(i, k) for i in range(4) for k in range(2)]
    served = serve(model, variables, PROMPTS, key, config=laid, requests=requests, rows=8, mesh=mesh)
    for done in (one for some in served for one in some):
        row = 2 * done.request[0] + done.request[1]
        assert done.tokens == np.asarray(one.tokens)[row, : len(done.tokens)].tolist()
    with pytest.raises(InputError, match=f"laid out as {layout}, and config.layout is training"):
        generate(model, ready, PROMPTS, key, config=plain, mesh=mesh)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["gathered", "tensor"])
def test_beams_and_adapters(split, layout: Any) -> None:
    _, variables, mesh = split
    model = Llama(SHAPE, lora=LoraConfig(rank=2))
    adapters = jax.tree.map(lambda x: x + 0.1, init_adapters(model, jax.random.key(1), mesh=mesh))
    variables = {**variables, "adapters": adapters}
    for more in ({}, {"weights": "bfloat16"}):
        texts = []
        for each in (layout, "training"):
            config = SampleConfig(max_new_tokens=6, layout=each, **more)
            texts.append(generate(model, variables, PROMPTS, jax.random.key(1), config=config, mesh=mesh).tokens)
        np.testing.assert_array_equal(*texts)
    found = [
        beam_search(model, variables, PROMPTS, config=SampleConfig(max_new_tokens=6, beams=2, layout=each), mesh=mesh)
        for each in (layout, "training")
    ]
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)


def test_what_fits_is_chosen(split) -> None:
    model, variables, mesh = split
    size = 4.0 * sum(x.size for x in jax.tree.leaves(variables))

    def chosen(limit: float, held: float = 0.0, model=model, variables=variables, mesh=mesh, **options) -> str | None:
        config = SampleConfig(**options)
        return with_layout(config, model, variables, mesh, held=held, limit=limit).layout

    whole = size / 2 / 0.45  # two devices share a layer; half of nine tenths
    assert chosen(whole * 1.01) == "gathered"
    assert chosen(whole * 0.99) == "tensor"
    assert chosen(whole * 1.01, held=0.1 * size) == "tensor"
    assert chosen(whole * 0.26, weights="int8") == "gathered"
    assert chosen(whole * 0.2) == "training"
    assert chosen(1.0, layout="gathered") == "gathered"
    odd = Llama(dataclasses.replace(SHAPE, num_kv_heads=4, num_heads=8))
    assert chosen(whole * 0.99, model=odd) == "training"
    with pytest.raises(InputError, match=r"key/value heads of 4 do not divide over 8 devices; take gathered or"):
        chosen(whole, model=odd, layout="tensor")
    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    alone = init_variables(model, jax.random.key(0), mesh=one)
    assert chosen(1e12, variables=alone, mesh=one) == "training", "whole, in the dtype that is computed in"
    assert chosen(1e12, model=Llama(SHAPE, dtype="bfloat16"), variables=alone, mesh=one) == "gathered"
    assert chosen(1e12, variables=alone, mesh=None) == "training"


def test_the_copy_is_in_the_dtype_of_the_computation_and_where_it_should_be(split) -> None:
    _, variables, mesh = split
    model = Llama(SHAPE, dtype="bfloat16")
    size = sum(x.size for x in jax.tree.leaves(variables))
    each: Any = (("gathered", 2), ("tensor", 8))
    for layout, parts in each:
        ready = prepare(model, variables, SampleConfig(layout=layout), mesh=mesh)
        assert device_bytes(ready.token) == pytest.approx(2 * size / parts, rel=0.15)  # norms are whole, in float32
