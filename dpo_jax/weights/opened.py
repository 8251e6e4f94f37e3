"""A stored model, opened once: what `--model` names, answering for its architecture, tokenizer and weights.

One class for each kind. `open_checkpoint` finds out which; from there on nobody asks again.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import ClassHead, LoraConfig
from dpo_jax.errors import InputError
from dpo_jax.model import quantised
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.heads import SCORE
from dpo_jax.model.llama import Llama
from dpo_jax.model.quantised import Kind, kind_of
from dpo_jax.model.variables import abstract_variables, frozen_copy, shardings
from dpo_jax.weights.gguf import tensors as gguf_tensors, tokenizer as gguf_tokenizer
from dpo_jax.weights.huggingface import heads, layout, model_folder, peft, shards
from dpo_jax.weights.integrity import base as bases
from dpo_jax.weights.integrity.base import Base
from dpo_jax.weights.orbax import params as orbax_params
from dpo_jax.weights.source import resolve
from dpo_jax.weights.tokenizers import folder_tokenizer

_log = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")
Loaded = tuple[Llama, dict[str, Any]]


@dataclass(eq=False)
class StoredModel:
    """A model on this machine; what is asked of it is read when it is first asked for.

    Attributes:
      path: its folder or file.
      name: as it was asked for.
      beneath: the model that it adds adapters to, or began with; None where it is whole.
      base: the same as its folder names it.
      has_adapters: whether it, or the model beneath, keeps adapters apart from the weights.
      terminators: ids that end a response, as an adapter folder keeps them.
      quantised: how the weights beneath its adapters were kept while these learnt, and are loaded; None: whole.
    """

    path: Path
    name: str
    beneath: ClassVar["StoredModel | None"] = None
    base: ClassVar[Base | None] = None
    has_adapters: ClassVar[bool] = False
    terminators: ClassVar[tuple[int, ...]] = ()
    quantised: ClassVar[Kind | None] = None

    @cached_property
    def _contents(self) -> tuple[LlamaConfig, layout.TensorReader]:
        """Configuration and checked weights. Raises `InputError` for a damaged folder, or another architecture."""
        config, reader = model_folder.read_config(self.path / "config.json"), shards.open_folder(self.path)
        model_folder.check_weights(config, reader)
        return config, reader

    @cached_property
    def architecture(self) -> LlamaConfig:
        """The architecture; names and shapes of the tensors are checked too, without reading them."""
        return self._contents[0]

    @property
    def tensors(self) -> layout.TensorReader | None:
        """Its checked weights, one by one; None of what is neither a Hugging Face folder nor a GGUF file."""
        return self._contents[1]

    @property
    def dtype(self) -> np.dtype:
        """What the weights are stored in, those beneath where there are adapters."""
        assert self.tensors is not None
        return self.tensors.dtype

    @property
    def origin(self) -> Path | None:
        """The folder whose config.json and generation_config.json belong to the model; None for a GGUF file."""
        return self.path

    @property
    def classes(self) -> tuple[ClassHead, ...]:
        """The classes of auxiliary heads, as `save_pretrained` was told them; none where it was not."""
        return heads.read_classes(self.path / heads.FILE)

    @cached_property
    def lasting(self) -> Base:
        """Its name so that it means the same from every folder, and tomorrow."""
        path = Path(self.name).expanduser()
        if path.exists():
            return Base(str(path.absolute()))
        return Base(self.name, next((part for part in self.path.parts if _COMMIT.fullmatch(part)), None))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to it, read anew. Raises `InputError` when there is none, or it is not fast."""
        return folder_tokenizer.read_tokenizer(self.path)

    def load(self, chosen: Mapping[str, Any], lora: LoraConfig, mesh: Mesh | None, dtype: Any) -> Loaded:
        """The model and its variables; adapters only where the checkpoint itself has some.

        `chosen`: fields of `Llama`. `lora`: adapters that will be put on it. `mesh` and `dtype`: see `load_pretrained`.
        """
        config, reader = self._contents
        model = _model(config, lora, **chosen)
        target = _target(model, "params", mesh, dtype)
        variables = {"params": layout.load_tree(layout.parameter_slots(config), reader.read, target)}
        found = heads.load_score(model, reader.read, mesh) if config.num_labels else {}
        found |= heads.load_others(self.path / heads.FILE, model, mesh)
        return model, variables | ({"heads": found} if found else {})


@lru_cache(maxsize=64)
def _model(config: LlamaConfig, lora: LoraConfig, **chosen: Any) -> Llama:
    """The same object for the same model: a program that was compiled for one takes its `apply`, and no other."""
    return Llama(config, lora=lora, **chosen)


class _GGUFFile(StoredModel):
    @cached_property
    def _contents(self) -> tuple[LlamaConfig, layout.TensorReader]:
        return gguf_tensors.open_file(self.path)

    @property
    def origin(self) -> Path | None:
        return None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return gguf_tokenizer.read_tokenizer(self.path)


class _OrbaxFolder(StoredModel):
    """What `convert` wrote."""

    tensors = None  # pyright: ignore[reportAssignmentType]

    @cached_property
    def architecture(self) -> LlamaConfig:
        return model_folder.read_config(self.path / "config.json")

    @property
    def dtype(self) -> np.dtype:
        return orbax_params.stored_dtype(self.path)

    def load(self, chosen: Mapping[str, Any], lora: LoraConfig, mesh: Mesh | None, dtype: Any) -> Loaded:
        model = _model(self.architecture, lora, **chosen)
        return model, {"params": orbax_params.load_params(self.path, _target(model, "params", mesh, dtype))}


class _OnAnother(StoredModel):
    """What stands on another model.

    Attributes:
      folder: where `base.json` lies.
      lora: the adapters that were put on the model beneath (rank 0 where it brings them).
      adds_score: whether they make a reward model of a language model.
    """

    tensors = None  # pyright: ignore[reportAssignmentType]
    folder: Path
    base: Base
    lora: LoraConfig
    adds_score: bool

    @cached_property
    def beneath(self) -> StoredModel:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The model beneath, found. Raises `InputError`, with the way to name its new place, where it is not there."""
        base = self.base
        if moved := os.environ.get(bases.PLACE):
            return open_checkpoint(moved)
        found = Path(base.model).expanduser()
        if base.fingerprint is None and found.exists() and not found.is_absolute():
            # As PEFT resolves it; what other tools wrote says nothing by which the weights could be known again.
            _log.info("%s: its base model %s is taken to be %s", self.path, base.model, found.absolute())
        try:
            return open_checkpoint(base.model, base.revision, merged=True)
        except InputError as problem:
            raise self._not_that(base.model, f"is not there ({problem})") from problem

    @cached_property
    def architecture(self) -> LlamaConfig:
        config = self.beneath.architecture
        config = dataclasses.replace(config, num_labels=1) if self.adds_score else config
        return model_folder.with_stops(config, self.terminators)

    @property
    def dtype(self) -> np.dtype:
        return self.beneath.dtype

    @property
    def origin(self) -> Path | None:
        return self.beneath.origin

    @property
    def quantised(self) -> Kind | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.quantised if self.has_adapters else None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.beneath.tokenizer()

    def _adapted(self, chosen: Mapping[str, Any], mesh: Mesh | None, dtype: Any) -> tuple[Llama, dict[str, Any], Any]:
        """The model beneath adapters, its variables if they are the right ones, and the target of the adapters."""
        model, variables = self.beneath.load(chosen, self.lora, mesh, self.quantised or dtype)
        if self.adds_score:
            model, variables = heads.as_reward_model(model, variables)
        base = self.base
        if base.fingerprint is not None and (found := bases.weights_hash(variables["params"])) != base.fingerprint:
            moved = os.environ.get(bases.PLACE)
            name = base.model if moved is None else f"{moved} ({bases.PLACE})"
            differs = f"(fingerprint {found[:12]}, not {base.fingerprint[:12]})"
            raise self._not_that(name, f"has other weights than it was trained on {differs}")
        if self.quantised is not None and self.quantised != kind_of(dtype):  # the same numbers, kept otherwise
            held = quantised.whole(variables["params"], None if kind_of(dtype) else dtype)
            variables["params"] = frozen_copy(held, dtype, model.dtype) if kind_of(dtype) else held
        return model, variables, _target(model, "adapters", mesh, jnp.float32)

    def _not_that(self, name: str, what: str) -> InputError:
        text = f"{self.path}: its base model {name} {what}; name the right one's place in the variable {bases.PLACE}"
        merged = self.path.parent / "model"
        beside = self.folder == self.path and merged.is_dir()
        return InputError(f"{text}, or use {merged}, which holds both" if beside else text)


class _AdapterFolder(_OnAnother):
    """PEFT's."""

    has_adapters = True
    folder = property(lambda self: self.path)  # pyright: ignore[reportAssignmentType]
    lora = property(lambda self: peft.read_lora(self.path))  # pyright: ignore[reportAssignmentType]
    adds_score = property(lambda self: peft.has_score(self.path))  # pyright: ignore[reportAssignmentType]

    @property
    def base(self) -> Base:  # pyright: ignore[reportIncompatibleVariableOverride]
        named = peft.base_of(self.path)  # where people, and PEFT, write a new place
        return bases.read(self.path, named) or Base(*named)

    @property
    def terminators(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return model_folder.read_stops(self.path / model_folder.GENERATION)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        own = folder_tokenizer.has_tokenizer(self.path)
        return folder_tokenizer.read_tokenizer(self.path) if own else super().tokenizer()

    def load(self, chosen: Mapping[str, Any], lora: LoraConfig, mesh: Mesh | None, dtype: Any) -> Loaded:
        if self.beneath.has_adapters:
            where = self.beneath.path
            raise InputError(f"{self.path}: its base model {where} has adapters too; merge those with convert")
        model, variables, target = self._adapted(chosen, mesh, dtype)
        model = model.clone(config=model_folder.with_stops(model.config, self.terminators))
        return model, {**variables, **peft.load_adapters(self.path, model, target, mesh)}


class RunCheckpoint(_OnAnother):
    """A run's `checkpoints/<step>`: what it has trained, on what it began with."""

    folder = property(lambda self: self.path.parent.parent)  # pyright: ignore[reportAssignmentType]
    lora = property(lambda self: orbax_params.origin(self.path)[1])  # pyright: ignore[reportAssignmentType]
    adds_score = property(lambda self: SCORE in self._heads)  # pyright: ignore[reportAssignmentType]

    @property
    def base(self) -> Base:  # pyright: ignore[reportIncompatibleVariableOverride]
        return bases.read(self.folder) or Base(orbax_params.origin(self.path)[0])

    @cached_property
    def _heads(self) -> dict[str, int]:
        return orbax_params.trained_heads(self.path)

    @property
    def has_adapters(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.lora.rank > 0 or self.beneath.has_adapters

    def load(self, chosen: Mapping[str, Any], lora: LoraConfig, mesh: Mesh | None, dtype: Any) -> Loaded:
        target: dict[str, Any] = {}
        if self.has_adapters:
            model, variables, target["adapters"] = self._adapted(chosen, mesh, dtype)
        else:
            model, variables = _model(self.architecture, lora, **chosen), {}
            target["params"] = _target(model, "params", mesh, dtype)
        if self._heads:
            target["heads"] = heads.target_of(model, self._heads, mesh)
        return model, variables | orbax_params.load_trained(self.path, target)


_CLASSES = {
    "huggingface": StoredModel,
    "gguf": _GGUFFile,
    "orbax": _OrbaxFolder,
    "peft": _AdapterFolder,
    "checkpoint": RunCheckpoint,
}


def open_checkpoint(
    source: str | Path | StoredModel, revision: str | None = None, *, merged: bool = False
) -> StoredModel:
    """The stored model that `source` names (arguments of `source.resolve`); an opened one stays as it is."""
    if isinstance(source, StoredModel):
        return source
    place = resolve(source, revision, merged=merged)
    return _CLASSES[place.kind](place.path, place.name)


def _target(model: Llama, part: str, mesh: Mesh | None, dtype: Any) -> Any:
    """Shape, dtype and place of every leaf of "params" or "adapters"."""
    places = None if mesh is None else shardings(model, mesh, dtype)[part]
    return layout.placed(abstract_variables(model, dtype)[part], places)
