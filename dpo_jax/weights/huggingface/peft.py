"""LoRA adapters as a PEFT folder: adapter_config.json and adapter_model.safetensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import LINEAR_LAYERS, LoraConfig
from dpo_jax.errors import InputError
from dpo_jax.headers import Fields, read_json, told
from dpo_jax.model import heads
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.weights.huggingface import fused_adapters, heads as head_files, layout, model_folder, shards
from dpo_jax.weights.integrity import base as bases
from dpo_jax.weights.integrity.folder import write_json
from dpo_jax.weights.tokenizers.tokenizer_files import save_tokenizer

PREFIX = "base_model.model."
"""What stands before the name of each tensor of an adapter file."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# PEFT's own sequence classifiers list both names that such a head may have; a Llama's is called score.
_SCORE_SAVED = ([heads.SCORE], ["classifier", heads.SCORE], [heads.SCORE, "classifier"])

# Entries that say how the adapter was trained or found, and change none of its numbers.
_WITHOUT_EFFECT = frozenset(
    """base_model_name_or_path revision inference_mode lora_dropout init_lora_weights task_type peft_type r lora_alpha
    target_modules auto_mapping peft_version megatron_config megatron_core qalora_group_size layers_pattern""".split()
)  # fmt: skip


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG)


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base model that an adapter folder's configuration names, and its revision."""
    raw = _config(folder)
    base, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    if not isinstance(base, str) or not base:
        raise InputError(
            f"{folder / CONFIG}: base_model_name_or_path is missing; write the base model's folder or id there"
        )
    return base, revision if isinstance(revision, str) else None


def read_lora(folder: Path) -> LoraConfig:
    """Rank, alpha and targets of an adapter folder. `InputError` for anything but plain LoRA on linear layers."""
    raw, where = _config(folder), folder / CONFIG
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type {raw.get('peft_type')!r} is not supported; only LORA is")
    fields = Fields(raw, str(where))
    rank, alpha = fields.whole("r"), fields.number("lora_alpha")
    patterns = raw.get("rank_pattern"), raw.get("alpha_pattern")
    in_blocks = fused_adapters.is_pattern(*patterns, rank, alpha)
    for key, value in raw.items():
        if key == "modules_to_save" and value in _SCORE_SAVED:
            continue
        if key in ("rank_pattern", "alpha_pattern") and in_blocks:
            continue
        # false, 0, "none", {} and null are how PEFT spells "not used"
        if key not in _WITHOUT_EFFECT and value not in (None, False, 0, "none", {}, []):
            raise InputError(f"{where}: {key} = {value!r} is not supported; only plain LoRA is read")
    if (start := raw.get("init_lora_weights", True)) not in (True, False, "gaussian"):
        # PiSSA and its like also changed the base weights
        raise InputError(f"{where}: init_lora_weights = {start!r} is not supported; convert it to plain LoRA with peft")
    return LoraConfig(rank=rank, alpha=alpha, targets=_targets(raw.get("target_modules"), where))


def _targets(named: Any, where: Path) -> tuple[str, ...]:
    """The kinds of linear layers that `target_modules` names.

    By kind (q_proj), "all-linear", or layer by layer (model.layers.0.self_attn.q_proj), as newer versions of PEFT write
    what all-linear stood for. That each kind has adapters in every layer shows when the tensors are read.
    """
    if named == "all-linear":
        return LINEAR_LAYERS
    several = isinstance(named, list) and all(isinstance(name, str) for name in named)
    last = [name.rsplit(".", 1)[-1] for name in named] if several else []
    kinds = {kind for name in last for kind in fused_adapters.KINDS.get(name, (name,))}
    if not kinds or not kinds <= set(LINEAR_LAYERS):
        raise InputError(
            f"{where}: target_modules {told(named)} is not supported; list some of {', '.join(LINEAR_LAYERS)}"
        )
    return tuple(kind for kind in LINEAR_LAYERS if kind in kinds)


def has_score(folder: Path) -> bool:
    """True for the adapters of a reward model: the score is saved among them."""
    return _config(folder).get("modules_to_save") in _SCORE_SAVED


def load_adapters(folder: Path, model: Llama, target: Any, mesh: Mesh | None) -> dict[str, Any]:
    """{"adapters": ...} of a folder, and {"heads": ...} where it has some, for a model made with `read_lora`.

    `target` is that of the adapters, as for `layout.load_tree`.
    """
    reader = fused_adapters.FusedReader(shards.SafetensorsReader(folder, [WEIGHTS]), model)
    slots = layout.adapter_slots(model)
    score = [layout.score_slot(model.config, PREFIX)] if has_score(folder) else []
    layout.check_keys([*slots, *score], reader)
    found = head_files.load_score(model, reader.read, mesh, PREFIX) if score else {}
    found |= head_files.load_others(folder / head_files.FILE, model, mesh)
    return {"adapters": layout.load_tree(slots, reader.read, target), **({"heads": found} if found else {})}


def write_configs(
    folder: Path,
    model: Llama,
    config: LlamaConfig,
    base: bases.Base,
    terminators: Sequence[int] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """What makes a folder of `fused_adapters.tensors` one that `peft.PeftModel.from_pretrained` loads.

    A reward model's (`config`) is PEFT's form for a sequence classifier. `terminators` are kept in a
    generation_config.json, for the model that `convert` makes of it.
    """
    lora, scored = model.lora, bool(config.num_labels)
    alpha = lora.scale * lora.rank
    told = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scored else "CAUSAL_LM",
        "base_model_name_or_path": base.model,
        "revision": base.revision,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": model.lora.settled.dropout,
        **fused_adapters.named(model),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": [heads.SCORE] if scored else None,
        "use_rslora": False,
        "use_dora": False,
    }
    (folder / shards.SINGLE).rename(folder / WEIGHTS)
    bases.write(folder, base)
    write_json(folder / CONFIG, told)
    if terminators:
        model_folder.write_generation(folder, config, None, terminators)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
