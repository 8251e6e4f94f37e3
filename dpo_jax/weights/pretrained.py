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
from jax.sharding import Mesh, SingleDeviceSharding
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import AttentionKernel, ClassHead, LoraConfig, Remat
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.config_keys import ignoring
from dpo_jax.model.heads import SCORE
from dpo_jax.model.llama import Llama
from dpo_jax.model.variables import abstract_variables, init_adapters, merge_adapters, shardings
from dpo_jax.weights import base as bases
from dpo_jax.weights import gguf, heads, huggingface, layout, merging, orbax_params, peft, tokenizer_files
from dpo_jax.weights.source import Source, config_file, resolve
from dpo_jax.weights.tokenizer import check_published

_log = logging.getLogger(__name__)


def open_tensors(place: Source) -> tuple[LlamaConfig, layout.TensorReader]:
    """Configuration and checked tensors of a resolved Hugging Face folder or GGUF file."""
    return (gguf.open_file if place.kind == "gguf" else huggingface.open_folder)(place.path)


def base_place(place: Source) -> Source:
    """The whole model that a checkpoint stands on: the base of an adapter folder, the start of a run, or itself."""
    return base_place(bases.beneath(place)) if place.kind in ("peft", "checkpoint") else place


def has_adapters(place: Source) -> bool:
    """True for an adapter folder, and for a checkpoint of a run that trains adapters."""
    if place.kind != "checkpoint":
        return place.kind == "peft"
    return orbax_params.origin(place.path)[1].rank > 0 or has_adapters(bases.beneath(place))


def _below_adapters(place: Source) -> tuple[Source, LoraConfig]:
    """The model that the adapters of `place` were put on, and their kind (rank 0 where that model brings it)."""
    base = bases.beneath(place)
    if place.kind == "peft":
        if has_adapters(base):
            raise InputError(f"{place.path}: its base model {base.path} has adapters too; merge those with convert")
        return base, peft.read_lora(place.path)
    return base, orbax_params.origin(place.path)[1]


def _base_of(source: str | Path) -> bases.Base:
    """What an adapter folder made from `source` should call its base model."""
    place = resolve(source)
    return bases.base_of(place) if has_adapters(place) else bases.lasting(source)


def origin_folder(place: Source) -> Path | None:
    """The folder whose config.json and generation_config.json belong to a checkpoint; None for a GGUF file."""
    base = base_place(place)
    return None if base.kind == "gguf" else base.path


def read_architecture(source: str | Path | Source) -> LlamaConfig:
    """The architecture of a checkpoint; names and shapes of its tensors are checked too, without reading them."""
    place = source if isinstance(source, Source) else resolve(source)
    base = base_place(place)
    config = huggingface.read_config(base.path) if base.kind == "orbax" else open_tensors(base)[0]
    if place.kind == "peft":
        config = huggingface.with_stops(config, place.path)
    return replace(config, num_labels=1) if _adds_score(place) else config


def read_shape(source: str | Path) -> LlamaConfig:
    """The architecture of a checkpoint, of which a config.json alone is read where there is one."""
    found = config_file(source)
    return read_architecture(source) if found is None else huggingface.read_config(found.parent)


def _adds_score(place: Source) -> bool:
    """True where a reward model was made of a language model: adapters or a run's checkpoint with a score."""
    if place.kind == "peft":
        return peft.has_score(place.path)
    return place.kind == "checkpoint" and SCORE in orbax_params.trained_heads(place.path)


def merged_params(model: Llama, variables: Mapping[str, Any]) -> Any:
    """The parameters, with the adapters, if there are any, added to them."""
    return merge_adapters(variables, model.lora) if "adapters" in variables else variables["params"]


def _target(model: Llama, part: str, mesh: Mesh | None, dtype: Any) -> Any:
    """Shape, dtype and place of every leaf of "params" or "adapters"."""
    shapes = abstract_variables(model)[part]
    one = SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda _: one, shapes) if mesh is None else shardings(model, mesh)[part]
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), shapes, places)


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
      dtype: of the parameters (adapters are always float32).
      lora: adds fresh adapters (A random by `seed`, B zero). Not for a source that has adapters of its own.
      compute_dtype: of activations and products; not given: `dtype`.
      remat, attention: see `Llama`.
      seed: of the adapters.
      ignore_config_keys: keys of config.json that are not known here and are said to change nothing.

    Raises `InputError` for anything wrong with the checkpoint, with file and tensor.
    """
    place = resolve(source)
    if place.kind == "checkpoint" and Path(source).expanduser().resolve() != place.path.resolve():
        _log.warning("%s: this run is not finished; its newest intact checkpoint is used: %s", source, place.path)
    chosen: dict[str, Any] = {
        "dtype": jnp.dtype(dtype if compute_dtype is None else compute_dtype),
        "remat": remat,
        "attention": attention,
    }
    if lora is not None and lora.rank and has_adapters(place):
        raise InputError(f"{place.path}: has adapters already; leave --lora.rank out, or merge them with convert")
    with ignoring(ignore_config_keys):
        model, variables = _load(place, chosen, lora or LoraConfig(), mesh, dtype)
    if model.lora.rank and "adapters" not in variables:
        variables["adapters"] = init_adapters(model, jax.random.key(seed), mesh=mesh)
    return model, variables


def read_classes(source: str | Path) -> tuple[ClassHead, ...]:
    """The classes of a checkpoint's auxiliary heads, as `save_pretrained` was told them; none where it was not."""
    return heads.read_classes(resolve(source).path)


def _load(
    place: Source, chosen: Mapping[str, Any], lora: LoraConfig, mesh: Mesh | None, dtype: Any
) -> tuple[Llama, dict[str, Any]]:
    """Parameters, and the adapters that the checkpoint itself holds."""
    if has_adapters(place):
        beneath, own = _below_adapters(place)
        model, variables = _load(beneath, chosen, own, mesh, dtype)
        if _adds_score(place):
            model, variables = heads.as_reward_model(model, variables)
        bases.check(place, variables["params"])
        target = _target(model, "adapters", mesh, jnp.float32)
        if place.kind == "peft":
            model = model.clone(config=huggingface.with_stops(model.config, place.path))
            return model, {**variables, **peft.load_adapters(place.path, model, target, mesh)}
        return model, variables | orbax_params.load_trained(
            place.path, {"adapters": target, **_trained_heads(place, model, mesh)}
        )
    if place.kind in ("orbax", "checkpoint"):
        model = Llama(read_architecture(place), lora=lora, **chosen)
        target = _target(model, "params", mesh, dtype)
        if place.kind == "orbax":
            return model, {"params": orbax_params.load_params(place.path, target)}
        return model, orbax_params.load_trained(place.path, {"params": target, **_trained_heads(place, model, mesh)})
    config, reader = open_tensors(place)
    model = Llama(config, lora=lora, **chosen)
    target = _target(model, "params", mesh, dtype)
    variables = {"params": layout.load_tree(layout.parameter_slots(config), reader, target)}
    found = heads.load_score(model, reader, mesh) if config.num_labels else {}
    if place.kind == "huggingface":
        found |= heads.load_others(place.path, model, mesh)
    return model, variables | ({"heads": found} if found else {})


def _trained_heads(place: Source, model: Llama, mesh: Mesh | None) -> dict[str, Any]:
    sizes = orbax_params.trained_heads(place.path)
    return {"heads": heads.target_of(model, sizes, mesh)} if sizes else {}


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
    classes: Sequence[ClassHead] = (),
    terminators: Sequence[int] = (),
) -> float | None:
    """Write a folder that `transformers` loads (or, with `merge=False`, a PEFT adapter folder).

    Every process calls this, and process 0 writes. The folder appears whole or not at all; an earlier model folder
    of the same name is replaced, and a folder that holds anything else is refused.

    Args:
      path: the folder.
      model: gives the architecture and the adapters' scale.
      variables: {"params": ...[, "adapters": ...][, "heads": ...]}. With a head "score" the folder is a reward model
        (`LlamaForSequenceClassification`); other heads go to `heads.safetensors` (see `weights/heads.py`).
      tokenizer: written beside the weights; None writes none.
      source: what the model was loaded from: its folder's generation_config.json and further config.json entries are
        carried along, and an adapter folder names it (or its own base) as the base model. Adapters are merged with the
        weights as they are stored there, where `variables` hold them in less than float32.
      dtype: of the stored weights; not given: that of the parameters, and float32 where there are adapters, since less
        would round away most of what they have learnt.
      merge: add the adapters to the weights; False writes only the adapters, and needs `source`.
      shard_bytes: largest weight file.
      classes: names for the outputs of auxiliary heads (`RewardConfig.heads`), which `read_classes` reads again.
      terminators: ids that end an answer under the chat template (`ChatTokenizer.terminators`): generation_config.json
        lists them beside those of `source`.

    Returns:
      What storing merged weights in less than float32 lost of the adapters' update, relative to it
      (`merging.Rounding`); None where nothing was lost.

    Raises `InputError` for an unwritable or full disk, or a tokenizer that does not fit the embedding.
    """
    path = Path(path)
    if tokenizer is not None:
        check_published(tokenizer, model.config, None if source is None else resolve(source))
    if not merge:
        if "adapters" not in variables:
            raise InputError(f"{path}: there are no adapters to save apart from the weights (merge=False)")
        if source is None:
            raise InputError(f"{path}: an adapter folder names its base model; give source")
        base = replace(_base_of(source), fingerprint=bases.weights_hash(variables["params"]))
        named: dict[str, Any] = {"base": (base.model, base.revision), "also": lambda folder: bases.write(folder, base)}
        told = named | {"dtype": dtype or jnp.float32, "classes": classes, "terminators": terminators}
        peft.save_adapters(path, model, variables, tokenizer, **told)
        return None
    params, adapters = variables["params"], variables.get("adapters")
    if dtype is None:
        dtype = jnp.float32 if adapters is not None else jax.tree.leaves(params)[0].dtype
    rounding = merging.Rounding(dtype)
    origin = None if source is None else origin_folder(resolve(source))
    collection = variables.get("heads", {})
    config = replace(model.config, num_labels=1 if SCORE in collection else 0)
    if config.num_labels and tokenizer is not None:
        config, tokenizer = heads.padded_apart(config, tokenizer)
    others = heads.gathered(collection)

    def finish(folder: Path) -> None:
        huggingface.write_configs(folder, config, dtype, origin, terminators)
        heads.write_others(folder, collection, others, classes)
        if tokenizer is not None:
            tokenizer_files.save_tokenizer(tokenizer, folder, origin)

    slots = layout.parameter_slots(config)
    shapes = layout.tensor_shapes(slots)
    if adapters is None:
        tensors = layout.tensors(slots, params, dtype)
    else:
        beneath = _beneath(source, params, slots)
        tensors = merging.merged(shapes, beneath, merging.factors(model, adapters), rounding)
    if config.num_labels:
        score = [layout.score_slot(config)]
        shapes = shapes | layout.tensor_shapes(score)  # a new one: the tensors are made later, by the keys of the old
        tensors = itertools.chain(tensors, layout.tensors(score, collection, dtype))
    huggingface.write_weights(path, shapes, tensors, dtype, finish, shard_bytes=shard_bytes)
    return rounding.lost


def _beneath(source: str | Path | None, params: Any, slots: list[layout.Slot]) -> Iterator[np.ndarray]:
    """The weights beneath adapters in float32: `params`, or where these are narrower, those that `source` stores."""
    leaf = jax.tree.leaves(params)[0]
    if source is None or leaf.dtype == jnp.float32:
        return layout.tensors(slots, params, jnp.float32)
    place = resolve(source)
    place = _below_adapters(place)[0] if has_adapters(place) else place
    if place.kind in ("huggingface", "gguf"):
        return read_all(open_tensors(place)[1], layout.tensor_shapes(slots), np.dtype(np.float32))
    mesh = getattr(leaf.sharding, "mesh", None)
    chosen = {"dtype": jnp.dtype(jnp.float32), "remat": "none", "attention": "auto"}
    exact = _load(place, chosen, LoraConfig(), mesh if isinstance(mesh, Mesh) else None, jnp.float32)[1]
    return layout.tensors(slots, exact["params"], jnp.float32)


def read_all(
    reader: layout.TensorReader, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Every tensor of `shapes`, whole, one at a time. In processes that write nothing only their shapes."""
    for key, shape in shapes.items():
        if jax.process_index() == 0:
            yield reader.read(key, tuple(slice(0, n, 1) for n in shape)).astype(dtype, copy=False)
        else:
            yield np.broadcast_to(np.zeros((), dtype), shape)
