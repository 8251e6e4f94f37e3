"""Options of the commands that do not train: demo, generate, eval, logps, score, inspect, convert."""

from dataclasses import dataclass
from typing import Literal

from dpo_jax.config.bases import ReadsModels, RunsModels, WritesTexts
from dpo_jax.config.checks import Count, Positive, Seed, not_given, part, require, require_day
from dpo_jax.config.names import RunOptions
from dpo_jax.config.sections import AttentionKernel, DataConfig, SampleConfig


@dataclass(frozen=True)
class DemoRun(ReadsModels):
    """The whole thing on a real 135M Llama: `dpo-jax demo`.

    The controlled-sentiment experiment of the DPO paper (Rafailov et al. 2023, section 6.1): the model writes reviews,
    a sentiment lexicon judges them, DPO learns from the pairs, and unseen prompts show what it did.
    """

    out: str = "dpo-jax-demo"
    """Folder for samples, pairs, the run and the report; an interrupted demo goes on with it."""
    fast: bool = False
    """A smaller experiment: under two minutes on two CPU cores instead of about five."""
    seed: Seed = 0
    """Seed of everything."""
    model: str = "smollm2"
    """A Hugging Face folder, a hub id, a .gguf file, or smollm2."""


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


@dataclass(frozen=True, kw_only=True)
class RowsRun(ReadsModels, metaclass=RunOptions):
    """A command on rows that are made into tokens for a model."""

    model: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint of ours, or smollm2."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """refuse: a bad row stops the command. skip: leave them out, counted by reason."""
    data: DataConfig = part(DataConfig, without=("shuffle", "workers"))


@dataclass(frozen=True, kw_only=True)
class ForwardRun(RowsRun, RunsModels):
    """A command that takes rows once through a model."""

    batch_size: Count = 8
    """Rows in one forward pass, over all devices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and computation; the head of a reward model is float32."""
    attention: AttentionKernel = "auto"
    """Attention kernel; auto takes the best that can run on these devices."""


@dataclass(frozen=True, kw_only=True)
class EvalRun(ForwardRun):
    """Judge a model on preference pairs: `dpo-jax eval`."""

    reference: str | None = None
    """Reference policy, for rewards, margins and the distance to it. Not given: log-probabilities are compared."""
    judge: str | None = None
    """A second reward model, where --model is one: how far the two agree."""
    report: str | None = None
    """HTML file for tables and plots, where --model is a reward model."""
    out: str | None = None
    """JSON file for the results, which are shown as tables in any case."""
    beta: Positive | None = not_given(0.1, needs="reference")
    """Scale of the rewards, beta x log-ratio to --reference."""
    samples: Count | None = None
    """Also answer the first so many prompts, and report on the repetition and length of the answers."""
    seed: Seed = 0
    """Seed of the answers."""
    sample: SampleConfig = part(SampleConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.samples is not None or self.seed == 0, "--seed has no effect without --samples")
        require(self.seed == 0 or self.sample.beams is None, "--seed has no effect with --sample.beams")
        require(self.samples is not None or self.sample == SampleConfig(), "--sample.* has no effect without --samples")


@dataclass(frozen=True, kw_only=True)
class LogpsRun(ForwardRun):
    """Log-probabilities of both responses of every row, as JSON lines in input order: `dpo-jax logps`."""

    out: str
    """JSONL file: chosen_logps, rejected_logps (sums), chosen_tokens, rejected_tokens, and the row number."""


@dataclass(frozen=True, kw_only=True)
class ScoreRun(ForwardRun):
    """The reward of every response, as JSON lines in input order: `dpo-jax score`.

    --data holds pairs, lists of replies, or single responses. An interrupted file is gone on with.
    """

    model: str
    """The reward model: a Hugging Face folder (one label), a hub id, or a run folder of ours."""
    out: str
    """JSONL file: the row number, and the rewards of its responses."""
    copy: bool = False
    """Also copy the columns of the row."""


@dataclass(frozen=True, kw_only=True)
class InspectRun(RowsRun):
    """Show the tokens of some rows, coloured by whether the loss counts them: `dpo-jax inspect`."""

    model: str
    """Where the tokenizer is: a Hugging Face folder, a hub id, a .gguf file, or smollm2."""
    kind: Literal["preferences", "dialogues"] = "preferences"
    """How the rows are read: as pairs, or as dialogues, as `dpo-jax sft` reads them."""
    train_on: Literal["answers", "last", "all"] | None = not_given("answers")
    """What the loss counts of a dialogue: every answer, the last answer, all tokens."""
    rows: Count = 3
    """How many rows to show."""
    first: Count = 1
    """Row number (from 1) to begin at."""
    table: bool = False
    """Instead of rows: comparisons, turns, and tokens of an example, a prompt and a response, by the column `source`
    (Llama 2's Table 6)."""
    data: DataConfig = part(DataConfig, without=("shuffle", "workers", "buckets"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table:
            require(self.kind == "preferences", "--table counts comparisons: it has no effect with --kind dialogues")
            require((self.rows, self.first) == (3, 1), "--rows and --first have no effect with --table")
            usual = DataConfig()
            for name in ("template", "date", "max_length", "max_prompt_length"):
                same = getattr(self.data, name) == getattr(usual, name)
                require(same, f"--data.{name} has no effect with --table, which counts whole texts without a template")
        if self.kind == "preferences":
            require(self.train_on is None, "--train_on has no effect without --kind dialogues")
        else:
            unlimited = self.data.max_prompt_length is None
            require(unlimited, "--data.max_prompt_length has no effect with --kind dialogues")


@dataclass(frozen=True)
class ConfigsRun:
    """The recipes that come with the package: `dpo-jax configs`, `dpo-jax configs show|copy NAME`."""

    action: Literal["list", "show", "copy"] = "list"
    """list: all, in a line each. show: one, as a CONFIG.py that derives from no other. copy: the same, into a file."""
    name: str | None = None
    """Which one, for show and copy."""
    to: str | None = None
    """File that copy writes. Not given: NAME.py."""

    def __post_init__(self) -> None:
        listed = self.action == "list"
        require(listed or self.name is not None, f"configs {self.action} needs a name (dpo-jax configs lists them)")
        require(not listed or self.name is None, "--name has no effect with configs list")
        require(self.action == "copy" or self.to is None, f"--to has no effect with configs {self.action}")


@dataclass(frozen=True)
class ReportRun:
    """Runs on one page: curves over each other, options that differ, last figures: `dpo-jax report RUN RUN ...`."""

    runs: tuple[str, ...]
    """Two or more run folders, finished or not."""
    out: str = "compared.html"
    """The page to write."""
    overwrite: bool = False
    """Replace the page if it is there."""

    def __post_init__(self) -> None:
        require(len(self.runs) > 1, "report compares two or more runs; each has a report.html of its own")
        require(len({*self.runs}) == len(self.runs), "--runs names a run twice")


@dataclass(frozen=True)
class CompletionRun:
    """What lets a shell complete commands, options and values: `dpo-jax completion bash|zsh|fish`."""

    shell: Literal["bash", "zsh", "fish"]
    """The shell whose script is printed; it reads it at its start."""


@dataclass(frozen=True)
class ConvertRun(ReadsModels):
    """Rewrite a checkpoint in another format: `dpo-jax convert`."""

    from_: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint or run folder of ours, or smollm2."""
    to: str
    """Folder to write; it must be new or empty. With --format gguf a new file, which ends with .gguf."""
    format: Literal["huggingface", "orbax", "gguf"] = "huggingface"
    """huggingface: config.json, safetensors and tokenizer. orbax: a checkpoint of ours. gguf: one file with tokenizer
    and chat template, for llama.cpp."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] | None = None
    """Dtype to write; q8_0 (8 bits, and a scale for each 32 numbers) with --format gguf. Not given: the source's;
    float32 where adapters are merged, of which less would lose most."""
