"""Options of `dpo-jax ppo`: of the PPO step and its critic-free relatives, and of the run around it."""

from dataclasses import dataclass, field
from typing import Literal

from dpo_jax.config.checks import Options, not_given, require
from dpo_jax.config.sections import OptimizerConfig, SampleConfig
from dpo_jax.config.training import JudgedRun

_NARROWING = ("top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram", "logit_bias", "min_new_tokens")
"""Options of sampling under which the tokens drawn have other probabilities than the model gives them."""


@dataclass(frozen=True)
class PPOLossConfig(Options):
    """The reward of a token, its advantage, and the losses. The formulas stand in `dpo_jax/align/ppo.py`."""

    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """gae: PPO with a value model. rloo, grpo: without one, from several responses to each prompt."""
    clip: float = 0.2
    """Clip range of the ratio between new and old policy."""
    epochs: int | None = None
    """Passes over each rollout (Llama 2: 1). Not given: 1 for grpo, else 4."""
    minibatches: int = 1
    """Optimizer updates a pass: the rollout is split into this many mini-batches."""
    kl_coefficient: float = 0.05
    """Price of a nat of KL(policy, reference) (Llama 2: 0.01 at 7B and 13B, 0.005 above)."""
    kl_placement: Literal["reward", "loss"] | None = None
    """reward: taken off the rewards. loss: a term of the loss. Not given: loss for grpo, else reward."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_corrected"] | None = None
    """Which estimate of the KL divergence is priced. In the reward k1 alone, which optimises KL(policy, reference) of
    the whole response. In the loss: k3 (GRPO's), which optimises KL(reference, policy) of each token; k2, or
    k3_corrected (k3 times the importance ratio, as DeepSeek-V3.2), which optimise KL(policy, reference) of each token.
    Not given: k1 in the reward, k3 in the loss."""
    kl_target: float | None = None
    """Adapt the coefficient so that the KL of a response stays near this many nats (Ziegler et al. 2019)."""
    kl_horizon: int | None = not_given(10_000, needs="kl_target")
    """Responses over which the coefficient adapts."""
    stop_kl: float | None = None
    """Leave out the rest of a rollout's updates once a mini-batch is farther than this from the old policy (nats a
    token)."""
    gamma: float | None = not_given(1.0, advantage=("gae",))
    """Discount of GAE."""
    lam: float | None = not_given(0.95, advantage=("gae",))
    """Lambda of GAE."""
    value: Literal["separate", "shared", "stopped"] | None = not_given("separate", advantage=("gae",))
    """Value model: a trunk of its own, the policy's trunk, or the policy's trunk without a gradient into it."""
    value_clip: float | None = not_given(0.2, advantage=("gae",))
    """Clip range of the value around its old value."""
    value_coefficient: float | None = not_given(0.1, advantage=("gae",))
    """Weight of the value loss."""
    entropy_coefficient: float = 0.0
    """Weight of an entropy bonus."""
    whiten_advantages: bool | None = None
    """Scale advantages to mean 0 and variance 1 over the tokens of the rollout. Not given: for gae."""
    whiten_rewards: bool | None = not_given(False, advantage=("gae",))
    """Scale token rewards to variance 1 over the rollout (the mean stays)."""
    score_clip: float | None = None
    """Clip scores to plus or minus this."""
    normalize_scores: bool = False
    """Scale scores to mean 0 and variance 1 over the rollout, before clipping."""
    missing_eos_penalty: float | None = None
    """Taken off the score of a response that was cut before its terminator."""
    group_size: int | None = None
    """Responses to each prompt. Not given: 1 for gae, 4 for rloo, 8 for grpo."""

    def __post_init__(self) -> None:
        self.refuse_idle("--ppo.")
        require(0 < self.clip < 1, f"--ppo.clip {self.clip} must lie in (0, 1)")
        self.at_least("--ppo.", epochs=1, minibatches=1, kl_horizon=1)
        self.positive("--ppo.", "kl_target", "stop_kl", "value_clip", "score_clip", "missing_eos_penalty")
        require(self.kl_coefficient >= 0, "--ppo.kl_coefficient must not be negative")
        require(
            not self.kl_in_loss or self.kl_estimator != "k1",
            "--ppo.kl_estimator k1 as a term of the loss has gradient 0 in expectation, so that no --ppo.kl_coefficient"
            " or --ppo.kl_target can hold the policy; take k3, k2 or k3_corrected, or --ppo.kl_placement reward",
        )
        require(
            self.kl_in_loss or self.kl_estimator in (None, "k1"),
            f"--ppo.kl_estimator {self.kl_estimator} taken off the rewards gives the gradient of no divergence and no"
            " pull back to the reference; take k1 there, or --ppo.kl_placement loss",
        )
        require(
            self.kl_target is None or self.kl_coefficient > 0,
            "--ppo.kl_target scales --ppo.kl_coefficient, which must be positive",
        )
        for name in ("gamma", "lam"):
            share = getattr(self, name)
            require(share is None or 0 <= share <= 1, f"--ppo.{name} must lie in [0, 1]")
        require(self.value_coefficient is None or self.value_coefficient >= 0, "--ppo.value_coefficient is negative")
        require(self.entropy_coefficient >= 0, "--ppo.entropy_coefficient must not be negative")
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
    def critic(self) -> Literal["separate", "shared", "stopped"] | None:
        """Where the value model stands; None without one."""
        return self.resolved("value") if self.advantage == "gae" else None

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL divergence is a term of the loss and not of the rewards."""
        return (self.kl_placement or ("loss" if self.advantage == "grpo" else "reward")) == "loss"

    @property
    def kl_choice(self) -> Literal["k1", "k2", "k3", "k3_corrected"]:
        """Which estimate of the KL divergence is priced."""
        return self.kl_estimator or ("k3" if self.kl_in_loss else "k1")

    @property
    def passes(self) -> int:
        """Passes over each rollout."""
        return self.epochs or (1 if self.advantage == "grpo" else 4)

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened."""
        return self.advantage == "gae" if self.whiten_advantages is None else self.whiten_advantages

    @property
    def updates(self) -> int:
        """Optimizer updates a step."""
        return self.passes * self.minibatches


@dataclass(frozen=True)
class PPOConfig(PPOLossConfig):
    """All that `align.ppo.init_state` and `align.ppo.train_step` need to know."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    temperature: float = 1.0
    """Temperature that the rollout was sampled at; log-probabilities are taken at it everywhere."""
    vocabulary: int | None = None
    """Ids from here on are never sampled and have no part in log-probabilities or entropy: rows of a padded embedding
    that stand for no text. Not given: the policy has every row."""
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


@dataclass(frozen=True, kw_only=True)
class PPORun(JudgedRun):
    """Let a model learn from rewards of what it writes: `dpo-jax ppo`.

    --data holds prompts: rows with `prompt` (a text) or `messages`. One step is one iteration: sample responses to a
    batch of prompts, score them, and make --ppo.epochs x --ppo.minibatches updates. --train.batch_size counts the
    responses of an iteration.
    """

    value_model: str | None = None
    """Reward model that the value model starts from. Not given: the policy with a fresh head."""
    rollout_batch_size: int | None = None
    """Responses sampled and measured at once, to save memory; changes no text. Not given: all."""
    ppo: PPOLossConfig = field(default_factory=PPOLossConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        size, group, m = self.train.batch_size, self.ppo.group, self.ppo.minibatches
        require(self.sample.temperature > 0, "--sample.temperature must be positive: PPO learns from samples")
        require(
            self.sample.beams is None and not self.sample.stop_strings,
            "--sample.beams and --sample.stop_strings have no effect: PPO learns from plain samples",
        )
        free = SampleConfig()
        narrowing = [name for name in _NARROWING if getattr(self.sample, name) != getattr(free, name)]
        require(
            not narrowing,
            f"--sample.{narrowing[0] if narrowing else ''} does not go with PPO: it changes what is drawn, and the"
            " update compares log-probabilities of the model as it is; leave it out (rejection takes it)",
        )
        room = self.data.max_length - self.sample.max_new_tokens
        require(
            room > 0,
            f"--sample.max_new_tokens {self.sample.max_new_tokens} leaves no room for a prompt in --data.max_length"
            f" {self.data.max_length}",
        )
        require(
            size % group == 0,
            f"--train.batch_size {size} responses are not made of groups of {group} (--ppo.group_size)",
        )
        require(size % m == 0, f"--train.batch_size {size} does not split into --ppo.minibatches {m}")
        pieces = self.rollout_batch_size
        require(
            pieces is None or (pieces >= 1 and size % pieces == 0 and pieces % group == 0),
            f"--rollout_batch_size {pieces} is no multiple of {group} (--ppo.group_size) that divides"
            f" --train.batch_size {size}",
        )
        if self.value_model is not None:
            apart = self.ppo.critic == "separate"
            require(apart, "--value_model has no effect without --ppo.advantage gae and --ppo.value separate")
            require(
                not self.lora.rank,
                "--value_model does not go with --lora.rank: there the values' adapters stand on the policy's weights",
            )

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt before it is cut."""
        room = self.data.max_length - self.sample.max_new_tokens
        return min(self.data.prompt_room(self.sample.max_new_tokens), room)

    def check_sizes(self, devices: int) -> None:
        """Refuse sizes that do not divide over mini-batches, micro-batches and devices. Raises `InputError`."""
        parts, pieces = self.ppo.minibatches * self.train.accumulate * devices, self.rollout_batch_size
        require(
            self.train.batch_size % parts == 0,
            f"--train.batch_size {self.train.batch_size} does not divide by {parts} (--ppo.minibatches x"
            f" --train.accumulate x devices that split the batch); choose a multiple of {parts}",
        )
        require(
            pieces is None or pieces % devices == 0,
            f"--rollout_batch_size {pieces} does not divide over {devices} devices that split the batch",
        )

    def step_config(self) -> PPOConfig:
        """What the step needs to know of these options."""
        return PPOConfig(
            **vars(self.ppo),
            temperature=self.sample.temperature,
            optimizer=self.optimizer,
            accumulate=self.train.accumulate,
            seed=self.train.seed,
        )
