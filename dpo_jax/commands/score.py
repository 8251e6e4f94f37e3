"""`dpo-jax score`: the reward of every response, one JSON object a row."""

from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.config import ClassHead, ScoreRun
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.comparison_sets import load_responses
from dpo_jax.data.sets.dataset import check_lengths
from dpo_jax.data.sets.loader import eval_batches
from dpo_jax.data.sources.files import read_rows_or_problems
from dpo_jax.files.folder import as_json
from dpo_jax.files.jsonl import Row, RowsFile, check_own
from dpo_jax.files.log import ProgressBar, say
from dpo_jax.judge.loading import Setting, check_output, load_vocabulary
from dpo_jax.judge.reward_model import RewardModel, check_score
from dpo_jax.weights.integrity.fingerprint import fingerprint
from dpo_jax.weights.opened import open_checkpoint

_AT_ONCE = 32  # batches between two writes of the file


def score(run: ScoreRun) -> Path:
    """Write `run.out`, rows in input order. An interrupted file is gone on with. Returns the path.

    Each row is an object with `row` (its number in the file, from 1) and `rewards`, one number for each response in the
    row's own order; beside it `chosen_reward` and `rejected_reward` for a row with `chosen` and `rejected`, `reward`
    for a row with a single response; of a model with auxiliary heads `labels`, {head: [{class: probability}, ...]}, an
    object for each response. With --copy the row's own columns stand in front.

    Rows that cannot be used are left out, and said. Raises `InputError`.
    """
    setting = Setting.of(run.mesh, run.data, run)
    out = check_output(run.out, run.data.files)
    check_own(out, lambda row: "reward" in row or "rewards" in row, "rewards")
    place = open_checkpoint(run.model)
    architecture, tokenizer = load_vocabulary(place, run.data)
    check_score(run.model, architecture)
    data = load_responses(
        run.data.files, tokenizer, run.data, vocab_size=architecture.vocab_size, on_bad_rows=run.on_bad_rows
    )
    check_lengths(data, architecture, run.data.max_length)
    say(data.summary())
    model, variables = setting.load(place, tokenizer)

    batches = eval_batches(data, run.batch_size, run.data.buckets)
    classes = place.classes
    rewards = RewardModel(model, variables, mesh=setting.mesh, batch_size=run.batch_size, classes=classes)
    settings = {"options": as_json(run), "model": fingerprint(variables), "data": data.fingerprint}
    originals = _rows(run.data.files, set(data.row_numbers.tolist())) if run.copy else {}
    with RowsFile(out, settings) as file, ProgressBar("rows", len(data)) as bar:
        bar.update(len(file.rows))
        step = _AT_ONCE * run.batch_size
        for start in range(len(file.rows), len(data), step):
            rows, found = np.arange(start, min(start + step, len(data))), list[Row]()
            scores, chances = rewards.judge(batches.of(rows))
            for at, i in enumerate(rows):
                number, there = int(data.row_numbers[i]), data.response_lengths[i] > 0
                labels = {head.name: _named(head, chances[head.name][at, there]) for head in classes}
                result = _result(number, scores[at, there].tolist(), data.extras["layout"][i])
                found.append({**originals.get(number, {}), **result, **({"labels": labels} if labels else {})})
            file.append(found)
            bar.update(len(file.rows))
        done = file.finish()
    say(f"{out}: {len(done):,} rows")
    return out


def _result(number: int, rewards: list[float], layout: Any) -> Row:
    row: Row = {"row": number, "rewards": rewards}
    if layout == "pair":
        row |= {"chosen_reward": rewards[0], "rejected_reward": rewards[1]}
    elif layout == "single":
        row["reward"] = rewards[0]
    return row


def _named(head: ClassHead, chances: np.ndarray) -> list[dict[str, float]]:
    """[K, C] probabilities under the names of the classes."""
    return [dict(zip(head.classes, of_one, strict=True)) for of_one in chances.tolist()]


def _rows(source: str, wanted: set[int]) -> dict[int, Row]:
    found = ((number, row) for number, row in read_rows_or_problems(source) if number in wanted)
    return {number: row for number, row in found if not isinstance(row, BadRow)}
