"""Options of `dpo-jax dpo`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dpo_jax.config.checks import Options, not_given, require
from dpo_jax.config.sections import Layout, OptimizerConfig
from dpo_jax.config.training import HoldoutRun

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
]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

BETAS: dict[str, tuple[float, str]] = {
    "exo_pair": (0.1, "Ji et al. 2024, arXiv 2402.00856, appendix B"),
    "nca_pair": (0.01, "Chen et al. 2024, arXiv 2402.05369, appendix C, where it is called alpha"),
    "sppo_hard": (0.001, "Wu et al. 2024, arXiv 2405.00675, eta = 1 / beta = 1000"),
    "apo_zero": (0.1, "D'Oosterlinck et al. 2024, arXiv 2408.06266, section 5.2"),
    "apo_down": (0.1, "D'Oosterlinck et al. 2024, arXiv 2408.06266, section 5.2"),
    "discopop": (0.05, "Lu et al. 2024, arXiv 2406.08414, appendix B.1"),
}
"""Of the losses that take their paper's own beta where none is given: beta and its source. All others take 0.1."""
_MARGIN = ("sigmoid", "robust", "hinge", "exo_pair", "discopop")
"""Losses of nothing but beta times the margin of two rewards."""


@dataclass(frozen=True)
class DPOLossConfig(Options):
    """Which preference loss, and its coefficients. The formulas stand in `dpo_jax/align/losses.py`."""

    loss: Loss = "sigmoid"
    """sigmoid (DPO; cDPO with label_smoothing), robust, hinge, ipo, ipo_sum, sigmoid_norm, simpo, orpo, kto, dpop,
    exo_pair, nca_pair, sppo_hard, apo_zero, apo_down, discopop."""
    beta: float | None = not_given(0.1)
    """Strength of the pull towards the reference policy; not given: its paper's for nca_pair .01, sppo_hard .001,
    discopop .05."""
    label_smoothing: float | None = not_given(0.0, loss=("sigmoid", "robust", "exo_pair"))
    """Probability that a label is flipped. For sigmoid (then it is cDPO), robust and exo_pair (default .001)."""
    divergence: Divergence | None = not_given("reverse_kl", loss=_MARGIN)
    """f-DPO: what keeps the policy near the reference. For sigmoid, robust, hinge, exo_pair, discopop."""
    divergence_alpha: float | None = not_given(0.5, divergence=("alpha",))
    """Order of the alpha divergence: near 0 the reverse KL divergence, near 1 the forward one."""
    discopop_tau: float | None = not_given(0.05, loss=("discopop",))
    """DiscoPOP's temperature of the change from its logistic to its exponential part."""
    simpo_gamma: float | None = not_given(0.5, loss=("simpo",))
    """SimPO's target margin."""
    orpo_lambda: float | None = not_given(0.1, loss=("orpo",))
    """ORPO's weight of the odds-ratio term."""
    dpop_lambda: float | None = not_given(50.0, loss=("dpop",))
    """DPOP's penalty for a chosen log-probability below the reference's."""
    desirable_weight: float | None = not_given(1.0, loss=("kto",))
    """KTO's weight of chosen responses."""
    undesirable_weight: float | None = not_given(1.0, loss=("kto",))
    """KTO's weight of rejected responses."""
    nll_coefficient: float = 0.0
    """Adds this times the negative log-likelihood of the chosen response (Iterative RPO: 1, Llama 3: 0.2)."""
    nll_normalization: Literal["sequence", "token"] | None = not_given("sequence", needs="nll_coefficient")
    """sequence: mean over pairs of NLL / tokens. token: one mean over all chosen tokens of the global batch."""
    mask_format_tokens: bool = False
    """Leave header and turn-end tokens of both responses out of the preference term (Llama 3)."""
    ties: Ties = "error"
    """Rows that prefer nothing: error stops the run before it starts, drop leaves them out, counted."""
    reference: Literal["cached", "live"] = "cached"
    """Reference log-probabilities: computed once before training, or in every step."""

    def __post_init__(self) -> None:
        self.refuse_idle("--dpo.")
        self.positive("--dpo.", "beta")
        require(
            self.label_smoothing is None or 0 <= self.label_smoothing < 0.5,
            f"--dpo.label_smoothing {self.label_smoothing} must lie in [0, 0.5)",
        )
        require(
            self.loss != "exo_pair" or self.label_smoothing != 0,
            "--dpo.label_smoothing 0: exo_pair takes its logarithm; give a small positive one, such as 0.001",
        )
        require(
            self.divergence_alpha is None or 0 < self.divergence_alpha < 1,
            f"--dpo.divergence_alpha {self.divergence_alpha} must lie between 0 (reverse_kl) and 1 (forward_kl)",
        )
        require(
            self.discopop_tau is None or 0 < self.discopop_tau <= 1,
            f"--dpo.discopop_tau {self.discopop_tau} must lie in (0, 1]",
        )
        require(self.nll_coefficient >= 0, f"--dpo.nll_coefficient {self.nll_coefficient} must not be negative")

    def resolved(self, name: str) -> Any:
        """Option `name`, or what the loss takes where it was not given."""
        if getattr(self, name) is None:
            if name == "beta" and self.loss in BETAS:
                return BETAS[self.loss][0]
            if name == "label_smoothing" and self.loss == "exo_pair":
                return 1e-3
        return super().resolved(name)

    @property
    def reference_free(self) -> bool:
        """True where the loss has no reference policy (SimPO, ORPO)."""
        return self.loss in ("simpo", "orpo")


@dataclass(frozen=True)
class DPOConfig(DPOLossConfig):
    """All that `align.dpo.init_state` and `align.dpo.train_step` need to know."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    accumulate: int = 1
    """Split the batch into this many micro-batches; the result equals one big batch."""
    layout: Layout = "shared"
    """shared: the prompt is computed once for its K responses. separate: K whole sequences."""
    head_budget_bytes: int = 256 * 2**20
    """Memory a device may spend on one chunk of logits; the chunk length follows from it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.accumulate >= 1, f"--train.accumulate {self.accumulate} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DPORun(HoldoutRun):
    """Align a model with preferences: `dpo-jax dpo`.

    --data holds preferences. These are all the options that decide the numbers of the run, saved as `config.json`.
    """

    eval_data: str | None = None
    """Held-out preference file."""
    reference: str | None = None
    """Reference policy, if it is not `model` itself."""
    dpo: DPOLossConfig = field(default_factory=DPOLossConfig)

    def step_config(self) -> DPOConfig:
        """What the step needs to know of these options."""
        return DPOConfig(
            **vars(self.dpo),
            optimizer=self.optimizer,
            accumulate=self.train.accumulate,
            layout=self.train.layout,
        )
