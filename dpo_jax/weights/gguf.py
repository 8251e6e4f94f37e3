"""GGUF files of architecture `llama`: dequantised weights under Hugging Face's names, and the configuration.

The format keeps the rows of q and k in another order: within a head, the two halves that rotary positions pair up are
interleaved. They are put back here. Whatever the metadata says that this model would not compute is refused.
"""

import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from dpo_jax.errors import InputError
from dpo_jax.headers import Fields, told
from dpo_jax.model.architecture import LlamaConfig, from_hf
from dpo_jax.model.rope import rotary_frequencies
from dpo_jax.weights import layout
from dpo_jax.weights.gguf_header import GGUFHeader, GGUFTensor, open_gguf
from dpo_jax.weights.layout import Slices

_Q = GGMLQuantizationType
# Those whose dequantisation has been held against the format's definition, block by block.
_TYPES = (
    *(_Q.F32, _Q.F16, _Q.BF16, _Q.Q8_0, _Q.Q4_0, _Q.Q4_1, _Q.Q5_0, _Q.Q5_1),
    *(_Q.Q2_K, _Q.Q3_K, _Q.Q4_K, _Q.Q5_K, _Q.Q6_K, _Q.IQ4_NL, _Q.IQ4_XS),
)
_PLAIN = {_Q.F32: np.float32, _Q.F16: np.float16, _Q.BF16: ml_dtypes.bfloat16}
ROPE_FACTORS = "rope_freqs.weight"
PERMUTED = re.compile(r"\.[qk]_proj\.")
_MAX_LAYERS = 10_000

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; the GGUF name itself where there is none (it is then refused as unknown)."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, module, leaf = match.groups()
        if module in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[module]}.{leaf}"
    return _NAMES.get(name, name)


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor that Hugging Face calls `name`."""
    if match := re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)", name):
        layer, module, leaf = match.groups()
        return f"blk.{layer}.{next(ours for ours, theirs in _LAYER_NAMES.items() if theirs == module)}.{leaf}"
    return next(ours for ours, theirs in _NAMES.items() if theirs == name)


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where GGUF keeps Hugging Face's row r of q or k: half j, place i of a head lies at 2 i + j."""
    head, within = np.divmod(rows, head_dim)
    half, place = np.divmod(within, head_dim // 2)
    return head * head_dim + 2 * place + half


class GGUFTensors:
    """The weights of a GGUF file (a `TensorReader`)."""

    def __init__(self, header: GGUFHeader, head_dim: int):
        self.where = str(header.path)
        self._path, self._head_dim = header.path, head_dim
        self._tensors: dict[str, GGUFTensor] = {}
        for tensor in header.tensors.values():
            if tensor.kind not in _TYPES:
                supported = ", ".join(t.name for t in _TYPES)
                raise InputError(
                    f"{self.where}: tensor {tensor.name} is stored as {tensor.kind.name}; supported are {supported}"
                )
            if tensor.name != ROPE_FACTORS:
                self._tensors[_hf_name(tensor.name)] = tensor
        self.shapes = {key: tensor.shape for key, tensor in self._tensors.items()}
        kinds = {tensor.kind for tensor in self._tensors.values()}
        self.dtype = np.dtype(_PLAIN[kinds.pop()] if len(kinds) == 1 and kinds <= _PLAIN.keys() else np.float32)

    def read(self, key: str, index: Slices) -> np.ndarray:
        """A rectangle of a tensor, dequantised: float32, or bfloat16 and float16 as stored."""
        tensor = self._tensors[key]
        raw, rows = _raw(self._path, tensor), index[0]
        places = interleaved(np.arange(rows.start, rows.stop), self._head_dim) if PERMUTED.search(key) else rows
        if len(index) == 1:
            return _decode(raw, tensor.kind)[0, places]
        columns = index[1]
        block, size = GGML_QUANT_SIZES[tensor.kind]
        first, last = columns.start // block, -(-columns.stop // block)  # cut at whole blocks
        values = _decode(raw[places, first * size : last * size], tensor.kind)
        return values[:, columns.start - first * block : columns.stop - first * block]


def _raw(path: Path, tensor: GGUFTensor) -> np.ndarray:
    """The rows of a tensor as bytes, mapped for as long as they are in use: pages of a map count as memory."""
    shape = (math.prod(tensor.shape[:-1]), tensor.row_bytes)
    return np.memmap(path, np.uint8, "r", tensor.offset, shape)


def _decode(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    data = np.ascontiguousarray(data)
    return data.view(_PLAIN[kind]) if kind in _PLAIN else dequantize(data, kind)


# Metadata of the architecture that is read below, or changes none of the model's numbers.
_READ = frozenset(
    """block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv
    attention.layer_norm_rms_epsilon attention.key_length attention.value_length attention.sliding_window vocab_size
    rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor rope.scaling.original_context_length
    rope.scaling.finetuned rope.scale_linear""".split()
)  # fmt: skip
_ATTENTION = ("q", "k", "v", "output")
_UNDERSTOOD = "read are models of Llama's architecture, Mistral's among them (general.architecture llama)"


def read_config(header: GGUFHeader) -> LlamaConfig:
    """The architecture from the metadata. `InputError` for anything that this model does not compute."""
    path, tensors = header.path, header.tensors
    everything = Fields(header.metadata, f"{path}: metadata")
    if (architecture := everything.get("general.architecture")) != "llama":
        raise InputError(f"{path}: architecture {told(architecture)} is not supported; {_UNDERSTOOD}")
    if everything.maybe_whole("split.count", low=0) not in (None, 0, 1):
        raise InputError(f"{path}: is one of several parts; join them with llama-gguf-split --merge")
    raw = {key.removeprefix("llama."): v for key, v in header.metadata.items() if key.startswith("llama.")}
    own = Fields(raw, f"{path}: metadata", "llama.")
    if unknown := sorted(key for key, value in raw.items() if key not in _READ and value):
        raise InputError(f"{path}: metadata llama.{unknown[0]} = {told(raw[unknown[0]])} is not supported")

    biased = [part for part in _ATTENTION if f"blk.0.attn_{part}.bias" in tensors]
    if len(biased) not in (0, len(_ATTENTION)):
        raise InputError(
            f"{path}: biases of {', '.join(f'attn_{part}' for part in biased)} alone, as Qwen2 has them, are not"
            f" supported (all of the attention's or none are); {_UNDERSTOOD}"
        )
    layers = own.whole("block_count", high=_MAX_LAYERS)
    heads, hidden = own.whole("attention.head_count"), own.whole("embedding_length")
    named = own.maybe_whole("attention.key_length", low=0) or None
    head_dim = named or hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if (own.maybe_whole(key, low=0) or head_dim) != head_dim:
            raise InputError(f"{path}: metadata llama.{key} = {own.get(key)} differs from the head size {head_dim}")
    theta = own.number("rope.freq_base", 0.0, low=-1) or 10_000.0
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{path}: tensor token_embd.weight is missing; the file is incomplete")
    ends = [everything.maybe_whole(f"tokenizer.ggml.{name}_token_id", low=0) for name in ("eos", "eot")]
    window = own.maybe_whole("attention.sliding_window", low=0)
    return from_hf(
        {
            "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
            "vocab_size": own.maybe_whole("vocab_size", low=0) or embedding.shape[0],
            "hidden_size": hidden,
            "intermediate_size": own.whole("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": own.maybe_whole("attention.head_count_kv", low=0) or heads,
            "head_dim": named,
            "rms_norm_eps": _short(own.number("attention.layer_norm_rms_epsilon")),
            "rope_theta": _short(theta),
            "rope_scaling": _scaling(header, own, head_dim, theta),
            "max_position_embeddings": own.whole("context_length"),
            "sliding_window": window or None,
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": bool(biased),
            "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
            "bos_token_id": everything.maybe_whole("tokenizer.ggml.bos_token_id", low=0),
            "eos_token_id": list(dict.fromkeys(i for i in ends if i is not None)) or None,
            "pad_token_id": everything.maybe_whole("tokenizer.ggml.padding_token_id", low=0),
        },
        str(path),
    )


def _short(value: float) -> float:
    """The decimal that was meant by a number stored as float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _scaling(header: GGUFHeader, own: Fields, head_dim: int, theta: float) -> dict[str, Any] | None:
    path = header.path
    kind = own.text("rope.scaling.type") or "none"
    factor = own.number("rope.scaling.factor", 0.0, low=-1) or own.number("rope.scale_linear", 1.0, low=-1)
    factors = header.tensors.get(ROPE_FACTORS)
    if kind not in ("none", "linear"):
        raise InputError(
            f"{path}: RoPE scaling {told(kind)} is not supported; supported are linear and Llama 3.1's factors"
        )
    linear = factor not in (0, 1)
    if factors is None:
        return {"rope_type": "linear", "factor": _short(factor)} if linear else None
    if linear:
        raise InputError(f"{path}: both linear RoPE scaling and {ROPE_FACTORS}, which is not supported")
    if factors.kind != _Q.F32 or len(factors.shape) != 1:
        raise InputError(f"{path}: tensor {ROPE_FACTORS} is not a list of float32 numbers")
    return _llama3_scaling(path, _decode(_raw(path, factors), _Q.F32)[0], head_dim, theta)


def _llama3_scaling(path: Path, factors: np.ndarray, head_dim: int, theta: float) -> dict[str, Any]:
    """The four numbers of Llama 3.1's scaling, from the divisors of the frequencies that they led to.

    The file does not hold them; Llama 3.1 to 3.3 differ in the largest divisor alone. Used only if they give back
    every divisor.
    """
    original, low, high, factor = 8192, 1.0, 4.0, float(factors.max())
    frequencies = rotary_frequencies(head_dim, theta, None).astype(np.float64)
    turns = original * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - blend) / factor + blend) if factor > 0 else np.full_like(blend, np.nan)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-5, atol=0):
        raise InputError(f"{path}: the RoPE factors in {ROPE_FACTORS} are not those of Llama 3.1's scaling")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def open_file(path: Path) -> tuple[LlamaConfig, GGUFTensors]:
    """Configuration and checked weights of a GGUF file. Raises `InputError` as `huggingface.open_folder` does."""
    header = open_gguf(path)
    config = read_config(header)
    tensors = GGUFTensors(header, config.head_dim)
    layout.check_keys(layout.parameter_slots(config), tensors.where, tensors.shapes)
    return config, tensors
