"""The options that every training command has."""

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from dpo_jax.config.bases import AsksRewards, ReadsModels
from dpo_jax.config.devices import DistributedConfig, MeshConfig
from dpo_jax.config.names import RunOptions
from dpo_jax.config.optimizer import OptimizerConfig
from dpo_jax.config.options import Finite, Options, Share, part, require
from dpo_jax.config.sections import (
    CheckpointConfig,
    DataConfig,
    EnergyConfig,
    LogConfig,
    LoraConfig,
    SampleConfig,
    StepConfig,
    TrainConfig,
)

Step = TypeVar("Step", bound=StepConfig)


@dataclass(frozen=True, kw_only=True)
class TrainingRun(ReadsModels, metaclass=RunOptions):
    """One run of a training command: everything that decides its numbers, saved as `config.json` in the run folder."""

    model: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint of ours, or smollm2."""
    data: DataConfig = part(DataConfig)
    out: str
    """Run folder: config.json, metrics.jsonl, TensorBoard events, checkpoints/, the final model and the report."""
    eval_data: str | None = None
    """Held-out data file."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """refuse: bad rows stop the run before it starts (the whole file is checked). skip: they are left out, counted."""
    lora: LoraConfig = part(LoraConfig)
    optimizer: OptimizerConfig = part(OptimizerConfig)
    train: TrainConfig = part(TrainConfig)
    checkpoint: CheckpointConfig = part(CheckpointConfig)
    mesh: MeshConfig = part(MeshConfig)
    distributed: DistributedConfig = part(DistributedConfig)
    energy: EnergyConfig = part(EnergyConfig)
    log: LogConfig = part(LogConfig)
    push_to_hub: str | None = None
    """OWNER/NAME on the Hugging Face hub: the finished model/ goes there, into a new private repository where there is
    none. The token is read from HF_TOKEN. Given to a finished run it sends that."""

    def __post_init__(self) -> None:
        super().__post_init__()
        narrow, mesh = self.train.crossing_dtype, self.mesh
        require(
            narrow is None or (mesh.data != 1 and mesh.context == 1),
            f"--train.crossing_dtype {narrow} has no effect with"
            + (f" --mesh.context {mesh.context}" if mesh.data != 1 else " --mesh.data 1: nothing crosses"),
        )

    @property
    def evaluates(self) -> bool:
        """Whether the run has held-out data."""
        return self.eval_data is not None

    def step(self, kind: type[Step], loss: Options, **more: Any) -> Step:
        """What a step needs to know of these options: those of its `loss`, what every step has, and `more`."""
        told = {one.name: getattr(loss, one.name) for one in fields(loss)}  # pyright: ignore[reportArgumentType]
        crossing = self.train.settled.crossing_dtype
        every = {"optimizer": self.optimizer, "accumulate": self.train.accumulate, "crossing_dtype": crossing}
        dropout = {"dropout": self.lora.settled.dropout, "dropout_seed": self.train.seed}
        return kind.of_checked(**told, **every, **dropout, **more)


@dataclass(frozen=True, kw_only=True)
class HoldoutRun(TrainingRun):
    """A run on rows, of which some may be held out."""

    holdout: Share | None = None
    """Hold out this share of the data for evaluation, whole prompts at a time, in place of --eval_data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.holdout is None or self.eval_data is None, "give --holdout or --eval_data, not both: one is enough"
        )

    @property
    def evaluates(self) -> bool:
        """Whether the run has held-out data."""
        return self.eval_data is not None or self.holdout is not None


@dataclass(frozen=True, kw_only=True)
class SampledRun(TrainingRun):
    """A run that learns from what the model writes behind prompts, step by step."""

    rollout_batch_size: int | None = None
    """Responses sampled and measured at once, to save memory; changes no text. Where there are more, one that ends
    makes room for another, so that a long one holds up none. Not given: all."""
    sample: SampleConfig = part(SampleConfig, without=("stop_strings", "beams", "length_penalty"))
    data: DataConfig = part(DataConfig, without=("buckets", "workers"))

    def check_sampling(self, learner: str, responses: int, group: int, named: str) -> None:
        """Refuse what does not go with sampling `responses` an iteration, `group` to each prompt. Raises `InputError`.

        `learner`: who learns, for messages; `named`: the option that says the group.
        """
        require(self.sample.temperature > 0, f"--sample.temperature must be positive: {learner} learns from samples")
        most, new = self.response_room, self.sample.max_new_tokens
        takes = (
            f"--sample.max_new_tokens {new} leaves"
            if most == new
            else f"an episode of {most} tokens (--environment_tokens) leaves"
        )
        require(
            self.data.max_length > most,
            f"{takes} no room for a prompt in --data.max_length {self.data.max_length}",
        )
        pieces = self.rollout_batch_size
        of = f"--train.batch_size {responses}" if responses == self.train.batch_size else f"the {responses} responses"
        require(
            pieces is None or (pieces >= 1 and responses % pieces == 0 and pieces % group == 0),
            f"--rollout_batch_size {pieces} is no multiple of {group} ({named}) that divides {of}",
        )

    def check_pieces(self, devices: int) -> None:
        """Refuse pieces that do not divide over devices. Raises `InputError`."""
        pieces = self.rollout_batch_size
        require(
            pieces is None or pieces % devices == 0,
            f"--rollout_batch_size {pieces} does not divide over {devices} devices that split the batch",
        )

    @property
    def response_room(self) -> int:
        """The most tokens of a response."""
        return self.sample.max_new_tokens

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt before it is cut."""
        room = self.data.max_length - self.response_room
        return min(self.data.prompt_room(self.response_room), room)


@dataclass(frozen=True, kw_only=True)
class JudgedRun(TrainingRun, AsksRewards):
    """A run on prompts, whose responses are judged."""

    eval_data: str | None = None
    """Held-out prompts, answered with the same draws before the first iteration, every --train.eval_every and at the
    end: eval_reward, eval_kl, eval_length with intervals, and the texts' health."""
    reward: str | tuple[str, ...]
    """What judges a response, one or several, whose scores are summed: vader (sentiment, -1 to 1), length (hundreds of
    characters), regex:PATTERN (1 where it is found, else 0), language:CODE, exact:COLUMN, numeric:COLUMN and
    math:COLUMN (the row's right answer), json, json:SCHEMA, format:PATTERN, ramp:A:B, repetition:N, run:COMMAND,
    FILE.py:FUNCTION (your own code), a URL, judge:FILE.yaml (options of `dpo-jax judge`: a score asked of an endpoint
    or a model), or a reward model: a folder, a hub id, or a run. docs/rewards.md says what each gives."""
    reward_weights: tuple[Finite, ...] = ()
    """What each of several --reward is multiplied with, in their order. Not given: 1 each."""
    safety_reward: str | None = None
    """A second judge, for safety: combined with --reward as Llama 2 did, by the column `safety` of the prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.judges_are_given, "missing --reward: name what judges a response (docs/rewards.md)")
        twice = [name for i, name in enumerate(self.rewards) if name in self.rewards[:i]]
        require(not twice, f"--reward {twice[0] if twice else ''}: stands there twice; give it a weight instead")
        several, weights = len(self.rewards) > 1, self.reward_weights
        require(several or not weights, "--reward_weights has no effect with one --reward")
        require(
            not weights or len(weights) == len(self.rewards),
            f"--reward_weights: {len(weights)} for {len(self.rewards)} of --reward; one number each",
        )
        require(
            self.safety_reward is None or not several,
            "--safety_reward is combined with one --reward as Llama 2 did, not with several",
        )
        self.check_limits(*self.limited)

    @property
    def limited(self) -> tuple[str | None, ...]:
        """The judges that --reward_timeout and --reward_memory hold for."""
        return (*self.rewards, self.safety_reward)

    @property
    def judges_are_given(self) -> bool:
        """Whether something rewards what is written."""
        return bool(self.rewards)

    @property
    def rewards(self) -> tuple[str, ...]:
        """Each that --reward names."""
        return (self.reward,) if isinstance(self.reward, str) else self.reward

    @property
    def told_reward(self) -> str:
        """For one line: all of them."""
        return " + ".join(self.rewards)
