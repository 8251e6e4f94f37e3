"""Checkpoints from one format into another: what `dpo-jax convert` does."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.errors import InputError
from dpo_jax.headers import read_json
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.weights import huggingface, layout, merging, orbax_params, tokenizer_files
from dpo_jax.weights.folder import check_free
from dpo_jax.weights.pretrained import (
    base_place,
    has_adapters,
    load_pretrained,
    merged_params,
    open_tensors,
    origin_folder,
    read_all,
    read_architecture,
    read_classes,
    save_pretrained,
)
from dpo_jax.weights.source import Source, resolve
from dpo_jax.weights.tokenizer import check_published, tokenizer_of

Format = Literal["huggingface", "orbax"]

_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Format = "huggingface",
    dtype: Any = None,
    mesh: Mesh | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    terminators: Sequence[int] = (),
    shard_bytes: int = huggingface.SHARD_BYTES,
) -> float | None:
    """Write the checkpoint `source` as a new folder `target`, with its configuration and tokenizer.

    Hugging Face and GGUF weights go to a Hugging Face folder tensor by tensor, through no device. To orbax, from it,
    and from a PEFT adapter folder (which is merged with its base model), they pass through the devices of `mesh`.

    Args:
      source: as for `load_pretrained`.
      target: a folder that does not exist yet, or is empty.
      to: "huggingface" (safetensors), or "orbax": `params/`, with config.json and the tokenizer beside it.
      dtype: of the stored weights; not given: as in `source`, or float32 where it has several, or they are quantised,
        or have adapters added to them.
      mesh: where parameters that pass through devices are placed; None uses the first device.
      tokenizer: written in place of the source's own.
      terminators: ids that end an answer, beside those that the source names (see `save_pretrained`).
      shard_bytes: largest safetensors file.

    Returns:
      What storing merged adapters in less than float32 lost of them, relative to their size; None: nothing.

    Raises `InputError` for anything wrong with the source, or a target that cannot be written.
    """
    target = Path(target)
    if target.suffix.lower() in _FILES:
        raise InputError(
            f"{target}: names a file, and a folder is written, as safetensors or orbax (--format); GGUF is only read"
        )
    check_free(target, replace=False)
    place = resolve(source)
    stored = np.dtype(_stored_dtype(place) if dtype is None else dtype)
    spoken = tokenizer, tuple(dict.fromkeys((*_terminators(place), *terminators)))
    scores, adapted = bool(read_architecture(place).num_labels), has_adapters(place)
    if scores and to == "orbax":
        raise InputError(f"{source}: is a reward model, which is converted to --format huggingface only")
    if to == "huggingface" and (scores or adapted):
        # Adapters are added in float32, so that the weights beneath them are read as they are stored.
        beneath = _beneath_dtype(place) if adapted else stored
        model, variables = load_pretrained(source, mesh=mesh, dtype=beneath)
        carried: dict[str, Any] = {"source": source, "classes": read_classes(source), "terminators": spoken[1]}
        tokenizer = tokenizer or tokenizer_of(place)
        return save_pretrained(target, model, variables, tokenizer, **carried, dtype=stored, shard_bytes=shard_bytes)
    if to == "huggingface" and place.kind in ("huggingface", "gguf"):
        config, reader = open_tensors(place)
        shapes = layout.tensor_shapes(layout.parameter_slots(config))
        tensors = read_all(reader, shapes, stored)
    else:
        model, variables = load_pretrained(source, mesh=mesh, dtype=np.float32 if adapted else stored)
        config, params = model.config, merged_params(model, variables)
        if to == "orbax":
            lost = _lost(variables["params"], params, stored) if adapted and stored != np.float32 else None
            params = jax.tree.map(lambda x: x.astype(stored), params)
            orbax_params.write_folder(target, params, _finisher(place, config, stored, to, *spoken))
            return lost
        slots = layout.parameter_slots(config)
        shapes, tensors = layout.tensor_shapes(slots), layout.tensors(slots, params, stored)
    finish = _finisher(place, config, stored, to, *spoken)
    huggingface.write_weights(target, shapes, tensors, stored, finish, shard_bytes=shard_bytes, replace=False)
    return None


def _lost(before: Any, after: Any, dtype: np.dtype) -> float | None:
    rounding = merging.Rounding(dtype)
    for pair in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        rounding.store(*(np.asarray(x, np.float32) for x in pair))
    return rounding.lost


def _stored_dtype(place: Source) -> np.dtype:
    """What a checkpoint is stored in; float32 where it was trained, or is the sum of weights and adapters."""
    if place.kind == "checkpoint" or has_adapters(place):
        return np.dtype(np.float32)
    return _beneath_dtype(place)


def _beneath_dtype(place: Source) -> np.dtype:
    base = base_place(place)
    return orbax_params.stored_dtype(base.path) if base.kind == "orbax" else open_tensors(base)[1].dtype


def _terminators(place: Source) -> tuple[int, ...]:
    """What ends an answer, as an adapter folder keeps it."""
    kept = place.path / huggingface.GENERATION
    return huggingface.stops(read_json(kept)) if place.kind == "peft" and kept.is_file() else ()


def _finisher(
    place: Source,
    config: LlamaConfig,
    dtype: np.dtype,
    to: Format,
    tokenizer: PreTrainedTokenizerBase | None,
    terminators: Sequence[int],
) -> Callable[[Path], None]:
    """What writes the configuration and the tokenizer; the tokenizer is read now, before the weights are written."""
    origin = origin_folder(place)
    if origin != place.path or (to == "huggingface" and (place.path / tokenizer_files.JSON).is_file()):
        tokenizer = tokenizer or tokenizer_of(place)
        check_published(tokenizer, config, place)

    def finish(folder: Path) -> None:
        huggingface.write_configs(folder, config, dtype, origin, terminators)
        if tokenizer is not None:
            tokenizer_files.save_tokenizer(tokenizer, folder, origin)
        elif origin is not None:
            tokenizer_files.copy_tokenizer(origin, folder)

    return finish
