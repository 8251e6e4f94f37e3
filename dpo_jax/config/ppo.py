"""Options of the PPO step, and of its critic-free relatives."""

from dataclasses import dataclass, field
from typing import Literal

from dpo_jax.config.checks import only_with, require
from dpo_jax.config.sections import OptimizerConfig


@dataclass(frozen=True)
class PPOLossConfig:
    """The reward of a token, its advantage, and the losses. The formulas stand in `dpo_jax/align/ppo.py`."""

    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """gae: PPO with a value model. rloo, grpo: without one, from several responses to each prompt."""
    clip: float = 0.2
    """Clip range of the ratio between new and old policy."""
    epochs: int = 4
    """Passes over each rollout (Llama 2: 1)."""
    minibatches: int = 1
    """Optimizer updates a pass: the rollout is split into this many mini-batches."""
    kl_coefficient: float = 0.05
    """Price of a nat of KL(policy, reference) (Llama 2: 0.01 at 7B and 13B, 0.005 above)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Which one-sample estimate of the KL divergence is priced."""
    kl_placement: Literal["reward", "loss"] | None = None
    """reward: taken off the rewards. loss: a term of the loss. Not given: loss for grpo, else reward."""
    kl_target: float | None = None
    """Adapt the coefficient so that the KL of a response stays near this many nats (Ziegler et al. 2019)."""
    kl_horizon: int | None = None
    """Responses over which the coefficient adapts. Not given: 10,000."""
    stop_kl: float | None = None
    """Leave out the rest of a rollout's updates once a mini-batch is farther than this from the old policy (nats a
    token)."""
    gamma: float | None = None
    """Discount of GAE. Not given: 1."""
    lam: float | None = None
    """Lambda of GAE. Not given: 0.95."""
    value: Literal["separate", "shared", "stopped"] | None = None
    """Value model: a trunk of its own, the policy's trunk, or the policy's trunk without a gradient into it. Not given:
    separate."""
    value_clip: float | None = None
    """Clip range of the value around its old value. Not given: 0.2."""
    value_coefficient: float | None = None
    """Weight of the value loss. Not given: 0.1."""
    entropy_coefficient: float = 0.0
    """Weight of an entropy bonus."""
    whiten_advantages: bool | None = None
    """Scale advantages to mean 0 and variance 1 over the tokens of the rollout. Not given: for gae."""
    whiten_rewards: bool | None = None
    """Scale token rewards to variance 1 over the rollout (the mean stays). Not given: no."""
    score_clip: float | None = None
    """Clip scores to plus or minus this."""
    normalize_scores: bool = False
    """Scale scores to mean 0 and variance 1 over the rollout, before clipping."""
    missing_eos_penalty: float | None = None
    """Taken off the score of a response that was cut before its terminator."""
    group_size: int | None = None
    """Responses to each prompt. Not given: 1 for gae, 4 for rloo, 8 for grpo."""

    def __post_init__(self) -> None:
        gae_only = ("gamma", "lam", "value", "value_clip", "value_coefficient", "whiten_rewards")
        only_with(self, "advantage", dict.fromkeys(gae_only, ("gae",)), "ppo")
        require(0 < self.clip < 1, f"--ppo.clip {self.clip} must lie in (0, 1)")
        require(self.epochs >= 1, "--ppo.epochs must be at least 1")
        require(self.minibatches >= 1, "--ppo.minibatches must be at least 1")
        require(self.kl_coefficient >= 0, "--ppo.kl_coefficient must not be negative")
        require(self.kl_target is None or self.kl_target > 0, "--ppo.kl_target must be positive")
        require(
            self.kl_target is None or self.kl_coefficient > 0,
            "--ppo.kl_target scales --ppo.kl_coefficient, which must be positive",
        )
        require(
            self.kl_horizon is None or self.kl_target is not None,
            "--ppo.kl_horizon has no effect without --ppo.kl_target",
        )
        require(self.kl_horizon is None or self.kl_horizon >= 1, "--ppo.kl_horizon must be at least 1")
        require(self.stop_kl is None or self.stop_kl > 0, "--ppo.stop_kl must be positive")
        for name in ("gamma", "lam"):
            share = getattr(self, name)
            require(share is None or 0 <= share <= 1, f"--ppo.{name} must lie in [0, 1]")
        require(self.value_clip is None or self.value_clip > 0, "--ppo.value_clip must be positive")
        require(self.value_coefficient is None or self.value_coefficient >= 0, "--ppo.value_coefficient is negative")
        require(self.entropy_coefficient >= 0, "--ppo.entropy_coefficient must not be negative")
        require(self.score_clip is None or self.score_clip > 0, "--ppo.score_clip must be positive")
        require(
            self.missing_eos_penalty is None or self.missing_eos_penalty > 0,
            "--ppo.missing_eos_penalty must be positive",
        )
        needed = 1 if self.advantage == "gae" else 2
        require(
            self.group_size is None or self.group_size >= needed,
            f"--ppo.group_size {self.group_size}: {self.advantage} needs at least {needed} responses to a prompt",
        )

    @property
    def group(self) -> int:
        """Responses to each prompt."""
        return self.group_size or {"gae": 1, "rloo": 4, "grpo": 8}[self.advantage]

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL divergence is a term of the loss and not of the rewards."""
        return (self.kl_placement or ("loss" if self.advantage == "grpo" else "reward")) == "loss"

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened."""
        return self.advantage == "gae" if self.whiten_advantages is None else self.whiten_advantages

    @property
    def updates(self) -> int:
        """Optimizer updates a step."""
        return self.epochs * self.minibatches


@dataclass(frozen=True)
class PPOConfig(PPOLossConfig):
    """All that `align.ppo.init_state` and `align.ppo.train_step` need to know."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    temperature: float = 1.0
    """Temperature that the rollout was sampled at; log-probabilities are taken at it everywhere."""
    seed: int = 0
    """Seed of the mini-batches."""
    accumulate: int = 1
    """Split each mini-batch into this many micro-batches; the result is the same."""
    head_budget_bytes: int = 256 * 2**20
    """Memory a device may spend on one chunk of logits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, "PPO samples: the temperature must be positive")
        require(self.accumulate >= 1, f"--train.accumulate {self.accumulate} must be at least 1")
