"""Options of `dpo-jax recipe iterative_rpo`."""

import re
from dataclasses import dataclass
from typing import Literal

from dpo_jax.config.bases import ReadsModels
from dpo_jax.config.optimizer import OptimizerConfig
from dpo_jax.config.options import Count, RecipeSeed, Several, Warm, part, require, stage
from dpo_jax.config.sections import SampleConfig, TrainConfig
from dpo_jax.config.training.dpo import DPOLossConfig, DPORun


@dataclass(frozen=True, kw_only=True)
class IterativeRPORun(ReadsModels):
    """Reasoning by rounds of preferences: `dpo-jax recipe iterative_rpo` (Pang et al. 2024, arXiv 2404.19733).

    In each round the newest model answers every problem several times; right answers are paired with wrong ones, and
    DPO with an NLL term makes the next model, from the newest one and with it as the reference. Problems whose answers
    are all right or all wrong teach nothing: they are left out, and counted; so are answers that are cut or blank.
    """

    model: str
    """The first model: a Hugging Face folder, a hub id, a .gguf file, a checkpoint of ours, or smollm2."""
    prompts: str
    """Problems: rows with `prompt` or `messages`, and their right answer in the column --answer."""
    out: str
    """Folder of all rounds; an interrupted recipe goes on with the same command."""
    eval_prompts: str | None = None
    """Held-out problems of the same kind, answered greedily by every model: its accuracy, with an interval."""
    rounds: Count = 4
    """How often to sample, to pair and to train (the paper: 4)."""
    samples: Several = 30
    """Answers to each problem in a round (the paper: 30)."""
    temperatures: tuple[Warm, ...] = (0.8, 0.8, 1.3)
    """Temperature of those in round 1, 2 ...; the last holds for all rounds after it (the paper: .8, later 1.3)."""
    pairs_per_prompt: Count = 10
    """At most so many pairs of a problem, drawn without replacement from all of a right and a wrong answer (the paper:
    10)."""
    answer: str = "answer"
    """Column of the right answer: a number, a text with one of the marks (or the --answer_pattern) from which it is
    taken as from a response, or, without any, one line of at most 100 characters, which is the answer."""
    answer_pattern: str | None = None
    """Regular expression: what its one group holds at its last match is the answer. Not given: what follows the last
    `####` or stands in the last \\boxed{}; without those what follows the last `final answer:` or `answer is`; without
    any of them, the last number, where it is said plainly."""
    match: Literal["exact", "math_verify"] = "exact"
    """exact: equal texts without regard to case, $, %, * and a last point; numbers by value, and of an answer in words
    that has one number and says it plainly, that number. math_verify: equal in mathematics, by the package
    math-verify (pip install 'dpo_jax[math]')."""
    seed: RecipeSeed = 0
    """Seed of the answers and of which pairs are drawn; that of the training is --dpo.train.seed."""
    batch_size: Count = 32
    """Answers written at once, over all devices; one that is done makes room for the next. Changes no text."""
    sample: SampleConfig = part(
        SampleConfig,
        without=("temperature", "beams", "length_penalty"),
        instead="give --temperatures",
        max_new_tokens=512,
    )
    dpo: DPORun = stage(
        DPORun,
        *("reference", "holdout"),
        dpo=DPOLossConfig(beta=0.1, nll_coefficient=1.0),
        optimizer=OptimizerConfig(learning_rate=7e-7),
        train=TrainConfig(batch_size=16),
    )
    """Of the training of each round; its template and its dtype hold for the answers, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.temperatures), "--temperatures is empty: give at least one, such as 0.8")
        require(len(self.temperatures) <= self.rounds or self.temperatures == (0.8, 0.8, 1.3), _too_many(self))
        if self.answer_pattern is not None:
            try:
                groups = re.compile(self.answer_pattern).groups
            except re.error as error:
                require(False, f"--answer_pattern {self.answer_pattern}: {error}")
            else:
                require(groups == 1, f"--answer_pattern {self.answer_pattern}: has {groups} groups; give it one, (...)")

    def temperature(self, number: int) -> float:
        """Of the answers in round `number`, from 1."""
        return self.temperatures[min(number, len(self.temperatures)) - 1]


def _too_many(run: IterativeRPORun) -> str:
    return f"--temperatures has {len(run.temperatures)} for --rounds {run.rounds}; give at most one for each"
