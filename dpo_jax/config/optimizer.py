"""The optimizer, its schedule and its clipping."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dpo_jax.config.options import Count, Options, Positive, Unit, Within, not_given, require


@dataclass(frozen=True)
class OptimizerConfig(Options, prefix="--optimizer."):
    """Optimizer, schedule and clipping."""

    name: Literal["adamw", "adamw_8bit", "adafactor", "rmsprop"] = "adamw"
    """adamw (Loshchilov & Hutter 2019), adamw_8bit (its moments in blocks of 8-bit numbers, Dettmers et al. 2022, as
    TRL's optim=adamw_bnb_8bit), adafactor (Shazeer & Stern 2018: next to no memory; its steps are absolute, as TRL's
    optim=adafactor takes them) or rmsprop (as PyTorch's, which the DPO paper used)."""
    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: constant, or a linear or cosine fall to `floor` x peak at the last step."""
    warmup_steps: Annotated[int, Within(0)] | None = None
    """Linear warm-up: step t (from 0) uses peak x (t + 1) / (warmup_steps + 1)."""
    warmup_ratio: Annotated[float, Within(0, 1)] | None = None
    """Warm-up as a share of all steps, in place of `warmup_steps`."""
    warmup_min: Count | None = not_given(0, needs="warmup_ratio")
    """Least steps of that share (Llama 2's reward models: 3 %, and at least 5)."""
    floor: Unit | None = not_given(0.0, schedule=("linear", "cosine"))
    """Final learning rate as a share of the peak (0.1 for Llama 2)."""
    b1: float | None = not_given(0.9, name=("adamw", "adamw_8bit"))
    """AdamW's first-moment decay."""
    b2: float | None = not_given(0.999, name=("adamw", "adamw_8bit"))
    """AdamW's second-moment decay (Llama 2: 0.95)."""
    mu_dtype: Literal["float32", "bfloat16"] | None = not_given("float32", name=("adamw",))
    """Dtype in which AdamW's first moment is kept; bfloat16 saves 2 bytes a weight of 8."""
    decay: float | None = not_given(0.99, name=("rmsprop",))
    """RMSprop's second-moment decay."""
    exponent: Positive | None = not_given(0.8, name=("adafactor",))
    """Adafactor's c: at update t (from 1) the second moment decays by 1 - t^-c."""
    update_clip: Positive | None = not_given(1.0, name=("adafactor",))
    """Adafactor's d: the update of a matrix is scaled down to this root mean square."""
    parameter_scale: bool | None = not_given(False, name=("adafactor",))
    """Adafactor's steps are relative to a matrix's own root mean square (as T5's were); 1e-2 is then a usual rate."""
    eps1: Positive | None = not_given(1e-30, name=("adafactor",))
    """Adafactor's epsilon 1, added to squared gradients."""
    eps2: Positive | None = not_given(1e-3, needs="parameter_scale")
    """Adafactor's epsilon 2, the least root mean square that `parameter_scale` multiplies by."""
    eps: float = 1e-8
    """Added to the root of the second moment, but of Adafactor's."""
    weight_decay: float | None = not_given(0.0, name=("adamw", "adamw_8bit", "adafactor"))
    """Decoupled weight decay, on matrices only (not on norms and biases)."""
    clip_norm: float | None = 1.0
    """Clip gradients to this global norm; None does not clip."""
    total_steps: int | None = None
    """Length of the schedule. Not given: the length of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.warmup_steps is None or self.warmup_ratio is None,
            "give --optimizer.warmup_steps or --optimizer.warmup_ratio, not both",
        )
        require(
            self.name != "adafactor" or not self.given("eps"),
            "--optimizer.eps has no effect with --optimizer.name adafactor, which has --optimizer.eps1",
        )
        require(self.clip_norm is None or self.clip_norm > 0, "--optimizer.clip_norm must be positive, or None")
