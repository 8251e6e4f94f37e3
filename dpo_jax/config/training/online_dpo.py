"""Options of `dpo-jax dpo --online`."""

from dataclasses import dataclass
from typing import Literal, get_args

from dpo_jax.config.options import Options, Positive, Several, Share, not_given, part, require
from dpo_jax.config.training.dpo import DPOConfig, DPOLossConfig, Loss
from dpo_jax.config.training.run import JudgedRun, SampledRun

_STORED = ("kto", "apo_zero_unpaired", "bco_pair", "aot", "aot_unpaired", "odpo", "sft")
ONLINE_LOSSES = tuple(loss for loss in get_args(Loss) if loss not in _STORED)
"""Losses that need nothing but a pair and its log-probabilities."""
_OFFLINE = (
    "ties",
    "reference",
    "mask_format_tokens",
    "ld_alpha",
    "reference_sync_steps",
    "reference_mixup_alpha",
)
"""Options of a loss of pairs that stand in a file."""


@dataclass(frozen=True)
class OnlineConfig(Options, prefix="--online."):
    """Where the pairs come from. The formulas stand in `dpo_jax/align/online.py`."""

    samples: Several = 2
    """Responses to each prompt; the best and the worst of them are the pair."""
    opponent: Literal["policy", "reference", "mixture"] = "policy"
    """Who writes one of the two responses beside the policy: the policy itself (online DPO), the reference policy
    (XPO), or the two mixed token by token (Nash-MD)."""
    mixture: Share | None = not_given(0.125, opponent=("mixture",))
    """Weight of the reference in the mixture's logits: near 0 the policy, near 1 the reference."""
    exploration: Positive | None = not_given(opponent=("reference",))
    """XPO's alpha: adds this times the log-probability of the reference's response to the loss, whether that response
    won or lost (TRL's XPOConfig: 1e-5). Not given: no such term."""
    missing_eos_penalty: Positive | None = None
    """Taken off the score of a response that was cut before its terminator, before the best is chosen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.opponent == "policy" or self.samples == 2,
            f"--online.samples {self.samples}: with --online.opponent {self.opponent} a pair is one response of each;"
            " leave it at 2",
        )


@dataclass(frozen=True, kw_only=True)
class OnlineDPORun(SampledRun, JudgedRun):
    """Align a model with preferences about what it writes itself: `dpo-jax dpo --online`.

    --data holds prompts: rows with `prompt` (a text) or `messages`. One step is one iteration: sample responses to a
    batch of prompts, score them, and make one update on the pairs. --train.batch_size counts the prompts of an
    iteration.
    """

    online: OnlineConfig = part(OnlineConfig)
    dpo: DPOLossConfig = part(DPOLossConfig, without=_OFFLINE)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.dpo.loss in ONLINE_LOSSES,
            f"--dpo.loss {self.dpo.loss} does not go with --online, which takes losses of a pair:"
            f" {', '.join(ONLINE_LOSSES)}",
        )
        self.check_sampling("online DPO", self.responses, self.online.samples, "--online.samples")

    @property
    def responses(self) -> int:
        """Responses of an iteration."""
        return self.train.batch_size * self.online.samples

    def check_sizes(self, devices: int) -> None:
        """Refuse sizes that do not divide over devices. Raises `InputError`."""
        self.check_pieces(devices)
        pieces, each = self.rollout_batch_size or self.responses, self.online.samples
        require(
            pieces // each % devices == 0,
            f"--rollout_batch_size {pieces} is {pieces // each} prompts (--online.samples {each}), which do not divide"
            f" over {devices} devices",
        )

    def step_config(self) -> DPOConfig:
        """What the step needs to know of these options."""
        return self.step(DPOConfig, self.dpo, layout=self.train.settled.layout)
