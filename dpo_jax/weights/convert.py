"""Checkpoints from one format into another: what `dpo-jax convert` does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.errors import InputError
from dpo_jax.weights.gguf import writer as gguf_writer
from dpo_jax.weights.huggingface import layout, merging, model_folder
from dpo_jax.weights.integrity.folder import check_free, write_beside
from dpo_jax.weights.opened import StoredModel, open_checkpoint
from dpo_jax.weights.orbax import params as orbax_params
from dpo_jax.weights.pretrained import load_pretrained, merged_params, save_pretrained, stored_tensors
from dpo_jax.weights.tokenizer import check_published
from dpo_jax.weights.tokenizers import tokenizer_files

Format = Literal["huggingface", "orbax", "gguf"]

_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")


def convert(
    source: str | Path | StoredModel,
    target: str | Path,
    *,
    to: Format = "huggingface",
    dtype: Any = None,
    mesh: Mesh | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    terminators: Sequence[int] = (),
    shard_bytes: int = model_folder.SHARD_BYTES,
    beside: Mapping[str, bytes] | None = None,
) -> float | None:
    """Write the checkpoint `source` as a new folder `target`, with its configuration and tokenizer.

    Hugging Face and GGUF weights go to a Hugging Face folder tensor by tensor, through no device. To orbax, from it,
    and from a PEFT adapter folder (which is merged with its base model), they pass through the devices of `mesh`.

    Args:
      source: as for `load_pretrained`.
      target: a folder that does not exist yet, or is empty; of a GGUF file its path.
      to: "huggingface" (safetensors), or "orbax": `params/`, with config.json and the tokenizer beside it, or "gguf":
        one file, for one process.
      dtype: of the stored weights; not given: as in `source`, or float32 where it has several, or they are quantised,
        or have adapters added to them. A GGUF file takes "q8_0", too.
      mesh: where parameters that pass through devices are placed; None uses the first device.
      tokenizer: written in place of the source's own.
      terminators: ids that end an answer, beside those that the source names (see `save_pretrained`).
      shard_bytes: largest safetensors file.
      beside: further files of the folder, or of that of the GGUF file, by name (its card): there when it appears.

    Returns:
      What storing merged adapters in less than float32 lost of them, relative to their size; None: nothing.

    Raises `InputError` for anything wrong with the source, or a target that cannot be written.
    """
    target = Path(target)
    if to == "gguf" and target.suffix.lower() != ".gguf":
        raise InputError(f"{target}: --format gguf writes one file, and its name ends with .gguf")
    if to == "gguf" and target.exists():
        raise InputError(f"{target}: is there already; choose another --to")
    if to != "gguf" and target.suffix.lower() in _FILES:
        raise InputError(
            f"{target}: names a file, and a folder is written, as safetensors or orbax; --format gguf writes a file"
        )
    if to != "gguf":
        check_free(target, replace=False)
    place = open_checkpoint(source)
    if to == "gguf":
        stored = dtype or (place.dtype.name if place.beneath is None else "float32")
        ends = (*place.terminators, *terminators)
        _to_gguf(place, target, stored, mesh, tokenizer or place.tokenizer(), ends, beside)
        return None
    if dtype == "q8_0":
        raise InputError(f"--dtype q8_0 belongs to --format gguf, and {target} is written as {to}")
    if dtype is None:
        dtype = place.dtype if place.beneath is None else np.float32
    stored = np.dtype(dtype)
    terminators = tuple(dict.fromkeys((*place.terminators, *terminators)))
    config, adapted = place.architecture, place.has_adapters
    if config.num_labels and to == "orbax":
        raise InputError(f"{place.name}: is a reward model, which is converted to --format huggingface only")
    if to == "huggingface" and (config.num_labels or adapted):
        # Adapters are added in float32, so that the weights beneath them are read as they are stored.
        beneath = place.dtype if place.quantised is None else place.quantised
        model, variables = load_pretrained(place, mesh=mesh, dtype=beneath if adapted else stored)
        carried: dict[str, Any] = {"source": place, "classes": place.classes, "terminators": terminators}
        carried["beside"] = beside
        tokenizer = tokenizer or place.tokenizer()
        return save_pretrained(target, model, variables, tokenizer, **carried, dtype=stored, shard_bytes=shard_bytes)
    origin = place.origin
    if origin != place.path or (to == "huggingface" and (place.path / tokenizer_files.JSON).is_file()):
        tokenizer = tokenizer or place.tokenizer()
        check_published(tokenizer, config, place.tokenizer)

    def finish(folder: Path) -> None:
        model_folder.write_configs(folder, config, stored, origin, terminators, tokenizer)
        if tokenizer is None and origin is not None:
            tokenizer_files.copy_tokenizer(origin, folder)
        write_beside(folder, beside)

    if to == "huggingface":
        shapes = layout.tensor_shapes(layout.parameter_slots(config))
        tensors = stored_tensors(place, config, stored, mesh)
        model_folder.write_weights(target, shapes, tensors, stored, finish, shard_bytes=shard_bytes, replace=False)
        return None
    model, variables = load_pretrained(place, mesh=mesh, dtype=np.float32 if adapted else stored)
    params = merged_params(model, variables)
    lost = _lost(variables["params"], params, stored) if adapted and stored != np.float32 else None
    orbax_params.write_folder(target, jax.tree.map(lambda x: x.astype(stored), params), finish)
    return lost


def _to_gguf(
    place: StoredModel,
    target: Path,
    stored: Any,
    mesh: Mesh | None,
    tokenizer: PreTrainedTokenizerBase,
    terminators: Sequence[int],
    beside: Mapping[str, bytes] | None,
) -> None:
    """One file; Hugging Face and GGUF weights pass through no device."""
    if jax.process_count() > 1:
        raise InputError(f"{target}: a GGUF file is written by one process; run convert in one")
    config = place.architecture
    gguf_writer.check_model(config, place.name)
    check_published(tokenizer, config, place.tokenizer)
    shapes, tensors = (
        layout.tensor_shapes(layout.parameter_slots(config)),
        stored_tensors(place, config, np.float32, mesh),
    )
    told: dict[str, Any] = {"name": target.stem, "terminators": terminators, "beside": beside}
    gguf_writer.write_gguf(target, config, tokenizer, shapes, tensors, stored, **told)


def _lost(before: Any, after: Any, dtype: np.dtype) -> float | None:
    rounding = merging.Rounding(dtype)
    for pair in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        rounding.store(*(np.asarray(x, np.float32) for x in pair))
    return rounding.lost
