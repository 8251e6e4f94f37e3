"""The pool of rejection sampling as a file: the best response to each prompt, and which of them are learnt.

A row of pool.jsonl: prompt, completion, score, iteration, temperature, sample, finish_reason (and `safety` where the
prompt has that tag). `dpo-jax sft` reads it as it is.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dpo_jax.align import rejection
from dpo_jax.complete.writing.k_responses import key_of
from dpo_jax.config import RejectionConfig
from dpo_jax.data.rows.messages import text_of
from dpo_jax.data.rows.preferences import parse_prompt
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.prompts import Prompt, PromptDataset
from dpo_jax.data.sources.checked_rows import CheckedRows
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import Row
from dpo_jax.judge.rewards.scores import SCORED, Judges, Responses
from dpo_jax.report.statistics import as_matrix


def hash_of(path: str) -> str:
    """SHA-256 of a file. Raises `InputError` where it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"--rejection.pool_from {path}: cannot be read ({error.strerror})") from error


def read_pool(path: str) -> list[Row]:
    """The rows of an earlier run's pool, one for each prompt. Raises `InputError` for anything else."""

    def parse(row: Row) -> Row:
        messages, text = parse_prompt({"prompt": row.get("prompt")})
        completion = text_of(row.get("completion"), "completion")
        iteration, temperature = row.get("iteration"), row.get("temperature")
        if not completion.strip() or type(iteration) is not int or not isinstance(temperature, int | float):
            raise BadRow("no row of a pool.jsonl", "it takes prompt, completion, iteration and temperature")
        prompt = Prompt(messages, text).plain
        kept = {name: row[name] for name in ("sample", "finish_reason", "safety") if name in row}
        return {"prompt": prompt, "completion": completion, "iteration": iteration, "temperature": temperature} | kept

    return list({key_of(row["prompt"]): row for row in CheckedRows(path, None).read(parse)}.values())


def judged(pool: Sequence[Row], judges: Judges, source: str, known: Sequence[Prompt] = ()) -> list[Row]:
    """The rows of an earlier pool with this run's scores. Raises `InputError` for one that is not finite.

    `known`: this run's prompts, whose other columns a reward may need.
    """
    scores: list[float] = []
    columns = {key_of(prompt.plain): prompt.columns for prompt in known}
    for first in range(0, len(pool), SCORED):
        rows = pool[first : first + SCORED]
        prompts = [
            Prompt(*parse_prompt({"prompt": row["prompt"]}), columns.get(key_of(row["prompt"]), {})) for row in rows
        ]
        numbers = np.arange(first + 1, first + 1 + len(rows))
        tagged = np.asarray([row.get("safety") is True for row in rows])
        scores += judges(Responses(prompts, [row["completion"] for row in rows], numbers, tagged)).total.tolist()
    bad = [str(i + 1) for i, score in enumerate(scores) if not math.isfinite(score)]
    if bad:
        raise InputError(
            f"{source}: the score of row {', '.join(bad[:5])} is not finite; remove it, or mend the reward"
        )
    return [{**row, "score": score} for row, score in zip(pool, scores, strict=True)]


def bests(
    data: PromptDataset, samples: Sequence[Row], scores: Sequence[Row], *, iteration: int, reward: str
) -> tuple[list[Row | None], list[str]]:
    """The best response to each prompt, in their order, None where every response is blank; and what to tell.

    `samples`, `scores`: the files of the iteration; `reward`: what the options call the judge.

    Raises `InputError` where no response to a prompt has a finite score, or no prompt's responses differ in score.
    """
    every = as_matrix(scores, len(data))
    lost = [str(n) for n in data.row_numbers[~np.isfinite(every).any(axis=1)]]
    if lost:
        raise InputError(
            f"--reward {reward}: no response to the prompts of rows {', '.join(lost[:8])} has a finite score"
            f" ({len(lost)} of {len(data)} prompts); mend the reward, or remove the rows"
        )
    blank = np.asarray([not row["response"].strip() for row in samples]).reshape(every.shape)
    usable = np.where(blank, np.nan, every)
    temperatures = np.asarray([row["temperature"] for row in samples[: every.shape[1]]])
    best = rejection.of_iteration(jnp.asarray(usable), jnp.asarray(temperatures), iteration)
    tied = np.asarray(rejection.best_of(jnp.asarray(usable)).tied)
    if tied.all():
        raise InputError(
            f"--reward {reward}: all {every.shape[1]} responses to a prompt have the same score, for every prompt, so"
            " there is no best; use a reward that tells them apart, or more samples"
        )
    said = []
    if (~np.isfinite(every)).any():
        said.append(f"{(~np.isfinite(every)).sum()} of {every.size} scores are not finite: those are never the best")
    if tied.any():
        said.append(f"{tied.sum()} of {len(data)} prompts have responses of one score only: the first of them counts")
    index = np.asarray(best.sample)
    if (index < 0).any():
        rows = ", ".join(map(str, data.row_numbers[index < 0][:8]))
        said.append(f"{(index < 0).sum()} of {len(data)} prompts have blank responses only and no best: rows {rows}")
    found: list[Row | None] = []
    for p, k in enumerate(index.tolist()):
        if k < 0:
            found.append(None)
            continue
        sample = samples[p * every.shape[1] + k]
        row = {"prompt": sample["prompt"], "completion": sample["response"], "score": float(best.score[p])}
        row |= {"iteration": iteration, "temperature": sample["temperature"], "sample": sample["sample"]}
        row["finish_reason"] = sample["finish_reason"]
        found.append(row | ({"safety": True} if data.safety[p] else {}))
    return found, said


def merged(earlier: Sequence[Row], found: Sequence[Row | None]) -> list[Row]:
    """The better of an earlier and a new response to each prompt: the new prompts in their order, then the others."""
    new = {key_of(row["prompt"]): row for row in found if row is not None}
    old = {key_of(row["prompt"]): row for row in earlier}
    keys = list(dict.fromkeys((*new, *old)))
    before = _arrays([old.get(key) for key in keys])
    after = rejection.merge(before, _arrays([new.get(key) for key in keys]))
    newer = np.asarray(after.score > before.score)
    return [new[key] if is_new else old[key] for key, is_new in zip(keys, newer, strict=True)]


def _arrays(rows: Sequence[Row | None]) -> rejection.Pool:
    pool = rejection.empty_pool(len(rows))
    there = [i for i, row in enumerate(rows) if row is not None]
    present = [row for row in rows if row is not None]
    at = jnp.asarray(there, jnp.int32)
    return rejection.Pool(
        pool.score.at[at].set(jnp.asarray([row["score"] for row in present], jnp.float32)),
        pool.iteration.at[at].set(jnp.asarray([row["iteration"] for row in present], jnp.int32)),
        pool.sample.at[at].set(jnp.asarray([row.get("sample", 0) for row in present], jnp.int32)),
        pool.temperature.at[at].set(jnp.asarray([row["temperature"] for row in present], jnp.float32)),
    )


def learnt(pool: Sequence[Row], config: RejectionConfig) -> list[Row]:
    """The rows of the pool that are learnt, in its order. Raises `InputError` where none is left."""
    if not pool:
        raise InputError(
            "every response to every prompt is blank, so there is nothing to learn from: look at samples.jsonl, and at"
            " --sample.logit_bias, --sample.stop_tokens and --data.template, or ask for longer ones with"
            " --sample.min_new_tokens"
        )
    kept = range(len(pool))
    if config.min_score is not None:
        kept = [i for i in kept if pool[i]["score"] >= config.min_score]
        if not kept:
            highest = max(row["score"] for row in pool)
            raise InputError(f"--rejection.min_score {config.min_score}: the highest score is {highest:.4g}; lower it")
    if config.share is not None:
        ranked = sorted(kept, key=lambda i: -pool[i]["score"])
        kept = sorted(ranked[: math.ceil(config.share * len(ranked))])
    return [pool[i] for i in kept]
