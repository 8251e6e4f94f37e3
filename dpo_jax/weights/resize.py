"""A model with rows for a larger vocabulary: embedding and output matrix grow, everything else stays bit for bit.

The row of a new piece is the mean of the rows of the old pieces that spelled its text before:

    E'[v] = E[v]                            v < V
    E'[v] = 1/n sum_k E[s_k],  s = old(v)   V <= v

old(v) are the ids that the old tokenizer gives for the text of piece v: a leading `▁` is a space, no other space is put
before it, and a character that it does not know is its three or four bytes, each of which counts as one of the n. The
mean is taken in float64 and rounded once, to the dtype of the weights. The output matrix, where it is not the embedding
itself, grows by the same rule, so the logit of a new piece begins as the mean of the logits of its parts.

Rows that no piece has (the padding to a multiple) are the mean of all V old rows: their logit is the mean of the old
logits, so none of them is likelier than an old token is on average (Jensen's inequality).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.weights.huggingface import layout, model_folder
from dpo_jax.weights.opened import StoredModel
from dpo_jax.weights.pieces import Pieces

GROWING = ("model.embed_tokens.weight", "lm_head.weight")
"""The tensors with a row a token."""


def check_rows(config: LlamaConfig, base: Pieces, where: object) -> None:
    """Raise `InputError` unless the embedding has one row a piece."""
    if config.vocab_size != len(base):
        raise InputError(
            f"{where}: the embedding has {config.vocab_size} rows, and {base.where} has {len(base)} pieces; begin with "
            "the model as it was before rows were added, or give its own tokenizer.model"
        )


def spellings(base: Pieces, longer: Pieces) -> list[list[int]]:
    """For each piece of `longer` that `base` does not have, in order, the ids by which `base` spells its text."""
    return base.spell([piece.piece for piece in longer.proto.pieces[len(base) :]])


def grown(rows: np.ndarray, spelled: Sequence[Sequence[int]], size: int) -> np.ndarray:
    """`rows` [V, D] with a row for each of `spelled` behind them, and mean rows up to `size`, in the same dtype."""
    new = np.empty((size, rows.shape[1]), rows.dtype)
    new[: len(rows)] = rows
    for at, ids in enumerate(spelled, len(rows)):
        new[at] = rows[ids].mean(axis=0, dtype=np.float64).astype(rows.dtype)
    if (filled := len(rows) + len(spelled)) < size:
        new[filled:] = rows.mean(axis=0, dtype=np.float64).astype(rows.dtype)
    return new


def write_resized(
    place: StoredModel,
    target: Path,
    base: Pieces,
    longer: Pieces,
    tokenizer: PreTrainedTokenizerBase,
    *,
    multiple: int = 1,
    shard_bytes: int = model_folder.SHARD_BYTES,
) -> int:
    """Write the model of a Hugging Face folder or GGUF file with a row for every piece of `longer`; return the rows.

    Tensors are read and written one at a time, through no device.

    Args:
      place: the model.
      target: a folder that does not exist yet, or is empty. It gets config.json with the new vocab_size,
        generation_config.json, safetensors, the tokenizer files and `tokenizer.model`.
      base: the vocabulary of the model.
      longer: the new one; see `pieces.check_extends`.
      tokenizer: `longer` for `transformers`.
      multiple: the number of rows is rounded up to a multiple of it.
      shard_bytes: largest safetensors file.

    Raises `InputError` for anything wrong with the model, or a target that cannot be written.
    """
    config, reader = place.architecture, place.tensors
    assert reader is not None, "read tensor by tensor"
    check_rows(config, base, place.path)
    spelled, size = spellings(base, longer), -(-len(longer) // multiple) * multiple
    config = dataclasses.replace(config, vocab_size=size)
    shapes, dtype = layout.tensor_shapes(layout.parameter_slots(config)), reader.dtype

    def tensors() -> Iterator[np.ndarray]:
        for key, shape in shapes.items():
            stored = (len(base), *shape[1:]) if key in GROWING else shape
            values = reader.read(key, tuple(slice(0, n, 1) for n in stored)).astype(dtype, copy=False)
            yield grown(values, spelled, size) if key in GROWING else values

    def finish(folder: Path) -> None:
        model_folder.write_configs(folder, config, dtype, place.origin, tokenizer=tokenizer)
        (folder / "tokenizer.model").write_bytes(longer.proto.SerializeToString(deterministic=True))

    model_folder.write_weights(target, shapes, tensors(), dtype, finish, shard_bytes=shard_bytes, replace=False)
    return size
