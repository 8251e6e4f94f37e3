"""The weighted mean of models of one shape, tensor by tensor, in float32 ("model soups", Wortsman et al. 2022).

    theta = sum_i w_i theta_i,      sum_i w_i = 1

Hugging Face folders and GGUF files are read one tensor at a time, each model's in turn, through no device: memory holds
two tensors, however many models there are. Checkpoints of runs and PEFT adapters are loaded whole first.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.errors import InputError
from dpo_jax.headers import told
from dpo_jax.model.architecture import LlamaConfig, to_hf
from dpo_jax.weights.huggingface import layout, model_folder
from dpo_jax.weights.integrity.folder import check_free, write_json
from dpo_jax.weights.opened import StoredModel
from dpo_jax.weights.pretrained import stored_tensors

log = logging.getLogger(__name__)

PROVENANCE = "average.json"
# Ids of tokens and the longest text change no weight's meaning.
_FREE = {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "torch_dtype", "dtype"}


def check_alike(places: Sequence[StoredModel], tokenizers: Sequence[PreTrainedTokenizerBase]) -> None:
    """Raise `InputError` where two models differ in shape, in what config.json says, or in their tokenizers' pieces.

    Another chat template is told.
    """
    first, spoken = places[0], tokenizers[0].get_vocab()
    wanted = to_hf(first.architecture)
    if first.architecture.num_labels:
        raise InputError(f"{first.name}: is a reward model; language models are averaged")
    for place, tokenizer in zip(places[1:], tokenizers[1:], strict=True):
        found = to_hf(place.architecture)
        for key in sorted((wanted.keys() | found.keys()) - _FREE):
            if wanted.get(key) != found.get(key):
                raise InputError(
                    f"{place.name}: {key} is {told(found.get(key))}, and {told(wanted.get(key))} in {first.name}; only"
                    " models of one shape are averaged"
                )
        if (pieces := tokenizer.get_vocab()) != spoken:
            odd = min((piece for piece, _ in pieces.items() ^ spoken.items()), key=lambda p: (len(p), p))
            raise InputError(
                f"{place.name}: its tokenizer is not that of {first.name}: {told(odd)} is {told(pieces.get(odd))}, and"
                f" {told(spoken.get(odd))} there; only models of one tokenizer are averaged"
            )
        if tokenizer.chat_template != tokenizers[0].chat_template:
            log.warning("%s: has another chat template than %s, whose template is kept", place.name, first.name)


def _digested(place: StoredModel, config: LlamaConfig, digest: Any) -> Iterator[np.ndarray]:
    """The tensors of a model in float32, one after the other, each put into `digest` (of hashlib)."""
    for tensor in stored_tensors(place, config, np.float32):
        values = np.ascontiguousarray(tensor, np.float32)
        digest.update(values.data)
        yield values


def mean(tensors: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    """sum_i w_i x_i of arrays of one shape, each product and sum in float32."""
    total = np.zeros(tensors[0].shape, np.float32)
    for values, share in zip(tensors, shares, strict=True):
        total += np.float32(share) * values
    return total


def average(
    places: Sequence[StoredModel],
    shares: Sequence[float],
    target: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    terminators: Sequence[int] = (),
    dtype: Any = None,
    made_by: dict[str, Any],
    shard_bytes: int = model_folder.SHARD_BYTES,
) -> None:
    """Write the average of models as a new Hugging Face folder.

    Args:
      places: the models, checked (`check_alike`).
      shares: the weight of each; their sum is 1.
      target: a folder that does not exist yet, or is empty.
      tokenizer, terminators: written beside the weights; of the first model.
      dtype: of the stored weights; not given: that of the first model.
      made_by: what else `average.json` says, beside each model's name, share and sha256 of its float32 tensors.
      shard_bytes: largest safetensors file.

    Raises `InputError` for a broken model, or a target that cannot be written.
    """
    check_free(target, replace=False)
    config, origin = places[0].architecture, places[0].origin
    stored = np.dtype(places[0].dtype if dtype is None else dtype)
    shapes = layout.tensor_shapes(layout.parameter_slots(config))
    digests = [hashlib.sha256() for _ in places]
    read = [_digested(place, config, digest) for place, digest in zip(places, digests, strict=True)]
    tensors = (mean(each, shares).astype(stored) for each in zip(*read, strict=True))

    def finish(folder: Path) -> None:
        model_folder.write_configs(folder, config, stored, origin, terminators, tokenizer)
        models = [
            {"model": base.model, "revision": base.revision, "weight": share, "sha256": digest.hexdigest()}
            for base, share, digest in zip((place.lasting for place in places), shares, digests, strict=True)
        ]
        write_json(folder / PROVENANCE, {**made_by, "dtype": stored.name, "models": models})

    model_folder.write_weights(target, shapes, tensors, stored, finish, shard_bytes=shard_bytes, replace=False)
