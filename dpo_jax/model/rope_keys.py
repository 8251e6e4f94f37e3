"""RoPE as a config.json spells it: read in either spelling (`rope_scaling`, or transformers 5's `rope_parameters`),
and written in both."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo_jax.errors import InputError
from dpo_jax.headers import Fields, told
from dpo_jax.model.config_keys import left_unread
from dpo_jax.model.families import Family
from dpo_jax.model.rope import RopeScaling

if TYPE_CHECKING:
    from dpo_jax.model.architecture import LlamaConfig

_SPELLINGS = ("rope_parameters", "rope_scaling")
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


@dataclass(frozen=True)
class Rope:
    """What was read: `fields` of `LlamaConfig`, and the keys that were left unread."""

    fields: dict[str, Any]
    unread: list[str]


def read(fields: Fields, family: Family, max_position: int) -> Rope:
    """RoPE of a model. Raises `InputError` for a kind or a value that is not supported."""
    spelled = {name: fields.get(name) or {} for name in _SPELLINGS}
    for name, value in spelled.items():
        if not isinstance(value, dict):
            raise fields.wrong(name, "an object")
    local, unread = None, []
    if family.two_bases:
        local = fields.number("rope_local_base_freq")
        for name, value in spelled.items():
            if _GLOBAL in value or _LOCAL in value:
                spelled[name], local, more = _by_layer_type(Fields(value, fields.where, f"{name}."), local)
                unread += more
    found = [name for name, value in spelled.items() if value]
    name = found[0] if found else "rope_scaling"
    if len(found) == 2 and _alike(spelled["rope_parameters"]) != _alike(spelled["rope_scaling"]):
        raise InputError(f"{fields.where}: rope_parameters and rope_scaling say different things; leave one out")
    nested = Fields(spelled[name], fields.where, f"{name}.")
    theta = _base(fields, family, nested, name)
    share = _partial(fields, nested)
    scaling = _scaling(fields, nested, family, max_position)
    unread += left_unread(nested.raw, nested.asked, fields.where, f"{name}.")
    read = {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local, "partial_rotary": share}
    return Rope(read, unread)


def _by_layer_type(value: Fields, local: float) -> tuple[dict[str, Any], float, list[str]]:
    """The global layers' RoPE, the base of the windowed ones, and unread keys, from RoPE fields by layer type."""
    parts = {kind: value.get(kind) or {} for kind in (_GLOBAL, _LOCAL)}
    for kind, part in parts.items():
        if not isinstance(part, dict):
            raise value.wrong(kind, "an object")
    near = Fields(parts[_LOCAL], value.where, f"{_LOCAL}.")
    kind = near.text("rope_type", near.text("type", "default"))
    if kind != "default":
        raise InputError(f"{value.where}: RoPE scaling {told(kind)} of layers with a window is not supported")
    local = near.number("rope_theta", local)
    unread = left_unread(near.raw, near.asked, value.where, f"{_LOCAL}.")
    return parts[_GLOBAL], local, unread + left_unread(value.raw, value.asked, value.where, "rope_parameters.")


def _base(fields: Fields, family: Family, nested: Fields, name: str) -> float:
    usual = family.defaults.get("rope_theta", 10_000.0)
    inner = nested.number("rope_theta", usual)
    given = nested.raw.get("rope_theta") is not None
    outer = fields.number("rope_theta", inner)
    if given and outer == usual and "rope_theta" in family.defaults:
        outer = inner  # the outer one was not there: it is the family's own
    if given and inner != outer:
        raise InputError(f"{fields.where}: rope_theta is {outer:g}, and within {name} another; leave one out")
    return outer


def _partial(fields: Fields, nested: Fields) -> float:
    """The share of a head's channels that is rotated; 0 is how some files spell that nothing is said."""
    for part in (nested, fields):
        share = part.number("partial_rotary_factor", 1.0, low=-1)
        if not 0 <= share <= 1:
            raise part.wrong("partial_rotary_factor", "from 0 to 1")
        if share not in (0, 1):
            fields.asked.add("partial_rotary_factor")
            return share
    return 1.0


def _scaling(fields: Fields, nested: Fields, family: Family, max_position: int) -> RopeScaling | None:
    kind = nested.text("rope_type", nested.text("type", "default"))
    nested.asked |= {"type"}
    if family.longrope and kind in ("su", "yarn"):
        kind = "longrope"  # what the first Phi-3 files call it
    if kind not in _KINDS:
        raise InputError(
            f"{fields.where}: RoPE scaling {told(kind)} is not supported; supported are {', '.join(_KINDS[:-1])} and"
            f" {_KINDS[-1]}"
        )
    outer = fields.maybe_whole("original_max_position_embeddings") if family.longrope else None
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", nested.number("factor"))
    if kind == "dynamic":
        nested.asked.add("original_max_position_embeddings")  # transformers goes by max_position_embeddings
        return RopeScaling("dynamic", nested.number("factor"), original_max_position=max_position)
    if kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            factor=nested.number("factor"),
            low_freq_factor=nested.number("low_freq_factor"),
            high_freq_factor=nested.number("high_freq_factor"),
            original_max_position=nested.whole("original_max_position_embeddings"),
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise nested.wrong("low_freq_factor", f"below high_freq_factor {scaling.high_freq_factor:g}")
        return scaling
    original = outer or nested.whole("original_max_position_embeddings", max_position, low=2)
    nested.asked.add("original_max_position_embeddings")
    factor = nested.number("factor", max_position / original)
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            factor,
            original_max_position=original,
            beta_fast=nested.number("beta_fast", 32.0),
            beta_slow=nested.number("beta_slow", 1.0),
            truncate=nested.flag("truncate", True),
            scale=nested.number("attention_factor", _yarn_scale(nested, factor)),
        )
    pairs = [tuple(map(float, nested.items(name, (int, float), "numbers"))) for name in ("short_factor", "long_factor")]
    for name, factors in zip(("short_factor", "long_factor"), pairs, strict=True):
        if not all(0 < one < 1e12 for one in factors):
            raise nested.wrong(name, "a list of numbers above 0")
    return RopeScaling(
        "longrope",
        factor,
        original_max_position=original,
        scale=nested.number("attention_factor", _longrope_scale(factor, original)),
        short_factors=pairs[0],
        long_factors=pairs[1],
    )


def _yarn_scale(nested: Fields, factor: float) -> float:
    """sqrt(1/t) of the paper's Eq. 22, or a ratio of two such where `mscale` and `mscale_all_dim` say so."""

    def of(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scale, everywhere = nested.number("mscale", 0.0), nested.number("mscale_all_dim", 0.0)
    return of(scale) / of(everywhere) if scale and everywhere else of(1.0)


def _longrope_scale(factor: float, original: int) -> float:
    """sqrt(1 + ln f / ln N), as in the released code."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _alike(rope: Mapping[str, Any]) -> dict[str, Any]:
    """One spelling of either spelling's scaling, without what stands in one of them alone."""
    alone = ("rope_theta", "type", "partial_rotary_factor", "original_max_position_embeddings", "attention_factor")
    kept = {key: value for key, value in rope.items() if key not in alone and value is not None}
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "llama3":
        kept["original_max_position_embeddings"] = rope.get("original_max_position_embeddings")
    if kind in ("su", "longrope"):
        kept.pop("factor", None)
    return kept | {"rope_type": "longrope" if kind == "su" else kind}


def write(config: "LlamaConfig", family: Family) -> dict[str, Any]:
    """RoPE's keys of a config.json. Older readers want rope_theta and rope_scaling, transformers 5 rope_parameters."""
    rope: dict[str, Any] = {"rope_type": "default"}
    older: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        rope = older = _written(config.rope_scaling, config.max_position)
        if family.longrope:  # whose older readers take these three alone
            older = {"type": rope["rope_type"], **{k: rope[k] for k in ("short_factor", "long_factor") if k in rope}}
    whole = {**rope, "rope_theta": config.rope_theta}
    if config.partial_rotary != 1:
        whole["partial_rotary_factor"] = config.partial_rotary
    raw: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": older, "rope_parameters": whole}
    if config.partial_rotary != 1:
        raw["partial_rotary_factor"] = config.partial_rotary
    if family.longrope and config.rope_scaling is not None:
        raw["original_max_position_embeddings"] = config.rope_scaling.original_max_position
    if family.two_bases:
        near = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        raw["rope_parameters"] = {_GLOBAL: whole, _LOCAL: near}
    if family.base_key:
        raw["rope_local_base_freq"] = config.local_rope_theta
    return raw


def _written(s: RopeScaling, max_position: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = s.original_max_position
    if s.kind == "llama3":
        rope |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
        rope["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    if s.kind == "yarn":
        rope |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
        rope["attention_factor"] = s.scale
    if s.kind == "longrope":
        rope |= {"short_factor": list(s.short_factors), "long_factor": list(s.long_factors)}
        if s.scale != _longrope_scale(s.factor, s.original_max_position):
            rope["attention_factor"] = s.scale
        if s.factor == max_position / s.original_max_position:
            del rope["factor"]
    return rope
