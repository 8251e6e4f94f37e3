"""Load a checkpoint of any kind, save one in Hugging Face's format."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import NO_LORA, AttentionKernel, ClassHead, LoraConfig, Remat
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.config_keys import ignoring
from dpo_jax.model.heads import SCORE
from dpo_jax.model.llama import Llama
from dpo_jax.model.quantised import kind_in, kind_of
from dpo_jax.model.variables import init_adapters, merge_adapters
from dpo_jax.weights.huggingface import fused_adapters, heads, layout, merging, model_folder, peft
from dpo_jax.weights.integrity import base as bases
from dpo_jax.weights.integrity.base import Base
from dpo_jax.weights.integrity.folder import write_beside
from dpo_jax.weights.opened import RunCheckpoint, StoredModel, open_checkpoint
from dpo_jax.weights.source import config_file
from dpo_jax.weights.tokenizer import check_published

_log = logging.getLogger(__name__)


def read_shape(source: str | Path) -> LlamaConfig:
    """The architecture of a checkpoint, of which a config.json alone is read where there is one."""
    found = config_file(source)
    return open_checkpoint(source).architecture if found is None else model_folder.read_config(found)


def merged_params(model: Llama, variables: Mapping[str, Any]) -> Any:
    """The parameters, with the adapters, if there are any, added to them."""
    return merge_adapters(variables, model.lora) if "adapters" in variables else variables["params"]


def load_pretrained(
    source: str | Path | StoredModel,
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    lora: LoraConfig | None = None,
    compute_dtype: Any = None,
    remat: Remat = "dots",
    attention: AttentionKernel = "auto",
    seed: int = 0,
    ignore_config_keys: Sequence[str] = (),
) -> tuple[Llama, dict[str, Any]]:
    """The model and its variables, {"params": ...[, "adapters": ...][, "heads": ...]}.

    A reward model (`LlamaForSequenceClassification` with one label, or one of ours) brings the head "score", and has no
    output matrix; auxiliary heads come from the folder's `heads.safetensors`.

    Weights are read leaf by leaf straight into their shards, in `dtype`; each process reads what its devices hold.

    Args:
      source: a Hugging Face folder, a `.gguf` file, a folder written by `convert`, a PEFT adapter folder (its base
        model is loaded too), a run folder (its final model, or its newest intact checkpoint), a run's
        `checkpoints/<step>`, a hub id, or "smollm2".
      mesh: where to place the weights; None puts them on the first device.
      dtype: of the parameters (adapters are always float32); the words int8 and nf4 quantise the kernels of the layers
        as they are read (`model/quantised.py`) and keep other parameters in `compute_dtype`.
      lora: adds fresh adapters (A random by `seed`, B zero). Not for a source that has adapters of its own.
      compute_dtype: of activations and products; not given: `dtype`, and float32 of what is quantised.
      remat, attention: see `Llama`.
      seed: of the adapters.
      ignore_config_keys: keys of config.json that are not known here and are said to change nothing.

    Raises `InputError` for anything wrong with the checkpoint, with file and tensor.
    """
    place = source if isinstance(source, StoredModel) else open_checkpoint(source)
    if isinstance(place, RunCheckpoint) and Path(place.name).expanduser().resolve() != place.path.resolve():
        _log.warning("%s: this run is not finished; its newest intact checkpoint is used: %s", place.name, place.path)
    if compute_dtype is None:
        compute_dtype = dtype if kind_of(dtype) is None else jnp.float32
    chosen: dict[str, Any] = {
        "dtype": jnp.dtype(compute_dtype),
        "remat": remat,
        "attention": attention,
    }
    lora = lora or NO_LORA
    if lora.rank:
        if place.has_adapters:
            raise InputError(f"{place.path}: has adapters already; leave --lora.rank out, or merge them with convert")
        if problem := fused_adapters.told_apart(place.architecture.model_type, lora.targets):
            raise InputError(f"{place.path}: {problem}")
    with ignoring(ignore_config_keys):
        model, variables = place.load(chosen, lora, mesh, dtype)
    if model.lora.rank and "adapters" not in variables:
        variables["adapters"] = init_adapters(model, jax.random.key(seed), mesh=mesh)
    return model, variables


def save_pretrained(
    path: str | Path,
    model: Llama,
    variables: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    source: str | Path | StoredModel | None = None,
    dtype: Any = None,
    merge: bool = True,
    shard_bytes: int = model_folder.SHARD_BYTES,
    classes: Sequence[ClassHead] = (),
    terminators: Sequence[int] = (),
    beside: Mapping[str, bytes] | None = None,
) -> float | None:
    """Write a folder that `transformers` loads (or, with `merge=False`, a PEFT adapter folder).

    Every process calls this, and process 0 writes. The folder appears whole or not at all; an earlier model folder
    of the same name is replaced, and a folder that holds anything else is refused.

    Args:
      path: the folder.
      model: gives the architecture and the adapters' scale.
      variables: {"params": ...[, "adapters": ...][, "heads": ...]}. With a head "score" the folder is a reward model
        (`LlamaForSequenceClassification`); other heads go to `heads.safetensors` (see `weights/huggingface/heads.py`).
      tokenizer: written beside the weights; None writes none.
      source: what the model was loaded from: its folder's generation_config.json and further config.json entries are
        carried along, and an adapter folder names it (or its own base) as the base model. Adapters are merged with the
        weights as they are stored there, where `variables` hold them in less than float32; with quantised matrices as
        these are when they are made whole, so that the merged model is the one that was trained.
      dtype: of the stored weights; not given: that of the parameters, and float32 where there are adapters, since less
        would round away most of what they have learnt.
      merge: add the adapters to the weights; False writes only the adapters, and needs `source`.
      shard_bytes: largest weight file.
      classes: names for the outputs of auxiliary heads (`RewardConfig.heads`), which an opened checkpoint names again.
      terminators: ids that end an answer under the chat template (`ChatTokenizer.terminators`): generation_config.json
        lists them beside those of `source`.
      beside: further files of the folder, by name (its card).

    Returns:
      What storing merged weights in less than float32 lost of the adapters' update, relative to it
      (`merging.Rounding`); None where nothing was lost.

    Raises `InputError` for an unwritable or full disk, or a tokenizer that does not fit the embedding.
    """
    path = Path(path)
    place = source if isinstance(source, StoredModel | None) else open_checkpoint(source)
    if tokenizer is not None:
        check_published(tokenizer, model.config, None if place is None else place.tokenizer)
    params, adapters, collection = variables["params"], variables.get("adapters"), variables.get("heads", {})
    config = replace(model.config, num_labels=1 if SCORE in collection else 0)
    base: Base | None = None
    if not merge:
        if adapters is None:
            raise InputError(f"{path}: there are no adapters to save apart from the weights (merge=False)")
        if place is None:
            raise InputError(f"{path}: an adapter folder names its base model; give source")
        named = place.base if place.base is not None and place.has_adapters else place.lasting
        base = replace(named, fingerprint=bases.weights_hash(params), quantised=kind_in(params))
        if place.quantised is not None and base.quantised is None:  # made whole since
            base = named
    if config.num_labels and tokenizer is not None:
        config, tokenizer = heads.padded_apart(config, tokenizer)
    if dtype is None:
        dtype = jnp.float32 if adapters is not None else jax.tree.leaves(params)[0].dtype
    origin = None if place is None else place.origin
    rounding, slots = merging.Rounding(dtype), layout.parameter_slots(config)
    others = heads.gathered(collection)

    def finish(folder: Path) -> None:
        if base is None:
            model_folder.write_configs(folder, config, dtype, origin, terminators, tokenizer)
        else:
            peft.write_configs(folder, model, config, base, terminators, tokenizer)
        heads.write_others(folder, others, classes)
        write_beside(folder, beside)

    shapes = layout.tensor_shapes(slots)
    if adapters is None:
        tensors = layout.tensors(slots, params, dtype)
    elif base is not None:
        shapes, tensors = fused_adapters.tensors(model, adapters, dtype)
        shard_bytes = 1 << 62  # PEFT reads one file
    else:
        if place is None or params["embed_tokens"]["embedding"].dtype == jnp.float32:
            beneath = layout.tensors(slots, params, jnp.float32)
        else:
            beneath = _as_stored(place, config, params)
        tensors = merging.merged(shapes, beneath, merging.factors(model, adapters), rounding)
    if config.num_labels:
        score = [layout.score_slot(config, "" if base is None else peft.PREFIX)]
        shapes = shapes | layout.tensor_shapes(score)  # a new one: the tensors are made later, by the keys of the old
        tensors = itertools.chain(tensors, layout.tensors(score, collection, dtype))
    model_folder.write_weights(path, shapes, tensors, dtype, finish, shard_bytes=shard_bytes)
    return rounding.lost


def _as_stored(place: StoredModel, config: LlamaConfig, params: Any) -> Iterator[np.ndarray]:
    """The weights that `place` stores beneath all adapters, in float32, by way of the devices of `params`."""
    mesh = getattr(jax.tree.leaves(params)[0].sharding, "mesh", None)
    mesh = mesh if isinstance(mesh, Mesh) else None
    kind = kind_in(params) or place.quantised
    if kind is not None:
        beneath = place.beneath if place.quantised is not None and place.beneath is not None else place
        variables = load_pretrained(beneath, mesh=mesh, dtype=kind)[1]
        return layout.tensors(layout.parameter_slots(config), variables["params"], np.float32)
    # A run may have begun with an adapter, which its own go on from.
    while place.has_adapters and place.beneath is not None:
        place = place.beneath
    return stored_tensors(place, config, np.float32, mesh)


def stored_tensors(
    place: StoredModel, config: LlamaConfig, dtype: Any, mesh: Mesh | None = None
) -> Iterator[np.ndarray]:
    """The weights of a model, as `layout.tensors` gives those of `config`; adapters are added to them.

    Those of a Hugging Face folder or GGUF file pass through no device; others are loaded whole first, onto `mesh`.
    """
    slots = layout.parameter_slots(config)
    if place.tensors is not None:
        return read_all(place.tensors, layout.tensor_shapes(slots), np.dtype(dtype))
    model, variables = load_pretrained(place, mesh=mesh, dtype=np.float32 if place.has_adapters else dtype)
    return layout.tensors(slots, merged_params(model, variables), dtype)


def read_all(
    reader: layout.TensorReader, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Every tensor of `shapes`, whole, one at a time. In processes that write nothing only their shapes."""
    for key, shape in shapes.items():
        if jax.process_index() == 0:
            yield reader.read(key, tuple(slice(0, n, 1) for n in shape)).astype(dtype, copy=False)
        else:
            yield np.broadcast_to(np.zeros((), dtype), shape)
