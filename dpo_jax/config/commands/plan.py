"""Options of `dpo-jax plan` and `dpo-jax bench`."""

from dataclasses import dataclass

from dpo_jax.config.options import Count, NotNegative, Options, Positive, UpToOne, no_option, not_given, part, require
from dpo_jax.config.training.run import TrainingRun


@dataclass(frozen=True)
class AssumeConfig(Options, prefix="--assume."):
    """Shares of a device's peaks that a program is assumed to reach."""

    matrix: UpToOne = 0.6
    """Of the peak of matrix products."""
    memory: UpToOne = 0.8
    """Of the memory's bandwidth."""
    links: UpToOne = 0.5
    """Of the bandwidth of all links of a device together."""


@dataclass(frozen=True)
class PlanRun(Options):
    """What a training step needs on devices that are not here, before they are paid for: `dpo-jax plan`.

    CONFIG.py says which command and how; its options may follow too, under their own names (--train.remat full,
    --mesh.tensor 4, --data.max_length 2048). The real step is compiled, from shapes alone. The exit code is 0 where
    everything fits into the devices' memory, and 3 where something does not.
    """

    topology: str
    """The devices: v4:2x2x1, v5e:4x4, v5p:4x4x4, v6e:4x4 (a TPU slice), a100:8, h100:8, h200:8
    (a node), a100:2x8 (two)."""
    model_shape: str | None = None
    """A published model, by name (llama2_7b, llama2_13b, llama2_70b, llama3_1b (3.2), llama3_8b,
    llama3_70b, mistral_7b, smollm2_135m), in place of --model, of which only config.json is read."""
    teacher_shape: str | None = None
    """The same in place of --teacher, where `distill` is planned."""
    prompt_tokens: Count | None = None
    """Tokens of a prompt in the largest batch. Not given: --data.max_prompt_length, or without it half of
    --data.max_length (of PPO: what --sample.max_new_tokens leaves of it)."""
    response_tokens: Count | None = None
    """Tokens of each response in the largest batch; of a window of text all its tokens. Not given: what the prompt
    leaves of --data.max_length."""
    out: str | None = None
    """JSON file with all figures."""
    search: bool = False
    """Try mesh splits x rematerialisation x micro-batches, and rank what fits. What was compiled is kept: a search
    that was interrupted goes on."""
    search_limit: Count | None = not_given(12, needs="search")
    """Compile at most so many candidates, the most promising first."""
    write_config: str | None = not_given(needs="search")
    """CONFIG.py to write with the options of the best that was found."""
    price_per_device_hour: NotNegative | None = None
    """Dollars for an hour of one device."""
    cache: str | None = None
    """Folder that keeps what was compiled, so that asking again costs nothing. Not given: one in the user's cache."""
    assume: AssumeConfig = part(AssumeConfig)
    training: TrainingRun | None = no_option()
    """The options of the command that is planned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        path = self.write_config
        require(path is None or path.endswith(".py"), f"--write_config {path}: a CONFIG is a Python file (.py)")


@dataclass(frozen=True)
class BenchRun(Options):
    """What a training command does on the devices that are here, beside what a plan says of it: `dpo-jax bench`.

    CONFIG.py, or the word of a command, says which; its options may follow under their own names (--train.remat full,
    --mesh.tensor 4, --data.max_length 2048). Weights are random and rows full, so that only the model's config.json is
    read. Where --data is given, its loader is measured too.
    """

    model_shape: str | None = None
    """A published model, by name, as in `dpo-jax plan`, in place of --model."""
    prompt_tokens: Count | None = None
    """Tokens of a prompt, as in `dpo-jax plan`."""
    response_tokens: Count | None = None
    """Tokens of each response, as in `dpo-jax plan`."""
    out: str | None = None
    """JSON file with all figures, written after each of them."""
    seconds: Positive = 10.0
    """How long each program is run, after its first time; three times at least."""
    checkpoint: bool = True
    """Write and read a checkpoint of the whole training state, and remove it."""
    folder: str | None = not_given("the system's folder for temporary files", needs="checkpoint")
    """Where that checkpoint is written."""
    training: TrainingRun | None = no_option()
    """The options of the command that is measured."""
