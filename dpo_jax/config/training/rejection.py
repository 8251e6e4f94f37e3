"""Options of `dpo-jax rejection`: how many responses are drawn and which are learnt, and of the run around it."""

from dataclasses import dataclass
from typing import Literal

from dpo_jax.config.optimizer import OptimizerConfig
from dpo_jax.config.options import (
    Count,
    Finite,
    NotNegative,
    Options,
    Several,
    UpToOne,
    Warm,
    not_given,
    part,
    require,
)
from dpo_jax.config.sections import CheckpointConfig, LogConfig, SampleConfig, TrainConfig
from dpo_jax.config.training.run import JudgedRun
from dpo_jax.config.training.sft import SFTDataConfig, SFTLossConfig


@dataclass(frozen=True)
class RejectionConfig(Options, prefix="--rejection."):
    """What is drawn, and which of it is learnt. The formulas stand in `dpo_jax/align/rejection.py`."""

    samples: Several = 10
    """K: responses to each prompt in an iteration, at each temperature (Llama 2: 10 to 100)."""
    temperatures: tuple[Warm, ...] = (1.0,)
    """Temperatures to sample at (Llama 2 found 1.2 to 1.3 best for its RLHF models); the best of all of them counts."""
    iterations: Count = 1
    """How often to sample, to judge and to fine-tune; each iteration goes on with the model of the one before."""
    pool: Literal["all", "latest"] = "all"
    """all: learn the best response to each prompt of all iterations so far (Llama 2 since V4). latest: of this one."""
    pool_from: str | None = None
    """pool.jsonl of an earlier run, to be merged in; its responses are judged anew, by this run's reward."""
    student: str | None = None
    """Model to be fine-tuned in place of --model, which then only samples (Llama 2: the bests of the 70B taught the
    smaller ones)."""
    share: UpToOne | None = None
    """Learn only this share of the bests, those of the highest score. Not given: all."""
    min_score: Finite | None = None
    """Learn only bests of at least this score. Not given: all."""
    eval_samples: Count | None = not_given(1)
    """Responses to each prompt of --eval_data."""
    eval_temperature: NotNegative | None = None
    """Temperature of those. Not given: the first of `temperatures`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.temperatures), "--rejection.temperatures is empty: give at least one, such as 1.0")
        distinct = len(set(self.temperatures)) == len(self.temperatures)
        require(distinct, "--rejection.temperatures names one twice; raise --rejection.samples instead")
        require(
            self.iterations == 1 or self.student is None,
            "--rejection.iterations has no effect with --rejection.student: the model that samples stays the same;"
            " raise --rejection.samples",
        )
        require(
            self.pool_from is None or self.pool == "all",
            "--rejection.pool_from has no effect with --rejection.pool latest",
        )
        require(
            self.eval_temperature != 0 or self.eval_samples in (None, 1),
            "--rejection.eval_samples has no effect at temperature 0 (greedy): all would be equal",
        )

    @property
    def evaluated_at(self) -> float:
        """Temperature of the responses of the evaluation."""
        return self.temperatures[0] if self.eval_temperature is None else self.eval_temperature


@dataclass(frozen=True, kw_only=True)
class RejectionRun(JudgedRun):
    """Let a model learn from the best of K of its own responses: `dpo-jax rejection` (Llama 2, section 3.2.3).

    --data holds prompts: rows with `prompt` (a text) or `messages`. An iteration samples --rejection.samples responses
    to every prompt, scores them, and fine-tunes the model on the best response to each, as `dpo-jax sft` does: --train,
    --optimizer, --lora, --sft and the section --data are those of that run.
    """

    eval_data: str | None = None
    """Held-out prompts, answered before the first and after each iteration: how the mean reward moves."""
    sample_batch_size: Count = 32
    """Responses written at once, over all devices; one that is done makes room for the next. Changes no text."""
    rejection: RejectionConfig = part(RejectionConfig)
    sample: SampleConfig = part(
        SampleConfig, without=("temperature", "beams", "length_penalty"), instead="give --rejection.temperatures"
    )
    optimizer: OptimizerConfig = part(OptimizerConfig, learning_rate=2e-5)
    data: SFTDataConfig = part(
        SFTDataConfig, without=("kind", "separator", "documents", "max_prompt_length"), train_on="last"
    )
    train: TrainConfig = part(TrainConfig, without=("layout", "eval_every", "stop_after"))
    checkpoint: CheckpointConfig = part(CheckpointConfig, without=("best",))
    log: LogConfig = part(LogConfig, without=("wandb",))
    sft: SFTLossConfig = part(SFTLossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        rejection = self.rejection
        frozen = self.train.frozen_dtype is None or self.lora.rank > 0
        require(frozen, "--train.frozen_dtype has no effect: nothing is frozen without --lora.rank")
        require(
            self.longest_prompt > 0,
            f"--sample.max_new_tokens {self.sample.max_new_tokens} leaves no room for a prompt in --data.max_length"
            f" {self.data.max_length}",
        )
        require(0 <= self.train.seed < 2**32, "--train.seed must lie in [0, 2^32)")
        if self.eval_data is None:
            given = rejection.eval_samples is not None or rejection.eval_temperature is not None
            require(
                not given,
                "--rejection.eval_samples and --rejection.eval_temperature have no effect without --eval_data",
            )

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt whose answer has room in --data.max_length."""
        return self.data.max_length - self.sample.max_new_tokens

    @property
    def trained(self) -> str:
        """The model that is fine-tuned."""
        return self.rejection.student or self.model
