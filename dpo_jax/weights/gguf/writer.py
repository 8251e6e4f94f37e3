"""A model as one GGUF file, with its tokenizer and chat template, as llama.cpp and `weights/gguf/tensors.py` read it.

Tensors are written one at a time. Vectors are float32, as llama.cpp wants them; matrices are what was asked for, and
those whose rows are no whole blocks of 32 are float16 in a Q8_0 file.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize
from transformers import PreTrainedTokenizerBase

from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.families import FAMILIES
from dpo_jax.weights.gguf.architecture import check_expressed, factors_of, gguf_name, metadata_of
from dpo_jax.weights.gguf.tensors import NORM, PERMUTED, interleaved
from dpo_jax.weights.gguf.tokenizer import read_tokenizer
from dpo_jax.weights.gguf.vocabulary import add_vocabulary
from dpo_jax.weights.huggingface import layout
from dpo_jax.weights.integrity.folder import write_beside

Stored = Literal["float32", "bfloat16", "float16", "q8_0"]

_Q = GGMLQuantizationType
_KINDS: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "float32": (_Q.F32, LlamaFileType.ALL_F32),
    "bfloat16": (_Q.BF16, LlamaFileType.MOSTLY_BF16),
    "float16": (_Q.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (_Q.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_LARGEST_HALF = float(np.finfo(np.float16).max)

# What any tokenizer must cut alike: words, cases, runs of spaces, digits, lines, marks, other scripts, emoji. None
# begins with a space: there SentencePiece, and llama.cpp with it, adds one more, and transformers' Llama does not.
_PROBES = (
    "Hello world, it's 2026! DON'T  stop   here.",
    "a\n\n\tb\r\n  c ",
    "1234567 3.14 x=y*2; foo_bar(baz)",
    "Grüße, naïve café; Привет мир; 你好，世界。 こんにちは",
    "🙂👍🏽 — “quotes” … ‰ ﬁ",
    "e\u0301 a\u030a",  # accents of their own, which some tokenizers compose first
)


def check_model(config: LlamaConfig, where: object) -> None:
    """Raise `InputError` for a model that a GGUF file does not describe."""
    if config.num_labels:
        raise InputError(f"{where}: is a reward model, which is converted to --format huggingface only")
    if FAMILIES[config.model_type].gguf is None:
        raise InputError(
            f"{where}: a model of type {config.model_type} is not written as GGUF; use --format huggingface"
        )
    check_expressed(config, layout.tensor_shapes(layout.parameter_slots(config)).keys(), where)


def write_gguf(
    path: Path,
    config: LlamaConfig,
    tokenizer: PreTrainedTokenizerBase,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[np.ndarray],
    stored: Stored,
    *,
    name: str,
    terminators: Sequence[int] = (),
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write the file `path`, which appears whole or not at all.

    Args:
      config: checked by `check_model`.
      shapes: Hugging Face's names and the shapes of the tensors, in the order in which they come.
      tensors: the values, made one at a time.
      stored: what matrices are kept in.
      name: of the model, for those who read the metadata.
      terminators: ids that end a response, beside the tokenizer's EOS and the model's: GGUF has room for two.
      beside: further files of its folder, by name, which are there when it appears.

    Raises `InputError`: a tokenizer that GGUF cannot express, a value beyond float16, a full disk.
    """
    kind, file_type = _KINDS[stored]
    form = FAMILIES[config.model_type].gguf
    assert form is not None
    kinds = {key: _kind(kind, shapes[key]) for key in shapes}
    partial = path.with_name(f".{path.name}.partial")
    writer = GGUFWriter(partial, form.architecture)
    writer.add_name(name)
    writer.add_file_type(file_type)
    for key, value in metadata_of(config).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    add_vocabulary(writer, tokenizer, config, _ends(tokenizer, config, terminators))
    factors = factors_of(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for key, values in factors.items():
            writer.add_tensor_info(key, values.shape, values.dtype, values.nbytes)
        for key in shapes:
            size = _bytes(kinds[key], shapes[key])
            own = gguf_name(key, form.architecture)
            assert own is not None, key
            writer.add_tensor_info(own, shapes[key], np.dtype(np.float32), size, raw_dtype=kinds[key])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in factors.values():
            writer.write_tensor_data(values)
        for key, values in zip(shapes, tensors, strict=True):
            writer.write_tensor_data(_encoded(key, values, kinds[key], config))
        writer.close()
        _check_ids(read_tokenizer(partial), tokenizer)
        write_beside(path.parent, beside)
        os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot be written ({reason}); free some space or choose another place") from error
    finally:
        partial.unlink(missing_ok=True)


def _kind(kind: GGMLQuantizationType, shape: Sequence[int]) -> GGMLQuantizationType:
    if len(shape) == 1:
        return _Q.F32
    return _Q.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def _bytes(kind: GGMLQuantizationType, shape: Sequence[int]) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def _encoded(key: str, values: np.ndarray, kind: GGMLQuantizationType, config: LlamaConfig) -> np.ndarray:
    """A tensor as it lies in the file: rows in llama.cpp's order, and norms with what is added to their weights."""
    values, form = np.asarray(values, np.float32), FAMILIES[config.model_type].gguf
    if config.norm_offset and key.endswith(NORM):
        values = values + np.float32(config.norm_offset)
    if form is not None and form.interleaved and PERMUTED.search(key):
        permuted = np.empty_like(values)
        permuted[interleaved(np.arange(len(values)), config.head_dim)] = values
        values = permuted
    if kind == _Q.F16 and (largest := float(np.abs(values).max(initial=0))) > _LARGEST_HALF:
        raise InputError(f"tensor {key} holds {largest:g}, and float16 ends at {_LARGEST_HALF:g}; use --dtype bfloat16")
    if kind == _Q.F32:
        return np.ascontiguousarray(values)
    return values.astype(np.float16) if kind == _Q.F16 else quantize(values, kind)


def _ends(tokenizer: PreTrainedTokenizerBase, config: LlamaConfig, further: Sequence[int]) -> list[int]:
    """The tokenizer's EOS, and one more id that ends a response: GGUF has `eos` and `eot`."""
    eos = tokenizer.eos_token_id
    every = [*([eos] if isinstance(eos, int) else []), *further, *config.stop_ids]
    return list(dict.fromkeys(every))[:2]


def _check_ids(written: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a file whose tokenizer does not give the same ids."""
    for text in _PROBES:
        if written(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise InputError(
                f"the tokenizer cannot be written as GGUF: its ids of {text!r} would become others; "
                "use --format huggingface"
            )
