"""Checkpoints from one format into another: what `dpo-jax convert` does."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from dpo_jax.errors import InputError
from dpo_jax.headers import read_json
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.weights import huggingface, layout, orbax_params, tokenizer_files
from dpo_jax.weights.folder import check_free
from dpo_jax.weights.pretrained import (
    base_place,
    has_adapters,
    load_pretrained,
    merged_params,
    open_tensors,
    origin_folder,
    read_architecture,
    read_classes,
    save_pretrained,
)
from dpo_jax.weights.source import Source, resolve
from dpo_jax.weights.tokenizer import check_published, tokenizer_of

Format = Literal["huggingface", "orbax"]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Format = "huggingface",
    dtype: Any = None,
    mesh: Mesh | None = None,
    shard_bytes: int = huggingface.SHARD_BYTES,
) -> None:
    """Write the checkpoint `source` as a new folder `target`, with its configuration and tokenizer.

    Hugging Face and GGUF weights go to a Hugging Face folder tensor by tensor, through no device. To orbax, from it,
    and from a PEFT adapter folder (which is merged with its base model), they pass through the devices of `mesh`.

    Args:
      source: as for `load_pretrained`.
      target: a folder that does not exist yet, or is empty.
      to: "huggingface" (safetensors), or "orbax": `params/`, with config.json and the tokenizer beside it.
      dtype: of the stored weights; not given: as in `source`, or float32 where it has several or they are quantised.
      mesh: where parameters that pass through devices are placed; None uses the first device.
      shard_bytes: largest safetensors file.

    Raises `InputError` for anything wrong with the source, or a target that cannot be written.
    """
    target = Path(target)
    check_free(target, replace=False)
    place = resolve(source)
    stored = np.dtype(_stored_dtype(place) if dtype is None else dtype)
    if read_architecture(place).num_labels:
        if to == "orbax":
            raise InputError(f"{source}: is a reward model, which is converted to --format huggingface only")
        model, variables = load_pretrained(source, mesh=mesh, dtype=stored)
        tokenizer = tokenizer_of(place)
        carried: dict[str, Any] = {"source": source, "classes": read_classes(source)}
        save_pretrained(target, model, variables, tokenizer, **carried, dtype=stored, shard_bytes=shard_bytes)
        return
    if to == "huggingface" and place.kind in ("huggingface", "gguf"):
        config, reader = open_tensors(place)
        shapes = layout.tensor_shapes(layout.parameter_slots(config))
        tensors = _read_all(reader, shapes, stored)
    else:
        model, variables = load_pretrained(source, mesh=mesh, dtype=stored)
        config, params = model.config, merged_params(model, variables)
        if to == "orbax":
            orbax_params.write_folder(target, params, _finisher(place, config, stored, to))
            return
        slots = layout.parameter_slots(config)
        shapes, tensors = layout.tensor_shapes(slots), layout.tensors(slots, params, stored)
    finish = _finisher(place, config, stored, to)
    huggingface.write_weights(target, shapes, tensors, stored, finish, shard_bytes=shard_bytes, replace=False)


def _read_all(reader: layout.TensorReader, shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> Iterator[np.ndarray]:
    for key, shape in shapes.items():
        yield reader.read(key, tuple(slice(0, n, 1) for n in shape)).astype(dtype, copy=False)


def _stored_dtype(place: Source) -> np.dtype:
    if place.kind == "checkpoint" and not has_adapters(place):
        return np.dtype(np.float32)  # trained weights
    base = base_place(place)
    return orbax_params.stored_dtype(base.path) if base.kind == "orbax" else open_tensors(base)[1].dtype


def _finisher(place: Source, config: LlamaConfig, dtype: np.dtype, to: Format) -> Callable[[Path], None]:
    """What writes the configuration and the tokenizer; the tokenizer is read now, before the weights are written."""
    origin = origin_folder(place)
    tokenizer, kept = None, place.path / huggingface.GENERATION
    terminators = huggingface.stops(read_json(kept)) if place.kind == "peft" and kept.is_file() else ()
    if origin != place.path or (to == "huggingface" and (place.path / tokenizer_files.JSON).is_file()):
        tokenizer = tokenizer_of(place)
        check_published(tokenizer, config, place)

    def finish(folder: Path) -> None:
        huggingface.write_configs(folder, config, dtype, origin, terminators)
        if tokenizer is not None:
            tokenizer_files.save_tokenizer(tokenizer, folder, origin)
        elif origin is not None:
            tokenizer_files.copy_tokenizer(origin, folder)

    return finish
