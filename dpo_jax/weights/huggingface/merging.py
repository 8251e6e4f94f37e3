"""Adapters added to the weights beneath them, in float32, tensor by tensor; and what a narrower dtype loses of that.

    W' = W + (alpha / rank) A B

What a run has learnt is small beside W: bfloat16 has 8 bits, and an update below a 256th of a weight rounds away.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dpo_jax.model.llama import Llama
from dpo_jax.weights.huggingface import fused_adapters

Factors = dict[str, tuple[np.ndarray, np.ndarray]]
"""By the key of the weight W [out, in] that they are added to: B [out, r], times alpha / rank, and A [r, in]."""


class Rounding:
    """What is left of an update u of weights w once they are stored in `dtype`.

    `lost` is |u - (round(w + u) - round(w))| / |u| over all weights that were updated: 0 where nothing was lost, about
    1 where no weight moved. None where there is no update, or float32 keeps it.
    """

    def __init__(self, dtype: Any):
        self.dtype = np.dtype(dtype)
        self._lost = self._update = 0.0

    def store(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """`after` (float32) in the dtype."""
        stored = after.astype(self.dtype)
        if self.dtype != np.float32 and (update := after - before).any():
            moved = stored.astype(np.float32) - before.astype(self.dtype).astype(np.float32)
            self._update += float(np.sum(np.square(update, dtype=np.float64)))
            self._lost += float(np.sum(np.square(update - moved, dtype=np.float64)))
        return stored

    @property
    def lost(self) -> float | None:
        """See above."""
        return math.sqrt(self._lost / self._update) if self._update else None


def factors(model: Llama, adapters: Mapping[str, Any]) -> Factors:
    """The adapters on the host. Every process has to call this (see `layout.tensors`)."""
    values = dict(zip(*fused_adapters.tensors(model, adapters, np.float32), strict=True))
    found: Factors = {}
    for key, a in values.items():
        name, is_a, _ = key.removeprefix("base_model.model.").rpartition(".lora_A.weight")
        if is_a:
            b = values[key.replace(".lora_A.", ".lora_B.")]
            found[f"{name}.weight"] = np.float32(model.lora.scale) * b, a
    return found


def merged(
    keys: Mapping[str, Any], weights: Iterator[np.ndarray], added: Factors, rounding: Rounding
) -> Iterator[np.ndarray]:
    """Each weight (float32, in the order of `keys`) with what is `added` to it, stored as `rounding` says.

    In processes that write nothing only their shapes mean anything.
    """
    for key, weight in zip(keys, weights, strict=True):
        if key in added and jax.process_index() == 0:
            b, a = added[key]
            yield rounding.store(weight, weight + b @ a)
        else:
            yield weight.astype(rounding.dtype)
