"""Options of `dpo-jax rejection`: how many responses are drawn and which are learnt, and of the run around it."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from dpo_jax.config.checks import Options, not_given, require
from dpo_jax.config.sections import OptimizerConfig, SampleConfig
from dpo_jax.config.sft import SFTDataConfig, SFTLossConfig
from dpo_jax.config.training import JudgedRun


@dataclass(frozen=True)
class RejectionConfig(Options):
    """What is drawn, and which of it is learnt. The formulas stand in `dpo_jax/align/rejection.py`."""

    samples: int = 10
    """K: responses to each prompt in an iteration, at each temperature (Llama 2: 10 to 100)."""
    temperatures: tuple[float, ...] = (1.0,)
    """Temperatures to sample at (Llama 2 found 1.2 to 1.3 best for its RLHF models); the best of all of them counts."""
    iterations: int = 1
    """How often to sample, to judge and to fine-tune; each iteration goes on with the model of the one before."""
    pool: Literal["all", "latest"] = "all"
    """all: learn the best response to each prompt of all iterations so far (Llama 2 since V4). latest: of this one."""
    pool_from: str | None = None
    """pool.jsonl of an earlier run, to be merged in; its responses are judged anew, by this run's reward."""
    student: str | None = None
    """Model to be fine-tuned in place of --model, which then only samples (Llama 2: the bests of the 70B taught the
    smaller ones)."""
    share: float | None = None
    """Learn only this share of the bests, those of the highest score. Not given: all."""
    min_score: float | None = None
    """Learn only bests of at least this score. Not given: all."""
    eval_samples: int | None = not_given(1)
    """Responses to each prompt of --eval_data."""
    eval_temperature: float | None = None
    """Temperature of those. Not given: the first of `temperatures`."""

    def __post_init__(self) -> None:
        require(self.samples >= 2, f"--rejection.samples {self.samples}: the best of K takes at least 2")
        require(bool(self.temperatures), "--rejection.temperatures is empty: give at least one, such as 1.0")
        for t in self.temperatures:
            ok = 0 < t < math.inf
            require(ok, f"--rejection.temperatures {t}: must be positive (greedy samples would all be equal)")
        distinct = len(set(self.temperatures)) == len(self.temperatures)
        require(distinct, "--rejection.temperatures names one twice; raise --rejection.samples instead")
        self.at_least("--rejection.", iterations=1, eval_samples=1)
        require(
            self.iterations == 1 or self.student is None,
            "--rejection.iterations has no effect with --rejection.student: the model that samples stays the same;"
            " raise --rejection.samples",
        )
        require(
            self.pool_from is None or self.pool == "all",
            "--rejection.pool_from has no effect with --rejection.pool latest",
        )
        require(self.share is None or 0 < self.share <= 1, "--rejection.share must lie in (0, 1]")
        require(
            self.min_score is None or math.isfinite(self.min_score), "--rejection.min_score must be a finite number"
        )
        t = self.eval_temperature
        require(t is None or 0 <= t < math.inf, "--rejection.eval_temperature must not be negative")
        require(
            t != 0 or self.eval_samples in (None, 1),
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
    sample_batch_size: int = 32
    """Responses written at once, over all devices; one that is done makes room for the next. Changes no text."""
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    optimizer: OptimizerConfig = field(default_factory=partial(OptimizerConfig, learning_rate=2e-5))
    data: SFTDataConfig = field(default_factory=partial(SFTDataConfig, train_on="last"))
    sft: SFTLossConfig = field(default_factory=SFTLossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        sample, rejection = self.sample, self.rejection
        plain = sample.temperature == 1 and sample.beams is None
        require(plain, "--sample.temperature and --sample.beams have no effect: give --rejection.temperatures")
        require(
            self.data.kind == "dialogues", "--data.kind has no effect: rejection sampling learns answers to prompts"
        )
        unused = self.train.eval_every is None and self.checkpoint.best is None
        require(unused, "--train.eval_every and --checkpoint.best have no effect: the held-out data are prompts")
        frozen = self.train.frozen_dtype is None or self.lora.rank > 0
        require(frozen, "--train.frozen_dtype has no effect: nothing is frozen without --lora.rank")
        require(
            self.longest_prompt > 0,
            f"--sample.max_new_tokens {sample.max_new_tokens} leaves no room for a prompt in --data.max_length"
            f" {self.data.max_length}",
        )
        self.at_least("--", sample_batch_size=1)
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
