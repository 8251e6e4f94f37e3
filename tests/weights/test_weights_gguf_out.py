"""GGUF out: read back by `gguf` and by `weights/gguf/tensors.py`; tokenizers that keep their ids; refusals."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import tokenizers_for_tests
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file
from test_weights_gguf import gguf_name, interleave

import dpo_jax
from dpo_jax import cli
from dpo_jax.errors import InputError
from dpo_jax.weights.convert import convert
from dpo_jax.weights.opened import open_checkpoint

HEAD = 32


def folder(path: Path, **config: Any) -> Path:
    """A tiny model whose config.json has these values too."""
    tiny.folder(path, layers=2, hidden=64, heads=2, kv_heads=1, tied=False)
    there = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(there | config))
    return path


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "q8_0"])
def test_every_tensor_is_where_llama_cpp_looks_for_it(tmp_path: Path, kind: str) -> None:
    source, file = folder(tmp_path / "hf"), tmp_path / "new" / "m.gguf"
    assert cli.main(["convert", "--from", str(source), "--to", str(file), "--format", "gguf", "--dtype", kind]) == 0
    assert sorted(path.name for path in file.parent.iterdir()) == ["m.README.md", "m.gguf"]
    stored = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}[kind]
    quantised = gguf.GGMLQuantizationType[stored]
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    expected = load_file(source / "model.safetensors")
    assert found.keys() == {gguf_name(name) for name in expected}
    for name, values in expected.items():
        tensor = found[gguf_name(name)]
        if "q_proj" in name or "k_proj" in name:
            values = interleave(values, HEAD)
        if values.ndim == 1:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            np.testing.assert_array_equal(tensor.data, values)
        else:
            assert tensor.tensor_type == quantised
            want = dequantize(quantize(values, quantised), quantised)
            np.testing.assert_array_equal(dequantize(tensor.data, quantised).reshape(values.shape), want)
    back = open_checkpoint(file)
    assert back.architecture == open_checkpoint(source).architecture
    if kind == "float32":
        assert back.tensors is not None
        for name, values in expected.items():
            np.testing.assert_array_equal(back.tensors.read(name, tuple(slice(0, n, 1) for n in values.shape)), values)


def test_tokenizer_and_template_come_back(tmp_path: Path) -> None:
    source, file = folder(tmp_path / "hf"), tmp_path / "m.gguf"
    convert(source, file, to="gguf")
    before, after = dpo_jax.load_tokenizer(source), dpo_jax.load_tokenizer(file)
    assert after.chat_template == before.chat_template
    assert (after.eos_token, after.pad_token, after.bos_token) == (before.eos_token, before.pad_token, before.bos_token)
    for text in ("the film was good<|im_end|>\n", " a  b\n\n12 Grüße 你好"):
        assert after(text)["input_ids"] == before(text)["input_ids"]


def test_llama_2s_tokenizer(tmp_path: Path, shared_data: Path) -> None:
    (tmp_path / "llama2").mkdir()
    tokenizer = tokenizers_for_tests.llama2(shared_data, tmp_path / "llama2")
    size = len(tokenizer) + 7  # rows of the embedding that stand for no token
    source, file = tiny.folder(tmp_path / "hf", layers=1, vocab=size), tmp_path / "m.gguf"
    convert(source, file, to="gguf", tokenizer=tokenizer)
    after = dpo_jax.load_tokenizer(file)
    rows = (shared_data / "vicuna_questions" / "question.jsonl").read_text(encoding="utf-8").splitlines()
    for text in [json.loads(row)["turns"][0] for row in rows] + ["two  spaces\n\n", "你好，世界 🙂", ""]:
        assert after(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64},
    ],
)
def test_what_else_the_architecture_has_comes_back(tmp_path: Path, config: dict[str, Any]) -> None:
    source, file = folder(tmp_path / "hf", **config), tmp_path / "m.gguf"
    convert(source, file, to="gguf")
    assert open_checkpoint(file).architecture == open_checkpoint(source).architecture


def test_refusals_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "hf")
    words = ["convert", "--from", str(source), "--format", "gguf", "--to"]
    assert cli.main([*words, str(tmp_path / "out")]) == 2
    assert "its name ends with .gguf" in capsys.readouterr().err
    assert cli.main(["convert", "--from", str(source), "--to", str(tmp_path / "o"), "--dtype", "q8_0"]) == 2
    assert "--dtype q8_0 belongs to --format gguf" in capsys.readouterr().err
    big = folder(tmp_path / "big")
    weights = load_file(big / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1e6
    tiny.save_file(weights, big / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="use --dtype bfloat16"):
        convert(big, tmp_path / "big.gguf", to="gguf", dtype="float16")
    path = source / "tokenizer.json"
    cut = json.loads(path.read_text())
    cut["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, cut["pre_tokenizer"]]}
    path.write_text(json.dumps(cut))
    with pytest.raises(InputError, match="in a way that has no name here"):
        convert(source, tmp_path / "cut.gguf", to="gguf")
    assert not [path for path in tmp_path.iterdir() if "gguf" in path.name]
