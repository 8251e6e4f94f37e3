"""Logits against `transformers` in float32, on random models of every shape that is supported."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_jax
from dpo_jax.config import LoraConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # large enough that a wrong weight shows in the logits
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2: MHA, untied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama-3.2: GQA, tied, llama3 RoPE, past the original context": (
        "Llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE, "head_dim": 16},
    ),
    "linear RoPE": (
        "Llama",
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "biases": ("Llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 4096, "head_dim": 16, "rms_norm_eps": 1e-5}),
    "zephyr: no window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
}


def random_folder(path: Path, family: str, options: dict[str, Any]) -> Any:
    """Save a random model of `transformers` to `path`, its norms and biases random too, and return it."""
    config = getattr(transformers, f"{family}Config")(**{**TINY, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3)
            elif "norm" in name:
                weight.normal_(1, 0.2)
    model.save_pretrained(path)
    return model


@partial(jax.jit, static_argnums=0)
def _logits(model: Any, variables: Any, tokens: jax.Array) -> jax.Array:
    return model.apply(variables, model.apply(variables, tokens), method="logits")


def largest_difference(reference: Any, model: Any, variables: Any, tokens: np.ndarray) -> float:
    """Largest absolute difference of the two models' logits on `tokens` [B, T]."""
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(_logits(model, variables, jnp.asarray(tokens, jnp.int32)))
    assert np.abs(theirs).max() > 0.5
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_transformers(tmp_path: Path, shape: str) -> None:
    reference = random_folder(tmp_path, *SHAPES[shape])
    model, variables = dpo_jax.load_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 100))
    difference = largest_difference(reference, model, variables, tokens)
    print(f"{shape}: max abs difference {difference:.2e}")
    assert difference <= 2e-4


def test_transformers_loads_what_we_save(tmp_path: Path) -> None:
    random_folder(tmp_path / "theirs", *SHAPES["llama-3.2: GQA, tied, llama3 RoPE, past the original context"])
    model, variables = dpo_jax.load_pretrained(tmp_path / "theirs")
    dpo_jax.save_pretrained(tmp_path / "ours", model, variables, None, source=tmp_path / "theirs")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = np.random.default_rng(1).integers(0, TINY["vocab_size"], (1, 90))
    assert largest_difference(again.eval(), model, variables, tokens) <= 2e-4
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.rope_parameters["rope_theta"] == 500_000.0


@pytest.mark.parametrize("shape", ["llama-2: MHA, untied", "biases"])
def test_peft_loads_the_adapter_folder(tmp_path: Path, shape: str) -> None:
    peft = pytest.importorskip("peft")
    base = random_folder(tmp_path / "base", *SHAPES[shape])
    lora = LoraConfig(rank=4, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"))
    model, variables = dpo_jax.load_pretrained(tmp_path / "base", lora=lora)
    key = jax.random.key(1)
    variables["adapters"] = jax.tree.map(lambda x: 0.3 * jax.random.normal(key, x.shape), variables["adapters"])
    tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 20))
    without = largest_difference(base, model, variables, tokens)
    assert without > 0.1, "the adapters do nothing: the test is void"

    folder = tmp_path / "adapter"
    dpo_jax.save_pretrained(folder, model, variables, None, source=tmp_path / "base", merge=False)
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    assert largest_difference(theirs, model, variables, tokens) <= 2e-4

    again, loaded = dpo_jax.load_pretrained(folder)
    assert again.lora == lora
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)

    dpo_jax.save_pretrained(tmp_path / "merged", model, variables, None, source=tmp_path / "base")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert largest_difference(merged, model, variables, tokens) <= 5e-4


def test_our_loader_reads_the_adapter_that_peft_saves(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = random_folder(tmp_path / "base", *SHAPES["mistral"])
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["k_proj", "gate_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    raw = tmp_path / "adapter" / "adapter_config.json"
    raw.write_text(json.dumps(json.loads(raw.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    model, variables = dpo_jax.load_pretrained(tmp_path / "adapter")
    assert (model.lora.rank, model.lora.alpha, model.lora.targets) == (3, 5.0, ("k_proj", "gate_proj"))
    tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], (1, 20))
    assert largest_difference(theirs, model, variables, tokens) <= 2e-4
