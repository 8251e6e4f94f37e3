"""Options of `dpo-jax sft`."""

from dataclasses import dataclass, field
from typing import Literal

from dpo_jax.config.checks import only_with, require
from dpo_jax.config.sections import OptimizerConfig

Proposal = Literal["uniform", "log_uniform"]


@dataclass(frozen=True)
class SFTLossConfig:
    """How the next-token loss is computed. The formulas stand in `dpo_jax/align/sft.py`."""

    loss: Literal["exact", "sampled"] = "exact"
    """exact: softmax over the whole vocabulary. sampled: over the target and --sft.negatives drawn ids, for very large
    vocabularies; evaluation stays exact."""
    negatives: int | None = None
    """Ids drawn in each step for the sampled loss, shared by all its tokens. Not given: 8192."""
    proposal: Proposal | None = None
    """What they are drawn from: uniform, or log_uniform (Zipf's law, for ids in order of falling frequency). Not given:
    uniform."""

    def __post_init__(self) -> None:
        only_with(self, "loss", {"negatives": ("sampled",), "proposal": ("sampled",)}, "sft")
        require(self.negatives is None or self.negatives >= 1, "--sft.negatives must be at least 1")


@dataclass(frozen=True)
class SFTConfig(SFTLossConfig):
    """All that `align.sft.init_state` and `align.sft.train_step` need to know."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    accumulate: int = 1
    """Split the batch into this many micro-batches; the result equals one big batch."""
    packed: bool = True
    """False promises that a window holds one sequence and then padding, which more attention kernels can run."""
    seed: int = 0
    """Seed of the drawn ids of the sampled loss."""
    head_budget_bytes: int = 256 * 2**20
    """Memory a device may spend on one chunk of logits; the chunk length follows from it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.accumulate >= 1, f"--train.accumulate {self.accumulate} must be at least 1")
