"""What a judge thinks of the answers of a version of a model to the prompts of a recipe."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dpo_jax.config import PPORun, RejectionRun
from dpo_jax.data.rows.preferences import parse_prompt
from dpo_jax.data.sets.prompts import Prompt, other_columns
from dpo_jax.data.sources.files import read_rows
from dpo_jax.errors import InputError, naming
from dpo_jax.files.jsonl import Row
from dpo_jax.judge.rewards.functions import open_reward, scores_of
from dpo_jax.mesh import batch_parts, make_mesh

_JUDGED = 256
"""Answers in one call of a judge, and as many more as the last prompt has."""

log = logging.getLogger(__name__)


def read_prompts(source: str) -> dict[int, Prompt]:
    """Row -> its prompt. Raises `InputError`."""
    found = {}
    for number, row in read_rows(source):
        with naming(f"{source}: row {number}"):
            found[number] = Prompt(*parse_prompt(row), other_columns(row))
    return found


def judge_answers(
    rows: Sequence[Row], prompts: Mapping[int, Prompt], judge: str, like: PPORun | RejectionRun, out: str
) -> list[Row]:
    """The rows with the judge's `score` of each answer. One without a score (a reply that cannot be read) is left out.

    Args:
      rows: answers, with the `row` of their prompt; those to one prompt stand together.
      prompts: row -> prompt.
      judge: as --reward of `dpo-jax ppo`.
      like: gives time-outs, dtypes, the mesh, and whether texts are raw.
      out: the recipe's folder; the replies of a judge:FILE.yaml are kept beside it, in OUT.replies.

    Raises `InputError` where no answer gets a score.
    """
    devices = make_mesh(**dataclasses.asdict(like.mesh))
    setting = dataclasses.replace(like, out=out)
    function = open_reward(judge, setting, mesh=devices, batch_size=8 * batch_parts(devices))
    judged: list[Row] = []
    for some in chunks(rows):
        asked, numbers = [prompts[row["row"]] for row in some], np.asarray([row["row"] for row in some])
        texts = [row["response"] for row in some]
        scores = scores_of(function, asked, texts, numbers, judge, finite=False).tolist()
        judged += [row | {"score": score} for row, score in zip(some, scores, strict=True) if math.isfinite(score)]
    left_out = len(rows) - len(judged)
    if not judged:
        raise InputError(f"--judge {judge}: none of {len(rows)} answers got a score that is a number; see its replies")
    if left_out:
        log.warning("--judge %s: %d of %d answers got no score and are left out", judge, left_out, len(rows))
    return judged


def chunks(rows: Sequence[Row], most: int = _JUDGED) -> Iterator[list[Row]]:
    """The rows in calls of about `most`; the answers to one prompt are in one, since a judge may compare them."""
    some: list[Row] = []
    for row in rows:
        if len(some) >= most and row["row"] != some[-1]["row"]:
            yield some
            some = []
        some.append(row)
    if some:
        yield some
