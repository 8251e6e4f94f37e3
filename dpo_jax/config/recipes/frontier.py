"""Options of `dpo-jax recipe frontier`."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from dpo_jax.config.bases import WritesTexts
from dpo_jax.config.options import Count, Options, Positive, RecipeSeed, Several, part, require
from dpo_jax.config.sections import LoraConfig


@dataclass(frozen=True)
class FrontierConfig(Options, prefix="--recipe."):
    """How much of everything. What is not given follows from `size` (see `FRONTIER_SIZES`)."""

    size: Literal["fast", "full"] = "full"
    """full: at most 25 minutes on two CPU cores, with SmolLM2-135M. fast: at most 5, with fewer points."""
    prompts: Count | None = None
    """Openings whose samples make the preference pairs; PPO writes to them, too."""
    samples: Several | None = None
    """Samples of each, of which the best and the worst make a pair."""
    unseen: Several | None = None
    """Other openings, on which every point is measured."""
    unseen_samples: Count | None = None
    """Texts that a trained model writes to each of them."""
    best_of: Several | None = None
    """Texts that the reference writes to each of them: best-of-n is shown for n = 1, 2, 4 ... up to so many."""
    new_tokens: Count | None = None
    """Tokens of a text."""
    batch_size: Count | None = None
    """Texts written at once."""
    points: Count | None = None
    """Checkpoints of each run that are measured, evenly along training; it divides the numbers of steps."""
    dpo_beta: tuple[Positive, ...] | None = None
    """A DPO run for each beta."""
    dpo_steps: Count | None = None
    """Steps of 8 pairs."""
    sft_steps: Count | None = None
    """Steps of 8 chosen texts."""
    ppo_kl_coefficient: tuple[Positive, ...] | None = None
    """A PPO run for each price of the KL divergence."""
    ppo_steps: Count | None = None
    """Iterations of PPO."""
    ppo_batch_size: Count | None = None
    """Texts in each, a multiple of 2."""
    learning_rate: Positive = 5e-4
    """Peak learning rate of all runs, for LoRA."""
    temperature: Positive = 0.8
    """Of all samples; the KL divergence is measured at it, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dpo_beta", "ppo_kl_coefficient"):
            values = getattr(self, name)
            if values is not None:
                unlike = len(set(values)) == len(values) > 0
                require(unlike, f"--recipe.{name}: give one number or more, all different")


FRONTIER_SIZES = {
    "full": FrontierConfig(
        prompts=96,
        samples=5,
        unseen=40,
        unseen_samples=2,
        best_of=16,
        new_tokens=20,
        batch_size=48,
        points=2,
        dpo_beta=(0.1, 0.3, 1.0),
        dpo_steps=20,
        sft_steps=20,
        ppo_kl_coefficient=(0.05, 0.2),
        ppo_steps=12,
        ppo_batch_size=32,
    ),
    "fast": FrontierConfig(
        prompts=32,
        samples=4,
        unseen=24,
        unseen_samples=1,
        best_of=8,
        new_tokens=12,
        batch_size=32,
        points=2,
        dpo_beta=(0.1,),
        dpo_steps=6,
        sft_steps=6,
        ppo_kl_coefficient=(0.05,),
        ppo_steps=4,
        ppo_batch_size=16,
    ),
}


@dataclass(frozen=True)
class FrontierRun(WritesTexts):
    """Reward against KL divergence for DPO, PPO, best-of-n and SFT on chosen: `dpo-jax recipe frontier`.

    The DPO paper's Figure 2 (left) in small (Rafailov et al. 2023, section 6.1): one model, one set of openings of
    reviews, one judge. Every stage is kept in the folder; an interrupted recipe goes on with the same command.
    """

    out: str
    """Folder for the samples, the runs, the table and the plot."""
    model: str = "smollm2"
    """The reference, from which every method starts: a Hugging Face folder, a hub id, a .gguf file, or smollm2."""
    reward: str = "vader"
    """What judges a text, as for `dpo-jax ppo`: vader (sentiment), length, regex:PATTERN, language:CODE,
    FILE.py:FUNCTION, a URL, or a reward model."""
    seed: RecipeSeed = 0
    """Seed of everything."""
    lora: LoraConfig = part(LoraConfig, rank=16)
    recipe: FrontierConfig = part(FrontierConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lora.rank > 0, "--lora.rank must be positive: the reference is the model without its adapters")
        sizes = self.sizes
        for name in ("dpo_steps", "sft_steps", "ppo_steps"):
            steps = getattr(sizes, name)
            require(
                steps % sizes.points == 0,
                f"--recipe.points {sizes.points} does not divide --recipe.{name} {steps}: points lie evenly",
            )
        require(sizes.ppo_batch_size % 2 == 0, f"--recipe.ppo_batch_size {sizes.ppo_batch_size} must be even")

    @property
    def sizes(self) -> Any:
        """A `FrontierConfig` with everything filled in (which its type would not say)."""
        given = {f.name: getattr(self.recipe, f.name) for f in fields(self.recipe)}
        return replace(FRONTIER_SIZES[self.recipe.size], **{k: v for k, v in given.items() if v is not None})
