"""Random models of every family that llama.cpp has, with every flag that its files have a place for.

For tests/weights/test_families_gguf.py, and for benchmarks/llama_cpp.py, which lets llama.cpp itself read them. Weights
are exact in float16.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny
from safetensors.numpy import save_file

from dpo_jax.model.architecture import from_hf
from dpo_jax.weights.huggingface import layout

LENGTH = 24
BASE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "rope_theta": 20_000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.4, 1.5, 1.7], "long_factor": [1.5, 3, 4, 5, 6, 7]}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, "sliding_window": 7}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 7, "head_dim": 32},
    "qwen2": {"rope_scaling": YARN},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "smollm3": {},
    "phi3": {"sliding_window": 7, "rope_scaling": LONG, "original_max_position_embeddings": 32,
             "partial_rotary_factor": 0.75},
    "gemma": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**GEMMA, "num_hidden_layers": 6, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "olmo2": {},
    "granite": {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.3, "embedding_multiplier": 6.0,
                "residual_multiplier": 0.22, "logits_scaling": 3.0},
}  # fmt: skip


def folder(path: Path, model_type: str, **changes: Any) -> Path:
    """A random model of a family, with a byte-level tokenizer."""
    raw = {**BASE, "model_type": model_type, **CASES[model_type], **changes}
    config, rng = from_hf(raw), np.random.default_rng(0)
    path.mkdir()
    tensors = {}
    for key, shape in layout.tensor_shapes(layout.parameter_slots(config)).items():
        middle = 0.0 if not key.endswith("norm.weight") else 1 - config.norm_offset
        tensors[key] = (middle + 0.15 * rng.standard_normal(shape)).astype(np.float16).astype(np.float32)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(raw))
    tiny.tokenizer().save_pretrained(path)
    return path


def logps(model: Any, variables: Any, tokens: Any) -> np.ndarray:
    hidden = model.apply(variables, tokens)
    return np.asarray(jax.nn.log_softmax(model.apply(variables, hidden, method="logits"), axis=-1))
