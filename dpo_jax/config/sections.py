"""Sections of options that several commands share; those about devices and processes are in `devices.py`, the
optimizer's in `optimizer.py`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

from dpo_jax.config.optimizer import OptimizerConfig
from dpo_jax.config.options import (
    ON_COMMAND_LINE,
    Count,
    Finite,
    NotNegative,
    Options,
    Positive,
    Several,
    UpToOne,
    Within,
    not_given,
    part,
    require,
    require_day,
)

Remat = Literal["none", "dots", "full", "offload"]
AttentionKernel = Literal["auto", "xla", "cudnn", "splash"]
Narrow = Literal["bfloat16", "int8"]
FrozenDtype = Literal["float32", "bfloat16", "int8", "nf4"]
SampleLayout = Literal["gathered", "tensor", "training"]
GATHERED, TENSOR, TRAINING = get_args(SampleLayout)
Layout = Literal["windows", "shared", "separate"]
Dtype = Literal["float32", "bfloat16"]

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig(Options, prefix="--lora."):
    """Low-rank adapters (Hu et al. 2021): y = x W + (alpha / rank) x A B, with A and B trained and W frozen."""

    rank: int = 0
    """Rank of the adapters; 0 trains the full weights."""
    alpha: Positive | None = not_given(needs="rank")
    """Numerator of the scale alpha / rank. Not given: 2 x rank."""
    targets: tuple[str, ...] = LINEAR_LAYERS
    """Linear layers that get an adapter."""
    dropout: Annotated[float, Within(0, 1, "[)")] | None = not_given(0.0, needs="rank")
    """Share of an adapter's inputs that are left out in training, others in each step (by --train.seed)."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"--lora.rank {self.rank} must be 0 (full fine-tuning) or positive")
        super().__post_init__()
        require(self.rank or self.targets == LINEAR_LAYERS, "--lora.targets has no effect without --lora.rank")
        unknown = sorted(set(self.targets) - set(LINEAR_LAYERS))
        require(not unknown, f"--lora.targets {' '.join(unknown)}: choose from {' '.join(LINEAR_LAYERS)}")
        require(bool(self.targets), f"--lora.targets is empty: choose from {' '.join(LINEAR_LAYERS)}")

    @cached_property
    def scale(self) -> float:
        """alpha / rank."""
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank


NO_LORA = LoraConfig()
"""No adapters."""


@dataclass(frozen=True, kw_only=True)
class StepConfig(Options, prefix="--train."):
    """What every step needs to know beside its loss."""

    optimizer: OptimizerConfig = part(OptimizerConfig)
    accumulate: Count = 1
    """Split the batch (of PPO: each mini-batch) into this many micro-batches; the result equals one big batch."""
    crossing_dtype: Dtype = "float32"
    """Dtype in which gradients cross between the copies of the model."""
    dropout: float = 0.0
    """Share of what adapters read that is left out in the pass that gradients are taken of (`model/dropout.py`)."""
    dropout_seed: int = 0
    """With the step, which."""


@dataclass(frozen=True)
class FilesConfig(Options, prefix="--data."):
    """Files of rows."""

    files: str = ON_COMMAND_LINE
    """What is learnt from, or judged: JSONL, JSON, Parquet, CSV or text files, folders, patterns, hub data sets
    or tfds: folders; several are separated by commas. docs/data.md has a row of each kind."""
    columns: str | None = None
    """Where rows hold what is read, if not under the names in docs/data.md: prompt=input,chosen=good_answer; a place
    inside a column is prompt=question.text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for place in () if self.columns is None else self.columns.split(","):
            name, equals, column = place.partition("=")
            require(
                bool(name and equals and column.strip(".")),
                f"--data.columns {self.columns}: write NAME=COLUMN, with commas between",
            )


@dataclass(frozen=True)
class DataConfig(FilesConfig):
    """From files of rows to token batches."""

    template: str | None = None
    """llama2, llama3, zephyr, chatml, or raw (texts as they stand). Not given: the tokenizer's own template."""
    date: str | None = None
    """Day (YYYY-MM-DD) that a chat template writes where it writes today's, as Llama 3.1's does. Not given: today; for
    a run the day on which it began, which its config.json keeps."""
    empty_system: bool = False
    """Put an empty system message before a conversation without one, as the alignment handbook did until 2025; the
    chat template that is saved with the model does so from then on."""
    max_length: int = 1024
    """Longest prompt + response in tokens; the end of a longer response is cut."""
    max_prompt_length: Count | None = None
    """Longest prompt in tokens; the start of a longer one is cut. Not given: a row that fits max_length stays whole;
    else the prompt keeps half of max_length, or what the row's longest response leaves where that is more."""
    buckets: Count = 4
    """Number of shapes: of windows, or of batches padded to them, where rows of like length share one. Each is compiled
    once."""
    shuffle: bool = True
    """Shuffle rows anew in every epoch (by --train.seed); else they keep the order of the file."""
    limit: Count | None = None
    """Use only the first rows of the file."""
    workers: int = 2
    """Threads that prepare batches ahead of the step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.max_length >= 2, f"--data.max_length {self.max_length} must be at least 2: a prompt and a response"
        )
        longest = self.max_prompt_length
        require(
            longest is None or self.max_length > longest,
            f"--data.max_length {self.max_length} must exceed --data.max_prompt_length {longest}, or no response fits",
        )
        require_day(self.date, "--data.date")
        require(self.date is None or self.template != "raw", "--data.date has no effect with --data.template raw")
        require(
            not self.empty_system or self.template != "raw",
            "--data.empty_system has no effect with --data.template raw",
        )

    def prompt_room(self, response: int) -> int:
        """Tokens that a prompt keeps in front of a response of `response` tokens (the longest, of several).

        Without an explicit limit that is all of it where both fit into `max_length`.
        """
        return prompt_room(response, self.max_length, self.max_prompt_length)


def prompt_room(response: int, max_length: int, max_prompt_length: int | None) -> int:
    """`DataConfig.prompt_room`, of these lengths."""
    return max(max_length // 2, max_length - response) if max_prompt_length is None else max_prompt_length


@dataclass(frozen=True)
class TrainConfig(Options, prefix="--train."):
    """The loop."""

    steps: Count | None = None
    """Number of optimizer steps. Not given: as many as `epochs` holds."""
    epochs: Positive | None = None
    """Passes over the data. Not given (and no `steps`): 1."""
    batch_size: Count = 8
    """Rows (pairs, dialogues, or packed windows) in one optimizer step, over all devices and micro-batches."""
    accumulate: Count = 1
    """Split each batch into this many micro-batches, to save memory; the result is the same."""
    seed: int = 0
    """Seed of the shuffle and of adapter initialisation."""
    dtype: Dtype = "float32"
    """Dtype of the computation. Trained weights are always float32."""
    frozen_dtype: FrozenDtype | None = None
    """Dtype in which weights that are not trained (under LoRA; a live reference) are kept; int8 and nf4 (QLoRA)
    quantise the linear layers, in blocks, and keep the rest in `dtype`. Not given: `dtype`."""
    crossing_dtype: Dtype | None = not_given("float32")
    """Dtype in which gradients cross between the copies of the model (--mesh.data), once a step. bfloat16 halves what
    crosses; it rounds the gradients of each copy, and their sum."""
    export_dtype: Dtype | None = not_given("float32")
    """Dtype of the finished `model/`. bfloat16 rounds away much of what was learnt, under
    LoRA most of it, and then the run says how much. `adapter/` is always float32."""
    remat: Remat = "dots"
    """What the backward pass recomputes: none, dots (all but matrix products and what plain attention gives), full
    (whole layers), offload (whole layers, from inputs that wait in the host's memory)."""
    attention: AttentionKernel = "auto"
    """Attention kernel; auto takes the best that can run on these devices and says which."""
    layout: Layout | None = None
    """windows: real tokens only, each prompt once. shared: each prompt once, padded. separate: once for each response.
    Not given: windows."""
    eval_every: Count | None = None
    """Evaluate on --eval_data every so many steps, and at the end. Not given: at the end only."""
    stop_after: Count | None = None
    """End after so many evaluations in a row in which the metric of --checkpoint.best has not become better than it
    was. model/ then holds the weights of the best evaluation."""
    sample_every: Count | None = None
    """Let the policy answer a few fixed prompts before the first step, every so many steps and at the end, greedily:
    text by step, in training_samples.jsonl and the report."""
    sample_prompts: str | None = not_given(needs="sample_every")
    """File of these prompts, at most 32. Not given: the first four of the held-out data, or of --data."""
    sample_tokens: Count | None = not_given(64, needs="sample_every")
    """Longest of these answers in tokens."""
    peak_flops: Positive | None = None
    """Peak FLOP/s of a device, against which mfu is logged. Not given: a known TPU's or GPU's, dense bfloat16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.steps is None or self.epochs is None, "give --train.steps or --train.epochs, not both")
        require(
            self.stop_after is None or self.eval_every is not None,
            "--train.stop_after counts evaluations: give --train.eval_every, too",
        )
        require(
            self.batch_size % self.accumulate == 0,
            f"--train.batch_size {self.batch_size} does not divide by --train.accumulate {self.accumulate}",
        )

    @classmethod
    def _settle(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of what another option says: weights kept as they are computed with; and the layout."""
        kept = {"frozen_dtype": given["frozen_dtype"] or given["dtype"], "layout": given["layout"] or "windows"}
        return super()._settle(given) | kept


@dataclass(frozen=True)
class EnergyConfig(Options, prefix="--energy."):
    """What the estimate of a run's electricity assumes; see `dpo_jax/train/accounting.py`."""

    device_watts: NotNegative | None = None
    """Power of one device. Not given: the rated power of a known GPU or TPU, and for others no estimate."""
    pue: Annotated[float, Within(1)] | None = not_given(1.1)
    """Watts that the data centre draws for each watt of its devices."""
    carbon_intensity: NotNegative | None = not_given(0.385)
    """Kilograms of CO2 a kWh of electricity."""


@dataclass(frozen=True)
class LogConfig(Options, prefix="--log."):
    """Where else the figures of a run go."""

    wandb: str | None = None
    """Project on Weights & Biases (pip install 'dpo_jax[wandb]'); WANDB_API_KEY and WANDB_MODE=offline are read from
    the environment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.wandb is None or self.wandb.strip(), "--log.wandb names no project")


@dataclass(frozen=True)
class CheckpointConfig(Options, prefix="--checkpoint."):
    """Checkpoints of the whole training state."""

    every: Count = 100
    """Steps between checkpoints; one more is made at the end and at SIGTERM."""
    keep: Count = 2
    """Newest checkpoints to keep."""
    local: str | None = None
    """Folder on each host's own disk, or in its memory (/dev/shm/dpo_jax): checkpoints are kept there too, every
    `local_every` steps. A run goes on from the newest that all hosts still have; a host that is lost takes its own
    along, and then that is the newest in --out."""
    local_every: Count | None = not_given(10, needs="local")
    """Steps between local checkpoints; fewer than `every`."""
    best: str | None = None
    """Beside the newest also keep the best by this metric of the evaluation (the newest of equals), e.g. eval_loss,
    eval_rewards/accuracies or eval_reward: one is saved after each evaluation. Needs --eval_data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        near = self.settled.local_every
        require(
            self.local is None or near < self.every,
            f"--checkpoint.local_every {near} must be less than --checkpoint.every {self.every}: a step is kept in one"
            " of the two places",
        )


@dataclass(frozen=True)
class SampleConfig(Options, prefix=""):
    """How to generate. The filters act in this order: logit_bias, repetition_penalty, no_repeat_ngram, min_new_tokens,
    temperature, top_k, top_p, min_p."""

    max_new_tokens: Count = 128
    """Longest response in tokens, the terminator included."""
    temperature: NotNegative = 1.0
    """0 is greedy."""
    top_k: Count | None = None
    """Keep only the k most likely tokens."""
    top_p: UpToOne | None = None
    """Keep the smallest set of tokens whose probability reaches p (nucleus sampling)."""
    stop_tokens: tuple[int, ...] = ()
    """Ids that end a response (the end is part of it), beside those a command adds by itself."""
    min_p: UpToOne | None = None
    """Keep only tokens at least this many times as likely as the likeliest (0.05, say)."""
    repetition_penalty: Positive | None = None
    """Logits of tokens that stand in the prompt or the response are divided by it, negative ones multiplied (1.1, say;
    Keskar et al. 2019)."""
    no_repeat_ngram: Count | None = None
    """No run of so many tokens occurs twice in prompt and response."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id and what is added to its logit, e.g. 42 -5 7 1.5; -1000 forbids a token."""
    min_new_tokens: int = 0
    """No response ends by a stop token before it has so many tokens in front of it."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response, which is cut in front of them."""
    beams: Several | None = None
    """Beam search with so many beams, instead of sampling."""
    length_penalty: Finite | None = not_given(1.0, needs="beams")
    """A finished beam counts log-probability / length ** penalty: above 0 favours long responses."""
    weights: Narrow | None = None
    """Read the weights rounded to so few bits for every token after the prompt: faster, and not quite the model's
    probabilities. Not given: as they are."""
    layout: SampleLayout | None = None
    """Where the weights lie that tokens are drawn with. gathered: a copy, whole on every device. tensor: a copy of
    which every device has a part of each layer. training: as they lie; under --mesh.fsdp every token gathers every
    layer. Not given: the first of them that fits."""
    cache: Literal["float32", "bfloat16", "int8"] | None = None
    """What keys and values are kept in. Not given: what the model computes in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cuts = self.top_k is None and self.top_p is None and self.min_p is None
        require(
            self.temperature > 0 or cuts,
            "top_k, top_p and min_p have no effect at temperature 0 (greedy)",
        )
        ids = [token for token, _ in self.logit_bias]
        require(len(set(ids)) == len(ids), "logit_bias names a token id twice; give each id once")
        require(
            all(token >= 0 and not math.isnan(bias) and bias < math.inf for token, bias in self.logit_bias),
            "logit_bias takes token ids and numbers, e.g. 42 -5 7 1.5",
        )
        require(
            0 <= self.min_new_tokens < self.max_new_tokens or self.min_new_tokens == 0,
            f"min_new_tokens {self.min_new_tokens} must lie in [0, max_new_tokens {self.max_new_tokens})",
        )
        require(self.weights in (None, *get_args(Narrow)), f"weights {self.weights} must be bfloat16 or int8, or None")
        require(
            self.layout in (None, *get_args(SampleLayout)),
            f"layout {self.layout} must be gathered, tensor or training, or None",
        )
        require(
            self.cache in (None, "float32", *get_args(Narrow)),
            f"cache {self.cache} must be float32, bfloat16 or int8, or None",
        )
        require(all(self.stop_strings), "stop_strings holds an empty text, which would end every response at once")
        if self.beams is None:
            return
        require(
            self.temperature == 1 and cuts,
            "temperature, top_k, top_p and min_p have no effect with beams (beam search draws nothing)",
        )
        require(not self.stop_strings, "stop_strings cannot end a beam search; use stop_tokens, or leave beams out")
