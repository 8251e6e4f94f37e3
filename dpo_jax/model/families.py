"""The one table of families: `model_type` -> fields of `LlamaConfig`, keys of config.json, classes and tensors.

Nothing else names a family. Each entry is what the class of that name in `transformers` computes, and what its
configuration takes where a config.json does not speak (`defaults`). `docs/adding_a_model.md` adds one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dpo_jax.errors import InputError

CLASSIFICATION = "ForSequenceClassification"

Windows = Literal["none", "all", "later", "pattern", "unrotated"]
"""Which layers a window holds for, where `layer_types` does not list them: none ever; all; those from
`max_window_layers` on, under `use_sliding_window`; all but every n-th (`sliding_window_pattern`); those without
positions, under `use_sliding_window`."""


@dataclass(frozen=True)
class GGUF:
    """How llama.cpp's files hold the models of a family; their tensors' names are those of the `gguf` package.

    What is not listed has no place there, and a model that has it is refused when it is written.

    Attributes:
      architecture: general.architecture, which every key of its metadata begins with.
      keys: key of config.json -> key of the metadata, of what a Llama does not have.
      biases: the keys of config.json whose biases llama.cpp reads.
      interleaved: the rows of q and k are kept in the order of pairs (x_2i, x_2i+1).
      part_rotates: rope.dimension_count may be less than a head.
      wide_layers: llama.cpp takes query_pre_attn_scalar to be the heads' size, and hidden_size / num_attention_heads in
        models of this many layers (the largest Gemma 2 and 3).
    """

    architecture: str
    keys: Mapping[str, str] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    interleaved: bool = False
    part_rotates: bool = False
    wide_layers: int = 0


@dataclass(frozen=True)
class Family:
    """What the checkpoints of one `model_type` have in common.

    Attributes:
      prefix: of the classes' names in `transformers`: Qwen2 of Qwen2ForCausalLM.
      defaults: config.json key -> what `transformers` takes where the key is absent.
      fields: field of `LlamaConfig` -> its value in every model of the family.
      keys: the keys of config.json (of `SPELLED`) that this family has beside those of all.
      activation: the key that names the gate's activation.
      windows: see `Windows`.
      root_embedding: embeddings are multiplied by the square root of their width.
      unrotated: config.json may name layers without positions (`no_rope_layers`).
      longrope: the original length stands beside the RoPE's fields, which may call longrope su or yarn.
      two_bases: windowed layers have a base of their own (`rope_local_base_freq`, or RoPE fields by layer type).
      base_key: that base has the key `rope_local_base_freq`.
      fused: tensors of several projections in one on disk, part after part: name -> parts.
      classifier: prefix of its ...ForSequenceClassification in `transformers`, where it is another; None: it has none.
      head_size: its config.json has `head_dim`; elsewhere that is written only where it does not follow from the width.
      gguf: see `GGUF`; None: llama.cpp has no such architecture.
    """

    prefix: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    activation: str = "hidden_act"
    windows: Windows = "none"
    root_embedding: bool = False
    unrotated: bool = False
    longrope: bool = False
    two_bases: bool = False
    base_key: bool = False
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    classifier: str | None = ""
    head_size: bool = True
    gguf: GGUF | None = None

    def class_name(self, *, scores: bool) -> str:
        """The class in `transformers`, as a language model or a reward model (see `classifier`)."""
        return f"{(scores and self.classifier) or self.prefix}{CLASSIFICATION if scores else 'ForCausalLM'}"


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""What config.json calls an activation -> what `LlamaConfig.activation` does; the first of a kind is written."""

SPELLED: dict[str, tuple[str, str]] = {
    "attention_bias": ("attention_bias", "flag"),
    "mlp_bias": ("mlp_bias", "flag"),
    "attn_logit_softcapping": ("attention_cap", "number or none"),
    "final_logit_softcapping": ("logit_cap", "number or none"),
    "query_pre_attn_scalar": ("attention_scale", "inverse root"),
    "attention_multiplier": ("attention_scale", "number"),
    "embedding_multiplier": ("embedding_scale", "number"),
    "residual_multiplier": ("residual_scale", "number"),
    "logits_scaling": ("logit_scale", "inverse"),
}
"""config.json key -> field, and how the number there becomes the field's."""

_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_GEMMA_2 = {
    **{key: value for key, value in _GEMMA.items() if key != "hidden_act"},
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_CAPS = ("attention_bias", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")

_BIASES = ("attention_bias", "mlp_bias")
_SCALES = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_WINDOW = {"sliding_window": "attention.sliding_window"}
_LOGIT_CAP = {"final_logit_softcapping": "final_logit_softcapping"}
_SCORE_CAP = {"attn_logit_softcapping": "attn_logit_softcapping"}
_NEAR = {"rope_local_base_freq": "rope.freq_base_swa"}

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", keys=_BIASES, gguf=GGUF("llama", biases=_BIASES, interleaved=True)),
    "mistral": Family(
        "Mistral",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
        windows="all",
        gguf=GGUF("llama", keys=_WINDOW, interleaved=True),
    ),
    "qwen2": Family(
        "Qwen2", defaults=_QWEN, fields={"qkv_bias": True}, windows="later", head_size=False, gguf=GGUF("qwen2")
    ),
    "qwen3": Family(
        "Qwen3",
        defaults={**_QWEN, "head_dim": 128},
        fields={"qk_norm": "head"},
        keys=("attention_bias",),
        windows="later",
        gguf=GGUF("qwen3"),
    ),
    "smollm3": Family(
        "SmolLM3",
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": True,
            "rope_theta": 2_000_000.0,
            "no_rope_layer_interval": 4,
        },
        keys=("attention_bias", "mlp_bias"),
        windows="unrotated",
        unrotated=True,
        head_size=False,
        gguf=GGUF("smollm3", interleaved=True),
    ),
    "phi3": Family(
        "Phi3",
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32_000,
            "pad_token_id": 32_000,
        },
        windows="all",
        longrope=True,
        head_size=False,
        fused={
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        },
        gguf=GGUF("phi3", keys=_WINDOW, part_rotates=True),
    ),
    "gemma": Family(
        "Gemma",
        defaults={**_GEMMA, "num_key_value_heads": 16},
        fields={"norm_offset": 1.0, "wide_norms": True},
        keys=("attention_bias",),
        root_embedding=True,
        gguf=GGUF("gemma"),
    ),
    "gemma2": Family(
        "Gemma2",
        defaults={**_GEMMA_2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        fields={"norm_offset": 1.0, "wide_norms": True, "norms": "both"},
        keys=_CAPS,
        gguf=GGUF("gemma2", keys={**_WINDOW, **_LOGIT_CAP, **_SCORE_CAP}, wide_layers=46),
        activation="hidden_activation",
        windows="pattern",
        root_embedding=True,
    ),
    "gemma3_text": Family(
        "Gemma3",
        defaults={
            **_GEMMA_2,
            "max_position_embeddings": 131_072,
            "_sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        fields={"norm_offset": 1.0, "wide_norms": True, "norms": "both", "qk_norm": "head"},
        keys=tuple(key for key in _CAPS if key != "attn_logit_softcapping"),  # read there, and never applied
        activation="hidden_activation",
        windows="pattern",
        root_embedding=True,
        two_bases=True,
        base_key=True,
        classifier="Gemma3Text",
        gguf=GGUF("gemma3", keys={**_WINDOW, **_LOGIT_CAP, **_NEAR}, wide_layers=62),
    ),
    "olmo2": Family(
        "Olmo2",
        defaults={"rms_norm_eps": 1e-5, "pad_token_id": 1, "eos_token_id": 50_279},
        fields={"norms": "after", "wide_norms": True, "qk_norm": "projection"},
        keys=("attention_bias",),
        head_size=False,
        gguf=GGUF("olmo2"),
    ),
    "olmo3": Family(
        "Olmo3",
        defaults={
            "rms_norm_eps": 1e-5,
            "pad_token_id": 1,
            "eos_token_id": 50_279,
            "rope_theta": 500_000.0,
            "rope_local_base_freq": 500_000.0,
            "sliding_window": 4096,
            "_sliding_window_pattern": 4,
        },
        fields={"norms": "after", "wide_norms": True, "qk_norm": "projection"},
        keys=("attention_bias",),
        windows="pattern",
        two_bases=True,
        head_size=False,
    ),
    "granite": Family(
        "Granite",
        defaults={
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        keys=(*_BIASES, *_SCALES),
        classifier=None,
        head_size=False,
        gguf=GGUF("granite", keys=_SCALES, biases=_BIASES, interleaved=True),
    ),
}

ARCHITECTURES: dict[str, str] = {
    family.class_name(scores=scores): model_type
    for scores in (False, True)
    for model_type, family in FAMILIES.items()
    if not scores or family.classifier is not None
}
"""Class of `transformers` -> model_type."""


def check_scores(model_type: str, where: object) -> None:
    """Raise `InputError` for a family whose reward models `transformers` has no class for."""
    if FAMILIES[model_type].classifier is None:
        raise InputError(
            f"{where}: transformers has no {CLASSIFICATION[3:]} of model_type {model_type}, so no reward model is made"
            " of it; start from another family"
        )
