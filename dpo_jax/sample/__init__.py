"""Generation from a Llama. `dpo_jax.sample.generate` is the function; it lives in `sample/engine.py`."""

from dpo_jax.sample.engine import Generation, generate

__all__ = ["Generation", "generate"]
