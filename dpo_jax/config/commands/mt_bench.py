"""Options of `dpo-jax mt-bench`: FastChat's files."""

from dataclasses import dataclass
from typing import Literal

from dpo_jax.config.bases import WritesTexts
from dpo_jax.config.commands.judge import AsksOne, EndpointConfig
from dpo_jax.config.options import Count, Options, Seed, not_given, part, require, require_day
from dpo_jax.config.sections import SampleConfig

_FIXED_DRAW = ("temperature", "top_k", "top_p", "min_p", "beams", "length_penalty")


@dataclass(frozen=True, kw_only=True)
class MTBenchAnswerRun(WritesTexts):
    """A model's answers to the questions of FastChat's question.jsonl: `dpo-jax mt-bench answer`.

    Temperatures are the categories' as in FastChat, a question's `required_temperature` first; all else is the model's
    own distribution. The second turn is asked behind the answer to the first.
    """

    model: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint or run folder of ours, or smollm2."""
    questions: str
    """FastChat's question.jsonl: rows with `question_id`, `category`, `turns`."""
    out: str
    """File to write, such as data/mt_bench/model_answer/NAME.jsonl; an interrupted one is gone on with."""
    model_id: str | None = None
    """What the model is called in it. Not given: the name of the file, without .jsonl."""
    template: str | None = None
    """Chat template: llama2, llama3, zephyr or chatml. Not given: the tokenizer's own."""
    date: str | None = None
    """Day (YYYY-MM-DD) that the chat template writes where it writes today's."""
    batch_size: Count = 8
    """Answers written at once, over all devices; one that is done makes room for the next."""
    seed: Seed = 0
    """Seed of the draw. An answer depends on it, on the dialogue so far and the place of its question in the file."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and computation."""
    sample: SampleConfig = part(SampleConfig, without=_FIXED_DRAW, max_new_tokens=1024)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_day(self.date, "--date")
        require(self.model_id is None or self.model_id.strip(), "--model_id is blank; give the model a name")


@dataclass(frozen=True, kw_only=True)
class MTBenchJudgeRun(AsksOne):
    """Judgements of answers in FastChat's files, as `mt-bench show` reads them: `dpo-jax mt-bench judge`.

    The judge is --endpoint.url or --model, at temperature 0.
    """

    questions: str
    """FastChat's question.jsonl: rows with `question_id`, `category`, `turns`."""
    answers: tuple[str, ...]
    """Files of answers, such as data/mt_bench/model_answer/*.jsonl: one or more models, all questions of each."""
    out: str
    """File to write, such as data/mt_bench/model_judgment/NAME_single.jsonl; an interrupted one is gone on with."""
    mode: Literal["single", "pairwise-baseline", "pairwise-all"] = "single"
    """single: a score from 1 to 10 for each answer. The others ask which of two is better, in both orders: each model
    against --baseline, or each against each."""
    baseline: str | None = not_given(mode=("pairwise-baseline",))
    """Model of --answers that the others are compared with."""
    references: str | None = None
    """FastChat's reference_answer file, for questions of math, reasoning and coding. Not given: `reference` of
    --questions."""
    prompts: str | None = None
    """FastChat's judge_prompts.jsonl, read as it is. Not given: ours, whose figures compare with no published ones."""
    language: Literal["en", "zh"] | None = not_given("en")
    """Of our prompts."""
    cache: str | None = None
    """Folder of replies, by a hash of all that decides them. Not given: OUT.replies."""
    endpoint: EndpointConfig = part(EndpointConfig, without=("temperature", "top_p"))
    sample: SampleConfig = part(SampleConfig, without=_FIXED_DRAW, max_new_tokens=1024, temperature=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        one = (self.endpoint.url is None) != (self.model is None)
        require(one, "give one judge: --endpoint.url URL or --model MODEL")
        require(self.mode != "pairwise-baseline" or self.baseline, "--mode pairwise-baseline needs --baseline MODEL")
        require(self.prompts is None or self.language is None, "--language has no effect with --prompts")
        require_day(self.date, "--date")
        require(self.answers, "--answers names at least one file")


@dataclass(frozen=True)
class MTBenchShowRun(Options):
    """Scores and win rates from FastChat's judgement files: `dpo-jax mt-bench show`.

    Single judgements (gpt-4_single.jsonl) give mean scores, pairwise ones (gpt-4_pair.jsonl) wins, losses and ties: a
    win only where both orders of the two answers name the same one.
    """

    judgments: str
    """FastChat's model_judgment file: rows with `model` and `score`, or with `model_1`, `model_2`, `g1_winner`."""
    questions: str | None = None
    """FastChat's question.jsonl, for the categories. Not given: ids 81 to 160 are MT-Bench's own, ten a category."""
    models: tuple[str, ...] = ()
    """Only these models, in this order; of pairs, those of two of them. Not given: all."""
    baseline: str | None = None
    """Of pairs, only those with this model."""
    json: bool = False
    """Print one JSON object instead of tables."""
    out: str | None = None
    """Folder for radar.png (categories), bars.png (models, by turn) and summary.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        twice = [name for name in self.models if self.models.count(name) > 1]
        require(not twice, f"--models names {''.join(twice[:1])} twice; name each model once")
        missing = self.baseline is not None and bool(self.models) and self.baseline not in self.models
        require(not missing, f"--baseline {self.baseline} is none of --models; name it there, too")
