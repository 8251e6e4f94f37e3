"""What a Llama is: its sizes and switches, read from and written to a Hugging Face `config.json`.

A value that this model cannot honour exactly is refused here, by name; nothing is ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_jax.errors import InputError
from dpo_jax.headers import MAX_WHOLE, Fields, told
from dpo_jax.model.config_keys import OPTION, QUANTIZED, ignored, left_unread, refuse_quantized


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
    output matrix. `further_stop_ids` are those of generation_config.json beside `eos_token_ids`; config.json has none.
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
    further_stop_ids: tuple[int, ...] = ()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which generation ends, by all that stands beside the weights."""
        return (*self.eos_token_ids, *self.further_stop_ids)


_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "LlamaForSequenceClassification": "llama",
    "MistralForSequenceClassification": "mistral",
}
_CLASSIFICATION = "ForSequenceClassification"

_MAX_LAYERS, _MAX_WIDTH, _MAX_INNER, _MAX_VOCAB, _MAX_HEADS = 10_000, 1 << 20, 1 << 24, 1 << 26, 1 << 16
_MISTRAL = {"sliding_window": 4096, "kv_heads": 8, "max_position": 131_072}
"""What `transformers` takes where a Mistral's config.json does not speak of it."""


def _rope(fields: Fields) -> tuple[float, RopeScaling | None, list[str]]:
    """`rope_theta`, scaling and unread keys, from either spelling (`rope_scaling`, or transformers 5's
    `rope_parameters`)."""
    spelled = {name: fields.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
    for name, value in spelled.items():
        if not isinstance(value, dict):
            raise fields.wrong(name, "an object")
    found = [name for name, value in spelled.items() if value]
    name = found[0] if found else "rope_scaling"
    if len(found) == 2 and _alike(spelled["rope_parameters"]) != _alike(spelled["rope_scaling"]):
        raise InputError(f"{fields.where}: rope_parameters and rope_scaling say different things; leave one out")
    nested = Fields(spelled[name], fields.where, f"{name}.")
    theta = fields.number("rope_theta", nested.number("rope_theta", 10_000.0))
    if nested.number("rope_theta", theta) != theta:
        raise InputError(f"{fields.where}: rope_theta is {theta:g}, and within {name} another; leave one out")
    for part in (fields, nested):
        if part.number("partial_rotary_factor", 1.0, low=-1) not in (0, 1):
            raise part.wrong("partial_rotary_factor", "1, the only one that is supported")
    kind = nested.text("rope_type", nested.text("type", "default"))
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = RopeScaling("linear", nested.number("factor"))
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            factor=nested.number("factor"),
            low_freq_factor=nested.number("low_freq_factor"),
            high_freq_factor=nested.number("high_freq_factor"),
            original_max_position=nested.whole("original_max_position_embeddings"),
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise nested.wrong("low_freq_factor", f"below high_freq_factor {scaling.high_freq_factor:g}")
    else:
        raise InputError(
            f"{fields.where}: RoPE scaling {told(kind)} is not supported; supported are default, linear and llama3"
        )
    return theta, scaling, left_unread(nested.raw, nested.asked, fields.where, f"{name}.")


def _alike(rope: Mapping[str, Any]) -> dict[str, Any]:
    """One spelling of either spelling's scaling, without its base."""
    kept = {key: value for key, value in rope.items() if key not in ("rope_theta", "type")}
    return kept | {"rope_type": rope.get("rope_type", rope.get("type"))}


def _num_labels(fields: Fields) -> int:
    """The labels of a `...ForSequenceClassification`: the one that is a reward. `InputError` for another number."""
    names = fields.get("id2label")
    if names is not None and not isinstance(names, dict):
        raise fields.wrong("id2label", "an object")
    count = fields.whole("num_labels", len(names) if names else 2, low=0)  # transformers' default
    if count != 1:
        raise InputError(f"{fields.where}: a classifier with {count} labels; a reward model has one (num_labels 1)")
    return 1


def _ids(fields: Fields, key: str) -> tuple[int, ...]:
    """The token ids of a field: one, a list, or none. -1 is how old checkpoints spell none."""
    value = fields.get(key)
    several = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and -1 <= i <= MAX_WHOLE for i in several):
        raise fields.wrong(key, "a token's id or a list of them")
    return tuple(i for i in several if i >= 0)


def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> LlamaConfig:
    """Read a Hugging Face config dictionary. `where` names the file in errors.

    Raises `InputError` for another architecture, a missing size, a value of another type or beyond its range, or one
    that would change the numbers in a way that this model does not implement.
    """
    return read_hf(raw, where)[0]


def read_hf(raw: Mapping[str, Any], where: str) -> tuple[LlamaConfig, list[str]]:
    """`from_hf`, and the keys that were left unread although `transformers` does not write them into every model."""
    fields = Fields(raw, where)
    names = fields.items("architectures", str, "names")
    model_type = fields.text("model_type")
    if names and names[0] not in _ARCHITECTURES:
        raise InputError(
            f"{where}: architecture {names[0][:80]} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )
    if model_type not in (None, *_ARCHITECTURES.values()) or (not names and model_type is None):
        raise InputError(f"{where}: model_type {told(model_type)} is not supported; supported are llama and mistral")
    refuse_quantized(fields.get(QUANTIZED), where)
    model_type = model_type or _ARCHITECTURES[names[0]]
    mistral = model_type == "mistral"

    def only(key: str, *allowed: Any) -> None:
        if (value := fields.get(key)) is not None and value not in allowed:
            raise InputError(
                f"{where}: {key} = {told(value)} is not supported; supported: {', '.join(map(repr, allowed))}"
            )

    only("hidden_act", "silu", "swish")
    only("attention_dropout", 0, 0.0)
    only("is_encoder_decoder", False)
    only("add_cross_attention", False)
    only("is_decoder", False, True)
    only("tie_encoder_decoder", False)
    only("rope_interleaved", False)
    hidden = fields.whole("hidden_size", high=_MAX_WIDTH)
    heads = fields.whole("num_attention_heads", high=_MAX_HEADS)
    kv_heads = _MISTRAL["kv_heads"] if mistral and "num_key_value_heads" not in raw else heads
    window = None
    if mistral:
        window = fields.maybe_whole("sliding_window") if "sliding_window" in raw else _MISTRAL["sliding_window"]
    theta, scaling, unread = _rope(fields)
    config = LlamaConfig(
        vocab_size=fields.whole("vocab_size", high=_MAX_VOCAB),
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size", high=_MAX_INNER),
        num_layers=fields.whole("num_hidden_layers", high=_MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=fields.whole("num_key_value_heads", kv_heads, high=_MAX_HEADS),
        head_dim=fields.whole("head_dim", hidden // heads, high=_MAX_WIDTH // heads),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, high=1.0),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position=fields.whole("max_position_embeddings", _MISTRAL["max_position"] if mistral else 2048),
        sliding_window=window,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        bos_token_id=next(iter(_ids(fields, "bos_token_id")), None),
        eos_token_ids=_ids(fields, "eos_token_id"),
        pad_token_id=next(iter(_ids(fields, "pad_token_id")), None),
        model_type=model_type,
        num_labels=_num_labels(fields) if names and names[0].endswith(_CLASSIFICATION) else 0,
    )
    if read := [key for key in sorted(fields.asked) if raw.get(key) is not None and ignored(key)]:
        raise InputError(f"{where}: {OPTION} {read[0]}: it is read, and cannot be left out")
    unread = left_unread(raw, fields.asked, where) + unread
    if config.num_heads % config.num_kv_heads:
        raise InputError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {config.num_kv_heads}"
        )
    if fields.get("head_dim") is None and hidden % heads:
        raise InputError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    if config.head_dim % 2:
        raise InputError(f"{where}: head_dim {config.head_dim} is odd; rotary embeddings need pairs")
    return config, unread


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
