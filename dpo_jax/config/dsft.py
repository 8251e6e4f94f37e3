"""Options of `dpo-jax recipe dsft`."""

from dataclasses import dataclass, field
from typing import Literal

from dpo_jax.config.checks import Options, require, require_day
from dpo_jax.config.judge import EndpointConfig
from dpo_jax.config.sections import MeshConfig, SampleConfig


@dataclass(frozen=True, kw_only=True)
class SelfInstructConfig(Options):
    """What the teacher writes."""

    rounds: int = 1
    """How often an instruction is refined: each seed prompt gives this many new ones at most."""
    rouge: float = 0.7
    """A new instruction is dropped where its ROUGE-L with one that was kept is at least this (self-instruct's rule)."""
    turns: int = 1
    """Turns of the user in a dialogue: those after the first are written by the teacher, which plays both sides."""
    language: Literal["en", "zh"] = "en"
    """Of our prompts to the teacher."""

    def __post_init__(self) -> None:
        require(self.rounds >= 0, f"--write.rounds {self.rounds} must not be negative")
        require(0 < self.rouge <= 1, f"--write.rouge {self.rouge} must lie in (0, 1]")
        self.at_least("--write.", turns=1)


@dataclass(frozen=True, kw_only=True)
class DialogueFilterConfig(Options):
    """Which dialogues are kept."""

    truecase: bool = True
    """Begin sentences, and the pronoun I, with a capital."""
    feelings: bool = True
    """Drop dialogues in which the assistant says that it has no emotions or opinions (Zephyr's filter)."""
    phrases: tuple[str, ...] = ()
    """JSON files of further phrases, {language: [regular expression, ...]}, that no answer may hold."""
    refusals: bool = True
    """Drop dialogues with an answer that refuses."""
    least_characters: int = 1
    """Of an answer."""
    most_characters: int = 20_000
    """Of an answer."""
    languages: tuple[str, ...] = ()
    """Codes (en, zh) of the languages that are kept. Not given: all."""
    near: float | None = 0.8
    """Drop a dialogue whose estimated similarity (MinHash) to one that was kept is at least this. None: keep all."""
    heldout: tuple[str, ...] = ()
    """Files of prompts or dialogues that are held out: a dialogue with a turn of the user nearly equal to one of theirs
    (--filter.near; without it, equal) is dropped."""

    def __post_init__(self) -> None:
        self.at_least("--filter.", least_characters=1, most_characters=1)
        require(
            self.least_characters <= self.most_characters,
            "--filter.least_characters must not exceed --filter.most_characters",
        )
        require(self.near is None or 0.5 <= self.near <= 1, f"--filter.near {self.near} must lie in [0.5, 1]")
        require(self.feelings or not self.phrases, "--filter.phrases has no effect without --filter.feelings")


@dataclass(frozen=True, kw_only=True)
class DSFTRun(Options):
    """Dialogues for distilled SFT (Tunstall et al. 2023, section 3), written by a teacher: `dpo-jax recipe dsft`.

    Seed prompts -> answers -> refined instructions -> their answers -> dialogues -> filters. The teacher is an endpoint
    (--endpoint.url) or a model of this machine (--model).
    """

    prompts: str
    """Seed prompts: rows with `prompt` or another layout of `dpo-jax generate`; each a single user's message."""
    out: str
    """Folder of all stages; data.jsonl in it is what `dpo-jax sft` learns from. The same command goes on."""
    model: str | None = None
    """A teacher of this machine: a Hugging Face folder, a hub id, a .gguf file, a run of ours, or smollm2."""
    template: str | None = None
    """Chat template of --model. Not given: its tokenizer's own."""
    date: str | None = None
    """Day (YYYY-MM-DD) that the chat template of --model writes where it writes today's."""
    batch_size: int = 8
    """Answers of --model at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of --model."""
    seed: int = 0
    """Of all that the teacher draws."""
    write: SelfInstructConfig = field(default_factory=SelfInstructConfig)
    filter: DialogueFilterConfig = field(default_factory=DialogueFilterConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(max_new_tokens=512))
    """How --model draws."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    ignore_config_keys: tuple[str, ...] = ()
    """Keys of a model's config.json that are not known here and change nothing: they are left out."""

    def __post_init__(self) -> None:
        self.mesh.draws_only()
        for name in ("template", "date"):
            require(getattr(self, name) is None or self.model, f"--{name} has no effect without --model")
        require_day(self.date, "--date")
        require(0 <= self.seed < 2**31, "--seed must lie in [0, 2^31)")
        require(self.batch_size >= 1, "--batch_size must be at least 1")
        require(
            self.model is None or self.endpoint.url is None, "give one teacher: --endpoint.url URL or --model MODEL"
        )
