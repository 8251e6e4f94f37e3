"""What options are called: the same in a CONFIG.py, in the files of a run, in messages and on the command line."""

import dataclasses
import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

_OLD = {"source": "data.files", "eval_source": "eval_data", "mix_source": "mix_data", "target": "to"}
"""Names of the version before -> those of today. They are still read, in this version only."""

ELSEWHERE = {
    "lr": ("optimizer.learning_rate",),
    "optim": ("optimizer.name",),
    "lr_scheduler_type": ("optimizer.schedule",),
    "max_grad_norm": ("optimizer.clip_norm",),
    "num_train_epochs": ("train.epochs",),
    "max_steps": ("train.steps",),
    "per_device_train_batch_size": ("train.batch_size",),
    "gradient_accumulation_steps": ("train.accumulate",),
    "gradient_checkpointing": ("train.remat",),
    "bf16": ("train.dtype",),
    "eval_steps": ("train.eval_every",),
    "eval_every_n_steps": ("train.eval_every",),
    "save_steps": ("checkpoint.every",),
    "checkpointing_options": ("checkpoint.every",),
    "save_total_limit": ("checkpoint.keep",),
    "report_to": ("log.wandb",),
    "hub_model_id": ("push_to_hub",),
    "output_dir": ("out",),
    "model_name_or_path": ("model",),
    "dataset": ("data",),
    "dataset_name": ("data",),
    "val_size": ("holdout",),
    "cutoff_len": ("data.max_length",),
    "max_response_length": ("sample.max_new_tokens", "data.max_length"),
    "max_tokens_to_generate": ("sample.max_new_tokens",),
    "max_completion_length": ("sample.max_new_tokens",),
    "loss_type": ("dpo.loss", "ppo.averaging"),
    "loss_agg_mode": ("ppo.averaging",),
    "algorithm": ("dpo.loss",),
    "pref_loss": ("dpo.loss",),
    "pref_beta": ("dpo.beta",),
    "pref_ftx": ("dpo.nll_coefficient",),
    "beta": ("dpo.beta", "ppo.kl_coefficient"),
    "dpo_label_smoothing": ("dpo.label_smoothing",),
    "lambda_orpo": ("dpo.orpo_lambda",),
    "kto_chosen_weight": ("dpo.desirable_weight",),
    "kto_rejected_weight": ("dpo.undesirable_weight",),
    "f_divergence_type": ("dpo.divergence",),
    "precompute_ref_log_probs": ("dpo.reference",),
    "sync_ref_model": ("dpo.reference_sync_steps",),
    "ref_model_sync_steps": ("dpo.reference_sync_steps",),
    "ref_model_mixup_alpha": ("dpo.reference_mixup_alpha",),
    "ref_model": ("reference",),
    "lora_r": ("lora.rank",),
    "lora_target": ("lora.targets",),
    "lora_target_modules": ("lora.targets",),
    "lora_dropout": ("lora.dropout",),
    "load_in_4bit": ("train.frozen_dtype",),
    "load_in_8bit": ("train.frozen_dtype",),
    "quantization_bit": ("train.frozen_dtype",),
    "deepspeed": ("mesh.fsdp",),
    "reward_funcs": ("reward",),
    "reward_fns": ("reward",),
    "reward_model": ("reward",),
    "multi_objective_aggregation": ("reward_aggregation",),
    "num_generations": ("ppo.group_size",),
    "num_iterations": ("ppo.epochs",),
    "epsilon": ("ppo.clip",),
    "epsilon_high": ("ppo.clip_high",),
    "delta": ("ppo.dual_clip",),
    "scale_rewards": ("ppo.scale",),
    "importance_sampling_level": ("ppo.ratio",),
    "mask_truncated_completions": ("ppo.overlong",),
    "vllm_importance_sampling_mode": ("ppo.sampler_correction",),
    "vllm_importance_sampling_clip_max": ("ppo.sampler_cap",),
}
"""What TRL's, LLaMA-Factory's and Tunix's users call an option -> what it is called here, for messages: of several the
first that the command has. The tables of docs/coming_from.md say the same, by a test."""

OTHERWISE = {
    "per_device_train_batch_size": "which counts the whole step: devices x rows of each x accumulation",
    "gradient_accumulation_steps": "which splits --train.batch_size into so many pieces",
    "report_to": "and TensorBoard's files are always written",
    "resume_from_checkpoint": "a run goes on by the same command again",
}
"""What an option of that name means here, where that is something else."""

log = logging.getLogger(__name__)


def option(name: str) -> str:
    """The command-line spelling of a field, such as --data.max_length, or --data of `data.files`.

    What a section is called stands for its files, and `from_` for a word that Python keeps for itself.
    """
    return f"--{name.removesuffix('.files').removesuffix('_')}"


def with_new_names(flat: Mapping[str, Any], path: object) -> dict[str, Any]:
    """Options of a run ("sft.source": ...) that an older version may have written in `path`, under today's names."""
    renamed = {}
    for name, value in flat.items():
        section, dot, own = name.rpartition(".")
        if own in _OLD:
            _tell_once(f"{path}: written by an older version, which said {own} for {_OLD[own]}; it is read as that")
        renamed[f"{section}{dot}{_OLD.get(own, own)}"] = value
    return renamed


@cache
def _tell_once(line: str) -> None:
    log.warning("%s", line)


class RunOptions(type):
    """Of the options of a command: where they have a section `data`, `data="a.jsonl"` is one with nothing but files.

    The names of the version before are taken too, with one line that says so.
    """

    def __call__(cls, *args: Any, **options: Any) -> Any:
        for old in [name for name in options if name in _OLD]:
            new, value = _OLD[old].removesuffix(".files"), options.pop(old)
            given = options.get(new)
            if dataclasses.is_dataclass(given) and not isinstance(given, type):
                value = dataclasses.replace(given, files=value)
            elif given is not None:
                raise TypeError(f"{cls.__name__}() got {old} and {new}, which are one option: leave {old} out")
            options[new] = value
            written = f'{new}={type(given).__name__}("...", ...)' if given is not None else f'{new}="..."'
            _tell_once(f"{old}= is called {new} now: write {written}; the old name is read in this version only")
        fields: dict[str, Any] = getattr(cls, "__dataclass_fields__", {})
        if isinstance(options.get("data"), str) and callable(made := fields["data"].default_factory):
            section: Any = made()
            options["data"] = dataclasses.replace(section, files=options["data"])
        return super().__call__(*args, **options)
