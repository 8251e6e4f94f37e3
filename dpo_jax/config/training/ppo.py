"""Options of the PPO step and of its critic-free relatives; those of the run around it: `ppo_run.py`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from dpo_jax.config.options import (
    Count,
    NotNegative,
    Options,
    Positive,
    Share,
    Unit,
    UpToOne,
    Within,
    not_given,
    require,
)
from dpo_jax.config.sections import Layout, StepConfig
from dpo_jax.config.training.presets import PRESETS, WORDS

_CRITIC_FREE = ("rloo", "grpo", "none", "leave_one_out", "group_mean", "batch_mean", "greedy")
_WITH_RATIO = ("clipped", "cispo")

_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

SamplerCorrection = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Preset = Literal["ppo", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce++", "remax"]
Advantage = Literal["gae", "rloo", "grpo", "none", "leave_one_out", "group_mean", "batch_mean", "greedy"]
Averaging = Literal["token", "sequence", "group", "sum", "constant"]


@dataclass(frozen=True)
class PPOLossConfig(Options, prefix="--ppo."):
    """The reward of a token, its advantage, and the losses. The formulas stand in `dpo_jax/align/ppo.py`.

    Where an option is not given, --ppo.preset decides, and where that says nothing, the option's own default.
    """

    preset: Preset | None = None
    """A published algorithm, which sets what is not given beside it: ppo, rloo, grpo, dr_grpo, dapo, gspo, cispo,
    reinforce++, remax (table and sources: docs/grpo.md)."""
    advantage: Advantage | None = not_given("gae")
    """gae: with a value model. Without one, the return less: none (nothing), leave_one_out (the mean of the other
    responses to the prompt), group_mean (of all of them), batch_mean, greedy (the score of the greedy response). rloo:
    leave_one_out, and grpo: group_mean with --ppo.scale group and --ppo.kl_placement loss, as before there were
    presets."""
    scale: Literal["none", "group", "batch"] | None = not_given("none", advantage=_CRITIC_FREE)
    """Divide by the standard deviation: of the returns of the prompt's responses, or of the rollout. Not given: none;
    group for grpo."""
    returns: Literal["response", "to_go"] | None = not_given("response", advantage=_CRITIC_FREE)
    """response: the rewards of the whole response, for each of its tokens. to_go: those from the token on, with
    --ppo.gamma."""
    ratio: Literal["token", "sequence", "sequence_token"] | None = not_given("token", surrogate=_WITH_RATIO)
    """New over old policy: of each token; sequence: the geometric mean over the response (GSPO); sequence_token: its
    value, with each token's own gradient (GSPO-token)."""
    surrogate: Literal["clipped", "cispo", "reinforce"] | None = not_given("clipped")
    """clipped: PPO's. cispo: log-probabilities weighted by the clipped ratio, which has no gradient. reinforce:
    log-probabilities, without a ratio."""
    clip: Share | None = not_given(0.2, surrogate=_WITH_RATIO)
    """Clip range of the ratio between new and old policy, on both sides."""
    clip_low: UpToOne | None = not_given(surrogate=_WITH_RATIO)
    """Below 1, the ratio is clipped at 1 less this (1: never). Not given: as --ppo.clip."""
    clip_high: Positive | None = not_given(surrogate=_WITH_RATIO)
    """Above 1, the ratio is clipped at 1 plus this. Not given: as --ppo.clip."""
    dual_clip: Annotated[float, Within(1, ends="()")] | None = not_given(surrogate=("clipped",))
    """Bound of the loss of a bad token, as a multiple of its advantage (Ye et al. 2020: 3). Not given: none."""
    averaging: Averaging | None = not_given("token")
    """token: mean over the mini-batch's tokens. sequence: over responses, of token means (GRPO). group: over prompts,
    of means over all tokens of their responses (DAPO). sum: over responses, of sums. constant: the same, over
    --sample.max_new_tokens (Dr. GRPO)."""
    epochs: Count | None = not_given(4)
    """Passes over each rollout (Llama 2: 1); 1 for grpo."""
    minibatches: Count = 1
    """Optimizer updates a pass: the rollout is split into this many mini-batches."""
    kl_coefficient: NotNegative | None = not_given(0.05)
    """Price of a nat of KL(policy, reference) (Llama 2: 0.01 at 7B and 13B, 0.005 above)."""
    kl_placement: Literal["reward", "loss"] | None = not_given("reward")
    """reward: taken off the rewards. loss: a term of the loss. Not given: loss for grpo, else reward."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_corrected"] | None = not_given()
    """Which estimate of the KL divergence is priced. In the reward k1 alone, which optimises KL(policy, reference) of
    the whole response. In the loss: k3 (GRPO's), which optimises KL(reference, policy) of each token; k2, or
    k3_corrected (k3 times the importance ratio, as DeepSeek-V3.2), which optimise KL(policy, reference) of each token.
    Not given: k1 in the reward, k3 in the loss."""
    kl_target: Positive | None = None
    """Adapt the coefficient so that the KL of a response stays near this many nats (Ziegler et al. 2019)."""
    kl_horizon: Count | None = not_given(10_000, needs="kl_target")
    """Responses over which the coefficient adapts."""
    sampler_correction: SamplerCorrection | None = not_given("none")
    """Where the sampler's probabilities are not the trainer's, as with --sample.weights int8: a token's loss times the
    ratio of the two, of the token or of the whole response, truncated at --ppo.sampler_cap (TIS) or 0 above it (MIS).
    TRL: vllm_importance_sampling_mode."""
    sampler_cap: Positive | None = not_given(3.0, sampler_correction=_CORRECTIONS)
    """The largest such ratio (TRL: vllm_importance_sampling_clip_max)."""
    stop_kl: Positive | None = None
    """Leave out the rest of a rollout's updates once a mini-batch is farther than this from the old policy (nats a
    token)."""
    gamma: Unit | None = not_given(1.0)
    """Discount of GAE, and of the return to go."""
    lam: Unit | None = not_given(0.95, advantage=("gae",))
    """Lambda of GAE."""
    value: Literal["separate", "shared", "stopped"] | None = not_given("separate", advantage=("gae",))
    """Value model: a trunk of its own, the policy's trunk, or the policy's trunk without a gradient into it."""
    value_clip: Positive | None = not_given(0.2, advantage=("gae",))
    """Clip range of the value around its old value."""
    value_coefficient: NotNegative | None = not_given(0.1, advantage=("gae",))
    """Weight of the value loss."""
    entropy_coefficient: NotNegative = 0.0
    """Weight of an entropy bonus."""
    whiten_advantages: bool | None = None
    """Scale advantages to mean 0 and variance 1 over the tokens of the rollout. Not given: for gae."""
    whiten_rewards: bool | None = not_given(False, advantage=("gae",))
    """Scale token rewards to variance 1 over the rollout (the mean stays)."""
    score_clip: Positive | None = None
    """Clip scores to plus or minus this."""
    normalize_scores: bool = False
    """Scale scores to mean 0 and variance 1 over the rollout, before clipping."""
    missing_eos_penalty: Positive | None = None
    """Taken off the score of a response that was cut before its terminator."""
    group_size: Count | None = not_given()
    """Responses to each prompt. Not given: 4 for leave_one_out, 8 for group_mean, else 1."""
    zero_variance: Literal["keep", "leave_out", "resample"] | None = not_given("keep")
    """Groups whose scores are all equal: keep; leave_out of the loss and its average; resample: answer their prompts
    again first (DAPO's dynamic sampling)."""
    resample_rounds: Count | None = not_given(2, zero_variance=("resample",))
    """How often groups without variance are sampled again; those left then are left out."""
    overlong: Literal["score", "mask", "ramp"] | None = not_given("score")
    """Responses that were cut: score, as the others. mask: learn nothing from them. ramp: take up to 1 off the score of
    a response as its length goes through the last --ppo.overlong_buffer tokens (DAPO, Eq. 13)."""
    overlong_buffer: Count | None = not_given(overlong=("ramp",))
    """Tokens of that ramp. Not given: a fifth of --sample.max_new_tokens."""

    def __post_init__(self) -> None:
        self._check_preset()
        super().__post_init__()
        require(
            self.gamma is None or self.estimator == "gae" or self.settled.returns == "to_go",
            f"--ppo.gamma has no effect with --ppo.advantage {self.settled.advantage} and --ppo.returns response",
        )
        require(
            self.clip is None or self.clip_low is None or self.clip_high is None,
            "--ppo.clip has no effect with --ppo.clip_low and --ppo.clip_high",
        )
        require(
            not self.kl_in_loss or self.kl_choice != "k1",
            "--ppo.kl_estimator k1 as a term of the loss has gradient 0 in expectation, so that no --ppo.kl_coefficient"
            " or --ppo.kl_target can hold the policy; take k3, k2 or k3_corrected, or --ppo.kl_placement reward",
        )
        require(
            self.kl_in_loss or self.kl_choice == "k1",
            f"--ppo.kl_estimator {self.kl_choice} taken off the rewards gives the gradient of no divergence and no"
            " pull back to the reference; take k1 there, or --ppo.kl_placement loss",
        )
        require(
            self.kl_target is None or self.kl_price > 0,
            "--ppo.kl_target scales --ppo.kl_coefficient, which must be positive",
        )
        for name in ("kl_placement", "kl_estimator"):
            require(
                getattr(self, name) is None or self.kl_price > 0,
                f"--ppo.{name} has no effect: --ppo.kl_coefficient is 0",
            )
        require(
            self.stop_kl is None or self.updates > 1,
            "--ppo.stop_kl has no effect with one update a rollout (--ppo.epochs, --ppo.minibatches)",
        )
        self._check_groups()
        for name in ("normalize_scores", "score_clip", "missing_eos_penalty"):
            require(
                self.estimator != "greedy" or not getattr(self, name),
                f"--ppo.{name} does not go with --ppo.advantage greedy, whose baseline is a score as it is",
            )
        require(
            self.estimator != "greedy" or self.settled.overlong != "ramp",
            "--ppo.overlong ramp does not go with --ppo.advantage greedy, whose baseline is a score as it is",
        )

    def _check_preset(self) -> None:
        require(
            self.preset is None or self.preset in PRESETS,
            f"--ppo.preset {self.preset} is unknown; presets are {', '.join(PRESETS)}",
        )
        plain = WORDS.get(self.advantage or "", {}).get("advantage")
        require(
            self.preset is None or plain is None,
            f"--ppo.advantage {self.advantage} beside --ppo.preset {self.preset} says two things; write --ppo.advantage"
            f" {plain}, or leave one out",
        )

    def _check_groups(self) -> None:
        compared = (
            self.estimator in ("leave_one_out", "group_mean")
            or self.settled.scale == "group"
            or self.settled.zero_variance != "keep"
        )
        needed = 2 if compared else 1
        require(
            self.group >= needed,
            f"--ppo.group_size {self.group}: --ppo.advantage {self.settled.advantage} with --ppo.scale"
            f" {self.settled.scale} and --ppo.zero_variance {self.settled.zero_variance} needs at least"
            f" {needed} responses to a prompt",
        )

    @classmethod
    def _settle(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """As given, or of the preset, or of the word for the advantages, or what stands for it."""
        word, preset = given["advantage"], given["preset"]
        whole = WORDS.get(word or "", {}) if preset is None else PRESETS[preset].options
        return super()._settle({name: whole.get(name) if value is None else value for name, value in given.items()})

    @property
    def estimator(self) -> Literal["gae", "none", "leave_one_out", "group_mean", "batch_mean", "greedy"]:
        """How advantages come from returns, under its one name."""
        word = self.settled.advantage
        return WORDS.get(word, {}).get("advantage", word)

    @property
    def group(self) -> int:
        """Responses to each prompt."""
        return self.settled.group_size or {"leave_one_out": 4, "group_mean": 8}.get(self.estimator, 1)

    @property
    def critic(self) -> Literal["separate", "shared", "stopped"] | None:
        """Where the value model stands; None without one."""
        return self.settled.value if self.estimator == "gae" else None

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far below and above 1 the ratio is clipped."""
        both = self.clip
        low = both if self.clip_low is None and both is not None else self.settled.clip_low
        high = both if self.clip_high is None and both is not None else self.settled.clip_high
        usual = self.settled.clip
        return usual if low is None else low, usual if high is None else high

    @property
    def kl_price(self) -> float:
        """The coefficient at the start."""
        return self.settled.kl_coefficient

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL divergence is a term of the loss and not of the rewards."""
        return self.settled.kl_placement == "loss"

    @property
    def kl_choice(self) -> Literal["k1", "k2", "k3", "k3_corrected"]:
        """Which estimate of the KL divergence is priced."""
        usual = "k3" if self.kl_in_loss else "k1"
        # A placement of one's own leaves the preset's estimator, which belongs to the preset's placement.
        own = self.kl_estimator if self.kl_placement is not None else self.settled.kl_estimator
        return own or usual

    @property
    def passes(self) -> int:
        """Passes over each rollout."""
        return self.settled.epochs

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened."""
        return self.estimator == "gae" if self.whiten_advantages is None else self.whiten_advantages

    @property
    def by_token(self) -> bool:
        """Whether it matters at which token of a response a reward stands."""
        return self.estimator == "gae" or self.settled.returns == "to_go"

    @property
    def updates(self) -> int:
        """Optimizer updates a step."""
        return self.passes * self.minibatches

    @property
    def stores_old_logps(self) -> bool:
        """Whether the policy's log-probabilities are measured before the first update.

        Several updates compare with them, and rewards hold them; a single update has its own.
        """
        return self.updates > 1 or (not self.kl_in_loss and self.kl_price > 0)

    def algorithm(self) -> str:
        """What is run, in a word: for a log."""
        return self.preset or self.settled.advantage


@dataclass(frozen=True)
class PPOConfig(PPOLossConfig, StepConfig):
    """All that `align.ppo.init_state` and `align.ppo.train_step` need to know."""

    temperature: float = 1.0
    """Temperature that the rollout was sampled at; log-probabilities are taken at it everywhere."""
    vocabulary: int | None = None
    """Ids from here on are never sampled and have no part in log-probabilities or entropy: rows of a padded embedding
    that stand for no text. Not given: the policy has every row."""
    max_response: int | None = None
    """The most tokens a response may have: what `averaging` constant divides by, and where the ramp of overlong
    responses ends."""
    seed: int = 0
    """Seed of the mini-batches."""
    layout: Layout = "windows"
    """windows: real tokens only, as the rollout's windows say; one without them is laid out as shared. shared: a prompt
    is computed once for the responses to it that stand together. separate: once for each."""
    head_budget_bytes: int = 256 * 2**20
    """Memory a device may spend on one chunk of logits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, "PPO samples: the temperature must be positive")
        if self.settled.averaging == "constant" or self.settled.overlong == "ramp":
            require(self.max_response, "averaging constant and overlong ramp need max_response")

    @property
    def ramp(self) -> int:
        """Tokens of the ramp of overlong responses."""
        most = self.max_response or 0
        return self.settled.overlong_buffer or max(1, most // 5)
