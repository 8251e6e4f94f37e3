"""Options of `dpo-jax recipe zephyr`."""

from dataclasses import dataclass

from dpo_jax.config.bases import ReadsModels
from dpo_jax.config.options import SET_BY_RECIPE, Count, RecipeSeed, Share, part, stage
from dpo_jax.config.recipes.aif import AIFRun
from dpo_jax.config.recipes.dsft import DSFTRun
from dpo_jax.config.sections import SampleConfig
from dpo_jax.config.training.dpo import DPORun
from dpo_jax.config.training.sft import SFTRun


@dataclass(frozen=True, kw_only=True)
class ZephyrRun(ReadsModels):
    """Zephyr (Tunstall et al. 2023): distilled SFT, AI feedback, distilled DPO: `dpo-jax recipe zephyr`.

    A teacher writes dialogues, which the model learns from (sft); a pool of writers answers prompts and a judge rates
    (aif); the model learns from the pairs (dpo). dsft, sft, aif and dpo hold the options of the stages.
    """

    model: str
    """The base model: a Hugging Face folder, a hub id, a .gguf file, a checkpoint of ours, or smollm2."""
    seeds: str
    """Seed prompts of the teacher's dialogues, as --prompts of `dpo-jax recipe dsft`."""
    prompts: str
    """Prompts that the pool answers, as --prompts of `dpo-jax recipe aif`."""
    pool: str
    """YAML file of writers, as --pool of `dpo-jax recipe aif`. A writer's `model` may be OUT/sft, the model so far."""
    judge: str
    """Who rates, as --judge of `dpo-jax recipe aif`; it also compares the answers before and after distilled DPO. One
    that asks `list` is asked for pairs there, in both orders."""
    out: str
    """Folder of all stages; an interrupted recipe goes on with the same command."""
    heldout: Share = 0.1
    """Share of the prompts, by a hash, whose pairs are not learnt: the model answers them before and after."""
    batch_size: Count = 32
    """Answers to them at once, over all devices."""
    sample: SampleConfig = part(SampleConfig, without=("beams", "length_penalty"), max_new_tokens=256)
    """How they are answered."""
    seed: RecipeSeed = 0
    """Of those answers, and of which prompts are held out."""
    dsft: DSFTRun = part(
        DSFTRun,
        without=("prompts", "out", "ignore_config_keys"),
        **dict.fromkeys(("prompts", "out"), SET_BY_RECIPE),
    )
    """Of the teacher and its dialogues."""
    sft: SFTRun = stage(SFTRun, "holdout")
    """Of distilled SFT."""
    aif: AIFRun = part(
        AIFRun,
        without=("prompts", "pool", "judge", "out", "ignore_config_keys"),
        **dict.fromkeys(("prompts", "pool", "judge", "out"), SET_BY_RECIPE),
    )
    """Of AI feedback."""
    dpo: DPORun = stage(DPORun, "reference", "holdout")
    """Of distilled DPO."""
