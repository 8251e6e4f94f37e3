"""Sizes of published models, so that a plan needs no download: `--model_shape NAME`.

From the config.json of each on the Hugging Face hub. A model that is not here is planned from its own config.json
(`--model FOLDER_OR_HUB_ID`), of which only that file is read.
"""

import math
from dataclasses import replace
from pathlib import Path

from dpo_jax.config import ON_COMMAND_LINE, DistillRun, TrainingRun
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig, RopeScaling
from dpo_jax.weights.huggingface.layout import parameter_slots
from dpo_jax.weights.pretrained import read_shape

_LLAMA2_7B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_position=4096,
)
_LLAMA3_8B = replace(
    _LLAMA2_7B,
    vocab_size=128_256,
    intermediate_size=14_336,
    num_kv_heads=8,
    rope_theta=500_000.0,
    max_position=8192,
)
_70B = {"hidden_size": 8192, "intermediate_size": 28_672, "num_layers": 80, "num_heads": 64, "num_kv_heads": 8}

SHAPES = {
    "llama2_7b": _LLAMA2_7B,
    "llama2_13b": replace(
        _LLAMA2_7B, hidden_size=5120, intermediate_size=13_824, num_layers=40, num_heads=40, num_kv_heads=40
    ),
    "llama2_70b": replace(_LLAMA2_7B, **_70B),
    "llama3_1b": replace(
        _LLAMA3_8B,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        head_dim=64,
        max_position=131_072,
        rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        tie_embeddings=True,
    ),
    "llama3_8b": _LLAMA3_8B,
    "llama3_70b": replace(_LLAMA3_8B, **_70B),
    "mistral_7b": replace(
        _LLAMA2_7B, intermediate_size=14_336, num_kv_heads=8, max_position=32_768, model_type="mistral"
    ),
    "smollm2_135m": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position=8192,
        rope_theta=100_000.0,
        tie_embeddings=True,
    ),
}


def shape_of(run: TrainingRun, name: str | None) -> tuple[LlamaConfig, str]:
    """The model's shape and what to call it: the one `name` stands for, else that of `run.model`.

    Raises `InputError` for an unknown name, or where neither says which.
    """
    if name is not None:
        return _named(name, "model"), name
    if run.model == ON_COMMAND_LINE:
        raise InputError("no model is named: give --model_shape (such as llama2_7b) or --model")
    return read_shape(run.model), Path(run.model).name


def teacher_of(run: TrainingRun, name: str | None) -> LlamaConfig | None:
    """The shape of the teacher of a distillation: the one `name` stands for, else that of `run.teacher`; else None.

    Raises `InputError` as `shape_of`, and for a name that has no effect.
    """
    if not isinstance(run, DistillRun):
        if name is not None:
            raise InputError(f"--teacher_shape {name} has no effect: only distill has a teacher")
        return None
    if name is not None:
        return _named(name, "teacher")
    if run.teacher == ON_COMMAND_LINE:
        raise InputError("no teacher is named: give --teacher_shape (such as llama2_13b) or --teacher")
    return read_shape(run.teacher)


def _named(name: str, option: str) -> LlamaConfig:
    if name not in SHAPES:
        raise InputError(f"--{option}_shape {name}: is none of {', '.join(SHAPES)}; for others give --{option}")
    return SHAPES[name]


def parameters(shape: LlamaConfig) -> int:
    """How many parameters a model of this shape has."""
    return sum(math.prod(slot.shape) for slot in parameter_slots(shape))
