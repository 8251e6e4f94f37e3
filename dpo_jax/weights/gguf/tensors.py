"""The tensors of GGUF files: dequantised, and under Hugging Face's names.

For some architectures the rows of q and k lie in another order: within a head, the two halves that rotary positions
pair up are interleaved. They are put back here, and so are norms' weights, which have Gemma's 1 added there.
"""

import math
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.families import FAMILIES
from dpo_jax.weights.gguf.architecture import FACTORS, gguf_name, read_config
from dpo_jax.weights.gguf.header import GGUFHeader, GGUFTensor, open_gguf
from dpo_jax.weights.huggingface import layout
from dpo_jax.weights.huggingface.layout import Slices

_Q = GGMLQuantizationType
# Those whose dequantisation has been held against the format's definition, block by block.
_TYPES = (
    *(_Q.F32, _Q.F16, _Q.BF16, _Q.Q8_0, _Q.Q4_0, _Q.Q4_1, _Q.Q5_0, _Q.Q5_1),
    *(_Q.Q2_K, _Q.Q3_K, _Q.Q4_K, _Q.Q5_K, _Q.Q6_K, _Q.IQ4_NL, _Q.IQ4_XS),
)
_PLAIN = {_Q.F32: np.float32, _Q.F16: np.float16, _Q.BF16: ml_dtypes.bfloat16}
PERMUTED = re.compile(r"\.[qk]_proj\.")
NORM = "norm.weight"


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where GGUF keeps Hugging Face's row r of q or k: half j, place i of a head lies at 2 i + j."""
    head, within = np.divmod(rows, head_dim)
    half, place = np.divmod(within, head_dim // 2)
    return head * head_dim + 2 * place + half


class GGUFTensors:
    """The weights of a GGUF file (a `TensorReader`)."""

    def __init__(self, header: GGUFHeader, config: LlamaConfig, keys: Iterable[str]):
        """`keys`: Hugging Face's names of the tensors of such a model."""
        form = FAMILIES[config.model_type].gguf
        assert form is not None
        self.where = str(header.path)
        self._path, self._head_dim = header.path, config.head_dim if form.interleaved else None
        self._offset = config.norm_offset
        self._tensors: dict[str, GGUFTensor] = {}
        named = {gguf_name(key, form.architecture): key for key in keys}
        for tensor in header.tensors.values():
            if tensor.kind not in _TYPES:
                supported = ", ".join(t.name for t in _TYPES)
                raise InputError(
                    f"{self.where}: tensor {tensor.name} is stored as {tensor.kind.name}; supported are {supported}"
                )
            if tensor.name not in FACTORS:
                self._tensors[named.get(tensor.name, tensor.name)] = tensor
        self.shapes = {key: tensor.shape for key, tensor in self._tensors.items()}
        kinds = {tensor.kind for tensor in self._tensors.values()}
        self.dtype = np.dtype(_PLAIN[kinds.pop()] if len(kinds) == 1 and kinds <= _PLAIN.keys() else np.float32)

    def read(self, key: str, index: Slices) -> np.ndarray:
        """A rectangle of a tensor, dequantised: float32, or bfloat16 and float16 as stored."""
        tensor = self._tensors[key]
        raw, rows = _raw(self._path, tensor), index[0]
        places = rows
        if self._head_dim is not None and PERMUTED.search(key):
            places = interleaved(np.arange(rows.start, rows.stop), self._head_dim)
        if len(index) == 1:
            values = _decode(raw, tensor.kind)[0, places]
            return values - np.float32(self._offset) if self._offset and key.endswith(NORM) else values
        columns = index[1]
        block, size = GGML_QUANT_SIZES[tensor.kind]
        first, last = columns.start // block, -(-columns.stop // block)  # cut at whole blocks
        values = _decode(raw[places, first * size : last * size], tensor.kind)
        return values[:, columns.start - first * block : columns.stop - first * block]


def _vector(header: GGUFHeader, name: str) -> np.ndarray | None:
    """A short list of float32 numbers that is a tensor of the file; None where there is none."""
    if (tensor := header.tensors.get(name)) is None:
        return None
    if tensor.kind != _Q.F32 or len(tensor.shape) != 1:
        raise InputError(f"{header.path}: tensor {name} is not a list of float32 numbers")
    return _decode(_raw(header.path, tensor), _Q.F32)[0]


def _raw(path: Path, tensor: GGUFTensor) -> np.ndarray:
    """The rows of a tensor as bytes, mapped for as long as they are in use: pages of a map count as memory."""
    shape = (math.prod(tensor.shape[:-1]), tensor.row_bytes)
    return np.memmap(path, np.uint8, "r", tensor.offset, shape)


def _decode(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    data = np.ascontiguousarray(data)
    return data.view(_PLAIN[kind]) if kind in _PLAIN else dequantize(data, kind)


def open_file(path: Path) -> tuple[LlamaConfig, GGUFTensors]:
    """Configuration and checked weights of a GGUF file. Raises `InputError` as `model_folder.open_folder` does."""
    header = open_gguf(path)
    if (embedding := header.tensors.get("token_embd.weight")) is None:
        raise InputError(f"{path}: tensor token_embd.weight is missing; the file is incomplete")
    names, rows = header.tensors.keys(), embedding.shape[0]
    config = read_config(header.metadata, names, partial(_vector, header), str(path), rows=rows)
    slots = layout.parameter_slots(config)
    tensors = GGUFTensors(header, config, [key for slot in slots for key in slot.keys])
    layout.check_keys(slots, tensors)
    return config, tensors
