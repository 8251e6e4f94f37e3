"""Options of `dpo-jax sft`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from dpo_jax.config.optimizer import OptimizerConfig
from dpo_jax.config.options import Count, Options, not_given, part, require
from dpo_jax.config.sections import DataConfig, StepConfig, TrainConfig
from dpo_jax.config.training.run import HoldoutRun, TrainingRun

Proposal = Literal["uniform", "log_uniform"]


@dataclass(frozen=True)
class SFTLossConfig(Options, prefix="--sft."):
    """How the next-token loss is computed. The formulas stand in `dpo_jax/align/sft.py`."""

    loss: Literal["exact", "sampled"] = "exact"
    """exact: softmax over the whole vocabulary. sampled: over the target and --sft.negatives drawn ids, for very large
    vocabularies (the loss that is logged is then an estimate, a little too small); evaluation stays exact."""
    negatives: Count | None = not_given(8192, loss=("sampled",))
    """Ids drawn in each step for the sampled loss, shared by all its tokens."""
    proposal: Proposal | None = not_given("log_uniform", loss=("sampled",))
    """What they are drawn from: log_uniform (Zipf's law, for ids in order of falling frequency, as tokenizers number
    them), or uniform (better where frequent pieces were appended)."""

    @property
    def drawn(self) -> int | None:
        """Ids that are drawn in each step; None of the exact loss."""
        return None if self.loss == "exact" else self.settled.negatives


@dataclass(frozen=True)
class SFTConfig(SFTLossConfig, StepConfig):
    """All that `align.sft.init_state` and `align.sft.train_step` need to know."""

    packed: bool = True
    """False promises that a window holds one sequence and then padding, which more attention kernels can run."""
    seed: int = 0
    """Seed of the drawn ids of the sampled loss."""
    head_budget_bytes: int = 256 * 2**20
    """Memory a device may spend on one chunk of logits; the chunk length follows from it."""


@dataclass(frozen=True)
class SFTDataConfig(DataConfig):
    """From dialogues or documents to windows of tokens."""

    kind: Literal["dialogues", "text"] = "dialogues"
    """dialogues: rows with a prompt and its answer. text: documents, for pre-training: rows with `text`, .txt files or
    folders of them; --data names one source, or several with weights: a.jsonl:0.7 b.txt:0.3."""
    max_length: int = 1024
    """Longest dialogue in tokens; the end of a longer one is cut. With packing, and with text, the size of a window."""
    train_on: Literal["answers", "last", "all"] = "answers"
    """What the loss counts: every answer, the last answer of a dialogue alone, or all tokens."""
    packing: bool = False
    """Put several dialogues into one window (none sees another): --train.batch_size then counts windows. Else each has
    a window of its own."""
    separator: str | None = not_given(kind=("text",))
    """(text) What stands between the documents of a .txt file: blank_line, or a literal such as "<|endoftext|>". Not
    given: a file is one document."""
    documents: Literal["masked", "joined"] | None = not_given("masked", kind=("text",))
    """(text) What a token sees of its window. masked: its own document. joined: all that stands before it, as Llama 2
    was pre-trained."""

    def __post_init__(self) -> None:
        # An answer may follow a prompt of any length: there is no limit of its own, and none of a recipe's to keep.
        object.__setattr__(self, "max_prompt_length", None)
        super().__post_init__()
        one_size = type(self).buckets
        require(not self.packing or self.buckets == one_size, "--data.buckets has no effect with --data.packing")
        of_dialogues = {"train_on": "answers", "packing": False, "buckets": one_size, "template": None, "date": None}
        of_dialogues["empty_system"] = False
        for name, default in of_dialogues.items() if self.kind == "text" else ():
            require(getattr(self, name) == default, f"--data.{name} has no effect with --data.kind text")


@dataclass(frozen=True, kw_only=True)
class SFTRun(HoldoutRun):
    """Fine-tune a model on dialogues or instructions, or go on with its pre-training: `dpo-jax sft`.

    Rows hold `messages` or `conversations`, a prompt and its answer, or preference pairs, of which the chosen answer is
    learnt (see `dpo_jax/data/rows/dialogues.py`). With --data.kind text they are documents, cut into full windows
    (`dpo_jax/data/sets/text_windows.py`).
    """

    optimizer: OptimizerConfig = part(OptimizerConfig, learning_rate=2e-5)
    train: TrainConfig = part(TrainConfig, without=("layout",))
    data: SFTDataConfig = part(SFTDataConfig, without=("max_prompt_length",))
    sft: SFTLossConfig = part(SFTLossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.holdout is None or self.data.kind != "text", "--holdout has no effect with --data.kind text")

    def step_config(self, *, packed: bool) -> SFTConfig:
        """What the step needs to know of these options; `packed`: whether a window holds several sequences."""
        return self.step(SFTConfig, self.sft, packed=packed, seed=self.train.seed)


def sft_inside(run: TrainingRun, folder: Path, *, data: Mapping[str, Any], **changes: Any) -> SFTRun:
    """The fine-tuning inside another command: on `folder`/sft.jsonl, in `folder`/sft, else with what both are told.

    data, changes: what differs in the section --data, and beside it.
    """
    told: dict[str, Any] = {each.name: getattr(run, each.name) for each in fields(SFTRun) if hasattr(run, each.name)}
    told["data"] = replace(run.data, files=str(folder / "sft.jsonl"), limit=None, columns=None, **data)
    return SFTRun(**(told | {"out": str(folder / "sft"), "eval_data": None, "push_to_hub": None} | changes))
