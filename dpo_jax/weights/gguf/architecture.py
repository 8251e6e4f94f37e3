"""What a GGUF file's metadata says of a model: read as its config.json would say it, and written.

Each family's place there is its `GGUF` in `model/families.py`. A model that is not what its own metadata reads back to
is not written: what llama.cpp takes as given (every fourth layer of a SmolLM3 without positions) is checked so, too.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from gguf import TensorNameMap, get_tensor_name_map
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

from dpo_jax.errors import InputError
from dpo_jax.headers import Fields, told
from dpo_jax.model.architecture import LlamaConfig, from_hf, to_hf
from dpo_jax.model.families import FAMILIES, GGUF, SPELLED
from dpo_jax.model.rope import RopeScaling, rotary_frequencies

LLAMA3_FACTORS, SHORT_FACTORS, LONG_FACTORS = (
    f"rope_{name}.weight" for name in ("freqs", "factors_short", "factors_long")
)
FACTORS = (LLAMA3_FACTORS, SHORT_FACTORS, LONG_FACTORS)
"""Tensors with a number for each pair of channels that RoPE turns."""

Vector = Callable[[str], np.ndarray | None]

_MAX_LAYERS = 10_000

# Metadata of every architecture that is read below, or changes none of the model's numbers.
_READ = frozenset(
    """block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv
    attention.layer_norm_rms_epsilon attention.key_length attention.value_length vocab_size
    rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor rope.scaling.original_context_length
    rope.scaling.attn_factor rope.scaling.finetuned rope.scale_linear""".split()
)  # fmt: skip
_ATTENTION = ("q", "k", "v", "output")
_IDS = ("bos_token_id", "eos_token_ids", "pad_token_id", "further_stop_ids")  # the tokenizer's metadata holds them


def _form(model_type: str) -> GGUF:
    form = FAMILIES[model_type].gguf
    assert form is not None
    return form


def _family(architecture: Any, keys: Collection[str], where: str) -> str:
    """The model_type of a file: the first with its architecture that has every key, or else the first."""
    forms = {name: family.gguf for name, family in FAMILIES.items() if family.gguf is not None}
    fit = [name for name, form in forms.items() if form.architecture == architecture]
    if not fit:
        known = ", ".join(dict.fromkeys(form.architecture for form in forms.values()))
        raise InputError(f"{where}: architecture {told(architecture)} is not supported; read are {known}")
    return next((name for name in fit if set(keys) <= _READ | set(_form(name).keys.values())), fit[0])


def read_config(
    metadata: Mapping[str, Any], names: Collection[str], vector: Vector, where: str, *, rows: int
) -> LlamaConfig:
    """The architecture. `InputError` for anything that this model does not compute.

    Args:
      names: of the file's tensors.
      vector: gives the values of one of `FACTORS`, or None.
      where: names the file in errors.
      rows: of the embedding.
    """
    everything = Fields(metadata, f"{where}: metadata")
    architecture = everything.get("general.architecture")
    raw = {key.removeprefix(f"{architecture}."): v for key, v in metadata.items() if key.startswith(f"{architecture}.")}
    model_type = _family(architecture, [key for key, value in raw.items() if value], where)
    family, form = FAMILIES[model_type], _form(model_type)
    if everything.maybe_whole("split.count", low=0) not in (None, 0, 1):
        raise InputError(f"{where}: is one of several parts; join them with llama-gguf-split --merge")
    own = Fields(raw, f"{where}: metadata", f"{architecture}.")
    read = _READ | set(form.keys.values())
    if unknown := sorted(key for key, value in raw.items() if key not in read and value):
        raise InputError(f"{where}: metadata {architecture}.{unknown[0]} = {told(raw[unknown[0]])} is not supported")

    heads, hidden = own.whole("attention.head_count"), own.whole("embedding_length")
    layers = own.whole("block_count", high=_MAX_LAYERS)
    named = own.maybe_whole("attention.key_length", low=0) or None
    head_dim = named or hidden // heads
    turned = own.maybe_whole("rope.dimension_count", low=0) or head_dim
    for key, value in (
        ("attention.value_length", own.maybe_whole("attention.value_length", low=0)),
        *([] if form.part_rotates else [("rope.dimension_count", turned)]),
    ):
        if (value or head_dim) != head_dim:
            raise InputError(f"{where}: metadata {architecture}.{key} = {value} differs from the head size {head_dim}")
    theta = own.number("rope.freq_base", 0.0, low=-1) or 10_000.0
    positions = own.whole("context_length")
    ends = [everything.maybe_whole(f"tokenizer.ggml.{name}_token_id", low=0) for name in ("eos", "eot")]
    config = {
        "model_type": model_type,
        "vocab_size": own.maybe_whole("vocab_size", low=0) or rows,
        "hidden_size": hidden,
        "intermediate_size": own.whole("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": own.maybe_whole("attention.head_count_kv", low=0) or heads,
        "head_dim": named,
        "rms_norm_eps": _short(own.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(theta),
        "max_position_embeddings": positions,
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": everything.maybe_whole("tokenizer.ggml.bos_token_id", low=0),
        "eos_token_id": list(dict.fromkeys(i for i in ends if i is not None)) or None,
        "pad_token_id": everything.maybe_whole("tokenizer.ggml.padding_token_id", low=0),
        **_scaling(own, vector, turned, theta, positions),
        **{key: _own(own, key, form.keys[key]) for key in form.keys if form.keys[key] in raw or _needed(key)},
        **_biases(form, names, where),
    }
    if turned != head_dim:
        config["partial_rotary_factor"] = turned / head_dim
    if "query_pre_attn_scalar" in family.keys:
        config["query_pre_attn_scalar"] = hidden // heads if layers == form.wide_layers else head_dim
    return from_hf(config, where)


def _needed(key: str) -> bool:
    """Whether llama.cpp loads no file without this key."""
    return key in SPELLED and SPELLED[key][1] in ("number", "inverse")


def _own(own: Fields, key: str, name: str) -> Any:
    """The value of a key that not every family has, as config.json holds it."""
    if key == "sliding_window":
        return own.maybe_whole(name, low=0) or None
    return _short(own.number(name))


def _biases(form: GGUF, names: Collection[str], where: str) -> dict[str, bool]:
    found: dict[str, bool] = {}
    if "attention_bias" in form.biases:
        biased = [part for part in _ATTENTION if f"blk.0.attn_{part}.bias" in names]
        if len(biased) not in (0, len(_ATTENTION)):
            raise InputError(
                f"{where}: biases of {', '.join(f'attn_{part}' for part in biased)} alone are not supported in a file"
                f" of architecture {form.architecture}: all of the attention's or none"
            )
        found["attention_bias"] = bool(biased)
    if "mlp_bias" in form.biases:
        found["mlp_bias"] = "blk.0.ffn_gate.bias" in names
    return found


def _short(value: float) -> float:
    """The decimal that was meant by a number stored as float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _scaling(own: Fields, vector: Vector, turned: int, theta: float, positions: int) -> dict[str, Any]:
    """RoPE's keys of config.json but its base."""
    kind = own.text("rope.scaling.type") or "none"
    factor = own.number("rope.scaling.factor", 0.0, low=-1) or own.number("rope.scale_linear", 1.0, low=-1)
    original = own.maybe_whole("rope.scaling.original_context_length", low=0) or positions
    given = {name: values for name in FACTORS if (values := vector(name)) is not None}
    if given.keys() == {SHORT_FACTORS, LONG_FACTORS} and kind in ("none", "longrope"):
        return _longrope(own, given, original, positions)
    if kind not in ("none", "linear", "yarn") or given.keys() - {LLAMA3_FACTORS}:
        said = told(kind) if not given else f"{told(kind)} with {', '.join(given)}"
        raise InputError(
            f"{own.where}: RoPE scaling {said} is not supported; supported are linear, yarn, Llama 3.1's factors and"
            " Phi-3's"
        )
    scaled = kind == "yarn" or factor not in (0, 1)
    if LLAMA3_FACTORS not in given:
        if kind == "yarn":
            rope = {"rope_type": kind, "factor": _short(own.number("rope.scaling.factor"))}
            return {"rope_scaling": {**rope, "original_max_position_embeddings": original}}
        return {"rope_scaling": {"rope_type": "linear", "factor": _short(factor)} if scaled else None}
    if scaled:
        raise InputError(f"{own.where}: both a RoPE scaling and {LLAMA3_FACTORS}, which is not supported")
    return {"rope_scaling": _llama3_scaling(own.where, given[LLAMA3_FACTORS], turned, theta)}


def _longrope(own: Fields, given: Mapping[str, np.ndarray], original: int, positions: int) -> dict[str, Any]:
    short, long = ([_short(x) for x in given[name]] for name in (SHORT_FACTORS, LONG_FACTORS))
    rope: dict[str, Any] = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    scale = own.number("rope.scaling.attn_factor", 1.0)
    if not math.isclose(scale, _usual_scale(positions, original), rel_tol=1e-6):
        rope["attention_factor"] = _short(scale)
    return {"rope_scaling": rope, "original_max_position_embeddings": original}


def _usual_scale(positions: int, original: int) -> float:
    """Of LongRoPE's cosines and sines (Ding et al. 2024, arXiv 2402.13753, in the released code)."""
    return math.sqrt(1 + math.log(positions / original) / math.log(original)) if positions > original > 1 else 1.0


def _llama3_scaling(where: str, factors: np.ndarray, turned: int, theta: float) -> dict[str, Any]:
    """The four numbers of Llama 3.1's scaling, from the divisors of the frequencies that they led to.

    The file does not hold them; Llama 3.1 to 3.3 differ in the largest divisor alone. Used only if they give back
    every divisor.
    """
    original, low, high, factor = 8192, 1.0, 4.0, float(factors.max())
    frequencies = rotary_frequencies(turned, theta, None).astype(np.float64)
    turns = original * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - blend) / factor + blend) if factor > 0 else np.full_like(blend, np.nan)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-5, atol=0):
        raise InputError(f"{where}: the RoPE factors in {LLAMA3_FACTORS} are not those of Llama 3.1's scaling")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def metadata_of(config: LlamaConfig) -> dict[str, int | float | str]:
    """The architecture's metadata: whole numbers, numbers that are kept as float32, and texts."""
    form, hf = _form(config.model_type), to_hf(config)
    own: dict[str, int | float | str] = {
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    for key, name in form.keys.items():
        if key == "sliding_window":
            own[name] = hf[key] or 0
        elif hf[key] is not None:
            own[name] = float(hf[key])
    scaling = config.rope_scaling or RopeScaling("default", 1.0)
    if scaling.kind in ("linear", "yarn"):
        own |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    if scaling.kind in ("yarn", "longrope"):
        own["rope.scaling.original_context_length"] = scaling.original_max_position
    if scaling.kind == "longrope":
        own["rope.scaling.attn_factor"] = float(scaling.scale)
    return {f"{form.architecture}.{key}": value for key, value in own.items()}


def factors_of(config: LlamaConfig) -> dict[str, np.ndarray]:
    """Those of `FACTORS` that a model has: what frequencies are divided by, float32 [rotated channels / 2]."""
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    if scaling.kind == "longrope":
        lists = {LONG_FACTORS: scaling.long_factors, SHORT_FACTORS: scaling.short_factors}
        return {name: np.asarray(values, np.float32) for name, values in lists.items()}
    if scaling.kind != "llama3":
        return {}
    plain = rotary_frequencies(config.rotary_dim, config.rope_theta, None).astype(np.float64)
    return {LLAMA3_FACTORS: (plain / rotary_frequencies(config.rotary_dim, config.rope_theta, scaling)).astype("f4")}


def check_expressed(config: LlamaConfig, keys: Collection[str], where: object) -> None:
    """Raise `InputError` unless a file with this metadata and these tensors (`keys`) is read as the same model."""
    form = _form(config.model_type)
    architecture, factors = form.architecture, factors_of(config)
    named = {key: gguf_name(key, architecture) for key in keys} | {key: key for key in factors}
    if homeless := sorted(key for key, name in named.items() if name is None or not _has(architecture, name)):
        raise InputError(
            f"{where}: {homeless[0]} has no place in a GGUF file of architecture {architecture}; use --format"
            " huggingface"
        )
    metadata = {"general.architecture": architecture, **metadata_of(config)}
    back = read_config(
        metadata, {name for name in named.values() if name}, factors.get, str(where), rows=config.vocab_size
    )
    back = dataclasses.replace(back, model_type=config.model_type, **{name: getattr(config, name) for name in _IDS})
    for field in dataclasses.fields(LlamaConfig):
        meant, found = getattr(config, field.name), getattr(back, field.name)
        if not _alike(meant, found):
            raise InputError(
                f"{where}: {field.name} = {told(str(meant))} has no place in a GGUF file of architecture"
                f" {architecture}; use --format huggingface"
            )


def _alike(meant: Any, found: Any) -> bool:
    """Equal, but for the rounding of numbers to float32."""
    if isinstance(meant, RopeScaling) and isinstance(found, RopeScaling):
        return all(_alike(*pair) for pair in zip(dataclasses.astuple(meant), dataclasses.astuple(found), strict=True))
    if isinstance(meant, tuple) and isinstance(found, tuple):
        return len(meant) == len(found) and all(map(_alike, meant, found))
    if isinstance(meant, float) and isinstance(found, float):
        return math.isclose(meant, found, rel_tol=1e-6)
    return meant == found


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def gguf_name(name: str, architecture: str) -> str | None:
    """GGUF's name of a tensor that Hugging Face calls `name`; None where llama.cpp has no place for it."""
    layer = _LAYER.match(name)
    stem, leaf = _LAYER.sub("model.layers.0.", name).rsplit(".", 1)
    if (found := _names(architecture).get_name(stem)) is None:
        return None
    return f"{found.replace('blk.0.', f'blk.{layer[1]}.') if layer else found}.{leaf}"


@lru_cache(maxsize=4)
def _names(architecture: str) -> TensorNameMap:
    return get_tensor_name_map(_kind(architecture), 1)


def _kind(architecture: str) -> MODEL_ARCH:
    return next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)


def _has(architecture: str, name: str) -> bool:
    """Whether the architecture has such a tensor, as a weight or as a bias."""
    stem = re.sub(r"^blk\.\d+\.", "blk.{bid}.", name).rsplit(".", 1)[0]
    return stem in {TENSOR_NAMES[tensor] for tensor in MODEL_TENSORS[_kind(architecture)]}
