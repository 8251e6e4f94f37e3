"""GGUF files of architecture `llama`: dequantised weights under Hugging Face's names, and the configuration.

The format keeps the rows of q and k in another order: within a head, the two halves that rotary positions pair up are
interleaved. They are put back here. Whatever the metadata says that this model would not compute is refused.
"""

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig, from_hf
from dpo_jax.model.llama import rotary_frequencies
from dpo_jax.weights import layout
from dpo_jax.weights.layout import Slices

_Q = GGMLQuantizationType
_TYPES = (_Q.F32, _Q.F16, _Q.BF16, _Q.Q8_0, _Q.Q4_0, _Q.Q4_1)
_PLAIN = {_Q.F32: np.float32, _Q.F16: np.float16, _Q.BF16: ml_dtypes.bfloat16}
_ROPE_FACTORS = "rope_freqs.weight"

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


def open_gguf(path: Path) -> GGUFReader:
    """Parse the header of a GGUF file (tensors stay on the disk). `InputError` where it is damaged."""
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return _parse(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)  # a vocabulary takes a second to parse, and the weights and the tokenizer both want it
def _parse(path: Path, size: int, mtime_ns: int) -> GGUFReader:
    del mtime_ns
    try:
        reader = GGUFReader(path)
    # the parser checks nothing: on damaged bytes it fails wherever NumPy, an enum or memory happens to object
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError, OSError) as error:
        raise InputError(f"{path}: truncated or not a GGUF file ({_line(error)}); fetch it again") from error
    for tensor in reader.tensors:
        if tensor.data_offset + tensor.n_bytes > size:
            raise InputError(f"{path}: truncated: tensor {tensor.name} ends beyond the file; fetch it again")
    return reader


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def metadata(reader: GGUFReader) -> dict[str, Any]:
    """Every metadata entry, as Python values."""
    return {key: field.contents() for key, field in reader.fields.items()}


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; the GGUF name itself where there is none (it is then refused as unknown)."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, module, leaf = match.groups()
        if module in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[module]}.{leaf}"
    return _NAMES.get(name, name)


def _interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where GGUF keeps Hugging Face's row r of q or k: half j, place i of a head lies at 2 i + j."""
    head, within = np.divmod(rows, head_dim)
    half, place = np.divmod(within, head_dim // 2)
    return head * head_dim + 2 * place + half


class GGUFTensors:
    """The weights of a GGUF file (a `TensorReader`)."""

    def __init__(self, path: Path, reader: GGUFReader, head_dim: int):
        self.where = str(path)
        self._head_dim = head_dim
        self._tensors: dict[str, ReaderTensor] = {}
        for tensor in reader.tensors:
            if tensor.tensor_type not in _TYPES:
                supported = ", ".join(t.name for t in _TYPES)
                raise InputError(
                    f"{path}: tensor {tensor.name} is stored as {tensor.tensor_type.name}; supported are {supported}"
                )
            if tensor.name != _ROPE_FACTORS:
                self._tensors[_hf_name(tensor.name)] = tensor
        kinds = {tensor.tensor_type for tensor in self._tensors.values()}
        self.dtype = np.dtype(_PLAIN[kinds.pop()] if len(kinds) == 1 and kinds <= _PLAIN.keys() else np.float32)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor; GGUF lists the fastest axis first."""
        return {key: tuple(int(n) for n in reversed(tensor.shape)) for key, tensor in self._tensors.items()}

    def read(self, key: str, index: Slices) -> np.ndarray:
        """A rectangle of a tensor, dequantised: float32, or bfloat16 and float16 as stored."""
        tensor = self._tensors[key]
        rows: slice | np.ndarray = index[0]
        if re.search(r"\.[qk]_proj\.", key):
            rows = _interleaved(np.arange(rows.start, rows.stop), self._head_dim)
        if len(index) == 1:
            return _decode(tensor.data, tensor.tensor_type)[rows]
        columns = index[1]
        block, size = GGML_QUANT_SIZES[tensor.tensor_type]
        first, last = columns.start // block, -(-columns.stop // block)
        unit = size if tensor.data.dtype == np.uint8 else 1  # quantised rows are bytes, cut at whole blocks
        raw = tensor.data[rows][:, first * unit : last * unit]
        return _decode(raw, tensor.tensor_type)[:, columns.start - first * block : columns.stop - first * block]


def _decode(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    if kind in (_Q.F32, _Q.F16):
        return data
    data = np.ascontiguousarray(data)
    return data.view(ml_dtypes.bfloat16) if kind == _Q.BF16 else dequantize(data, kind)


# Metadata of the architecture that is read below, or changes none of the model's numbers.
_READ = frozenset(
    """block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv
    attention.layer_norm_rms_epsilon attention.key_length attention.value_length attention.sliding_window vocab_size
    rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor rope.scaling.original_context_length
    rope.scaling.finetuned rope.scale_linear""".split()
)  # fmt: skip
_ABSENT = (None, 0, 0.0, False)


def read_config(path: Path, reader: GGUFReader, meta: Mapping[str, Any]) -> LlamaConfig:
    """The architecture from the metadata. `InputError` for anything that this model does not compute."""
    if meta.get("general.architecture") != "llama":
        raise InputError(f"{path}: architecture {meta.get('general.architecture')!r} is not supported; only llama is")
    own = {key.removeprefix("llama."): value for key, value in meta.items() if key.startswith("llama.")}
    if unknown := sorted(key for key in own if key not in _READ and own[key] not in _ABSENT):
        raise InputError(f"{path}: metadata llama.{unknown[0]} = {own[unknown[0]]!r} is not supported")

    def get(key: str) -> Any:
        if own.get(key) is None:
            raise InputError(f"{path}: metadata llama.{key} is missing; the file is damaged or too old")
        return own[key]

    names = {tensor.name for tensor in reader.tensors}
    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = own.get("attention.key_length") or hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if (own.get(key) or head_dim) != head_dim:
            raise InputError(f"{path}: metadata llama.{key} = {own[key]} differs from the head size {head_dim}")
    theta = own.get("rope.freq_base") or 10_000.0
    embedding = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
    if embedding is None:
        raise InputError(f"{path}: tensor token_embd.weight is missing; the file is incomplete")
    eos = [meta[f"tokenizer.ggml.{k}_token_id"] for k in ("eos", "eot") if f"tokenizer.ggml.{k}_token_id" in meta]
    window = own.get("attention.sliding_window")
    raw = {
        "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
        "vocab_size": own.get("vocab_size") or int(embedding.shape[1]),
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "rms_norm_eps": _short(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(theta),
        "rope_scaling": _scaling(path, reader, own, head_dim, theta),
        "max_position_embeddings": get("context_length"),
        "sliding_window": window or None,
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_gate.bias" in names,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(eos)) or None,
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    return from_hf(raw, str(path))


def _short(value: float) -> float:
    """The decimal that was meant by a number stored as float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _scaling(
    path: Path, reader: GGUFReader, own: Mapping[str, Any], head_dim: int, theta: float
) -> dict[str, Any] | None:
    kind = own.get("rope.scaling.type") or "none"
    factor = own.get("rope.scaling.factor") or own.get("rope.scale_linear")
    factors = next((t for t in reader.tensors if t.name == _ROPE_FACTORS), None)
    if kind not in ("none", "linear"):
        raise InputError(
            f"{path}: RoPE scaling {kind!r} is not supported; supported are linear and Llama 3.1's factors"
        )
    linear = factor is not None and factor not in (0, 1)
    if factors is None:
        return {"rope_type": "linear", "factor": _short(factor)} if factor and linear else None
    if linear:
        raise InputError(f"{path}: both linear RoPE scaling and {_ROPE_FACTORS}, which is not supported")
    return _llama3_scaling(path, np.asarray(factors.data, np.float32), head_dim, theta)


def _llama3_scaling(path: Path, factors: np.ndarray, head_dim: int, theta: float) -> dict[str, Any]:
    """The four numbers of Llama 3.1's scaling, from the divisors of the frequencies that they led to.

    The file does not hold them; Llama 3.1 to 3.3 differ in the largest divisor alone. Used only if they give back
    every divisor.
    """
    original, low, high, factor = 8192, 1.0, 4.0, float(factors.max())
    frequencies = rotary_frequencies(head_dim, theta, None).astype(np.float64)
    turns = original * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - blend) / factor + blend)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-5, atol=0):
        raise InputError(f"{path}: the RoPE factors in {_ROPE_FACTORS} are not those of Llama 3.1's scaling")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def open_file(path: Path) -> tuple[LlamaConfig, GGUFTensors]:
    """Configuration and checked weights of a GGUF file. Raises `InputError` as `huggingface.open_folder` does."""
    reader = open_gguf(path)
    config = read_config(path, reader, metadata(reader))
    tensors = GGUFTensors(path, reader, config.head_dim)
    layout.check_keys(layout.parameter_slots(config), tensors)
    return config, tensors
