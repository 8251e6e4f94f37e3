"""What a model is: its sizes and switches, read from and written to a Hugging Face `config.json`.

A Llama, and what its neighbours add to it, each as a field of its own; `model/families.py` says which family has which.

A value that this model cannot honour exactly is refused here, by name; nothing is ignored.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_jax.errors import InputError
from dpo_jax.headers import MAX_WHOLE, Fields, told
from dpo_jax.model import rope_keys
from dpo_jax.model.config_keys import OPTION, QUANTIZED, ignored, left_unread, refuse_quantized
from dpo_jax.model.families import ACTIVATIONS, ARCHITECTURES, CLASSIFICATION, FAMILIES, SPELLED, Family
from dpo_jax.model.rope import RopeScaling


@dataclass(frozen=True)
class LlamaConfig:
    """Architecture of a checkpoint: a language model, or with `num_labels` 1 a reward model.

    A reward model is a `...ForSequenceClassification` with one label: it has a score (`model/heads.py`) in place of the
    output matrix. `further_stop_ids` are those of generation_config.json beside `eos_token_ids`; config.json has none.
    Every default is Llama's.

    Attributes (those that speak for themselves left out):
      attention_bias: biases on q, k, v and o.
      qkv_bias: biases on q, k and v alone (Qwen2, arXiv 2407.10671, section 2.2.1).
      qk_norm: RMSNorm of q and k before their rotation: "head", over the channels of each head (Qwen3, arXiv
        2505.09388, section 2); "projection", over all heads together (OLMo 2, arXiv 2501.00656, section 3.1).
      norms: where a sub-layer has its RMSNorm: "before"; "after", on what it gives, before it is added (OLMo 2);
        "both" (Gemma 2, arXiv 2408.00118, section 2).
      norm_offset: added to the weights of every RMSNorm; 1 in Gemma's code (arXiv 2403.08295).
      wide_norms: what a norm's weight multiplies is rounded afterwards only (Gemma's and OLMo 2's code).
      activation: of the gate: "silu" (SwiGLU) or "gelu_tanh" (GeGLU, in its tanh form; Gemma).
      embedding_scale: multiplies embeddings: sqrt(D) in Gemma, `embedding_multiplier` in Granite 3.
      residual_scale: multiplies what a sub-layer gives before it is added (Granite 3, `residual_multiplier`).
      attention_scale: factor of the scores; None means 1 / sqrt(C). `query_pre_attn_scalar`^-1/2 in Gemma 2 and 3.
      attention_cap: scores become cap tanh(score / cap) (Gemma 2, section 2).
      logit_scale: multiplies the logits (Granite 3, 1 / `logits_scaling`).
      logit_cap: logits become cap tanh(logit / cap) (Gemma 2, section 2).
      sliding_window: a token sees itself and the window - 1 before it (Mistral 7B, arXiv 2310.06825, section 2).
      global_layers: layers, counted from 0, that the window does not hold for (Gemma 2 and 3, Qwen2).
      unrotated_layers: layers whose q and k are not rotated (SmolLM3; Yang et al. 2025, arXiv 2501.18795).
      local_rope_theta: base of the layers with a window, unscaled (Gemma 3, arXiv 2503.19786, section 2).
      partial_rotary: the share of a head's channels that is rotated (Phi-4-mini, arXiv 2503.01743).
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
    qkv_bias: bool = False
    qk_norm: str = ""
    norms: str = "before"
    norm_offset: float = 0.0
    wide_norms: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_scale: float = 1.0
    logit_cap: float | None = None
    global_layers: tuple[int, ...] = ()
    unrotated_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    partial_rotary: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head are rotated."""
        return int(self.head_dim * self.partial_rotary)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which generation ends, by all that stands beside the weights."""
        return (*self.eos_token_ids, *self.further_stop_ids)


_MAX_LAYERS, _MAX_WIDTH, _MAX_INNER, _MAX_VOCAB, _MAX_HEADS = 10_000, 1 << 20, 1 << 24, 1 << 26, 1 << 16
_SLIDING, _FULL = "sliding_attention", "full_attention"


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
    if names and names[0] not in ARCHITECTURES:
        raise InputError(
            f"{where}: architecture {names[0][:80]} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    if model_type not in (None, *FAMILIES) or (not names and model_type is None):
        known = ", ".join(FAMILIES)
        raise InputError(f"{where}: model_type {told(model_type)} is not supported; supported are {known}")
    refuse_quantized(fields.get(QUANTIZED), where)
    model_type = model_type or ARCHITECTURES[names[0]]
    family, given = FAMILIES[model_type], raw
    raw = {**{key: value for key, value in family.defaults.items() if key not in raw}, **raw}
    fields = Fields(raw, where)
    fields.asked |= {"architectures", "model_type", QUANTIZED}

    def only(key: str, *allowed: Any) -> Any:
        if (value := fields.get(key)) is not None and value not in allowed:
            raise InputError(
                f"{where}: {key} = {told(value)} is not supported; supported: {', '.join(map(repr, allowed))}"
            )
        return value

    activation = _activation(fields, family, only)
    only("attention_dropout", 0, 0.0)
    only("is_encoder_decoder", False)
    only("add_cross_attention", False)
    only("is_decoder", False, True)
    only("tie_encoder_decoder", False)
    only("rope_interleaved", False)
    only("use_bidirectional_attention", False)
    hidden = fields.whole("hidden_size", high=_MAX_WIDTH)
    heads = fields.whole("num_attention_heads", high=_MAX_HEADS)
    layers = fields.whole("num_hidden_layers", high=_MAX_LAYERS)
    unrotated = _unrotated(fields, family, layers)
    window, everywhere = _windows(fields, family, layers, unrotated)
    max_position = fields.whole("max_position_embeddings", 2048)
    rope = rope_keys.read(fields, family, max_position)
    if family.root_embedding:
        rope.fields["embedding_scale"] = math.sqrt(hidden)
    config = LlamaConfig(
        vocab_size=fields.whole("vocab_size", high=_MAX_VOCAB),
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size", high=_MAX_INNER),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.whole("num_key_value_heads", heads, high=_MAX_HEADS),
        head_dim=fields.whole("head_dim", hidden // heads, high=_MAX_WIDTH // heads),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, high=1.0),
        max_position=max_position,
        sliding_window=window,
        global_layers=everywhere,
        unrotated_layers=unrotated,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        bos_token_id=next(iter(_ids(fields, "bos_token_id")), None),
        eos_token_ids=_ids(fields, "eos_token_id"),
        pad_token_id=next(iter(_ids(fields, "pad_token_id")), None),
        model_type=model_type,
        num_labels=_num_labels(fields) if names and names[0].endswith(CLASSIFICATION) else 0,
        activation=activation,
        **{SPELLED[key][0]: _spelled(fields, key) for key in family.keys},
        **family.fields,
        **rope.fields,
    )
    if read := [key for key in sorted(fields.asked) if given.get(key) is not None and ignored(key)]:
        raise InputError(f"{where}: {OPTION} {read[0]}: it is read, and cannot be left out")
    unread = left_unread(given, fields.asked, where) + rope.unread
    if config.num_heads % config.num_kv_heads:
        raise InputError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {config.num_kv_heads}"
        )
    if fields.get("head_dim") is None and hidden % heads:
        raise InputError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    if config.head_dim % 2:
        raise InputError(f"{where}: head_dim {config.head_dim} is odd; rotary embeddings need pairs")
    _check_rotary(config, where)
    return config, unread


def _check_rotary(config: LlamaConfig, where: str) -> None:
    """Raise `InputError` where the rotated channels are no pairs, or no pair has its factor."""
    rotary, scaling = config.rotary_dim, config.rope_scaling
    if rotary < 2 or rotary % 2:
        raise InputError(
            f"{where}: partial_rotary_factor {config.partial_rotary:g} rotates {rotary} channels of a head; "
            "rotary embeddings need pairs"
        )
    if scaling is not None and scaling.kind == "longrope":
        for name, factors in (("short_factor", scaling.short_factors), ("long_factor", scaling.long_factors)):
            if len(factors) != rotary // 2:
                raise InputError(f"{where}: RoPE's {name} has {len(factors)} numbers for {rotary // 2} pairs")


def _activation(fields: Fields, family: Family, only: Callable[..., Any]) -> str:
    """What the gate's activation is called here."""
    name = family.activation
    if family.root_embedding and name == "hidden_act" and (newer := fields.get("hidden_activation")) is not None:
        only("hidden_activation", *ACTIVATIONS)  # Gemma 1 as transformers 4 wrote it: the older key says gelu then
        fields.asked.add(name)
        return ACTIVATIONS[newer]
    if family.root_embedding and fields.get(name) == "gelu":
        return "gelu_tanh"  # what Gemma's first files say and do not mean; transformers reads it so
    return ACTIVATIONS[only(name, *ACTIVATIONS) or "silu"]


def _spelled(fields: Fields, key: str) -> Any:
    """The value of a field of `SPELLED`."""
    how = SPELLED[key][1]
    if how == "flag":
        return fields.flag(key, False)
    if how == "number or none" and fields.get(key) is None:
        return None
    value = fields.number(key)
    return {"inverse": 1 / value, "inverse root": value**-0.5}.get(how, value)


def _unrotated(fields: Fields, family: Family, layers: int) -> tuple[int, ...]:
    """The layers without positions: those with a 0 in `no_rope_layers`, or every n-th."""
    if not family.unrotated:
        return ()
    every = fields.whole("no_rope_layer_interval")
    listed = fields.items("no_rope_layers", int, "0 and 1, one a layer")
    if not listed and fields.get("no_rope_layers") is None:
        return tuple(i for i in range(layers) if (i + 1) % every == 0)
    if len(listed) != layers or not set(listed) <= {0, 1}:
        raise fields.wrong("no_rope_layers", f"a list of {layers} numbers 0 and 1, one a layer")
    return tuple(i for i, rotated in enumerate(listed) if not rotated)


def _windows(
    fields: Fields, family: Family, layers: int, unrotated: tuple[int, ...]
) -> tuple[int | None, tuple[int, ...]]:
    """The window and the layers that it does not hold for."""
    if family.windows == "none":
        return None, ()
    window = fields.maybe_whole("sliding_window")
    if family.windows in ("later", "unrotated"):
        later, wanted = fields.maybe_whole("max_window_layers", low=0), fields.flag("use_sliding_window", False)
        window = window if wanted else None
    else:
        later = 0
    kinds: list[str] = []
    if family.windows != "all":
        kinds = fields.items("layer_types", str, f"{_SLIDING} and {_FULL}, one a layer")
        if kinds and (len(kinds) != layers or not set(kinds) <= {_SLIDING, _FULL}):
            raise fields.wrong("layer_types", f"a list of {layers} texts {_SLIDING} or {_FULL}, one a layer")
    every = 0
    if family.windows == "pattern":
        every = fields.whole("sliding_window_pattern", fields.whole("_sliding_window_pattern", 2))
    if window is None:
        if _SLIDING in kinds:
            raise InputError(f"{fields.where}: layer_types has {_SLIDING}, and no sliding_window is in force")
        return None, ()
    if kinds:
        everywhere = tuple(i for i, kind in enumerate(kinds) if kind == _FULL)
    elif family.windows == "later":
        everywhere = tuple(range(min(layers, later or 0)))
    elif family.windows == "pattern":
        everywhere = tuple(i for i in range(layers) if (i + 1) % every == 0)
    elif family.windows == "unrotated":
        everywhere = tuple(i for i in range(layers) if i not in unrotated)
    else:
        everywhere = ()
    return (None, ()) if len(everywhere) == layers else (window, everywhere)


def to_hf(config: LlamaConfig) -> dict[str, Any]:
    """A Hugging Face config dictionary that `from_hf` reads back to `config` and `transformers` loads."""
    family = FAMILIES[config.model_type]
    usual = config.head_dim * config.num_heads == config.hidden_size
    activation = next(name for name, kind in ACTIVATIONS.items() if kind == config.activation)
    raw: dict[str, Any] = {
        "architectures": [family.class_name(scores=bool(config.num_labels))],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        **({"head_dim": config.head_dim} if family.head_size or not usual else {}),
        family.activation: activation,
        "rms_norm_eps": config.rms_norm_eps,
        **rope_keys.write(config, family),
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
    if family.windows != "none":
        raw["sliding_window"] = config.sliding_window
    if family.windows in ("later", "unrotated"):
        raw["use_sliding_window"] = config.sliding_window is not None
    if family.windows in ("later", "unrotated", "pattern"):
        windowed = set(range(config.num_layers)) - set(config.global_layers) if config.sliding_window else set()
        raw["layer_types"] = [_SLIDING if i in windowed else _FULL for i in range(config.num_layers)]
    if family.unrotated:
        raw["no_rope_layers"] = [int(i not in config.unrotated_layers) for i in range(config.num_layers)]
    return raw | {key: _unspelled(config, key) for key in family.keys}


def _unspelled(config: LlamaConfig, key: str) -> Any:
    """What config.json holds where `_spelled` gave the field's value."""
    name, how = SPELLED[key]
    value = getattr(config, name)
    if how in ("inverse", "inverse root"):
        meant = round(1 / value if how == "inverse" else value**-2, 9)  # whole numbers survive their roots
        return int(meant) if meant == int(meant) else meant
    return value
