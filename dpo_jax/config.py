"""Every option and every default, as frozen dataclasses. The field docstrings are the text of `--help`.

An option that would have no effect is an error: options that belong to one choice of another option default to None
("not given"), and `__post_init__` refuses them where they do not apply.
"""

from dataclasses import dataclass, field
from typing import Literal

from dpo_jax.errors import InputError

Loss = Literal["sigmoid", "robust", "hinge", "ipo", "ipo_sum", "sigmoid_norm", "simpo", "orpo", "kto", "dpop"]
Remat = Literal["none", "dots", "full"]
AttentionKernel = Literal["auto", "xla", "cudnn", "splash"]
Layout = Literal["shared", "separate"]

ON_COMMAND_LINE = "(given on the command line)"
"""Stands in a CONFIG.py for a field that the command line must give: the model, the data, the run folder."""

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _only_with(owner: object, choice: str, table: dict[str, tuple[str, ...]], section: str) -> None:
    """Refuse an option that was given though the value of `choice` makes it mean nothing."""
    chosen = getattr(owner, choice)
    for name, allowed in table.items():
        if getattr(owner, name) is not None and chosen not in allowed:
            raise InputError(
                f"--{section}.{name} has no effect with --{section}.{choice} {chosen};"
                f" it belongs to {', '.join(allowed)}"
            )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): y = x W + (alpha / rank) x A B, with A and B trained and W frozen."""

    rank: int = 0
    """Rank of the adapters; 0 trains the full weights."""
    alpha: float | None = None
    """Numerator of the scale alpha / rank. Not given: 2 x rank."""
    targets: tuple[str, ...] = LINEAR_LAYERS
    """Linear layers that get an adapter."""

    def __post_init__(self) -> None:
        _require(self.rank >= 0, f"--lora.rank {self.rank} must be 0 (full fine-tuning) or positive")
        if self.rank == 0:
            _require(self.alpha is None, "--lora.alpha has no effect without --lora.rank")
            _require(self.targets == LINEAR_LAYERS, "--lora.targets has no effect without --lora.rank")
        unknown = sorted(set(self.targets) - set(LINEAR_LAYERS))
        _require(not unknown, f"--lora.targets {' '.join(unknown)}: choose from {' '.join(LINEAR_LAYERS)}")
        _require(bool(self.targets), f"--lora.targets is empty: choose from {' '.join(LINEAR_LAYERS)}")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, schedule and clipping."""

    name: Literal["adamw", "rmsprop"] = "adamw"
    """adamw (Loshchilov & Hutter 2019) or rmsprop (as PyTorch's, which the DPO paper used)."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: constant, or a linear or cosine fall to `floor` x peak at the last step."""
    warmup_steps: int | None = None
    """Linear warm-up: step t (from 0) uses peak x (t + 1) / (warmup_steps + 1)."""
    warmup_ratio: float | None = None
    """Warm-up as a share of all steps, in place of `warmup_steps`."""
    floor: float | None = None
    """Final learning rate as a share of the peak (0.1 for Llama 2). Not given: 0."""
    b1: float | None = None
    """AdamW's first-moment decay. Not given: 0.9."""
    b2: float | None = None
    """AdamW's second-moment decay. Not given: 0.999 (Llama 2: 0.95)."""
    decay: float | None = None
    """RMSprop's second-moment decay. Not given: 0.99."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float | None = None
    """AdamW's decoupled weight decay, on matrices only (not on norms and biases). Not given: 0."""
    clip_norm: float | None = 1.0
    """Clip gradients to this global norm; None does not clip."""
    total_steps: int | None = None
    """Length of the schedule. Not given: the length of the run."""

    def __post_init__(self) -> None:
        _only_with(
            self,
            "name",
            {"b1": ("adamw",), "b2": ("adamw",), "weight_decay": ("adamw",), "decay": ("rmsprop",)},
            "optimizer",
        )
        _only_with(self, "schedule", {"floor": ("linear", "cosine")}, "optimizer")
        _require(self.learning_rate > 0, f"--optimizer.learning_rate {self.learning_rate} must be positive")
        _require(
            self.warmup_steps is None or self.warmup_ratio is None,
            "give --optimizer.warmup_steps or --optimizer.warmup_ratio, not both",
        )
        _require(self.warmup_steps is None or self.warmup_steps >= 0, "--optimizer.warmup_steps must not be negative")
        _require(self.warmup_ratio is None or 0 <= self.warmup_ratio < 1, "--optimizer.warmup_ratio must lie in [0, 1)")
        _require(self.floor is None or 0 <= self.floor <= 1, "--optimizer.floor is a share of the peak: in [0, 1]")
        _require(self.clip_norm is None or self.clip_norm > 0, "--optimizer.clip_norm must be positive, or None")


@dataclass(frozen=True)
class DPOLossConfig:
    """Which preference loss, and its coefficients. The formulas stand in `dpo_jax/align/dpo.py`."""

    loss: Loss = "sigmoid"
    """sigmoid (DPO; cDPO with label_smoothing), robust, hinge, ipo, ipo_sum, sigmoid_norm, simpo, orpo, kto, dpop."""
    beta: float = 0.1
    """Strength of the pull towards the reference policy."""
    label_smoothing: float | None = None
    """Probability that a label is flipped. Not given: 0. For sigmoid (then it is cDPO) and robust."""
    simpo_gamma: float | None = None
    """SimPO's target margin. Not given: 0.5."""
    orpo_lambda: float | None = None
    """ORPO's weight of the odds-ratio term. Not given: 0.1."""
    dpop_lambda: float | None = None
    """DPOP's penalty for a chosen log-probability below the reference's. Not given: 50."""
    desirable_weight: float | None = None
    """KTO's weight of chosen responses. Not given: 1."""
    undesirable_weight: float | None = None
    """KTO's weight of rejected responses. Not given: 1."""
    nll_coefficient: float = 0.0
    """Adds this times the negative log-likelihood of the chosen response (Iterative RPO: 1, Llama 3: 0.2)."""
    nll_normalization: Literal["sequence", "token"] | None = None
    """sequence: mean over pairs of NLL / tokens. token: one mean over all chosen tokens of the global batch. Not given:
    sequence."""
    mask_format_tokens: bool = False
    """Leave header and turn-end tokens of both responses out of the preference term (Llama 3)."""
    reference: Literal["cached", "live"] = "cached"
    """Reference log-probabilities: computed once before training, or in every step."""

    def __post_init__(self) -> None:
        _only_with(
            self,
            "loss",
            {
                "label_smoothing": ("sigmoid", "robust"),
                "simpo_gamma": ("simpo",),
                "orpo_lambda": ("orpo",),
                "dpop_lambda": ("dpop",),
                "desirable_weight": ("kto",),
                "undesirable_weight": ("kto",),
            },
            "dpo",
        )
        _require(self.beta > 0, f"--dpo.beta {self.beta} must be positive")
        _require(
            self.label_smoothing is None or 0 <= self.label_smoothing < 0.5,
            f"--dpo.label_smoothing {self.label_smoothing} must lie in [0, 0.5)",
        )
        _require(
            self.nll_normalization is None or self.nll_coefficient > 0,
            "--dpo.nll_normalization has no effect without --dpo.nll_coefficient",
        )
        _require(self.nll_coefficient >= 0, f"--dpo.nll_coefficient {self.nll_coefficient} must not be negative")

    @property
    def reference_free(self) -> bool:
        """True where the loss has no reference policy (SimPO, ORPO)."""
        return self.loss in ("simpo", "orpo")


@dataclass(frozen=True)
class DPOConfig(DPOLossConfig):
    """All that `align.dpo.init_state` and `align.dpo.train_step` need to know."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    accumulate: int = 1
    """Split the batch into this many micro-batches; the result equals one big batch."""
    layout: Layout = "shared"
    """shared: the prompt is computed once for its K responses. separate: K whole sequences."""
    head_budget_bytes: int = 256 * 2**20
    """Memory a device may spend on one chunk of logits; the chunk length follows from it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.accumulate >= 1, f"--train.accumulate {self.accumulate} must be at least 1")


@dataclass(frozen=True)
class DataConfig:
    """From rows to token batches."""

    template: str | None = None
    """llama2, llama3, zephyr, chatml, or raw (texts as they stand). Not given: the tokenizer's own template."""
    max_length: int = 1024
    """Longest prompt + response in tokens; the end of a longer response is cut."""
    max_prompt_length: int = 0
    """Longest prompt in tokens; the start of a longer prompt is cut. 0: half of max_length."""
    buckets: int = 4
    """Number of batch shapes: rows of like length share a batch, and each shape is compiled once."""
    shuffle: bool = True
    """Shuffle rows anew in every epoch (by --train.seed)."""
    limit: int | None = None
    """Use only the first rows of the file."""
    workers: int = 2
    """Threads that prepare batches ahead of the step."""

    def __post_init__(self) -> None:
        _require(
            self.max_length >= 2, f"--data.max_length {self.max_length} must be at least 2: a prompt and a response"
        )
        _require(self.max_prompt_length >= 0, "--data.max_prompt_length must be positive, or 0 (half of max_length)")
        if self.max_prompt_length == 0:
            object.__setattr__(self, "max_prompt_length", self.max_length // 2)
        _require(
            self.max_length > self.max_prompt_length,
            f"--data.max_length {self.max_length} must exceed --data.max_prompt_length {self.max_prompt_length},"
            " or no response fits",
        )
        _require(self.buckets >= 1, "--data.buckets must be at least 1")
        _require(self.limit is None or self.limit >= 1, "--data.limit must be at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int | None = None
    """Number of optimizer steps. Not given: as many as `epochs` holds."""
    epochs: float | None = None
    """Passes over the data. Not given (and no `steps`): 1."""
    batch_size: int = 8
    """Pairs in one optimizer step, over all devices and micro-batches."""
    accumulate: int = 1
    """Split each batch into this many micro-batches, to save memory; the result is the same."""
    seed: int = 0
    """Seed of the shuffle and of adapter initialisation."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation. Trained weights and optimizer state are always float32."""
    frozen_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype in which weights that are not trained (under LoRA; a live reference) are kept. Not given: `dtype`."""
    remat: Remat = "dots"
    """What the backward pass recomputes: none, dots (all but matrix products), full (whole layers)."""
    attention: AttentionKernel = "auto"
    """Attention kernel; auto takes the best that can run on these devices and says which."""
    layout: Layout = "shared"
    """shared: the prompt is computed once for all its responses. separate: once for each."""
    eval_every: int | None = None
    """Evaluate on --eval_data every so many steps, and at the end. Not given: at the end only."""

    def __post_init__(self) -> None:
        _require(self.steps is None or self.epochs is None, "give --train.steps or --train.epochs, not both")
        _require(self.steps is None or self.steps >= 1, "--train.steps must be at least 1")
        _require(self.epochs is None or self.epochs > 0, "--train.epochs must be positive")
        _require(self.batch_size >= 1, "--train.batch_size must be at least 1")
        _require(self.accumulate >= 1, "--train.accumulate must be at least 1")
        _require(
            self.batch_size % self.accumulate == 0,
            f"--train.batch_size {self.batch_size} does not divide by --train.accumulate {self.accumulate}",
        )
        _require(self.eval_every is None or self.eval_every >= 1, "--train.eval_every must be at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of the whole training state."""

    every: int = 100
    """Steps between checkpoints; one more is made at the end and at SIGTERM."""
    keep: int = 2
    """Newest checkpoints to keep."""
    best: str | None = None
    """Also keep the best by this metric, e.g. eval_rewards/accuracies or eval_loss (needs --eval_data)."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "--checkpoint.every must be at least 1")
        _require(self.keep >= 1, "--checkpoint.keep must be at least 1")


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; see `dpo_jax/mesh.py`."""

    data: int = 1
    """Whole copies of the model, each with its share of the batch."""
    fsdp: int = -1
    """Devices that share the parameters and split the batch; -1 takes all that are left."""
    tensor: int = 1
    """Devices that share each layer's heads and width."""


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes. Cloud TPU slices and SLURM jobs are detected with `auto`; elsewhere name the coordinator."""

    auto: bool = False
    """Call jax.distributed.initialize() and let it find the cluster (Cloud TPU pods, SLURM, Open MPI)."""
    coordinator: str | None = None
    """host:port of process 0."""
    processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """This process's number, from 0."""

    def __post_init__(self) -> None:
        given = [self.coordinator is not None, self.processes is not None, self.process_id is not None]
        _require(
            all(given) or not any(given),
            "give --distributed.coordinator, --distributed.processes and --distributed.process_id together",
        )
        _require(
            not (self.auto and any(given)),
            "--distributed.auto finds the cluster itself: leave the other --distributed options out",
        )


@dataclass(frozen=True)
class SampleConfig:
    """How to generate."""

    max_new_tokens: int = 128
    """Longest response in tokens, the terminator included."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int | None = None
    """Keep only the k most likely tokens."""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probability reaches p (nucleus sampling)."""
    stop_tokens: tuple[int, ...] = ()
    """Ids that end a response (the end is part of it), beside those a command adds by itself."""

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens must be at least 1")
        _require(self.temperature >= 0, "temperature must not be negative")
        _require(self.top_k is None or self.top_k >= 1, "top_k must be at least 1, or None")
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p must lie in (0, 1], or be None")
        _require(
            self.temperature > 0 or (self.top_k is None and self.top_p is None),
            "top_k and top_p have no effect at temperature 0 (greedy)",
        )


@dataclass(frozen=True)
class DPORun:
    """One `dpo-jax dpo` run: everything that decides its numbers, saved as `config.json` in the run folder."""

    model: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint of ours, or smollm2."""
    source: str
    """(--data) Preference file (JSONL, JSON or Parquet, plain or .gz), hub data set id, or tfds: folder."""
    out: str
    """Run folder: config.json, metrics.jsonl, TensorBoard events, checkpoints/, the final model and the report."""
    eval_source: str | None = None
    """(--eval_data) Held-out preference file."""
    reference: str | None = None
    """Reference policy, if it is not `model` itself."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """refuse: bad rows stop the run before it starts (the whole file is checked). skip: they are left out, counted."""
    dpo: DPOLossConfig = field(default_factory=DPOLossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


@dataclass(frozen=True)
class EvalRun:
    """Judge a model on preference pairs: `dpo-jax eval`."""

    model: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint of ours, or smollm2."""
    source: str
    """Preference file (JSONL, JSON or Parquet, plain or .gz) or hub data set id."""
    reference: str | None = None
    """Reference policy, for rewards, margins and the distance to it. Not given: log-probabilities are compared."""
    out: str | None = None
    """JSON file for the results, which are shown as tables in any case."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """refuse: a bad row stops the command. skip: leave them out, counted by reason."""
    beta: float | None = None
    """Scale of the rewards, beta x log-ratio to --reference. Not given: 0.1."""
    samples: int | None = None
    """Also answer the first so many prompts, and report on the repetition and length of the answers."""
    seed: int = 0
    """Seed of the answers."""
    batch_size: int = 8
    """Pairs in one forward pass, over all devices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and computation."""
    attention: AttentionKernel = "auto"
    """Attention kernel; auto takes the best that can run on these devices."""
    data: DataConfig = field(default_factory=DataConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        _require(self.beta is None or self.reference is not None, "--beta has no effect without --reference")
        _require(self.beta is None or self.beta > 0, f"--beta {self.beta} must be positive")
        _require(self.samples is None or self.samples >= 1, "--samples must be at least 1")
        _require(self.samples is not None or self.seed == 0, "--seed has no effect without --samples")
        _require(
            self.samples is not None or self.sample == SampleConfig(), "--sample.* has no effect without --samples"
        )
        _require(self.batch_size >= 1, "--batch_size must be at least 1")


@dataclass(frozen=True)
class LogpsRun:
    """Log-probabilities of both responses of every row, as JSON lines in input order: `dpo-jax logps`."""

    model: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint of ours, or smollm2."""
    source: str
    """Preference file (JSONL, JSON or Parquet, plain or .gz) or hub data set id."""
    out: str
    """JSONL file: chosen_logps, rejected_logps (sums), chosen_tokens, rejected_tokens, and the row number."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """refuse: a bad row stops the command. skip: leave them out, counted by reason."""
    batch_size: int = 8
    """Pairs in one forward pass, over all devices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and computation."""
    attention: AttentionKernel = "auto"
    """Attention kernel; auto takes the best that can run on these devices."""
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "--batch_size must be at least 1")


@dataclass(frozen=True)
class InspectRun:
    """Show the tokens of some rows, coloured by whether the loss counts them: `dpo-jax inspect`."""

    model: str
    """Where the tokenizer is: a Hugging Face folder, a hub id, a .gguf file, or smollm2."""
    source: str
    """Preference file (JSONL, JSON or Parquet, plain or .gz) or hub data set id."""
    rows: int = 3
    """How many rows to show."""
    first: int = 1
    """Row number (from 1) to begin at."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """refuse: a bad row stops the command. skip: leave them out, counted by reason."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        _require(self.rows >= 1, "--rows must be at least 1")
        _require(self.first >= 1, "--first counts rows from 1")


@dataclass(frozen=True)
class ConvertRun:
    """Rewrite a checkpoint in another format: `dpo-jax convert`."""

    source: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint or run folder of ours, or smollm2."""
    target: str
    """Folder to write; it must be new or empty."""
    format: Literal["huggingface", "orbax"] = "huggingface"
    """huggingface: config.json, safetensors and tokenizer. orbax: a checkpoint of ours."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype to write. Not given: the source's."""


@dataclass(frozen=True)
class GenerateRun:
    """Answer prompts: `dpo-jax generate`.

    A response ends at the model's own terminators, at those of the chat template, and at --sample.stop_tokens.
    """

    model: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint or run folder of ours, or smollm2."""
    prompt: str | None = None
    """One prompt; its response is printed as text."""
    prompts: str | None = None
    """File of prompts (JSONL, JSON or Parquet, plain or .gz): rows with `prompt` (a text) or `messages`."""
    out: str | None = None
    """JSONL file to write, one object a row in input order; an interrupted run goes on with it. Not given: stdout."""
    raw: bool = False
    """Continue the text as it stands, without a chat template."""
    template: str | None = None
    """Chat template: llama2, llama3, zephyr or chatml. Not given: the tokenizer's own."""
    batch_size: int = 8
    """Prompts generated from at once, over all devices."""
    seed: int = 0
    """Seed of the draw. A row's text depends on it, on the prompt and on the row number, and not on other rows."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and computation."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        _require(self.prompt is not None or self.prompts is not None, "give --prompt TEXT or --prompts FILE")
        _require(self.prompt is None or self.prompts is None, "give --prompt or --prompts, not both")
        _require(not (self.raw and self.template), "--template has no effect with --raw")
        _require(self.batch_size >= 1, "--batch_size must be at least 1")
        _require(0 <= self.seed < 2**32, "--seed must lie in [0, 2^32)")


@dataclass(frozen=True)
class DemoRun:
    """The whole thing on a real 135M Llama: `dpo-jax demo`.

    The controlled-sentiment experiment of the DPO paper (Rafailov et al. 2023, section 6.1): the model writes reviews,
    a sentiment lexicon judges them, DPO learns from the pairs, and unseen prompts show what it did.
    """

    out: str = "dpo-jax-demo"
    """Folder for samples, pairs, the run and the report; an interrupted demo goes on with it."""
    fast: bool = False
    """A smaller experiment: under two minutes on two CPU cores instead of about five."""
    seed: int = 0
    """Seed of everything."""
    model: str = "smollm2"
    """A Hugging Face folder, a hub id, a .gguf file, or smollm2."""

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "--seed must lie in [0, 2^32)")
