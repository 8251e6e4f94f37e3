"""Options of `dpo-jax recipe dsft`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dpo_jax.config.commands.judge import AsksOne
from dpo_jax.config.options import Count, Options, RecipeSeed, UpToOne, Within, part, require
from dpo_jax.config.sections import SampleConfig


@dataclass(frozen=True, kw_only=True)
class SelfInstructConfig(Options, prefix="--write."):
    """What the teacher writes."""

    rounds: Annotated[int, Within(0)] = 1
    """How often an instruction is refined: each seed prompt gives this many new ones at most."""
    rouge: UpToOne = 0.7
    """A new instruction is dropped where its ROUGE-L with one that was kept is at least this (self-instruct's rule)."""
    turns: Count = 1
    """Turns of the user in a dialogue: those after the first are written by the teacher, which plays both sides."""
    language: Literal["en", "zh"] = "en"
    """Of our prompts to the teacher."""


@dataclass(frozen=True, kw_only=True)
class DialogueFilterConfig(Options, prefix="--filter."):
    """Which dialogues are kept."""

    truecase: bool = True
    """Begin sentences, and the pronoun I, with a capital."""
    feelings: bool = True
    """Drop dialogues in which the assistant says that it has no emotions or opinions (Zephyr's filter)."""
    phrases: tuple[str, ...] = ()
    """JSON files of further phrases, {language: [regular expression, ...]}, that no answer may hold."""
    refusals: bool = True
    """Drop dialogues with an answer that refuses."""
    least_characters: Count = 1
    """Of an answer."""
    most_characters: Count = 20_000
    """Of an answer."""
    languages: tuple[str, ...] = ()
    """Codes (en, zh) of the languages that are kept. Not given: all."""
    near: Annotated[float, Within(0.5, 1, "[]")] | None = 0.8
    """Drop a dialogue whose estimated similarity (MinHash) to one that was kept is at least this. None: keep all."""
    heldout: tuple[str, ...] = ()
    """Files of prompts or dialogues that are held out: a dialogue with a turn of the user nearly equal to one of theirs
    (--filter.near; without it, equal) is dropped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.least_characters <= self.most_characters,
            "--filter.least_characters must not exceed --filter.most_characters",
        )
        require(self.feelings or not self.phrases, "--filter.phrases has no effect without --filter.feelings")


@dataclass(frozen=True, kw_only=True)
class DSFTRun(AsksOne):
    """Dialogues for distilled SFT (Tunstall et al. 2023, section 3), written by a teacher: `dpo-jax recipe dsft`.

    Seed prompts -> answers -> refined instructions -> their answers -> dialogues -> filters. The teacher is an endpoint
    (--endpoint.url) or a model of this machine (--model).
    """

    prompts: str
    """Seed prompts: rows with `prompt` or another layout of `dpo-jax generate`; each a single user's message."""
    out: str
    """Folder of all stages; data.jsonl in it is what `dpo-jax sft` learns from. The same command goes on."""
    seed: RecipeSeed = 0
    """Of all that the teacher draws."""
    write: SelfInstructConfig = part(SelfInstructConfig)
    filter: DialogueFilterConfig = part(DialogueFilterConfig)
    sample: SampleConfig = part(SampleConfig, without=("beams", "length_penalty"), max_new_tokens=512)
    """How --model draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.model is None or self.endpoint.url is None, "give one teacher: --endpoint.url URL or --model MODEL"
        )
