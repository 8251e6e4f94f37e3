"""What a judge says of many rows, as a file that can be gone on with: by a prompt, or by a function of texts."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.complete.asking import answers
from dpo_jax.complete.asking.reply_cache import key_of
from dpo_jax.config import JudgeRun
from dpo_jax.data.rows.cells import as_number
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.data.sources.files import read_rows_or_problems
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import RowsFile
from dpo_jax.files.log import ProgressBar
from dpo_jax.judge.asked.judge_prompts import JudgePrompt
from dpo_jax.judge.asked.judging import Item, Judgement, side_of
from dpo_jax.judge.rewards.functions import RewardFunction, scores_of

AT_ONCE = 256
"""Rows between two writes of the file."""


def deciding(
    judge: JudgeRun,
    prompt: JudgePrompt | None,
    items: Sequence[Item],
    *,
    function: RewardFunction | None,
    weights: str | None,
) -> dict[str, Any]:
    """All that decides what `judge` says of `items`: the settings of the file of its judgements.

    `function`: where it is one; `weights`: fingerprint of a model of this machine.
    """
    beside = [dict(item.columns) for item in items]
    return {
        **answers.deciding(judge, weights),
        **({} if function is None else {"judge": function.identity}),
        "prompt": None if prompt is None else prompt.version,
        "criteria": judge.criteria,
        "seed": judge.seed,
        "data": key_of(
            {"items": [[i.number, [m.as_dict() for m in i.messages], i.responses, i.reference] for i in items]}
        ),
        "columns": None if function is None else key_of({"columns": json.dumps(beside, default=str)}),
    }


def as_row(item: Item, judgement: Judgement) -> dict[str, Any]:
    """A judgement for a file, with the number of its row and the hash of what was judged."""
    return {"row": item.number, "judged": judged(item.messages, item.responses), **judgement.as_row()}


def judged(messages: Sequence[Message], responses: Sequence[str]) -> str:
    """A hash of a row's messages and responses, in order: 16 hexadecimal digits."""
    return key_of({"messages": [message.as_dict() for message in messages], "responses": list(responses)})[:16]


def write_judgements(
    file: RowsFile, items: Sequence[Item], judge: Callable[[Sequence[Item]], Sequence[Judgement]], label: str
) -> None:
    """Judge the items of which the file has no row yet. `label`: of the progress bar."""
    with ProgressBar(label, len(items), done=len(file.rows)) as bar:
        while len(file.rows) < len(items):
            some = items[len(file.rows) : len(file.rows) + AT_ONCE]
            file.append(map(as_row, some, judge(some)))
            bar.update(len(file.rows))


def prompt_of_item(item: Item) -> Prompt:
    """As reward functions are given it, with all that they may read beside."""
    return Prompt(item.messages, item.messages[0].content if len(item.messages) == 1 else None, item.columns)


def by_function(items: Sequence[Item], function: RewardFunction, name: str) -> list[Judgement]:
    """A function's scores, as judgements."""
    prompts, texts, numbers = [], [], []
    for item in items:
        for response in item.responses:
            prompts.append(prompt_of_item(item))
            texts.append(response)
            numbers.append(item.number)
    scores = iter(scores_of(function, prompts, texts, np.asarray(numbers), name).tolist())
    found = []
    for item in items:
        own = tuple(next(scores) for _ in item.responses)
        found.append(Judgement(own, side_of(own), None, 0, ()))
    return found


class Scores(NamedTuple):
    """What a judge says of a row: a score for each response, None where unparsed; `judged` where the file has it."""

    scores: tuple[float | None, ...]
    judged: str | None


def read_scores(source: str) -> dict[int, Scores]:
    """Row -> its scores, as `write_judgements` wrote them, or another program. Raises `InputError`."""
    found: dict[int, Scores] = {}
    for line, row in read_rows_or_problems(source):
        if isinstance(row, BadRow):
            raise InputError(f"{source}, row {line}: {row}; restore the file")
        number, scores, of = row.get("row"), row.get("scores"), row.get("judged")
        if type(number) is not int or not isinstance(scores, list) or not all(map(_is_score, scores)):
            raise InputError(f"{source}, row {line}: no row number with a list of scores, as dpo-jax judge writes them")
        if number in found:
            raise InputError(f"{source}, row {line}: row {number} for the second time; judge each row once")
        found[number] = Scores(tuple(scores), of if isinstance(of, str) else None)
    return found


def _is_score(value: Any) -> bool:
    return value is None or (not isinstance(value, str) and as_number(value) is not None)
