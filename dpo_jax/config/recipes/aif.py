"""Options of `dpo-jax recipe aif`, and of the writers in its pool."""

from dataclasses import dataclass
from typing import Literal

from dpo_jax.config.bases import WritesTexts
from dpo_jax.config.commands.judge import EndpointConfig
from dpo_jax.config.options import Count, Options, Positive, RecipeSeed, Several, not_given, part, require, require_day
from dpo_jax.config.sections import SampleConfig

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
"""UltraFeedback's four (Cui et al. 2023)."""


@dataclass(frozen=True, kw_only=True)
class WriterConfig(Options, prefix=""):
    """One writer of a pool: an endpoint, a model of this machine, or responses that were written before."""

    name: str
    """What its responses are said to be of: `model` of a completion."""
    weight: Positive = 1.0
    """How likely it is drawn, beside the others."""
    model: str | None = None
    """A model of this machine: a Hugging Face folder, a hub id, a .gguf file, a run of ours, or smollm2."""
    responses: str | None = None
    """File of prompts with responses to each; of several to one prompt the seed draws one."""
    template: str | None = not_given(needs="model")
    """Chat template of the model."""
    date: str | None = not_given(needs="model")
    """Day that its template writes."""
    batch_size: Count = 8
    """Responses of the model at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model."""
    sample: SampleConfig = part(SampleConfig, max_new_tokens=512)
    """How the model draws."""
    endpoint: EndpointConfig = part(EndpointConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = sum(x is not None for x in (self.model, self.responses, self.endpoint.url))
        require(given == 1, "give one of model, responses and endpoint.url")
        require(self.name.strip(), "name is blank")
        require_day(self.date, "date")


@dataclass(frozen=True, kw_only=True)
class AIFRun(WritesTexts):
    """AI feedback (Tunstall et al. 2023, section 3; Cui et al. 2023): `dpo-jax recipe aif`.

    For each prompt K writers are drawn from a pool, each with a principle's system prompt; a judge rates what they
    write; out come UltraFeedback's schema, and pairs of it.
    """

    prompts: str
    """Prompts: rows with `prompt` or another layout of `dpo-jax generate`."""
    pool: str
    """YAML file: a list of writers, each with `name`, `weight` and one of `model`, `responses`, `endpoint`."""
    judge: str
    """Who rates: judge:FILE.yaml, or anything else that --reward of `dpo-jax ppo` takes. A judge that asks `list` is
    asked for each of --aspects and for a critique."""
    beside: str | None = None
    """A second judge, as --judge; one that asks list is asked once, about all in all. It rates the same responses and
    decides nothing: how far it agrees with the first is shown, and stands in the report."""
    out: str
    """Folder of all stages: data.jsonl in UltraFeedback's schema, pairs.jsonl. The same command goes on."""
    samples: Several = 4
    """Responses to each prompt, by as many different writers."""
    principles: str = "ours"
    """System prompts by principle, of which each completion draws one: ours, none, or a JSON FILE {principle: [text,
    ...]}. They stand in the data, and not in the prompt that is learnt."""
    language: Literal["en", "zh"] | None = not_given("en")
    """Of our principles, and of our prompts to a judge that asks `list`."""
    aspects: tuple[str, ...] | None = not_given(ASPECTS)
    """What a judge that asks `list` rates."""
    critique: bool = True
    """Such a judge also writes a critique of each response, with an overall score from 1 to 10."""
    templates: str | None = None
    """UltraFeedback's templates (JSON), read as they are, for aspects and critique. Not given: ours."""
    rule: Literal["zephyr", "ultrafeedback_binarized", "best_worst", "all"] = "zephyr"
    """Of the pairs, as --rule of `dpo-jax pairs`."""
    ties: Literal["draw", "strict"] = "draw"
    """Of the pairs, as --ties of `dpo-jax pairs`."""
    repair: Literal["ultrafeedback"] | None = None
    """Of the pairs, as --repair of `dpo-jax pairs`."""
    reward_timeout: Positive | None = not_given(60.0)
    """Seconds to wait where --judge is a URL (60), or for one call of your own code (600), or of a command of run: for
    one response (10)."""
    judge_batch_size: Count | None = not_given(8)
    """Responses at once where --judge is a reward model."""
    judge_dtype: Literal["float32", "bfloat16"] | None = not_given("float32")
    """Of a reward model."""
    seed: RecipeSeed = 0
    """Of all draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beside != self.judge, f"--beside {self.beside}: is --judge itself; name another")
        aspects = self.settled.aspects
        require(aspects, "--aspects is empty: what is the judge to rate?")
        unknown = [name for name in aspects if name not in ASPECTS]
        require(not unknown, f"--aspects {' '.join(unknown)}: known are {', '.join(ASPECTS)}")
        require(len(set(aspects)) == len(aspects), "--aspects names one twice")
        overall = self.rule == "ultrafeedback_binarized"
        require(self.repair is None or overall, f"--repair has no effect with --rule {self.rule}: it reads the aspects")
        require(self.templates is None or self.samples == 4, "--templates takes four responses: --samples 4")
