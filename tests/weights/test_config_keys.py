"""`config.json` as the world writes it: what is read of it, what is harmless, and one line for everything else."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

import dpo_jax
from dpo_jax.cli import main
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import RopeScaling, from_hf
from dpo_jax.weights.huggingface import model_folder

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}

# What published checkpoints say beside the sizes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 1 converted": {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1, "max_sequence_length": 2048},
    "Llama 2": {"_name_or_path": "meta-llama/Llama-2-7b-hf", "pretraining_tp": 1, "rope_scaling": None},
    "Llama 2 chat": {"pretraining_tp": 1, "max_length": 4096, "temperature": 0.9, "top_p": 0.6, "do_sample": True},
    "Llama 3.1": {"rope_scaling": {**LLAMA3, "rope_type": "llama3"}, "rope_theta": 500000.0, "mlp_bias": False},
    "transformers 5": {"dtype": "bfloat16", "rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 5e5}},
    "TinyLlama": {"attention_bias": False, "num_key_value_heads": 4, "pretraining_tp": 1, "rope_theta": 10000.0},
    "Yi": {"rope_theta": 5000000.0, "pad_token_id": 0, "tie_word_embeddings": False},
    "Vicuna": {"max_sequence_length": 4096, "pad_token_id": 0, "transformers_version": "4.31.0"},
    "CodeLlama": {"rope_theta": 1000000, "max_position_embeddings": 16384},
    "LongLoRA": {"_flash_attn_2_enabled": True, "rope_scaling": {"factor": 8.0, "type": "linear"}},
    "Nous": {"tokenizer_model_max_length": 4096, "tokenizer_padding_side": "right"},
    "unsloth": {"unsloth_fixed": True, "unsloth_version": "2024.9", "pad_token_id": 128004, "head_dim": 128},
    "SmolLM2": {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "fp16"}},
    "Tulu": {"neftune_noise_alpha": 5, "use_flash_attention": True, "eos_token_id": [128001, 128008]},
    "Chinese-Alpaca": {"vocab_size": 55296, "pad_token_id": 0, "max_position_embeddings": 4096},
    "Mistral v0.1": {**MISTRAL, "sliding_window": 4096, "num_key_value_heads": 8, "rope_theta": 10000.0},
    "Mistral v0.3": {**MISTRAL, "sliding_window": None, "num_key_value_heads": 8, "rope_theta": 1000000.0},
    "Zephyr": {**MISTRAL, "sliding_window": 4096, "pad_token_id": 2, "rope_theta": 10000.0},
    "OpenHermes": {**MISTRAL, "use_sliding_window": False, "attention_dropout": 0.0, "bos_token_id": 1},
    "empty": {"pruned_heads": {}, "future_switch": False, "future_list": [], "future_number": 0, "future_name": ""},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name: str) -> None:
    assert from_hf({**BASE, **PUBLISHED[name]}).num_layers == 32


def test_both_spellings_of_rope_give_the_same() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    old, new = (from_hf({**BASE, **PUBLISHED[name]}) for name in ("Llama 3.1", "transformers 5"))
    assert (old.rope_theta, old.rope_scaling) == (new.rope_theta, new.rope_scaling) == (5e5, scaling)
    assert from_hf({**BASE, "rope_theta": None}).rope_theta == 10_000
    assert from_hf({**BASE, "rope_scaling": {"type": "linear", "factor": 2}}).rope_scaling == RopeScaling("linear", 2.0)


def test_defaults_where_mistral_says_nothing_are_those_of_transformers() -> None:
    from transformers import MistralConfig

    theirs, ours = MistralConfig(), from_hf({**BASE, **MISTRAL})
    assert (ours.sliding_window, ours.num_kv_heads) == (theirs.sliding_window, theirs.num_key_value_heads) == (4096, 8)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    null = from_hf({**BASE, **MISTRAL, "sliding_window": None, "num_key_value_heads": None})
    assert (null.sliding_window, null.num_kv_heads) == (None, 32)
    assert from_hf(BASE).num_kv_heads == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_scaling": 8.0}, r"unknown key logits_scaling = 8\.0.*--ignore_config_keys logits_scaling"),
        ({"sliding_window": 4096}, "unknown key sliding_window = 4096"),
        ({"rope_interleaved": True}, "rope_interleaved = True is not supported"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, r"rope_scaling\.factor = 0 is not a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": [2]}}, r"rope_scaling\.factor = \[2\] is not a number"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear' is not an object"),
        ({"rope_scaling": {"type": ["linear"]}}, r"rope_scaling\.type = \['linear'\] is not a text"),
        ({"rope_scaling": {"factor": 2.0}}, r"unknown key rope_scaling\.factor = 2\.0"),
        ({"rope_parameters": {**LLAMA3, "rope_type": "llama3", "low_freq_factor": 4.0}}, "is not below high_freq"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta is 10000, and",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "rope_parameters and rope_scaling say different things",
        ),
        ({"rope_theta": "10000"}, "rope_theta = '10000' is not a number"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0 is not a whole number from 1"),
        ({"num_attention_heads": 24}, "hidden_size 4096 is not a multiple of num_attention_heads 24"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0 is not a whole number from 1"),
        ({"hidden_size": "4096"}, "hidden_size = '4096' is not a whole number"),
        ({"hidden_size": [4096]}, r"hidden_size = \[4096\] is not a whole number"),
        ({"hidden_size": -4096}, "hidden_size = -4096 is not a whole number"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 is not a whole number from 1 to 10000"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True is not a whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan is not a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' is not true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id = '</s>' is not a token's id or a list"),
        ({"eos_token_id": [[2]]}, r"eos_token_id = \[\[2\]\] is not a token's id"),
        ({"bos_token_id": {}}, r"bos_token_id = {} is not a token's id"),
        ({"architectures": "LlamaForCausalLM"}, "architectures = 'LlamaForCausalLM' is not a list of names"),
        ({"model_type": 7}, "model_type = 7 is not a text"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantised by 'gptq'.*give the model that it was",
        ),
        ({"quantization_config": {"load_in_4bit": True}}, "the weights are quantised, in a form.*or a GGUF file"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_hf({**BASE, **change})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("keys") / "model", layers=1)


def changed(model: Path, path: Path, **keys: Any) -> Path:
    """A copy of the model whose config.json holds `keys` as well."""
    shutil.copytree(model, path)
    config = json.loads((path / "config.json").read_text()) | keys
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_harmless_and_empty_keys_are_named_once(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = changed(model, tmp_path / "m", unsloth_fixed=True, future=False, transformers_version="4.1")
    with caplog.at_level(logging.INFO, "dpo_jax.weights.huggingface.model_folder"):
        for _ in range(3):
            model_folder.read_config(folder / "config.json")
    said = [record.getMessage() for record in caplog.records if "keys without effect" in record.getMessage()]
    assert said == [f"{folder / 'config.json'}: keys without effect, not read: future, unsloth_fixed"]


def test_an_unknown_key_is_ignored_where_the_user_says_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(model, tmp_path / "m", new_key=[1])
    arguments = ["convert", "--from", str(folder), "--to", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "unknown key new_key = [1]" in capsys.readouterr().err
    assert main([*arguments, "--ignore_config_keys", "hidden_size"]) == 2
    assert "hidden_size: it is read, and cannot be left out" in capsys.readouterr().err
    assert main([*arguments, "--ignore_config_keys", "new_key"]) == 0
    dpo_jax.load_pretrained(tmp_path / "out")  # the key is not carried along
    with pytest.raises(InputError, match="unknown key new_key"):
        dpo_jax.load_pretrained(folder)
    dpo_jax.load_pretrained(folder, ignore_config_keys=["new_key"])


def test_a_key_that_no_model_has_is_told(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dpo_jax"):
        assert main(["convert", "--from", str(model), "--to", str(tmp_path / "o"), "--ignore_config_keys", "none"]) == 0
    assert "--ignore_config_keys none: no config.json that was read has it" in caplog.text
