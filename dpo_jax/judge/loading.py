"""What `eval`, `logps`, `score` and `inspect` load: devices, data, models; and what a model gives to the data."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax import mesh as meshes
from dpo_jax.config import AttentionKernel, DataConfig, EvalRun, LogpsRun, MeshConfig, ScoreRun, TrainConfig
from dpo_jax.data.sets.dataset import PreferenceDataset, check_lengths, load_preferences
from dpo_jax.data.sets.loader import eval_batches
from dpo_jax.data.tokens.templates import check_date
from dpo_jax.errors import InputError
from dpo_jax.files.log import say, show_log
from dpo_jax.judge.policy_logps import policy_logps
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.weights.opened import StoredModel
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import check_vocabulary


@dataclass(frozen=True)
class Setting:
    """How models are run in one command: devices, batches, dtype, kernel."""

    mesh: Mesh
    batch_size: int
    buckets: int
    dtype: str
    attention: AttentionKernel

    @classmethod
    def of(cls, mesh: MeshConfig, data: DataConfig, run: EvalRun | LogpsRun | ScoreRun | TrainConfig) -> "Setting":
        """From the options of a command. Raises `InputError` where the batch does not divide over the devices."""
        devices = meshes.make_mesh(**dataclasses.asdict(mesh))
        parts = meshes.batch_parts(devices)
        if run.batch_size % parts:
            raise InputError(
                f"--batch_size {run.batch_size} does not divide over {parts} devices; take a multiple of {parts}"
            )
        return cls(devices, run.batch_size, data.buckets, run.dtype, run.attention)

    def load(self, source: str | StoredModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Llama, dict[str, Any]]:
        """A model laid out on the mesh, with an embedding that has a row for every id of the tokenizer."""
        model, variables = load_pretrained(source, mesh=self.mesh, dtype=self.dtype, attention=self.attention)
        check_vocabulary(tokenizer, model.config)
        return model, variables

    def logps(self, model: Llama, variables: Any, dataset: PreferenceDataset, label: str) -> np.ndarray:
        """float64 [N, K] summed log-probabilities, in nats, in row order."""
        batches = eval_batches(dataset, self.batch_size, self.buckets)
        return policy_logps(dataset, model, variables, mesh=self.mesh, batches=batches, label=label).astype(np.float64)


def load_vocabulary(model: StoredModel, data: DataConfig | None = None) -> tuple[LlamaConfig, PreTrainedTokenizerBase]:
    """The model's architecture and its tokenizer, which fit together and `data`; its weights are not read."""
    show_log()
    architecture, tokenizer = model.architecture, model.tokenizer()
    check_vocabulary(tokenizer, architecture)
    if data is not None:
        check_date(tokenizer, data.template, data.date)
    return architecture, tokenizer


def load_data(
    model: StoredModel,
    source: str,
    config: DataConfig,
    on_bad_rows: Literal["refuse", "skip"],
    *,
    with_format_masks: bool = False,
) -> tuple[PreTrainedTokenizerBase, PreferenceDataset]:
    """The model's tokenizer and the pairs of a file, checked before weights are read; what was left out is said."""
    architecture, tokenizer = load_vocabulary(model, config)
    dataset = load_preferences(
        source,
        tokenizer,
        config,
        vocab_size=architecture.vocab_size,
        on_bad_rows=on_bad_rows,
        with_format_masks=with_format_masks,
    )
    check_lengths(dataset, architecture, config.max_length)
    say(dataset.summary())
    return tokenizer, dataset


def check_output(path: str | Path, *read: str | None) -> Path:
    """The file that a command will write, checked before any work: a regular file, in a folder that can be written.

    read: what the command reads (files, sets of files as --data takes them) or writes beside it, and so must not be it.

    Raises `InputError` otherwise.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        what = "is a folder" if path.is_dir() else "is not a file that can be written"
        raise InputError(f"{path}: {what}; choose another --out")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path}: {folder} is not a writable folder; choose another --out")
    for source in filter(None, read):
        for one in (source, *source.split(",")):
            if path.resolve() in (_resolved(one), _resolved(one.rpartition(":")[0])):
                raise InputError(f"{path}: would be written over {one}, which this command needs; choose another name")
    return path


def _resolved(place: str) -> Path | None:
    """Where it lies, were it a path; None for what is none."""
    try:
        return Path(place).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):
        return None
