"""Options of the commands that let models write: `generate`, `chat`, `serve`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dpo_jax.config.bases import WritesTexts
from dpo_jax.config.options import Count, Seed, Several, Within, part, require, require_day
from dpo_jax.config.sections import SampleConfig


@dataclass(frozen=True)
class GenerateRun(WritesTexts):
    """Answer prompts: `dpo-jax generate`.

    A response ends at the model's own terminators, at those of the chat template, at --sample.stop_tokens and at
    --sample.stop_strings.
    """

    model: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint or run folder of ours, or smollm2."""
    prompt: str | None = None
    """One prompt; its response is printed as text (with --samples: as JSON lines)."""
    prompts: str | None = None
    """File of prompts (JSONL, JSON, Parquet, CSV): rows with `prompt` (a text) or `messages`."""
    out: str | None = None
    """JSONL file to write, one object a row in input order; an interrupted run goes on with it. Not given: stdout."""
    raw: bool = False
    """Continue the text as it stands, without a chat template."""
    template: str | None = None
    """Chat template: llama2, llama3, zephyr or chatml. Not given: the tokenizer's own."""
    date: str | None = None
    """Day (YYYY-MM-DD) that the chat template writes where it writes today's. Not given: today, also for a run folder
    whose run began on another day (its config.json has that as data.date)."""
    batch_size: Count = 8
    """Responses written at once, over all devices; one that is done makes room for the next."""
    samples: Count = 1
    """Responses to each prompt, which is computed once for as many of them as --batch_size holds."""
    seed: Seed = 0
    """Seed of the draw. A text depends on it, on the prompt, the row and the sample number, and not on other rows."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and computation."""
    sample: SampleConfig = part(SampleConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.prompt is not None or self.prompts is not None, "give --prompt TEXT or --prompts FILE")
        require(self.prompt is None or self.prompts is None, "give --prompt or --prompts, not both")
        require(not (self.raw and self.template), "--template has no effect with --raw")
        require(not (self.raw and self.date), "--date has no effect with --raw")
        require_day(self.date, "--date")
        require(self.samples == 1 or self.sample.beams is None, "--samples has no effect with --sample.beams")
        require(self.seed == 0 or self.sample.beams is None, "--seed has no effect with --sample.beams")
        require(
            self.samples == 1 or self.sample.temperature > 0,
            "--samples has no effect at temperature 0 (greedy): all would be equal",
        )


_NOT_LIVE = (
    *("repetition_penalty", "no_repeat_ngram", "logit_bias", "min_new_tokens"),
    *("beams", "length_penalty"),
)


@dataclass(frozen=True, kw_only=True)
class TalkOptions(WritesTexts):
    """What both need."""

    template: str | None = None
    """Chat template: llama2, llama3, zephyr or chatml. Not given: the tokenizer's own."""
    batch_size: Count = 8
    """Responses written at once, over all devices; one that is done makes room for the next."""
    max_length: Several | None = None
    """Most tokens of a prompt and its response together. Not given: the model's context."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and computation."""


@dataclass(frozen=True, kw_only=True)
class ServeRun(TalkOptions):
    """Models behind an OpenAI-compatible endpoint: `dpo-jax serve`.

    /v1/chat/completions, /v1/completions and /v1/models, streamed or not, with seed, logprobs, stop and n. Every
    request has settings of its own and joins those that are being written; its text depends on none of them.
    """

    model: tuple[str, ...]
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint or run folder of ours, or smollm2; several: --model A
    --model B. Requests call them by the same names."""
    host: str = "127.0.0.1"
    """Address to listen at. One that others can reach needs the environment variable DPO_JAX_SERVE_TOKEN, which their
    requests send as the API key."""
    port: Annotated[int, Within(0, 65536)] = 8000
    """0: any that is free, which is said."""
    queue: Count = 256
    """Requests that may wait for a model; more are answered with 429."""
    max_body: Count = 8 * 2**20
    """Most bytes of a request; longer ones are answered with 413."""
    sample: SampleConfig = part(
        SampleConfig,
        without=(
            *_NOT_LIVE,
            *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop_tokens", "stop_strings"),
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.model, "--model names at least one model")
        double = [name for i, name in enumerate(self.model) if name in self.model[:i]]
        require(not double, f"--model {' '.join(double)} is given twice")


@dataclass(frozen=True, kw_only=True)
class ChatRun(TalkOptions):
    """Talk to a model in the terminal: `dpo-jax chat`.

    /system TEXT, /reset, /undo, /save FILE and /quit; Ctrl-C ends a response, not the chat.
    """

    model: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint or run folder of ours, or smollm2."""
    against: str | None = None
    """Another model, which answers each line too, in a dialogue of its own."""
    system: str | None = None
    """System prompt to begin with."""
    seed: Seed | None = None
    """Seed of the draw, to say the same again. Not given: another each time."""
    batch_size: Count = 1
    """Responses written at once."""
    sample: SampleConfig = part(SampleConfig, without=_NOT_LIVE, max_new_tokens=1024, temperature=0.7, top_p=0.9)
