"""Options of `dpo-jax distill`."""

from dataclasses import dataclass, fields
from typing import Literal

from dpo_jax.config.options import Options, Positive, Unit, no_option, part, require
from dpo_jax.config.sections import CheckpointConfig, SampleConfig, StepConfig, TrainConfig
from dpo_jax.config.training.run import SampledRun


@dataclass(frozen=True)
class DistillConfig(Options, prefix="--distill."):
    """What is learnt from the teacher. The formulas stand in `dpo_jax/align/distill.py`."""

    on_policy: Unit = 1.0
    """Share of the steps on the student's own responses (GKD's lambda; TRL's lmbda, there 0.5); the others learn on
    those of --data."""
    beta: Unit = 1.0
    """Generalised Jensen-Shannon divergence: 0 is the forward KL divergence, from the teacher; 1 the reverse one, from
    the student (TRL: beta, there 0.5)."""
    temperature: Positive = 1.0
    """Divides the logits of both in the loss; --sample.temperature is that of the draw."""


@dataclass(frozen=True)
class DistillStepConfig(DistillConfig, StepConfig):
    """All that `align.distill.init_state` and `align.distill.train_step` need to know."""

    vocabulary: int | None = None
    """Ids from here on have no part in the distributions: rows of a padded embedding that stand for no text."""
    head_budget_bytes: int = 256 * 2**20
    """Memory a device may spend on one chunk of logits, of student and teacher each."""


@dataclass(frozen=True, kw_only=True)
class DistillRun(SampledRun):
    """Let a student learn a teacher's distribution of each next token: `dpo-jax distill`.

    --data holds prompts, which the student answers; where --distill.on_policy is below 1, rows with an answer too. One
    step is one iteration on --train.batch_size prompts.
    """

    teacher: str
    """A Hugging Face folder, a hub id, a .gguf file or a run, with the tokenizer of --model."""
    teacher_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the teacher's weights and computation."""
    distill: DistillConfig = part(DistillConfig)
    eval_data: None = no_option()
    train: TrainConfig = part(TrainConfig, without=("layout", "eval_every", "stop_after"))
    checkpoint: CheckpointConfig = part(CheckpointConfig, without=("best",))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sampling("distillation", self.train.batch_size, 1, "one each")
        if self.distill.on_policy == 0:
            self._check_unsampled()
        frozen = self.train.frozen_dtype is None or self.lora.rank > 0
        require(frozen, "--train.frozen_dtype has no effect: nothing is frozen without --lora.rank")
        require(self.eval_data is None, "--eval_data has no effect in dpo-jax distill: leave it out")

    def _check_unsampled(self) -> None:
        free, beside = SampleConfig(max_new_tokens=self.sample.max_new_tokens), "--distill.on_policy 0"
        for option in fields(SampleConfig):
            same = getattr(self.sample, option.name) == getattr(free, option.name)
            require(same, f"--sample.{option.name} has no effect with {beside}: nothing is sampled; leave it out")
        require(self.rollout_batch_size is None, f"--rollout_batch_size has no effect with {beside}; leave it out")

    def check_sizes(self, devices: int) -> None:
        """Refuse sizes that do not divide over devices. Raises `InputError`."""
        self.check_pieces(devices)

    def step_config(self, vocabulary: int | None) -> DistillStepConfig:
        """What the step needs to know of these options."""
        return self.step(DistillStepConfig, self.distill, vocabulary=vocabulary)
