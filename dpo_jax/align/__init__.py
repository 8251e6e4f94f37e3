"""One file a paper. Every step is a pure function `train_step(state, batch, *, config) -> (state, metrics)`."""

from dpo_jax.align import dpo

__all__ = ["dpo"]
