"""Options of `dpo-jax recipe zephyr`."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dpo_jax.config.aif import AIFRun
from dpo_jax.config.checks import Options, require
from dpo_jax.config.dpo import DPORun
from dpo_jax.config.dsft import DSFTRun
from dpo_jax.config.llama2_chat import SET_BY_RECIPE
from dpo_jax.config.sections import SampleConfig
from dpo_jax.config.sft import SFTRun

_SET: dict[str, Any] = {"model": SET_BY_RECIPE, "data": SET_BY_RECIPE, "out": SET_BY_RECIPE}


@dataclass(frozen=True, kw_only=True)
class ZephyrRun(Options):
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
    heldout: float = 0.1
    """Share of the prompts, by a hash, whose pairs are not learnt: the model answers them before and after."""
    batch_size: int = 32
    """Answers to them at once, over all devices."""
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(max_new_tokens=256))
    """How they are answered."""
    seed: int = 0
    """Of those answers, and of which prompts are held out."""
    dsft: DSFTRun = field(default_factory=partial(DSFTRun, prompts=SET_BY_RECIPE, out=SET_BY_RECIPE))
    """Of the teacher and its dialogues."""
    sft: SFTRun = field(default_factory=partial(SFTRun, **_SET))
    """Of distilled SFT."""
    aif: AIFRun = field(
        default_factory=partial(
            AIFRun, prompts=SET_BY_RECIPE, pool=SET_BY_RECIPE, judge=SET_BY_RECIPE, out=SET_BY_RECIPE
        )
    )
    """Of AI feedback."""
    dpo: DPORun = field(default_factory=partial(DPORun, **_SET))
    """Of distilled DPO."""
    ignore_config_keys: tuple[str, ...] = ()
    """Keys of a model's config.json that are not known here and change nothing: they are left out."""

    def __post_init__(self) -> None:
        require(0 < self.heldout < 1, f"--heldout {self.heldout} is a share of the prompts: in (0, 1)")
        require(0 <= self.seed < 2**31, "--seed must lie in [0, 2^31)")
        self.at_least("--", batch_size=1)
