"""Optimizers whose moments take less memory than their weights do: rules that optax has not, or not for stacked layers.

Layers are stacked ([L, D, F]), and what an optimizer works out of a whole matrix is worked out for each layer's own.
"""

from typing import Any


def is_matrix(path: tuple[Any, ...]) -> bool:
    """Kernels, embeddings and adapter factors, [..., n, m]; not norm scales and biases [..., n], stacked too."""
    return path[-1].key not in ("scale", "bias")
