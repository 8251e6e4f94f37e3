"""Options of `dpo-jax recipe llama2_chat`."""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from dpo_jax.config.checks import require
from dpo_jax.config.ppo_run import PPORun
from dpo_jax.config.rejection import RejectionRun
from dpo_jax.config.reward import RewardRun
from dpo_jax.config.sft import SFTRun

SET_BY_RECIPE = "(set by the recipe)"
"""Stands in the run of a stage for what the recipe fills in: its model, its data, its folder, its reward."""


@dataclass(frozen=True)
class ChatRecipeConfig:
    """What the recipe does between its stages."""

    rounds: int = 4
    """Rounds of rejection sampling: V1, V2 ... (Llama 2: 4). PPO on top of the last gives one version more."""
    pair_samples: int = 4
    """Responses of the newest model to each prompt, of which the judge's best and worst make a pair."""
    pair_temperature: float = 1.0
    """Temperature of those."""
    pair_batch_size: int = 32
    """Responses written at once, over all devices."""
    heldout: float = 0.1
    """Share of the prompts, by a hash, whose comparisons no reward model learns: they measure its accuracy."""

    def __post_init__(self) -> None:
        require(self.rounds >= 1, f"--recipe.rounds {self.rounds} must be at least 1")
        require(self.pair_samples >= 2, f"--recipe.pair_samples {self.pair_samples} must be at least 2")
        require(self.pair_temperature > 0, "--recipe.pair_temperature must be positive: greedy samples are all equal")
        require(self.pair_batch_size >= 1, "--recipe.pair_batch_size must be at least 1")
        require(0 < self.heldout < 1, f"--recipe.heldout {self.heldout} is a share of the prompts: in (0, 1)")


_SET: dict[str, Any] = {"model": SET_BY_RECIPE, "data": SET_BY_RECIPE, "out": SET_BY_RECIPE}


@dataclass(frozen=True)
class Llama2ChatRun:
    """Llama 2-Chat's training (Touvron et al. 2023, section 3): `dpo-jax recipe llama2_chat`.

    SFT gives V0. In each round the newest model answers the prompts, a judge compares its answers in place of the
    paper's annotators, reward models learn from all comparisons so far, and rejection sampling with them, its pool
    carried along, gives the next version; PPO on top gives the last. sft, helpful, safety, rejection and ppo hold the
    options of the stages, which are runs of those commands.
    """

    model: str
    """The base model: a Hugging Face folder, a hub id, a .gguf file, a checkpoint of ours, or smollm2."""
    sft_data: str
    """Dialogues for SFT, as for `dpo-jax sft`."""
    helpful_data: str
    """Comparisons for the helpfulness reward models, as for `dpo-jax reward`."""
    prompts: str
    """Prompts (rows with `prompt` or `messages`) of rejection sampling, PPO and the comparisons in between; `safety`
    true tags those that the safety judge and reward model are for."""
    judge: str
    """What compares the answers of the newest model, in place of the paper's annotators: as --reward of `dpo-jax ppo`,
    such as vader, FILE.py:FUNCTION, a URL, or a reward model."""
    out: str
    """Folder of all stages; an interrupted recipe goes on with the same command."""
    safety_data: str | None = None
    """Comparisons for the safety reward models. Not given: there are none, and helpfulness alone is the reward."""
    safety_judge: str | None = None
    """What compares the answers to prompts tagged `safety`."""
    seed: int = 0
    """Seed of the answers that are compared, and of which prompts are held out."""
    recipe: ChatRecipeConfig = field(default_factory=ChatRecipeConfig)
    sft: SFTRun = field(default_factory=partial(SFTRun, **_SET))
    """Of the run that gives V0."""
    helpful: RewardRun = field(default_factory=partial(RewardRun, **_SET))
    """Of the helpfulness reward models."""
    safety: RewardRun = field(default_factory=partial(RewardRun, **_SET, mix_data=SET_BY_RECIPE))
    """Of the safety reward models; the share --safety.mix of helpfulness data is mixed in."""
    rejection: RejectionRun = field(default_factory=partial(RejectionRun, **_SET, reward=SET_BY_RECIPE))
    """Of the rounds of rejection sampling."""
    ppo: PPORun = field(default_factory=partial(PPORun, **_SET, reward=SET_BY_RECIPE))
    """Of the last version; its template and --ppo.sample.* hold for the answers that are compared, too."""
    ignore_config_keys: tuple[str, ...] = ()
    """Keys of a model's config.json that are not known here and change nothing: they are left out."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "--seed must lie in [0, 2^31)")
        require(
            (self.safety_data is None) == (self.safety_judge is None),
            "give --safety_data and --safety_judge together, or neither",
        )
        # As plain values: on the command line the options are of a class of its own.
        given = asdict(self.safety) != asdict(RewardRun(**_SET, mix_data=SET_BY_RECIPE))
        require(self.safety_data is not None or not given, "--safety.* has no effect without --safety_data")
