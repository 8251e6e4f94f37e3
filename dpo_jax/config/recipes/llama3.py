"""Options of `dpo-jax recipe llama3`."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from dpo_jax.config.bases import ReadsModels
from dpo_jax.config.optimizer import OptimizerConfig
from dpo_jax.config.options import (
    SET_BY_RECIPE,
    Count,
    RecipeSeed,
    Several,
    Share,
    Warm,
    left_out,
    require,
    stage,
)
from dpo_jax.config.recipes.llama2_chat import JUDGED
from dpo_jax.config.training.dpo import DPOLossConfig, DPORun
from dpo_jax.config.training.rejection import RejectionRun
from dpo_jax.config.training.reward import RewardRun
from dpo_jax.config.training.sft import SFTRun
from dpo_jax.config.values import built
from dpo_jax.errors import InputError

_AVERAGED = ("dpo", "optimizer", "train", "pairs")
"""Where the options lie by which averaged models may differ."""
_HOW = (
    *(f"train.{name}" for name in ("accumulate", "remat", "attention", "layout", "peak_flops")),
    *("dpo.reference", "dpo.ties"),  # no pair is a tie
)
"""Options of how the same model is computed, by which nothing worth averaging differs."""
_ASKED = ("sample", "mesh", "data.template", "data.date", "data.max_length", "train.dtype", "train.attention")
"""Options of --rejection that are of the answers that are compared, and so have an effect with --stages dpo."""
_SHORT = "has no effect with --stages dpo (the CONFIG of that form is llama3_rounds_dpo)"


@dataclass(frozen=True, kw_only=True)
class Llama3Run(ReadsModels):
    """Llama 3's rounds of post-training (Llama 3 report 2024, section 4.1): `dpo-jax recipe llama3`.

    In each round the newest model answers the prompts and a judge compares its answers in place of the annotators; a
    reward model learns from all comparisons so far; the best model so far answers each prompt K times, and the
    pre-trained model is fine-tuned on the answers that the reward model likes best; DPO on the newest pairs follows;
    and models that differ as --average_over says are averaged. sft, reward, rejection and dpo hold the options of the
    stages, which are runs of those commands.
    """

    model: str
    """The pre-trained model; with --stages dpo the model that the first round answers with. A Hugging Face folder, a
    hub id, a .gguf file, a checkpoint of ours, or smollm2."""
    prompts: str
    """Prompts: rows with `prompt` or `messages`."""
    judge: str
    """What compares the answers of the newest model, in place of annotators: as --reward of `dpo-jax ppo`, such as
    vader, FILE.py:FUNCTION, a URL, judge:FILE.yaml, or a reward model."""
    out: str
    """Folder of all rounds; an interrupted recipe goes on with the same command."""
    sft_data: str | None = None
    """Dialogues for the first model, V0, as for `dpo-jax sft`."""
    preferences: str | None = None
    """Comparisons that the reward models learn from beside those of the rounds, as for `dpo-jax reward`; a row with
    `edited` beside `chosen` and `rejected` ranks edited > chosen > rejected."""
    rounds: Count = 6
    """Rounds (Llama 3: 6)."""
    stages: Literal["all", "dpo"] = "all"
    """dpo: the short form. No reward model, no fine-tuning: each round is DPO, from the best model so far."""
    average_over: tuple[str, ...] = ()
    """Other runs of the DPO stage, each by what is different in it, such as train.seed=1,
    optimizer.learning_rate=5e-6, dpo.nll_coefficient=0.1 or pairs=all (the pairs of all rounds): their models and that
    of the stage itself are averaged, uniformly. Not given: one model, and no averaging."""
    pair_samples: Several = 4
    """Answers of the newest model to each prompt, of which the judge's best and worst make a pair."""
    pair_temperature: Warm = 1.0
    """Temperature of those."""
    batch_size: Count = 32
    """Answers written at once for the comparisons, over all devices."""
    heldout: Share = 0.1
    """Share of the prompts, by a hash, whose comparisons nothing learns from: they measure the reward models."""
    seed: RecipeSeed = 0
    """Seed of the answers that are compared, and of which prompts are held out."""
    sft: SFTRun = stage(SFTRun, "holdout")
    """Of the run that gives V0."""
    reward: RewardRun = stage(RewardRun, "mix_data", "mix", "holdout", "reward.margin", "reward.margin_scale")
    """Of the reward models: from the pre-trained model, without a margin."""
    rejection: RejectionRun = stage(
        RejectionRun,
        *JUDGED,
        *(f"rejection.{name}" for name in ("pool", "pool_from", "student", "iterations")),
        reward=SET_BY_RECIPE,
    )
    """Of the fine-tuning on the best answers: --rejection.rejection.samples is K (Llama 3: 10 to 30). Its template and
    date, its dtype, its mesh and --rejection.sample.* hold for the answers that are compared, too; with --stages dpo
    only those have an effect."""
    dpo: DPORun = stage(
        DPORun,
        *("reference", "holdout"),
        dpo=DPOLossConfig(beta=0.1, nll_coefficient=0.2, mask_format_tokens=True),
        optimizer=OptimizerConfig(learning_rate=1e-5),
    )
    """Of the DPO stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages == "dpo":
            for name in ("sft_data", "preferences"):
                require(getattr(self, name) is None, f"--{name} {_SHORT}")
            for name in ("sft", "reward"):
                require(not self.given(name), f"--{name}.* {_SHORT}")
            plain, given = (_flat(dataclasses.asdict(one)) for one in (self.usual("rejection"), self.rejection))
            for name, value in plain.items():
                asked = name in _ASKED or name.partition(".")[0] in _ASKED
                require(asked or given[name] == value, f"--rejection.{name} {_SHORT}")
        else:
            require(self.sft_data is not None, "give --sft_data DIALOGUES: the first model, V0, is fine-tuned on them")
        seen: dict[str, tuple[DPORun, bool]] = {}
        for name in self.average_over:
            one = self.variant(name)
            twice = next((other for other, known in seen.items() if known == one), None)
            same = f"--average_over names {twice} twice, as {name}; an average of equal models is none"
            require(twice is None, same if twice != name else same.replace(f", as {name}", ""))
            seen[name] = one

    def variant(self, spec: str) -> tuple[DPORun, bool]:
        """The options of another run of the DPO stage, OPTION=VALUE, and whether it learns the pairs of all rounds.

        Raises `InputError` for what is no such option, and for one that changes nothing.
        """
        option, equals, text = spec.partition("=")
        section, dot, rest = option.partition(".")
        known = ", ".join(f"{name}.*" for name in _AVERAGED[:-1])
        require(equals and section in _AVERAGED, f"--average_over {spec}: write OPTION=VALUE, of {known} or pairs=all")
        if section == "pairs":
            require((option, text) == ("pairs", "all"), f"--average_over {spec}: pairs=all is the only other mix")
            return self.dpo, True
        inner = getattr(self.dpo, section)
        require(dot and rest in {f.name for f in dataclasses.fields(inner)}, f"--average_over {spec}: no such option")
        idle = option in _HOW or f"dpo.{option}" in left_out(type(self))
        require(not idle, f"--average_over {spec}: changes nothing in the model")
        try:
            other = built(type(self.dpo), {option: [text]}, self.dpo, "(--average_over takes OPTION=VALUE)")
        except InputError as error:
            raise InputError(f"--average_over {spec}: {error}") from error
        same = getattr(getattr(other, section).settled, rest) == getattr(inner.settled, rest)
        require(not same, f"--average_over {spec}: is what --dpo.{option} is already, and changes nothing")
        return other, False


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their names on the command line."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
