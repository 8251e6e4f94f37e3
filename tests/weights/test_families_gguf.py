"""GGUF of every family that llama.cpp has: tensors read by the `gguf` package, models by ours and by `transformers`.

The models are those of tests/support/gguf_families.py.
"""

from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
from gguf.quants import dequantize, quantize
from gguf_families import CASES, LENGTH, folder, logps

import dpo_jax
from dpo_jax.errors import InputError
from dpo_jax.model.families import FAMILIES
from dpo_jax.weights.convert import convert
from dpo_jax.weights.gguf.tensors import interleaved
from dpo_jax.weights.opened import open_checkpoint

USUAL = {"rope_theta": 10_000.0, "rope_scaling": None}
GEMMAS = {**USUAL, "head_dim": 256, "query_pre_attn_scalar": 256}
READ_BY_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "llama": {**USUAL, "attention_bias": False, "mlp_bias": False},
    "qwen2": USUAL,
    "qwen3": {**USUAL, "head_dim": 128},
    "phi3": {**USUAL, "partial_rotary_factor": 1.0, "sliding_window": None},
    "gemma2": {**GEMMAS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {**GEMMAS, "rope_theta": 1e6, "final_logit_softcapping": None},
}
"""Its reader knows some of the metadata alone, and takes its own defaults for the rest."""


@pytest.mark.parametrize("model_type", CASES)
def test_out_and_back(tmp_path: Path, model_type: str) -> None:
    source = folder(tmp_path / "hf", model_type)
    form = FAMILIES[model_type].gguf
    assert form is not None
    model, before = dpo_jax.load_pretrained(source)
    tokens = jnp.asarray(np.random.default_rng(1).integers(3, 320, (1, LENGTH)), jnp.int32)
    wanted = logps(model, before, tokens)
    for dtype in ("float16", "q8_0"):
        file = tmp_path / f"{dtype}.gguf"
        convert(source, file, to="gguf", dtype=dtype)
        again, after = dpo_jax.load_pretrained(file, attention="xla")
        same = open_checkpoint(file).architecture
        assert same == open_checkpoint(source).architecture, again.config
        if dtype == "float16":
            np.testing.assert_array_equal(logps(model, after, tokens), wanted)
        else:
            error = float(np.abs(logps(model, after, tokens) - wanted).max())
            print(f"{model_type}: Q8_0 moves a log-probability by at most {error:.2g} nats")
            assert 0 < error < 0.5  # what is read is what Q8_0 rounds to, to the bit: see below
        check_tensors(file, open_checkpoint(source), form.architecture, dtype)


def read(source: Any, key: str) -> np.ndarray:
    shape = source.tensors.shapes[key]
    return source.tensors.read(key, tuple(slice(0, n, 1) for n in shape)).astype(np.float32)


def check_tensors(file: Path, source: Any, architecture: str, dtype: str) -> None:
    """As the `gguf` package reads them: names of its own table, values those of the source, rounded as asked for."""
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = {TENSOR_NAMES[tensor] for tensor in MODEL_TENSORS[kind]}
    mapped = gguf.get_tensor_name_map(kind, 6)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    factors = {name for name in found if name.startswith("rope_")}
    for key, shape in source.tensors.shapes.items():
        name = mapped.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        tensor = found.pop(name)
        assert ".".join(["blk.{bid}", *name.split(".")[2:-1]] if "blk" in name else name.split(".")[:-1]) in names
        values = read(source, key)
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]
        step = np.abs(values.reshape(-1, block)).max(axis=1).repeat(block).reshape(shape) / 127
        stored = gguf.GGMLQuantizationType[dtype.upper().replace("FLOAT16", "F16") if values.ndim == 2 else "F32"]
        if key.endswith("norm.weight"):
            values = values + np.float32(source.architecture.norm_offset)
        if architecture in ("llama", "smollm3", "granite") and (".q_proj." in key or ".k_proj." in key):
            rows = np.empty_like(values)
            rows[interleaved(np.arange(len(values)), source.architecture.head_dim)] = values
            values = rows
        assert tensor.tensor_type == stored
        want = dequantize(quantize(values, stored), stored)
        np.testing.assert_array_equal(dequantize(tensor.data, stored).reshape(shape), want)
        limit = 0.57 * step if stored == gguf.GGMLQuantizationType.Q8_0 else 2e-7  # steps are float16 numbers
        assert np.all(np.abs(read(open_checkpoint(file), key) - read(source, key)) <= limit)
    assert found.keys() == factors


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, "sliding_window = '7'"),
        (
            "qwen3",
            {"attention_bias": True},
            "attention_bias = 'True' has no place in a GGUF file of architecture",
        ),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 1]}, "unrotated_layers = '(0,)'"),
        ("gemma", {"tie_word_embeddings": False}, "lm_head.weight has no place in a GGUF file of architecture gemma"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "attention_scale = "),
        ("gemma3_text", {"sliding_window_pattern": 2, "_sliding_window_pattern": 2}, "global_layers = "),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling = "),
    ],
)
def test_what_a_file_would_not_say_is_refused(tmp_path: Path, model_type: str, changes: Any, message: str) -> None:
    source = folder(tmp_path / "hf", model_type, **changes)
    with pytest.raises(InputError) as caught:
        convert(source, tmp_path / "m.gguf", to="gguf")
    assert message in str(caught.value)
    assert "--format huggingface" in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model(tmp_path: Path, model_type: str) -> None:
    """Another reader of llama.cpp's files: what it makes of ours gives our log-probabilities."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    changes = {
        key: x for key, x in READ_BY_TRANSFORMERS[model_type].items() if "query" not in key or "gemma" in model_type
    }
    source = folder(tmp_path / "hf", model_type, **changes)
    convert(source, tmp_path / "m.gguf", to="gguf", dtype="float16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    model, variables = dpo_jax.load_pretrained(source)
    tokens = np.random.default_rng(1).integers(3, 320, (1, LENGTH))
    with torch.no_grad():
        wanted = torch.log_softmax(theirs(torch.tensor(tokens)).logits, -1).numpy()
    np.testing.assert_allclose(logps(model, variables, jnp.asarray(tokens, jnp.int32)), wanted, atol=1e-4)
