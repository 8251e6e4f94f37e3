"""What a Llama is: its sizes and switches, read from and written to a Hugging Face `config.json`.

A value that this model cannot honour exactly is refused here, by name; nothing is ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_jax.errors import InputError


@dataclass(frozen=True)
class RopeScaling:
    """Rescaling of rotary frequencies for contexts beyond the original one.

    kind "linear" divides every frequency by `factor`. kind "llama3" (Llama 3.1, section 3.4 of its report, as in the
    released code) divides low frequencies by `factor`, keeps high ones, and blends between.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """Architecture of a Llama or Mistral checkpoint: a language model, or with `num_labels` 1 a reward model.

    A reward model is a `...ForSequenceClassification` with one label: it has a score (`model/heads.py`) in place of the
    output matrix.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    max_position: int = 4096
    sliding_window: int | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    model_type: str = "llama"
    num_labels: int = 0


_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "LlamaForSequenceClassification": "llama",
    "MistralForSequenceClassification": "mistral",
}
_CLASSIFICATION = "ForSequenceClassification"

# Keys that say how the model was made or is to be served, and change none of its numbers.
_WITHOUT_EFFECT = frozenset(
    """_name_or_path architectures model_type torch_dtype dtype transformers_version use_cache pad_token_id bos_token_id
    eos_token_id initializer_range pretraining_tp is_llama_config rope_interleaved transformers.js_config auto_map
    attn_implementation _attn_implementation_autoset use_return_dict return_dict output_attentions
    output_hidden_states chunk_size_feed_forward num_labels id2label label2id problem_type task_specific_params
    unk_token_id finetuning_task tokenizer_class prefix sep_token_id decoder_start_token_id""".split()
)  # fmt: skip


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """`rope_theta` and scaling, from either spelling (`rope_scaling`, or transformers 5's `rope_parameters`)."""
    nested = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(nested.pop("rope_theta", raw.get("rope_theta", 10_000.0)))
    kind = nested.pop("rope_type", nested.pop("type", "default"))
    nested.pop("type", None)
    if float(nested.pop("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) or 1.0) != 1.0:
        raise InputError(f"{where}: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        if nested:
            raise InputError(f"{where}: RoPE of type default with unknown keys {sorted(nested)}")
        return theta, None
    if kind == "linear":
        scaling = RopeScaling("linear", float(nested.pop("factor")))
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            factor=float(nested.pop("factor")),
            low_freq_factor=float(nested.pop("low_freq_factor")),
            high_freq_factor=float(nested.pop("high_freq_factor")),
            original_max_position=int(nested.pop("original_max_position_embeddings")),
        )
    else:
        raise InputError(f"{where}: RoPE scaling {kind!r} is not supported; supported are default, linear and llama3")
    if nested:
        raise InputError(f"{where}: RoPE scaling {kind!r} with unknown keys {sorted(nested)}")
    return theta, scaling


def _num_labels(raw: Mapping[str, Any], where: str) -> int:
    """The labels of a `...ForSequenceClassification`: the one that is a reward. `InputError` for another number."""
    count = raw.get("num_labels")
    if count is None:
        count = len(raw["id2label"]) if raw.get("id2label") else 2  # transformers' default
    if count != 1:
        raise InputError(f"{where}: a classifier with {count} labels; a reward model has one (num_labels 1)")
    return 1


def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> LlamaConfig:
    """Read a Hugging Face config dictionary. `where` names the file in errors.

    Raises `InputError` for another architecture, a missing size, or a value that would change the numbers in a way
    that this model does not implement.
    """
    names = raw.get("architectures") or []
    model_type = raw.get("model_type")
    if names and names[0] not in _ARCHITECTURES:
        raise InputError(
            f"{where}: architecture {names[0]} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )
    if model_type not in (None, *_ARCHITECTURES.values()) or (not names and model_type is None):
        raise InputError(f"{where}: model_type {model_type!r} is not supported; supported are llama and mistral")
    seen = set(_WITHOUT_EFFECT) | {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}

    def get(key: str, default: Any = None, *, required: bool = False) -> Any:
        seen.add(key)
        value = raw.get(key)
        if value is None and required:
            raise InputError(f"{where}: {key} is missing")
        return default if value is None else value

    def only(key: str, *allowed: Any) -> None:
        seen.add(key)
        if raw.get(key) is not None and raw[key] not in allowed:
            raise InputError(
                f"{where}: {key} = {raw[key]!r} is not supported; supported: {', '.join(map(repr, allowed))}"
            )

    only("hidden_act", "silu", "swish")
    only("attention_dropout", 0, 0.0)
    only("is_encoder_decoder", False)
    only("add_cross_attention", False)
    only("is_decoder", False, True)
    only("quantization_config")
    only("tie_encoder_decoder", False)
    hidden, heads = int(get("hidden_size", required=True)), int(get("num_attention_heads", required=True))
    theta, scaling = _rope(raw, where)
    eos = raw.get("eos_token_id")
    config = LlamaConfig(
        vocab_size=int(get("vocab_size", required=True)),
        hidden_size=hidden,
        intermediate_size=int(get("intermediate_size", required=True)),
        num_layers=int(get("num_hidden_layers", required=True)),
        num_heads=heads,
        num_kv_heads=int(get("num_key_value_heads", heads)),
        head_dim=int(get("head_dim", hidden // heads)),
        rms_norm_eps=float(get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position=int(get("max_position_embeddings", 2048)),
        sliding_window=get("sliding_window"),
        tie_embeddings=bool(get("tie_word_embeddings", False)),
        attention_bias=bool(get("attention_bias", False)),
        mlp_bias=bool(get("mlp_bias", False)),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (int(eos),),
        pad_token_id=raw.get("pad_token_id"),
        model_type=model_type or _ARCHITECTURES[names[0]],
        num_labels=_num_labels(raw, where) if names and names[0].endswith(_CLASSIFICATION) else 0,
    )
    unknown = sorted(key for key in raw if key not in seen and raw[key] is not None)
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]} = {raw[unknown[0]]!r}; remove it if it changes nothing")
    if config.num_heads % config.num_kv_heads:
        raise InputError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise InputError(f"{where}: head_dim {config.head_dim} is odd; rotary embeddings need pairs")
    return config


def to_hf(config: LlamaConfig) -> dict[str, Any]:
    """A Hugging Face config dictionary that `from_hf` reads back to `config` and `transformers` loads."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        s = config.rope_scaling
        rope = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            rope |= {
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_max_position,
            }
    mistral = config.model_type == "mistral"
    raw: dict[str, Any] = {
        "architectures": [
            ("Mistral" if mistral else "Llama") + (_CLASSIFICATION if config.num_labels else "ForCausalLM")
        ],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        # Both spellings: older readers want rope_theta and rope_scaling, transformers 5 wants rope_parameters.
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": list(config.eos_token_ids)
        if len(config.eos_token_ids) > 1
        else (config.eos_token_ids or (None,))[0],
    }
    if config.num_labels:
        raw |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if mistral:
        raw["sliding_window"] = config.sliding_window
    else:
        raw |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return raw
