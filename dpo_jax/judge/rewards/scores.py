"""The scores of responses: by one judge, or several combined as one; of a whole file, resumable in the middle."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    open_reward,
    scores_and_said,
    scores_of,
    told_rows,
    try_out,
)
from dpo_jax.processes import distributed

SCORED = 512
"""Responses that are judged in one call; after each the scores are on the disk."""
LLAMA2 = ("helpfulness", "safety")
_TAKEN = (*LLAMA2, "row", "prompt", "response", "score", "kl", "tokens", "ended", "temperature", "sample")
"""Names that mean something else in the files that scores stand in."""


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

    def try_out(self, *data: PromptDataset | None) -> None:
        """Raise `InputError` where a function of the user would fail on any response to these prompts."""
        needed = self._whiten and (self._two or len(self._names) == 1)
        for prompts in filter(None, data):
            for judge, name in zip(self._checked, self._names, strict=True):
                if judge is not None:
                    try_out(judge, prompts.prompts, prompts.row_numbers, name, needed=needed)

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

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rows: np.ndarray, tagged: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores float32 [N], all finite under `whiten` only, and under their names those that they were combined from.

        `rows` int [N]: for messages; `tagged` bool [N]: prompts that a safety reward is to judge.
        """
        return self._scored(prompts, responses, rows, tagged, whiten=self._whiten, group=self._group)

    def as_they_are(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rows: np.ndarray, tagged: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As `__call__`, all finite, none standardised: what one model's responses score beside another's."""
        return self._scored(prompts, responses, rows, tagged, whiten=False, finite=True)

    def _scored(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        rows: np.ndarray,
        tagged: np.ndarray,
        *,
        whiten: bool,
        group: int | None = None,
        finite: bool | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        judges, names = self._opened(), self._names
        if self._two or len(judges) == 1:
            return scored(judges, names, prompts, responses, rows, tagged, whiten=whiten, finite=finite)
        finite = whiten if finite is None else finite
        return summed(judges, names, self._weights, prompts, responses, rows, group=group, finite=finite)


def scored(
    judges: Sequence[RewardFunction],
    names: Sequence[str],
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    rows: np.ndarray,
    tagged: np.ndarray,
    *,
    whiten: bool,
    finite: bool | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What `Judges` gives, of one judge or two, combined as Llama 2 did (`align/rewards.py`).

    `whiten`: for PPO: two are standardised over these responses, and scores that are not finite refused, as `finite`
    does, where it is given.
    """
    finite = whiten if finite is None else finite
    found = [
        scores_of(judge, prompts, responses, rows, name, finite=finite)
        for judge, name in zip(judges, names, strict=True)
    ]
    if len(found) == 1:
        return found[0], {}
    helpful, safe, at = (jnp.asarray(x) for x in (*found, tagged))
    every = jnp.ones(len(rows), bool)
    both = rewards.whitened(helpful, safe, at, every) if whiten else rewards.combined(helpful, safe, at)
    return np.asarray(both), dict(zip(LLAMA2, found, strict=True))


def summed(
    judges: Sequence[RewardFunction],
    names: Sequence[str],
    weights: Sequence[float],
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    rows: np.ndarray,
    *,
    group: int | None,
    finite: bool,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The weighted sum of several judges' scores, and each judge's own: NaN where it said None, which is in no sum.

    `group`: each is standardised first over so many neighbouring responses. Raises `InputError` for a response of which
    no judge says anything, and under `finite` for scores that are not finite.
    """
    both = [
        scores_and_said(judge, prompts, responses, rows, name, finite=finite)
        for judge, name in zip(judges, names, strict=True)
    ]
    found, said = np.stack([x for x, _ in both]), np.stack([x for _, x in both])
    if len(silent := rows[~said.any(axis=0)]):
        raise InputError(
            f"--reward: each gave None for responses to {told_rows(silent)} of the prompts; one must judge"
        )
    values = found if group is None else rewards.standardised(jnp.asarray(found), jnp.asarray(said), group)
    total = rewards.weighted_sum(jnp.asarray(values), jnp.asarray(said), jnp.asarray(weights, jnp.float32))
    return np.asarray(total), dict(zip(short_names(names), found, strict=True))


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
                file.append(_scored(some, [place[row["row"]] for row in some], data, judges))
                bar.update(len(file.rows))

    return write_once(path, settings, work)


def _scored(samples: Sequence[Row], at: Sequence[int], data: PromptDataset, judges: Judges) -> Iterator[Row]:
    rows = np.asarray([row["row"] for row in samples])
    texts = [row["response"] for row in samples]
    scores, parts = judges([data.prompts[i] for i in at], texts, rows, data.safety[list(at)])
    for i, row in enumerate(samples):
        values = {"score": scores[i], **{name: part[i] for name, part in parts.items()}}
        finite = {name: float(value) if np.isfinite(value) else None for name, value in values.items()}
        yield {"row": row["row"], "temperature": row["temperature"], "sample": row["sample"], **finite}
