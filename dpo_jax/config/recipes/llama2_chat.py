"""Options of `dpo-jax recipe llama2_chat`."""

from dataclasses import dataclass

from dpo_jax.config.bases import ReadsModels
from dpo_jax.config.options import (
    SET_BY_RECIPE,
    Count,
    Options,
    RecipeSeed,
    Several,
    Share,
    Warm,
    part,
    require,
    stage,
)
from dpo_jax.config.training.ppo_run import PPORun
from dpo_jax.config.training.rejection import RejectionRun
from dpo_jax.config.training.reward import RewardRun
from dpo_jax.config.training.sft import SFTRun

JUDGED = ("reward", "safety_reward", "reward_timeout", "reward_memory", "reward_weights")
"""Who judges a stage of a recipe is said of the recipe."""


@dataclass(frozen=True)
class ChatRecipeConfig(Options, prefix="--recipe."):
    """What the recipe does between its stages."""

    rounds: Count = 4
    """Rounds of rejection sampling: V1, V2 ... (Llama 2: 4). PPO on top of the last gives one version more."""
    pair_samples: Several = 4
    """Responses of the newest model to each prompt, of which the judge's best and worst make a pair."""
    pair_temperature: Warm = 1.0
    """Temperature of those."""
    pair_batch_size: Count = 32
    """Responses written at once, over all devices."""
    heldout: Share = 0.1
    """Share of the prompts, by a hash, whose comparisons no reward model learns: they measure its accuracy."""


@dataclass(frozen=True)
class Llama2ChatRun(ReadsModels):
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
    seed: RecipeSeed = 0
    """Seed of the answers that are compared, and of which prompts are held out."""
    recipe: ChatRecipeConfig = part(ChatRecipeConfig)
    sft: SFTRun = stage(SFTRun, "holdout")
    """Of the run that gives V0."""
    helpful: RewardRun = stage(RewardRun, "mix_data", "mix", "holdout")
    """Of the helpfulness reward models."""
    safety: RewardRun = stage(RewardRun, "mix_data", "holdout", mix_data=SET_BY_RECIPE)
    """Of the safety reward models; the share --safety.mix of helpfulness data is mixed in."""
    rejection: RejectionRun = stage(RejectionRun, *JUDGED, "rejection.pool_from", reward=SET_BY_RECIPE)
    """Of the rounds of rejection sampling."""
    ppo: PPORun = stage(
        PPORun,
        *JUDGED,
        *("reward_aggregation", "environment", "environment_turns", "environment_tokens", "environment_errors"),
        *("eval_samples", "eval_pass"),
        reward=SET_BY_RECIPE,
    )
    """Of the last version; its template and --ppo.sample.* hold for the answers that are compared, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.safety_data is None) == (self.safety_judge is None),
            "give --safety_data and --safety_judge together, or neither",
        )
        require(
            self.safety_data is not None or not self.given("safety"), "--safety.* has no effect without --safety_data"
        )
