"""Options of the commands that measure: `eval`, `logps`, `score`, `safety`, `win-rate`, `lm-eval`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dpo_jax.config.bases import AsksRewards, RunsModels, WritesTexts
from dpo_jax.config.commands.rows import RowsRun
from dpo_jax.config.options import Count, Finite, Options, Positive, Seed, Within, not_given, part, require
from dpo_jax.config.sections import AttentionKernel, SampleConfig


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
class SafetyRun(WritesTexts, AsksRewards):
    """What a model refuses, and whether it should: `dpo-jax safety`.

    Refusals by class and category, safe and unsafe prompts apart; with --safety_reward the share of violations, and
    with --reward helpfulness beside it, as Llama 2 reports them (Touvron et al. 2023, section 4.4).
    """

    data: str
    """Responses: rows with `prompt` and `response` (what `dpo-jax generate` writes), or `completion`, `output`; a
    prompt may be a list of messages, of several turns."""
    category: str | None = None
    """Column with a prompt's risk category. Not given: `category` or `type`, if there is one."""
    unsafe: tuple[str, ...] = ("contrast_",)
    """Categories that begin so hold prompts that should be refused (XSTest's, as it stands). all: every one does. none:
    none does."""
    label: str | None = None
    """Column with a person's class (XSTest's `final_label`): the classifier is compared with it."""
    safety_reward: str | None = None
    """A judge of safety, whatever --reward of `dpo-jax ppo` takes: a response that it scores below --threshold is a
    violation."""
    threshold: Finite | None = None
    """Of --safety_reward."""
    reward: str | None = None
    """A judge of helpfulness, likewise; its mean stands beside."""
    out: str | None = None
    """JSON file for the figures."""
    rows: str | None = None
    """JSONL file for the class, and the scores, of each row."""
    json: bool = False
    """Print one JSON object instead of tables."""
    batch_size: Count = 8
    """Responses in one pass of a reward model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of a reward model."""
    seed: Seed = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require((self.safety_reward is None) == (self.threshold is None), "--safety_reward and --threshold go together")
        self.check_limits(self.safety_reward, self.reward)


@dataclass(frozen=True)
class WinRateRun(Options):
    """How often one model's answers beat another's, with and without the longer answer's advantage: `dpo-jax win-rate`.

    Of all verdicts, and at equal length by AlpacaEval's minimal formula, each with a 95 % bootstrap interval.
    """

    answers: str
    """Answers of the model: rows with `instruction` and `output` (AlpacaEval's outputs.json), or `prompt` and
    `response`."""
    against: str
    """Answers of the other model to the same instructions."""
    judgments: str
    """Verdicts, laid out as AlpacaEval's annotations.json: `instruction`, `output_1`, `output_2` and `preference`, 1
    for output_1, 2 for output_2, 1.5 (or 0) for neither, between them by degrees, null for none. Several verdicts on
    one pair (both orders) count as their mean. With --judge the file to write."""
    judge: str | None = None
    """Judge the answers first: judge:FILE.yaml, whose file holds options of `dpo-jax judge` (`ask: pair` asks in both
    orders), or whatever --reward of `dpo-jax ppo` takes, whose scores are compared. A judging that was interrupted goes
    on."""
    json: bool = False
    """Print one JSON object instead of a table."""
    out: str | None = None
    """JSON file for the same object."""
    seed: Seed = 0
    """Seed of the bootstrap."""


@dataclass(frozen=True, kw_only=True)
class LmEvalRun(WritesTexts):
    """Tasks of EleutherAI's lm-evaluation-harness on a model of ours: `dpo-jax lm-eval`.

    TruthfulQA, GSM8K and hundreds more, and tasks of your own; needs `pip install 'dpo_jax[lm_eval]'`.
    """

    model: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint or run folder of ours, or smollm2."""
    tasks: tuple[str, ...]
    """Names of tasks or groups, as `lm_eval` takes them; * stands for any letters."""
    include_path: str | None = None
    """Folder of tasks of your own, as YAML. Such a file may name Python code, which is run: only folders you trust."""
    num_fewshot: Annotated[int, Within(0)] | None = None
    """Examples in front of each question. Not given: what the task says."""
    limit: Count | None = None
    """Only the first so many rows of each task: for a try, not for a figure."""
    apply_chat_template: bool = False
    """Put each question by the tokenizer's chat template."""
    system_instruction: str | None = None
    """A system message in front of each question."""
    out: str | None = None
    """JSON file for the harness's results."""
    rows: str | None = None
    """JSONL file for what the model said in each row."""
    batch_size: Count = 8
    """Sequences at once, over all devices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and computation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tasks, "--tasks is empty: give it the name of a task")
