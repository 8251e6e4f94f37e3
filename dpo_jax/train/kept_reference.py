"""The reference policy as a copy that nothing trains, and how far one in fewer bits is from the original."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.config import TrainConfig
from dpo_jax.model.llama import Llama
from dpo_jax.model.logprobs import token_logps
from dpo_jax.model.quantised import kind_of
from dpo_jax.model.variables import frozen_copy

ROWS, LENGTH = 8, 512
"""Of the data, by which a quantised reference is compared; tokens of each."""


def kept_reference(
    model: Llama, params: Any, train: TrainConfig, rows: Sequence[np.ndarray], mesh: Mesh
) -> tuple[dict[str, Any], str | None]:
    """{"params": a copy of `params` as `train` says}; and of a quantised one its error, in words.

    `rows`: token ids of a few texts. A copy, not a view: the arrays of the starting model are given to the first step.
    """
    dtype = train.settled.frozen_dtype
    kept = {"params": frozen_copy(params, dtype, train.dtype)}
    if kind_of(dtype) is None:
        return kept, None
    mean, largest, tokens = error(model, params, kept["params"], rows, mesh)
    return kept, (
        f"reference policy in {dtype}: log-probabilities of {tokens} tokens of the data are off by"
        f" {mean:.4f} nats on average and {largest:.4f} at most (--train.frozen_dtype)"
    )


def error(model: Llama, params: Any, other: Any, rows: Sequence[np.ndarray], mesh: Mesh) -> tuple[float, float, int]:
    """Mean and largest |log p - log p'| of a token in nats under two sets of parameters, and of how many tokens."""
    texts = [np.asarray(ids[:LENGTH], np.int32) for ids in rows[:ROWS]]
    width = -(-max(map(len, texts)) // 64) * 64
    parts = meshes.batch_parts(mesh)
    tokens = np.zeros((-(-len(texts) // parts) * parts, width), np.int32)
    segments = np.zeros_like(tokens)
    for i, ids in enumerate(texts):
        tokens[i, : len(ids)], segments[i, : len(ids)] = ids, 1

    def logps(variables: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        hidden: Any = model.apply(variables, tokens, None, segments, packed=False)
        unembedding: Any = model.apply(variables, method="unembedding")
        return token_logps(hidden, unembedding, jnp.roll(tokens, -1, axis=1))

    measure, batch = meshes.Replicated(logps, mesh), meshes.put_batch(mesh, (tokens, segments))
    found = [np.asarray(measure({"params": tree}, *batch), np.float64) for tree in (params, other)]
    counted = np.roll(segments, -1, axis=1) > 0
    counted[:, -1] = False
    off = np.abs(found[0] - found[1])[counted]
    return float(off.mean()), float(off.max()), int(counted.sum())
