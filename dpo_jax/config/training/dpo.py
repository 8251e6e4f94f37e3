"""Options of `dpo-jax dpo`."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, NamedTuple, cast, get_args

from dpo_jax.config.options import (
    Count,
    NotNegative,
    Options,
    Positive,
    Unit,
    UpToOne,
    Within,
    not_given,
    part,
    require,
)
from dpo_jax.config.sections import Layout, StepConfig
from dpo_jax.config.training.run import HoldoutRun

Ties = Literal["error", "drop"]
Loss = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "ipo_sum",
    "sigmoid_norm",
    "simpo",
    "orpo",
    "kto",
    "dpop",
    "exo_pair",
    "nca_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "apo_zero_unpaired",
    "bco_pair",
    "aot",
    "aot_unpaired",
    "odpo",
    "sft",
]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

BETAS: dict[str, tuple[float, str]] = {
    "exo_pair": (0.1, "Ji et al. 2024, arXiv 2402.00856, appendix B"),
    "nca_pair": (0.01, "Chen et al. 2024, arXiv 2402.05369, appendix C, where it is called alpha"),
    "sppo_hard": (0.001, "Wu et al. 2024, arXiv 2405.00675, eta = 1 / beta = 1000"),
    "apo_zero": (0.1, "D'Oosterlinck et al. 2024, arXiv 2408.06266, section 5.2"),
    "apo_down": (0.1, "D'Oosterlinck et al. 2024, arXiv 2408.06266, section 5.2"),
    "apo_zero_unpaired": (0.1, "D'Oosterlinck et al. 2024, arXiv 2408.06266, section 5.2"),
    "bco_pair": (0.01, "Jung et al. 2024, arXiv 2404.04656, appendix C"),
    "discopop": (0.05, "Lu et al. 2024, arXiv 2406.08414, appendix B.1"),
}
"""Of the losses that take their paper's own beta where none is given: beta and its source. All others take 0.1, and
several at once too, as MPO does."""
MARGIN = ("sigmoid", "robust", "hinge", "exo_pair", "discopop")
"""Losses of nothing but beta times the margin of two rewards."""
_UNPAIRED = ("kto", "apo_zero_unpaired")
_REFERENCE_FREE = ("simpo", "orpo", "sft")
_SORTED = ("aot", "aot_unpaired")
_OF_PAIRS = tuple(name for name in get_args(Loss) if name not in (*_UNPAIRED, *_REFERENCE_FREE))


def names_of(loss: str) -> tuple[Loss, ...]:
    """The losses that `--dpo.loss` adds; one, as a rule."""
    return tuple(cast(Loss, name.strip()) for name in loss.split(","))


@dataclass(frozen=True)
class DPOLossConfig(Options, prefix="--dpo."):
    """Which preference loss, and its coefficients. The formulas stand in `dpo_jax/align/losses.py`."""

    loss: str = "sigmoid"
    """sigmoid (DPO; cDPO with label_smoothing), robust, hinge, ipo, ipo_sum, sigmoid_norm, simpo, orpo, kto, dpop,
    exo_pair, nca_pair, sppo_hard, apo_zero, apo_down, discopop, apo_zero_unpaired, bco_pair, aot, aot_unpaired, odpo,
    sft. Several with commas between them are added (MPO: sigmoid,bco_pair,sft), each logged as loss/NAME."""
    loss_weights: str | None = None
    """Weights of several losses, with commas between them (MPO: 0.8,0.2,1); not given: 1 each."""
    beta: Positive | None = not_given(0.1, by=("loss", {name: beta for name, (beta, _) in BETAS.items()}))
    """Strength of the pull towards the reference policy; not given: its paper's for nca_pair .01, sppo_hard .001,
    bco_pair .01, discopop .05."""
    label_smoothing: Annotated[float, Within(0, 0.5)] | None = not_given(
        0.0, by=("loss", {"exo_pair": 1e-3}), loss=("sigmoid", "robust", "exo_pair", *_SORTED)
    )
    """Probability that a label is flipped. For sigmoid (then it is cDPO), robust, aot, aot_unpaired and exo_pair
    (default .001); of several losses, for each of these."""
    divergence: Divergence | None = not_given("reverse_kl", loss=MARGIN)
    """f-DPO: what keeps the policy near the reference. For sigmoid, robust, hinge, exo_pair, discopop; others beside
    them keep the reverse KL divergence."""
    divergence_alpha: Annotated[float, Within(0, 1, "()", "0 is reverse_kl, 1 forward_kl")] | None = not_given(
        0.5, divergence=("alpha",)
    )
    """Order of the alpha divergence: near 0 the reverse KL divergence, near 1 the forward one."""
    discopop_tau: UpToOne | None = not_given(0.05, loss=("discopop",))
    """DiscoPOP's temperature of the change from its logistic to its exponential part."""
    odpo_scale: Literal["log", "identity"] | None = not_given("log", loss=("odpo",))
    """ODPO's offset grows with the logarithm of the difference of a row's scores, or with the difference itself."""
    odpo_alpha: Positive | None = not_given(1.0, loss=("odpo",))
    """ODPO's weight of the offset."""
    simpo_gamma: float | None = not_given(0.5, loss=("simpo",))
    """SimPO's target margin."""
    orpo_lambda: float | None = not_given(0.1, loss=("orpo",))
    """ORPO's weight of the odds-ratio term."""
    dpop_lambda: float | None = not_given(50.0, loss=("dpop",))
    """DPOP's penalty for a chosen log-probability below the reference's."""
    desirable_weight: float | None = not_given(1.0, loss=_UNPAIRED)
    """KTO's (and apo_zero_unpaired's) weight of chosen responses."""
    undesirable_weight: float | None = not_given(1.0, loss=_UNPAIRED)
    """KTO's (and apo_zero_unpaired's) weight of rejected responses."""
    nll_coefficient: NotNegative = 0.0
    """Adds this times the negative log-likelihood of the chosen response (Iterative RPO: 1, Llama 3: 0.2)."""
    nll_normalization: Literal["sequence", "token"] | None = not_given("sequence")
    """sequence: mean over pairs of NLL / tokens. token: one mean over all chosen tokens of the global batch. Of loss
    sft too."""
    mask_format_tokens: bool = False
    """Leave header and turn-end tokens of both responses out of the preference term (Llama 3)."""
    ld_alpha: Unit | None = not_given(1.0, loss=_OF_PAIRS)
    """LD-DPO: tokens of the longer response beyond the length of the shorter one count this much in the preference
    sums, from 0 (not at all) to 1. Not beside simpo and orpo either,
    which compare means over whole responses."""
    use_weighting: bool = False
    """WPO: each pair weighs as much as the policy itself would be likely to write its two responses; in loss sft too,
    but not in the term of nll_coefficient."""
    ties: Ties = "error"
    """Rows that prefer nothing: error stops the run before it starts, drop leaves them out, counted."""
    reference: Literal["cached", "live"] = "cached"
    """Reference log-probabilities: computed once before training, or in every step."""
    reference_sync_steps: Count | None = None
    """TR-DPO: every so many steps the reference policy, which must be live, moves towards the policy."""
    reference_mixup_alpha: UpToOne | None = not_given(0.6, needs="reference_sync_steps")
    """TR-DPO: how far, from 0 to 1; 1 replaces it."""

    def __post_init__(self) -> None:
        names, known = names_of(self.loss), get_args(Loss)
        object.__setattr__(self, "loss", ",".join(names))  # "sigmoid, sft" is what "sigmoid,sft" is, everywhere
        for name in names:
            require(name in known, f"invalid choice '{name}' for argument '--dpo.loss'; choose from {', '.join(known)}")
        require(len(set(names)) == len(names), f"--dpo.loss {self.loss} names a loss twice; give it one weight")
        require(
            len(names) == 1 or not set(names) & set(_UNPAIRED),
            f"--dpo.loss {self.loss}: {' and '.join(_UNPAIRED)} judge responses apart and stand alone",
        )
        self._check_weights()
        super().__post_init__()
        self._check_reference()
        require(
            "exo_pair" not in names or self.settled.label_smoothing != 0,
            f"--dpo.label_smoothing {self.settled.label_smoothing:g}: exo_pair takes its logarithm; give a small"
            " positive one, such as 0.001" + (", for all losses" if len(names) > 1 else ""),
        )
        require(
            self.nll_normalization is None or self.nll_coefficient or "sft" in names,
            "--dpo.nll_normalization has no effect without --dpo.nll_coefficient",
        )
        require(
            names != ("sft",) or not self.mask_format_tokens,
            "--dpo.mask_format_tokens has no effect with --dpo.loss sft, which has no preference term",
        )

    def _check_weights(self) -> None:
        if self.loss_weights is None:
            return
        given, names = f"--dpo.loss_weights {self.loss_weights}", names_of(self.loss)
        require(len(names) > 1, f"{given} has no effect with one loss, {self.loss}")
        parts = self.loss_weights.split(",")
        require(len(parts) == len(names), f"{given} are {len(parts)} and the losses of {self.loss} are {len(names)}")
        try:
            weights = [float(part) for part in parts]
        except ValueError:
            weights = []
        require(
            weights and all(math.isfinite(weight) and weight > 0 for weight in weights),
            f"{given}: write positive numbers with commas between them, such as 0.8,0.2,1",
        )

    def _check_reference(self) -> None:
        names, moves = names_of(self.loss), self.reference_sync_steps
        require(
            moves is None or not self.objective.reference_free,
            f"--dpo.reference_sync_steps has no effect: --dpo.loss {self.loss} has no reference policy",
        )
        require(
            moves is None or self.reference == "live",
            f"--dpo.reference_sync_steps {moves} moves the reference policy, whose cached log-probabilities would be of"
            " another; add --dpo.reference live",
        )
        whole = [name for name in names if name in ("simpo", "orpo")]
        require(
            self.ld_alpha is None or not whole,
            f"--dpo.ld_alpha does not go with {' and '.join(whole)}, of means over whole responses; leave one out",
        )
        no_pairs = [name for name in names if name in (*_SORTED, *_UNPAIRED)]
        require(
            not self.use_weighting or not no_pairs,
            f"--dpo.use_weighting weighs pairs, and {', '.join(no_pairs)} has none of its own; choose another loss",
        )

    @cached_property
    def objective(self) -> "Objective":
        """These options with nothing left open: what steps and losses read."""
        names, given = names_of(self.loss), self.loss_weights
        weights = [1.0] * len(names) if given is None else map(float, given.split(","))
        said = {name: told for name, told in vars(self.settled).items() if name in Objective._fields}
        return Objective(**said, losses=names, weights=tuple(weights))


@dataclass(frozen=True)
class DPOConfig(DPOLossConfig, StepConfig):
    """All that `align.dpo.init_state` and `align.dpo.train_step` need to know."""

    layout: Layout = "windows"
    """windows: real tokens only, as the batch's windows say; a batch without them is laid out as shared. shared: the
    prompt is computed once for its K responses. separate: K whole sequences."""
    head_budget_bytes: int = 256 * 2**20
    """Memory a device may spend on one chunk of logits; the chunk length follows from it."""


class Objective(NamedTuple):
    """What a step minimises, and how it computes it: the options of `DPOConfig` but its optimizer, under their names.

    In place of one that was not given stands its default. `losses` are added, each with its weight of `weights`.
    """

    loss: str
    losses: tuple[Loss, ...]
    weights: tuple[float, ...]
    beta: float
    label_smoothing: float
    divergence: Divergence
    divergence_alpha: float
    discopop_tau: float
    odpo_scale: Literal["log", "identity"]
    odpo_alpha: float
    simpo_gamma: float
    orpo_lambda: float
    dpop_lambda: float
    desirable_weight: float
    undesirable_weight: float
    nll_coefficient: float
    nll_normalization: Literal["sequence", "token"]
    mask_format_tokens: bool
    ld_alpha: float
    use_weighting: bool
    reference: Literal["cached", "live"]
    reference_sync_steps: int | None
    reference_mixup_alpha: float
    accumulate: int = DPOConfig.accumulate
    layout: Layout = DPOConfig.layout
    head_budget_bytes: int = DPOConfig.head_budget_bytes

    @property
    def unpaired(self) -> bool:
        """Whether a row may have one response only (KTO, unpaired APO)."""
        return self.loss in _UNPAIRED

    @property
    def reference_free(self) -> bool:
        """Whether no loss has a reference policy (SimPO, ORPO, sft)."""
        return set(self.losses) <= set(_REFERENCE_FREE)

    @property
    def live(self) -> bool:
        """Whether the reference policy is computed in the step."""
        return self.reference == "live" and not self.reference_free

    @property
    def moving(self) -> bool:
        """Whether it follows the policy."""
        return self.reference_sync_steps is not None

    @property
    def takes_across(self) -> bool:
        """Whether a loss takes something from all rows of its batch that a forward pass must find first."""
        return bool({"bco_pair", *_SORTED} & set(self.losses))


@dataclass(frozen=True, kw_only=True)
class DPORun(HoldoutRun):
    """Align a model with preferences: `dpo-jax dpo`.

    --data holds preferences. These are all the options that decide the numbers of the run, saved as `config.json`.
    """

    eval_data: str | None = None
    """Held-out preference file."""
    reference: str | None = None
    """Reference policy, if it is not `model` itself."""
    dpo: DPOLossConfig = part(DPOLossConfig)

    def step_config(self) -> DPOConfig:
        """What the step needs to know of these options."""
        return self.step(DPOConfig, self.dpo, layout=self.train.settled.layout)
