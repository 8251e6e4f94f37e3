"""Load a checkpoint of any kind, save one in Hugging Face's format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import AttentionKernel, LoraConfig, Remat
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama, init_adapters, merge_adapters, shardings
from dpo_jax.weights import huggingface, layout, orbax_params, peft
from dpo_jax.weights.source import Source, resolve
from dpo_jax.weights.tokenizer import check_vocabulary


def open_tensors(place: Source) -> tuple[LlamaConfig, layout.TensorReader]:
    """Configuration and checked tensors of a resolved Hugging Face folder or GGUF file."""
    if place.kind == "gguf":
        from dpo_jax.weights.gguf import open_file

        return open_file(place.path)
    return huggingface.open_folder(place.path)


def origin_folder(place: Source) -> Path | None:
    """The folder whose config.json and generation_config.json belong to a checkpoint; None for a GGUF file."""
    if place.kind == "peft":
        return origin_folder(resolve(peft.base_of(place.path)))
    return None if place.kind == "gguf" else place.path


def merged_params(model: Llama, variables: Mapping[str, Any]) -> Any:
    """The parameters, with the adapters, if there are any, added to them."""
    return merge_adapters(variables, model.lora) if "adapters" in variables else variables["params"]


def _places(model: Llama, mesh: Mesh | None) -> Mapping[str, Any] | Sharding:
    return SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else shardings(model, mesh)["params"]


def load_pretrained(
    source: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    lora: LoraConfig | None = None,
    compute_dtype: Any = None,
    remat: Remat = "dots",
    attention: AttentionKernel = "auto",
    seed: int = 0,
) -> tuple[Llama, dict[str, Any]]:
    """The model and its variables, {"params": ...[, "adapters": ...]}.

    Weights are read leaf by leaf straight into their shards, in `dtype`; each process reads what its devices hold.

    Args:
      source: a Hugging Face folder, a `.gguf` file, a folder written by `convert`, a PEFT adapter folder (its base
        model is loaded too), a finished run folder, a hub id, or "smollm2".
      mesh: where to place the weights; None puts them on the first device.
      dtype: of the parameters (adapters are always float32).
      lora: adds fresh adapters (A random by `seed`, B zero). Not for a source that has adapters of its own.
      compute_dtype: of activations and products; not given: `dtype`.
      remat, attention: see `Llama`.
      seed: of the adapters.

    Raises `InputError` for anything wrong with the checkpoint, with file and tensor.
    """
    place = resolve(source)
    adapters_from: Path | None = None
    if place.kind == "peft":
        if lora is not None and lora.rank:
            raise InputError(
                f"{place.path}: already has adapters; leave --lora.rank out, or merge them with convert first"
            )
        adapters_from, lora = place.path, peft.read_lora(place.path)
        place = resolve(peft.base_of(place.path))
        if place.kind == "peft":
            raise InputError(
                f"{adapters_from}: its base model {place.path} is an adapter folder too; merge that one first"
            )
    lora = lora or LoraConfig()
    chosen: dict[str, Any] = {
        "dtype": jnp.dtype(dtype if compute_dtype is None else compute_dtype),
        "remat": remat,
        "attention": attention,
        "lora": lora,
    }
    if place.kind == "orbax":
        model = Llama(huggingface.read_config(place.path), **chosen)
        variables = {"params": orbax_params.load_params(place.path, model, _places(model, mesh), dtype)}
    else:
        config, reader = open_tensors(place)
        model = Llama(config, **chosen)
        variables = {"params": layout.load_tree(layout.parameter_slots(config), reader, _places(model, mesh), dtype)}
    if adapters_from is not None:
        variables["adapters"] = peft.load_adapters(adapters_from, model, mesh)
    elif lora.rank:
        variables["adapters"] = init_adapters(model, jax.random.key(seed), mesh=mesh)
    return model, variables


def save_pretrained(
    path: str | Path,
    model: Llama,
    variables: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    source: str | Path | None = None,
    dtype: Any = None,
    merge: bool = True,
    shard_bytes: int = huggingface.SHARD_BYTES,
) -> None:
    """Write a folder that `transformers` loads (or, with `merge=False`, a PEFT adapter folder).

    Every process calls this, and process 0 writes. The folder appears whole or not at all; an earlier model folder
    of the same name is replaced, and a folder that holds anything else is refused.

    Args:
      path: the folder.
      model: gives the architecture and the adapters' scale.
      variables: {"params": ...[, "adapters": ...]}.
      tokenizer: written beside the weights; None writes none.
      source: what the model was loaded from: its folder's generation_config.json and further config.json entries are
        carried along, and an adapter folder names it as the base model.
      dtype: of the stored weights; not given: that of the parameters (adapters: float32).
      merge: add the adapters to the weights; False writes only the adapters, and needs `source`.
      shard_bytes: largest weight file.

    Raises `InputError` for an unwritable or full disk, or a tokenizer that does not fit the embedding.
    """
    path = Path(path)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config)
    if not merge:
        if "adapters" not in variables:
            raise InputError(f"{path}: there are no adapters to save apart from the weights (merge=False)")
        if source is None:
            raise InputError(f"{path}: an adapter folder names its base model; give source")
        peft.save_adapters(path, model, variables["adapters"], tokenizer, base=str(source), dtype=dtype or jnp.float32)
        return
    params = merged_params(model, variables)
    dtype = jax.tree.leaves(params)[0].dtype if dtype is None else dtype
    origin = None if source is None else origin_folder(resolve(source))

    def finish(folder: Path) -> None:
        huggingface.write_configs(folder, model.config, dtype, origin)
        if tokenizer is not None:
            huggingface.save_tokenizer(tokenizer, folder, origin)

    slots = layout.parameter_slots(model.config)
    tensors = layout.tensors(slots, params, dtype)
    huggingface.write_weights(path, layout.tensor_shapes(slots), tensors, dtype, finish, shard_bytes=shard_bytes)
