"""Options of `dpo-jax average`."""

import math
from dataclasses import dataclass
from typing import Literal

from dpo_jax.config.bases import ReadsModels
from dpo_jax.config.checks import NotNegative, Share, require


@dataclass(frozen=True)
class AverageRun(ReadsModels):
    """The average of models of one shape and tokenizer, weight by weight: `dpo-jax average`.

    Llama 3 averages models of other seeds, data or learning rates at every stage; checkpoints of one run may be
    averaged too.
    """

    models: tuple[str, ...]
    """Two or more: Hugging Face folders, hub ids, .gguf files, checkpoints or run folders of ours."""
    to: str
    """Folder to write: a Hugging Face model, and average.json, which says of what it was made. New or empty."""
    weights: tuple[NotNegative, ...] = ()
    """One for each model; divided by their sum. Not given: all alike."""
    ema: Share | None = None
    """Exponential moving average over the models in their order: the average so far times this, and the next model
    times the rest."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype to write. Not given: that of the first model. The sum is float32 in any case."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.models) > 1, "--models names one model, and that is no average; name two or more")
        twice = [name for name in self.models if self.models.count(name) > 1]
        require(not twice, f"--models names {''.join(twice[:1])} twice; give it a weight (--weights) instead")
        require(not self.weights or self.ema is None, "--weights and --ema exclude each other")
        given, wanted = len(self.weights), len(self.models)
        require(given in (0, wanted), f"--weights has {given} numbers for {wanted} models; give one for each")
        require(not given or sum(self.weights) > 0, "--weights must be 0 or more, and not all 0")

    def shares(self) -> tuple[float, ...]:
        """The weight of each model; their sum is 1."""
        n = len(self.models)
        if self.ema is not None:  # a_0 = m_0, a_t = d a_(t-1) + (1 - d) m_t
            return tuple(self.ema ** (n - 1 - i) * (1 - self.ema if i else 1) for i in range(n))
        given = self.weights or (1.0,) * n
        return tuple(weight / math.fsum(given) for weight in given)
