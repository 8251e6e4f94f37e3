"""dpo_jax: aligns Llama models with human preferences, in JAX and Flax.

`import dpo_jax` is cheap; the names below are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_jax import align, masked, sample
    from dpo_jax.mesh import make_mesh
    from dpo_jax.weights.pretrained import load_pretrained, save_pretrained
    from dpo_jax.weights.tokenizer import load_tokenizer

__version__ = "0.1.0"

__all__ = ["align", "load_pretrained", "load_tokenizer", "make_mesh", "masked", "sample", "save_pretrained"]

_MODULES = ("align", "masked", "sample")
_FUNCTIONS = {
    "load_pretrained": "dpo_jax.weights.pretrained",
    "save_pretrained": "dpo_jax.weights.pretrained",
    "load_tokenizer": "dpo_jax.weights.tokenizer",
    "make_mesh": "dpo_jax.mesh",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"dpo_jax.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'dpo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
