"""Hugging Face model folders: config.json, safetensors, generation_config.json."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from transformers import PreTrainedTokenizerBase

from dpo_jax.errors import InputError
from dpo_jax.headers import read_json
from dpo_jax.model.architecture import LlamaConfig, read_hf, to_hf
from dpo_jax.model.config_keys import ignored
from dpo_jax.weights.huggingface import layout, shards
from dpo_jax.weights.integrity.folder import new_folder, write_json
from dpo_jax.weights.tokenizers.tokenizer_files import PIECES, save_tokenizer

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"

SHARD_BYTES = 5_000_000_000
"""Largest weight file: the size that Hugging Face's hub recommends."""

# Entries of a config.json that speak of the file they stood in, not of the model.
_NOT_CARRIED = {"torch_dtype", "dtype", "transformers_version", "_name_or_path", "auto_map"}


def read_config(file: Path) -> LlamaConfig:
    """The architecture that a config.json describes, and where generation ends by the generation_config.json beside."""
    config, unread = read_hf(read_json(file), str(file))
    if unread:
        _name_unread(str(file), ", ".join(unread))
    return with_stops(config, read_stops(file.with_name(GENERATION)))


def with_stops(config: LlamaConfig, ids: Sequence[int]) -> LlamaConfig:
    """The architecture with the `ids` at which a generation_config.json ends generation (`read_stops`)."""
    further = tuple(dict.fromkeys(i for i in ids if 0 <= i < config.vocab_size and i not in config.stop_ids))
    return dataclasses.replace(config, further_stop_ids=(*config.further_stop_ids, *further))


@lru_cache  # a command reads a configuration several times, and says this once
def _name_unread(where: str, keys: str) -> None:
    logger.info("%s: keys without effect, not read: %s", where, keys)


def check_weights(config: LlamaConfig, reader: shards.SafetensorsReader) -> None:
    """Raise `InputError` unless every tensor of such a model is there once, in its shape, and no other."""
    slots = layout.parameter_slots(config)
    if config.num_labels:
        slots.append(layout.score_slot(config))
        if "score.weight" not in reader.shapes:
            raise InputError(f"{reader.where}: config.json says reward model, and the weights have no score.weight")
    redundant = frozenset({"lm_head.weight"} if config.tie_embeddings and not config.num_labels else ())
    layout.check_keys(slots, reader, redundant)
    if redundant & reader.shapes.keys():
        _check_tied(reader)


def _check_tied(reader: shards.SafetensorsReader) -> None:
    """A tied model's own output matrix is redundant only if it is the embedding, bit for bit."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    rows, width = reader.shapes[embedding]
    same = reader.shapes[head] == (rows, width)
    for start in range(0, rows if same else 0, 4096):
        part = slice(start, min(start + 4096, rows), 1), slice(0, width, 1)
        same = same and reader.read(head, part).tobytes() == reader.read(embedding, part).tobytes()
    if not same:
        raise InputError(
            f"{reader.where}: config.json ties lm_head to the embedding, and lm_head.weight differs from it; set "
            "tie_word_embeddings to false if both are meant"
        )


def write_configs(
    folder: Path,
    config: LlamaConfig,
    dtype: Any,
    source: Path | None,
    terminators: Sequence[int] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """What stands beside the weights: config.json, generation_config.json, the files of `tokenizer`.

    What else those of the folder `source` say is carried along. `terminators`: see `write_generation`.
    """
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        config = dataclasses.replace(config, pad_token_id=None)  # transformers cannot make an embedding with such a row
    raw = to_hf(config)
    extras: dict[str, Any] = {}
    if source is not None and (source / "config.json").is_file():
        known = raw.keys() | _NOT_CARRIED
        extras = {k: v for k, v in read_json(source / "config.json").items() if k not in known and not ignored(k)}
    write_json(folder / "config.json", {**raw, **extras, "torch_dtype": np.dtype(dtype).name})
    write_generation(folder, config, None if source is None else source / GENERATION, terminators)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder, None if source is None else source / PIECES)


def write_generation(folder: Path, config: LlamaConfig, given: Path | None, terminators: Sequence[int] = ()) -> None:
    """generation_config.json, as `given` where that is there.

    `terminators`: ids that end an answer under the chat template. They join those at which generation stops already: a
    base model with `<|endoftext|>` that learnt a template of its own would go on behind its answer elsewhere.
    """
    path, raw = folder / GENERATION, to_hf(config)
    if given is not None and given.is_file():
        if not terminators:
            shutil.copyfile(given, path)
            return
        generation = read_json(given)
    else:
        ids = {name: raw[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = {"_from_model_config": True, **ids}
    if terminators:
        generation.pop("_from_model_config", None)  # transformers would take the ids from config.json again
        every = list(dict.fromkeys((*_stops(generation), *config.eos_token_ids, *terminators)))
        generation["eos_token_id"] = every if len(every) > 1 else every[0]
    write_json(path, generation)


def read_stops(file: Path) -> tuple[int, ...]:
    """The ids at which generation ends by a generation_config.json; none where there is no such file."""
    return _stops(read_json(file)) if file.is_file() else ()


def _stops(generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids at which generation ends, by a generation_config.json."""
    found = generation.get("eos_token_id")
    return tuple(i for i in (found if isinstance(found, list) else [found]) if type(i) is int)


def write_weights(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[np.ndarray],
    dtype: Any,
    finish: Callable[[Path], None],
    *,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = True,
) -> None:
    """Write a model folder that appears whole or not at all. Every process calls this; process 0 writes.

    Args:
      path: the folder; an earlier model folder there is replaced if `replace`.
      shapes: key and shape of each tensor, in the order of `tensors`.
      tensors: the values, made one at a time (by all processes together where they are sharded over several).
      dtype: what they are stored as.
      finish: writes the other files into the folder it is given.
      shard_bytes: largest weight file.
      replace: see `path`.

    Raises `InputError`, on every process, when the disk is full or the folder cannot be written; nothing is left then.
    """
    failure: InputError | None = None
    if jax.process_index() == 0:
        try:
            with new_folder(path, replace=replace) as scratch:
                shards.write_all(scratch, shapes, tensors, dtype, shard_bytes)
                finish(scratch)
        except InputError as error:
            failure = error
    if jax.process_count() > 1:
        for _ in tensors:  # the processes gather each tensor together, so all of them go through all
            pass
        failed = multihost_utils.process_allgather(np.int32(failure is not None))
        if failure is None and failed.any():
            failure = InputError(f"{path}: process 0 could not write it; its message says why")
    if failure is not None:
        raise failure
