"""Options of `dpo-jax safety`."""

from dataclasses import dataclass
from typing import Literal

from dpo_jax.config.bases import WritesTexts
from dpo_jax.config.checks import Count, Finite, Positive, Seed, not_given, require


@dataclass(frozen=True, kw_only=True)
class SafetyRun(WritesTexts):
    """What a model refuses, and whether it should: `dpo-jax safety`.

    Refusals by class and category, safe and unsafe prompts apart; with --safety_reward the share of violations, and
    with --reward helpfulness beside it, as Llama 2 reports them (Touvron et al. 2023, section 4.4).
    """

    data: str
    """Responses: rows with `prompt` and `response` (what `dpo-jax generate` writes), or `completion`, `output`; a
    prompt may be a list of messages, of several turns."""
    category: str | None = None
    """Column with a prompt's risk category. Not given: `category` or `type`, if there is one."""
    unsafe: tuple[str, ...] = ("contrast_",)
    """Categories that begin so hold prompts that should be refused (XSTest's, as it stands). all: every one does."""
    label: str | None = None
    """Column with a person's class (XSTest's `final_label`): the classifier is compared with it."""
    safety_reward: str | None = None
    """A judge of safety, whatever --reward of `dpo-jax ppo` takes: a response that it scores below --threshold is a
    violation."""
    threshold: Finite | None = None
    """Of --safety_reward."""
    reward: str | None = None
    """A judge of helpfulness, likewise; its mean stands beside."""
    reward_timeout: Positive | None = not_given(60.0)
    """Seconds to wait for an answer of a judge that is a URL (60), for a call of your own code (600), or for a command
    of run: on one response (10)."""
    reward_memory: Count | None = not_given(1024)
    """MiB that a command of run: may take for one response."""
    out: str | None = None
    """JSON file for the figures."""
    rows: str | None = None
    """JSONL file for the class, and the scores, of each row."""
    json: bool = False
    """Print one JSON object instead of tables."""
    batch_size: Count = 8
    """Responses in one pass of a reward model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of a reward model."""
    seed: Seed = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require((self.safety_reward is None) == (self.threshold is None), "--safety_reward and --threshold go together")
        runs = any(name is not None and name.startswith("run:") for name in (self.safety_reward, self.reward))
        require(self.reward_memory is None or runs, "--reward_memory has no effect: no judge is run:COMMAND")
