"""Preference training of Llama models in JAX and Flax.

Names are loaded when they are first used, so that `import dpo_jax` (and `dpo-jax --help`) does not start JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dpo_jax import align, config, data, masked, mesh, model, run, sample, state, types, weights
    from dpo_jax.errors import InputError
    from dpo_jax.mesh import make_mesh
    from dpo_jax.weights.pretrained import load_pretrained, save_pretrained
    from dpo_jax.weights.tokenizer import load_tokenizer

_NAMES = {
    "InputError": "dpo_jax.errors",
    "make_mesh": "dpo_jax.mesh",
    "load_pretrained": "dpo_jax.weights.pretrained",
    "save_pretrained": "dpo_jax.weights.pretrained",
    "load_tokenizer": "dpo_jax.weights.tokenizer",
}
_MODULES = ("align", "config", "data", "masked", "mesh", "model", "run", "sample", "state", "types", "weights")

__all__ = [
    "InputError",
    "__version__",
    "align",
    "config",
    "data",
    "load_pretrained",
    "load_tokenizer",
    "make_mesh",
    "masked",
    "mesh",
    "model",
    "run",
    "sample",
    "save_pretrained",
    "state",
    "types",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"dpo_jax.{name}")
    raise AttributeError(f"module 'dpo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
