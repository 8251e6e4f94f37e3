"""One file a paper. Every step is a pure function `train_step(state, batch, *, config) -> (state, metrics)`."""

from dpo_jax.align import dpo, ppo, reward, rewards, sft

__all__ = ["dpo", "ppo", "reward", "rewards", "sft"]
