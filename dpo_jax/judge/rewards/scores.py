"""The scores of responses: by one judge, or several combined as one; of a whole file, resumable in the middle."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax.align import rewards
from dpo_jax.config import JudgedRun, is_url
from dpo_jax.data.sets.prompts import Prompt, PromptDataset
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import Row, RowsFile, write_once
from dpo_jax.files.log import ProgressBar
from dpo_jax.judge.rewards.functions import (
    ModelReward,
    RewardFunction,
    check_reward,
    judgement,
    open_reward,
    told_rows,
    try_out,
)
from dpo_jax.judge.rewards.step_scores import Steps, scaled, together
from dpo_jax.processes import distributed

SCORED = 512
"""Responses that are judged in one call; after each the scores are on the disk."""
LLAMA2 = ("helpfulness", "safety")
_TAKEN = (*LLAMA2, *"row prompt response score steps kl turns tokens ended done temperature sample".split())
"""Names that mean something else in the files that scores stand in."""


class Responses(NamedTuple):
    """N responses that are judged at once.

    Attributes:
      prompts, texts: of each.
      rows: int [N], of the prompts in their file, for messages.
      tagged: bool [N], whether a safety reward is to judge it.
    """

    prompts: Sequence[Prompt]
    texts: Sequence[str]
    rows: np.ndarray
    tagged: np.ndarray

    @classmethod
    def to(cls, data: PromptDataset, at: np.ndarray, texts: Sequence[str]) -> "Responses":
        """Texts that answer the prompts `at` of a data set."""
        return cls([data.prompts[i] for i in at], texts, np.asarray(data.row_numbers)[at], data.safety[at])


class Scores(NamedTuple):
    """What N responses score.

    Attributes:
      total: float32 [N].
      parts: under their names the scores [N] that it was combined from; empty of one judge.
      steps: what of `total` stands at the ends of steps (`judge/rewards/step_scores.py`); None where no judge gave any.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    steps: Steps | None = None


class Judges:
    """Every `--reward`, and `--safety_reward` where there is one; opened when first needed, given back by `close`."""

    def __init__(
        self,
        config: JudgedRun,
        *,
        mesh: Mesh,
        batch_size: int,
        whiten: bool = False,
        group: int | None = None,
    ):
        """`whiten`: see `scored`; `group`: neighbouring responses that each of several is standardised over.

        Raises `InputError` for a judge that cannot be opened, before the weights of one are read.
        """
        self._config, self._setting, self._whiten = config, {"mesh": mesh, "batch_size": batch_size}, whiten
        self._names = [name for name in (*config.rewards, config.safety_reward) if name is not None]
        self._weights = config.reward_weights or (1.0,) * len(config.rewards)
        self._group, self._two = group, config.safety_reward is not None
        checked = [check_reward(name, config) for name in self._names]
        self.described = [
            name if judge is None else judge.identity for name, judge in zip(self._names, checked, strict=True)
        ]
        self._checked, self._open = checked, list[RewardFunction]()

    def try_out(self, *data: PromptDataset | None) -> bool:
        """Raise `InputError` where a function of the user would fail on any response to these prompts.

        Returns whether one scores steps of a response.
        """
        needed = self._whiten and (self._two or len(self._names) == 1)
        by_steps = [
            try_out(judge, prompts.prompts, prompts.row_numbers, name, needed=needed)
            for prompts in filter(None, data)
            for judge, name in zip(self._checked, self._names, strict=True)
            if judge is not None
        ]
        return any(by_steps)

    def _opened(self) -> list[RewardFunction]:
        if not self._open:
            self._open = [
                open_reward(name, self._config, **self._setting) if judge is None else judge
                for name, judge in zip(self._names, self._checked, strict=True)
            ]
        return self._open

    def weights(self) -> list[Any]:
        """What reward models among them keep on the devices."""
        return [judge.variables for judge in self._opened() if isinstance(judge, ModelReward)]

    def close(self) -> None:
        """Make room on the devices."""
        self._open = []

    def identities(self) -> list[str]:
        """They change when a judge does."""
        return [judge.identity for judge in self._opened()]

    def __call__(self, responses: Responses) -> Scores:
        """What they score, all finite under `whiten` only."""
        return self._scored(responses, whiten=self._whiten, finite=self._whiten, group=self._group)

    def as_they_are(self, responses: Responses) -> Scores:
        """As `__call__`, all finite, none standardised: what one model's responses score beside another's."""
        return self._scored(responses, whiten=False, finite=True, group=None)

    def _scored(self, responses: Responses, *, whiten: bool, finite: bool, group: int | None) -> Scores:
        judges, names = self._opened(), self._names
        if self._two or len(judges) == 1:
            return scored(judges, names, responses, whiten=whiten, finite=finite)
        return summed(judges, names, self._weights, responses, group=group, finite=finite)


def scored(
    judges: Sequence[RewardFunction],
    names: Sequence[str],
    responses: Responses,
    *,
    whiten: bool,
    finite: bool,
) -> Scores:
    """What `Judges` gives, of one judge or two, combined as Llama 2 did (`align/rewards.py`).

    `whiten`: two are standardised over these responses, for PPO; `finite`: other scores are refused.
    """
    prompts, texts, rows, tagged = responses
    found = [judgement(one, prompts, texts, rows, name, finite=finite) for one, name in zip(judges, names, strict=True)]
    for name, one in zip(names, found, strict=True):
        if finite and len(silent := rows[~one.said]):
            raise InputError(
                f"--reward {name}: gave None for responses to {told_rows(silent)} of the prompts, and nothing else"
                " judges them; the last checkpoint is intact"
            )
    if len(found) == 1:
        return Scores(found[0].scores, {}, found[0].steps)
    if any(one.steps is not None for one in found):
        raise InputError(
            "--safety_reward: Llama 2's rule chooses between two scores of whole responses, and one of the two judges"
            " gave scores of steps"
        )
    found = [one.scores for one in found]
    helpful, safe, at = (jnp.asarray(x) for x in (*found, tagged))
    every = jnp.ones(len(rows), bool)
    both = rewards.whitened(helpful, safe, at, every) if whiten else rewards.combined(helpful, safe, at)
    return Scores(np.asarray(both), dict(zip(LLAMA2, found, strict=True)))


def summed(
    judges: Sequence[RewardFunction],
    names: Sequence[str],
    weights: Sequence[float],
    responses: Responses,
    *,
    group: int | None,
    finite: bool,
) -> Scores:
    """The weighted sum of several judges' scores, and each judge's own: NaN where it said None, which is in no sum.

    `group`: each is standardised first over so many neighbouring responses. Raises `InputError` for a response of which
    no judge says anything, and under `finite` for scores that are not finite.
    """
    prompts, texts, rows, _ = responses
    every = [judgement(one, prompts, texts, rows, name, finite=finite) for one, name in zip(judges, names, strict=True)]
    found, said = np.stack([one.scores for one in every]), np.stack([one.said for one in every])
    if len(silent := rows[~said.any(axis=0)]):
        raise InputError(
            f"--reward: each gave None for responses to {told_rows(silent)} of the prompts; one must judge"
        )
    factors = jnp.ones_like(found) if group is None else rewards.scales(jnp.asarray(found), jnp.asarray(said), group)
    values = found if group is None else rewards.standardised(jnp.asarray(found), jnp.asarray(said), group)
    by = jnp.asarray(weights, jnp.float32)
    total = rewards.weighted_sum(jnp.asarray(values), jnp.asarray(said), by)
    steps = together([scaled(one.steps, of) for one, of in zip(every, np.asarray(factors * by[:, None]), strict=True)])
    return Scores(np.asarray(total), dict(zip(short_names(names), found, strict=True)), steps)


def short_names(names: Sequence[str]) -> list[str]:
    """What several judges are called in logs and files, each by itself: the function, the kind, or the folder."""
    short: list[str] = []
    for name in names:
        own = name.rpartition(":")[2] if ".py:" in name else Path(name.partition(":")[0]).name
        own = "url" if is_url(name) else own
        own += "_" * (own in _TAKEN)
        numbered = (own, *(f"{own}_{i}" for i in range(2, len(short) + 2)))
        short.append(next(one for one in numbered if one not in short))
    return short


def part_figures(parts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """TRL's `rewards/NAME/mean` and `/std` (unbiased) of each judge over the responses that it said something of.

    Of Llama 2's two the means stand under `rewards/NAME`.
    """
    figures: dict[str, float] = {}
    for name, values in parts.items():
        own = np.asarray(values, np.float64)
        own = own[np.isfinite(own)]
        if name in LLAMA2:
            figures[f"rewards/{name}"] = float(np.mean(values))
        elif len(own):
            figures[f"rewards/{name}/mean"] = float(own.mean())
            figures[f"rewards/{name}/std"] = float(own.std(ddof=1)) if len(own) > 1 else 0.0
    return figures


def told_parts(parts: Mapping[str, np.ndarray], at: int) -> dict[str, float | None]:
    """What each judge said of response `at`, for a row of a file."""
    return {name: float(values[at]) if np.isfinite(values[at]) else None for name, values in parts.items()}


def write_scores(path: Path, data: PromptDataset, samples: Sequence[Row], judges: Judges, *, label: str) -> list[Row]:
    """The score of every row of `samples`, as rows of the file `path`: null where it is not finite."""
    place = {int(number): i for i, number in enumerate(data.row_numbers)}

    def settings() -> dict[str, Any]:
        written = hashlib.sha256(json.dumps(samples).encode()).hexdigest()
        return {"samples": written, "reward": judges.identities()}

    def work(file: RowsFile) -> None:
        with ProgressBar(label, len(samples), done=len(file.rows), shown=distributed.is_main()) as bar:
            while len(file.rows) < len(samples):
                some = samples[len(file.rows) : len(file.rows) + SCORED]
                at = np.asarray([place[row["row"]] for row in some])
                scores = judges(Responses.to(data, at, [row["response"] for row in some]))
                file.append(_told(row, {"score": scores.total} | scores.parts, i) for i, row in enumerate(some))
                bar.update(len(file.rows))

    return write_once(path, settings, work)


def _told(row: Row, scores: Mapping[str, np.ndarray], at: int) -> Row:
    return {"row": row["row"], "temperature": row["temperature"], "sample": row["sample"], **told_parts(scores, at)}
