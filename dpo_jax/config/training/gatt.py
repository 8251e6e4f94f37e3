"""Options of `dpo-jax gatt`."""

from dataclasses import dataclass
from typing import Literal

from dpo_jax.config.devices import DistributedConfig
from dpo_jax.config.optimizer import OptimizerConfig
from dpo_jax.config.options import Count, Options, Share, Unit, no_option, not_given, part, require
from dpo_jax.config.sections import (
    CheckpointConfig,
    LogConfig,
    SampleConfig,
    TrainConfig,
)
from dpo_jax.config.training.run import TrainingRun
from dpo_jax.config.training.sft import SFTDataConfig, SFTLossConfig

ConstraintKind = Literal["hobby", "language", "figure", "persona"]


@dataclass(frozen=True)
class GattConfig(Options, prefix="--gatt."):
    """Instructions, dialogues, and the evaluation."""

    instructions: str | None = None
    """File of instructions: rows with `instruction` (or `system_prompt`), and if you like `check` (a regular
    expression that an answer must match, language:CODE, or keywords:A, B) and `short` (a terse form). Not given: they
    are made from short lists."""
    synthesised: int | None = None
    """Instructions made from the lists. Not given: 100, or none beside --gatt.instructions."""
    kinds: tuple[ConstraintKind, ...] = ("hobby", "language", "figure", "persona")
    """What the made instructions are about."""
    combine: Count = 1
    """A made instruction combines up to so many kinds."""
    languages: tuple[str, ...] = ()
    """Codes of the languages that made instructions may ask for, and in which instructions of the file without a check
    may be written for their language to be checked, e.g. es fr de. Not given: all."""
    short: Unit = 0.5
    """Share of the training dialogues that hold the terse form of their instruction, where it has one."""
    dialogues: Count = 200
    """Training dialogues to sample."""
    turns: Count = 4
    """User turns of each; shorter dialogues of --data are put one behind the other."""
    train_turns: Literal["last", "every"] = "last"
    """last: a dialogue trains its last answer. every: each answer in turn, as the last of the dialogue up to it."""
    keep: Literal["all", "consistent"] = "all"
    """consistent: learn only answers that pass their checks."""
    train: bool = True
    """Fine-tune and evaluate; else stop when sft.jsonl is written."""
    evaluate_only: bool = False
    """Evaluate --model as it is; options of sampling and training data are not looked at."""
    eval_dialogues: Count = 40
    """Dialogues of the evaluation, each with an instruction that has a check; all instructions in turn."""
    eval_turns: Count | None = None
    """User turns of each. Not given: as many as --gatt.turns."""
    holdout: Share | None = not_given(0.3)
    """Share of the rows of --data that the evaluation takes its prompts from, and training does not; none where
    --eval_data is given (with --gatt.evaluate_only it takes all)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.kinds), "--gatt.kinds needs at least one kind")
        require(len(set(self.kinds)) == len(self.kinds), "--gatt.kinds names a kind twice")
        require(
            self.combine <= len(self.kinds),
            f"--gatt.combine {self.combine} exceeds the {len(self.kinds)} kinds of --gatt.kinds: one constraint a kind",
        )
        spoken = self.instructions is not None or "language" in self.kinds
        require(spoken or not self.languages, "--gatt.languages has no effect: --gatt.kinds leaves languages out")
        if self.synthesised is not None:
            least = 0 if self.instructions is not None else 1
            require(self.synthesised >= least, f"--gatt.synthesised must be at least {least}")
        if not self.made:
            every = type(self).kinds
            require(self.kinds == every, "--gatt.kinds has no effect: no instruction is made (--gatt.synthesised N)")
            require(self.combine == 1, "--gatt.combine has no effect: no instruction is made (--gatt.synthesised N)")
        require(self.train or not self.evaluate_only, "--gatt.evaluate_only trains nothing: leave --gatt.no_train out")
        if not self.train:
            default = type(self)
            for name in ("eval_dialogues", "eval_turns"):
                same = getattr(self, name) == getattr(default, name)
                require(same, f"--gatt.{name} has no effect with --gatt.no_train")

    @property
    def made(self) -> int:
        """How many instructions are made from the lists."""
        return (100 if self.instructions is None else 0) if self.synthesised is None else self.synthesised

    @property
    def evaluated_turns(self) -> int:
        """User turns of a dialogue of the evaluation."""
        return self.turns if self.eval_turns is None else self.eval_turns


@dataclass(frozen=True, kw_only=True)
class GattRun(TrainingRun):
    """Make instructions hold for whole dialogues, by Ghost Attention (Llama 2, section 3.3): `dpo-jax gatt`.

    --data holds what users say: rows with `prompt`, `turns` (a list of texts), or `messages`, of which the user's turns
    are read. The model answers these prompts turn by turn with an instruction in every turn; it is fine-tuned on these
    dialogues with the instruction in the first turn only and no loss but on the last answer. How many answers keep to
    the instruction of the first turn is measured turn by turn, before and after, on prompts that were not trained on.
    """

    eval_data: str | None = None
    """What users say in the evaluation; rows that share a text with --data are left out. Not given: a share
    of --data is kept for it (--gatt.holdout)."""
    sample_batch_size: Count = 32
    """Answers written at once, over all devices; changes no text."""
    gatt: GattConfig = part(GattConfig)
    sample: SampleConfig = part(SampleConfig, without=("beams", "length_penalty"))
    optimizer: OptimizerConfig = part(OptimizerConfig, learning_rate=2e-5)
    data: SFTDataConfig = part(
        SFTDataConfig, without=("kind", "train_on", "separator", "documents", "max_prompt_length"), max_length=4096
    )
    train: TrainConfig = part(TrainConfig, without=("layout", "eval_every", "stop_after"))
    checkpoint: CheckpointConfig = part(CheckpointConfig, without=("best",))
    distributed: DistributedConfig = no_option(DistributedConfig)
    log: LogConfig = no_option(LogConfig)
    push_to_hub: None = no_option()
    sft: SFTLossConfig = part(SFTLossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.data.template != "raw", "--data.template raw has no turns; name a chat template")
        require(
            self.eval_data is None or self.gatt.holdout is None,
            "--gatt.holdout has no effect with --eval_data",
        )
        if not self.gatt.train:
            require(self.eval_data is None, "--eval_data has no effect with --gatt.no_train: nothing is evaluated")
            require(self.gatt.holdout is None, "--gatt.holdout has no effect with --gatt.no_train")
        if self.gatt.evaluate_only:
            require(
                self.eval_data is None and self.gatt.holdout is None,
                "--gatt.evaluate_only takes its prompts from --data: leave --eval_data and --gatt.holdout out",
            )
