"""Options of `dpo-jax reward`."""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dpo_jax.config.options import Count, NotNegative, Options, Positive, Several, Share, not_given, part, require
from dpo_jax.config.sections import Layout, StepConfig, TrainConfig
from dpo_jax.config.training.dpo import Ties
from dpo_jax.config.training.run import HoldoutRun
from dpo_jax.config.training.sft import Proposal

Margin = Literal["none", "small", "large", "column", "score_gap", "agreement"]
_HEAD = re.compile(r"(?P<name>\w+)(:(?P<weight>[0-9.]+))?=(?P<classes>[^=]+)")


class ClassHead(NamedTuple):
    """An auxiliary head, as `--reward.multi_class` or `--reward.multi_label` names it."""

    name: str
    """Of the head, and of the entry in a row's `labels`."""
    classes: tuple[str, ...]
    """In the order of its outputs."""
    weight: float
    """Of its loss."""
    overlapping: bool
    """Whether several classes may hold at once (a sigmoid each), or exactly one does (softmax)."""


@dataclass(frozen=True)
class RewardLossConfig(Options, prefix="--reward."):
    """The loss of a reward model. The formulas stand in `dpo_jax/align/reward.py`."""

    margin: Margin = "none"
    """By how much the chosen score should lead: none; small (1, 2/3, 1/3, 0) or large (3, 2, 1, 0) by the column
    `rating`, as Llama 2; column (the number in `margin`); score_gap (difference of the two scores, also in a list of
    scored replies); agreement (share of the annotators who agree)."""
    margin_scale: Positive | None = not_given(1.0, margin=("score_gap", "agreement"))
    """Multiplies the score gap or the agreement."""
    ties: Ties = "error"
    """Rows that prefer nothing: error stops the run before it starts, drop leaves them out, counted."""
    exclude_unsafe_chosen: bool = False
    """Leave out rows whose best response is unsafe and whose worst is safe, as Llama 2's safety data did: by
    {"safety": ["safe", "unsafe"]} in the column `labels`. The report counts the four bins."""
    pairs: Literal["all", "adjacent"] = "all"
    """Of a row with more than two ranked replies: all its pairs (InstructGPT), or neighbours in the ranking only. Each
    prompt counts once, however many pairs it gives."""
    max_replies: Several | None = None
    """Of a longer list of ranked replies keep so many, spread evenly over it, the best and the worst among them. Not
    given: all."""
    centering: NotNegative = 0.0
    """Adds this times (chosen score + rejected score) squared, which keeps scores around zero."""
    multi_class: tuple[str, ...] = ()
    """Auxiliary heads over exclusive classes (softmax), as NAME=CLASS,CLASS,... or NAME:WEIGHT=CLASS,... The column
    `labels` of a row holds {NAME: [label of each response]}."""
    multi_label: tuple[str, ...] = ()
    """Auxiliary heads over overlapping classes (a sigmoid each), written likewise; a label is a list of classes."""
    class_negatives: Count | None = None
    """For heads with more classes than this: train against so many drawn classes in place of all. Not given: all."""
    class_proposal: Proposal | None = not_given("uniform", needs="class_negatives")
    """What they are drawn from: uniform, or log_uniform (for classes in order of falling frequency)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [head.name for head in self.heads]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"--reward.multi_class, --reward.multi_label: head {' '.join(twice)} is given twice")
        require(
            "score" not in names, "--reward.multi_class, --reward.multi_label: score is the name of the reward head"
        )
        exclusive = [head for head in self.heads if not head.overlapping]
        if self.class_negatives is not None:
            require(
                any(len(head.classes) > self.class_negatives for head in exclusive),
                f"--reward.class_negatives {self.class_negatives} has no effect: no head of --reward.multi_class has"
                " more classes",
            )

    @property
    def heads(self) -> tuple[ClassHead, ...]:
        """The auxiliary heads."""
        softmax = [_class_head(text, "multi_class") for text in self.multi_class]
        return (*softmax, *(_class_head(text, "multi_label") for text in self.multi_label))


def _class_head(text: str, option: str) -> ClassHead:
    found = _HEAD.fullmatch(text)
    classes = () if found is None else tuple(name.strip() for name in found["classes"].split(","))
    least = 2 if option == "multi_class" else 1
    require(
        found is not None and len(classes) >= least and all(classes) and len(set(classes)) == len(classes),
        f"--reward.{option} {text}: write NAME=CLASS,CLASS,... with at least {least} different classes, such as"
        " safety=safe,unsafe",
    )
    assert found is not None
    weight = found["weight"] or "1"
    number = re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) is not None and float(weight) > 0
    require(number, f"--reward.{option} {text}: the weight {weight} must be a positive number")
    return ClassHead(found["name"], classes, float(weight), option == "multi_label")


@dataclass(frozen=True)
class RewardConfig(RewardLossConfig, StepConfig):
    """All that `align.reward.init_state` and `align.reward.train_step` need to know."""

    layout: Layout = "windows"
    """windows: real tokens only, as the batch's windows say; a batch without them is laid out as shared. shared: the
    prompt is computed once for its K responses. separate: K whole sequences."""
    seed: int = 0
    """Seed of fresh heads and of drawn classes."""


@dataclass(frozen=True, kw_only=True)
class RewardRun(HoldoutRun):
    """Train a reward model on comparisons: `dpo-jax reward`.

    Rows are preference pairs, lists of ranked or scored replies, or two responses with scores or annotators' votes
    (see `dpo_jax/data/rows/comparisons.py`).
    """

    mix_data: str | None = None
    """A second data file, mixed into the first (Llama 2's safety model: a tenth of helpfulness data)."""
    mix: Share | None = not_given(0.1, needs="mix_data")
    """Share of the mixture that comes from --mix_data."""
    reward: RewardLossConfig = part(RewardLossConfig)
    # A reward model writes nothing.
    train: TrainConfig = part(TrainConfig, without=("sample_every", "sample_prompts", "sample_tokens"))

    def step_config(self) -> RewardConfig:
        """What the step needs to know of these options."""
        return self.step(RewardConfig, self.reward, seed=self.train.seed, layout=self.train.settled.layout)
