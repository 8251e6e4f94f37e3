"""Weights quantised as they are read: fingerprints, pieces, formats; and what adapters on them come to."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from dpo_jax.config import LoraConfig
from dpo_jax.mesh import make_mesh
from dpo_jax.model import quantised
from dpo_jax.model.quantised import quantise
from dpo_jax.model.variables import shardings
from dpo_jax.weights.convert import convert
from dpo_jax.weights.huggingface import layout
from dpo_jax.weights.integrity import base
from dpo_jax.weights.pretrained import load_pretrained, save_pretrained
from dpo_jax.weights.tokenizer import load_tokenizer

LORA = LoraConfig(rank=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("quantised") / "model", layers=4, hidden=128)


@pytest.fixture(scope="module")
def whole(source: Path) -> Any:
    return load_pretrained(source)[1]["params"]


def kernels(params: Any) -> list[Any]:
    found = jax.tree.leaves(params, is_leaf=quantised.is_quantised)
    return [x for x in found if quantised.is_quantised(x)]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_what_is_read_is_what_quantising_gives(source: Path, whole: Any, kind: Any) -> None:
    params = load_pretrained(source, dtype=kind, compute_dtype="bfloat16")[1]["params"]
    assert len(kernels(params)) == 7
    held = params["layers"]["mlp"]["down_proj"]["kernel"]
    direct = quantise(whole["layers"]["mlp"]["down_proj"]["kernel"], kind)
    chex.assert_trees_all_equal(jax.tree.leaves(direct), jax.tree.leaves(held)[: len(jax.tree.leaves(direct))])
    assert params["embed_tokens"]["embedding"].dtype == jnp.bfloat16
    assert params["layers"]["input_layernorm"]["scale"].dtype == jnp.bfloat16


def test_layer_by_layer_and_on_a_mesh_the_same(source: Path, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, at_once = load_pretrained(source, dtype="nf4")
    largest = []
    load_piece = layout._load_piece

    def counted(*args: Any) -> Any:
        piece = load_piece(*args)
        largest.append(piece.nbytes)
        return piece

    with monkeypatch.context() as patch:
        patch.setattr(layout, "QUANTISED_BYTES", 1)
        patch.setattr(layout, "_load_piece", counted)
        by_layer = load_pretrained(source, dtype="nf4")[1]
    chex.assert_trees_all_equal(by_layer, at_once)
    assert max(largest) == 4 * whole["embed_tokens"]["embedding"].size  # and of what is quantised a layer at a time
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    there = load_pretrained(source, mesh=mesh, dtype="nf4")[1]["params"]
    chex.assert_trees_all_equal(jax.device_get(there), jax.device_get(at_once["params"]))
    assert jax.tree.map(lambda x: x.sharding, there) == shardings(model, mesh, "nf4")["params"]
    # It is known again as what it was made from.
    assert base.weights_hash(there) == base.weights_hash(by_layer["params"]) == base.weights_hash(whole)


def test_from_our_own_format(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "orbax", to="orbax")
    params, expected = (load_pretrained(x, dtype="nf4")[1]["params"] for x in (tmp_path / "orbax", source))
    chex.assert_trees_all_equal(params, expected)


def test_adapters_go_with_the_weights_that_they_learnt_on(source: Path, tmp_path: Path) -> None:
    model, variables = load_pretrained(source, dtype="nf4", lora=LORA)
    noise = jax.random.normal(jax.random.key(0), (4, 2, 256))
    variables["adapters"]["layers"]["mlp"]["gate_proj"]["lora_b"] = noise
    tokens = np.arange(3, 51).reshape(2, 24)

    def logits(model: Any, variables: Any) -> np.ndarray:
        hidden = model.apply({k: v for k, v in variables.items() if k in ("params", "adapters")}, tokens)
        return np.asarray(model.apply(variables, hidden, method="logits"))

    trained = logits(model, variables)
    text = load_tokenizer(source)
    save_pretrained(tmp_path / "merged", model, variables, text, source=source)
    save_pretrained(tmp_path / "adapter", model, variables, text, source=source, merge=False)
    np.testing.assert_allclose(logits(*load_pretrained(tmp_path / "merged")), trained, rtol=0, atol=2e-4)
    np.testing.assert_allclose(logits(*load_pretrained(tmp_path / "adapter")), trained, rtol=0, atol=2e-4)
    on_original = {**variables, "params": load_pretrained(source)[1]["params"]}
    assert np.abs(logits(model, on_original) - trained).max() > 0.05  # another model
    convert(tmp_path / "adapter", tmp_path / "converted", to="huggingface", dtype="bfloat16")
    merged, converted = (load_file(tmp_path / x / "model.safetensors") for x in ("merged", "converted"))
    for key, tensor in merged.items():
        np.testing.assert_array_equal(converted[key], tensor.astype(converted[key].dtype), err_msg=key)
    # Saved again from whole weights, they still name what they learnt on.
    again = load_pretrained(tmp_path / "adapter")
    save_pretrained(tmp_path / "again", *again, text, source=tmp_path / "adapter", merge=False)
    assert (tmp_path / "again" / "base.json").read_text() == (tmp_path / "adapter" / "base.json").read_text()
