"""Texts that go on with openings: written, judged, and measured under a second model. For `demo` and the recipes."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.complete.writing.writer import Draw, Some, Writer
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.files.jsonl import Row, read_lines
from dpo_jax.files.log import say
from dpo_jax.judge.rewards.functions import RewardFunction, scores_of
from dpo_jax.model.groups import response_logps
from dpo_jax.model.llama import Llama
from dpo_jax.report.statistics import by_prompt
from dpo_jax.sample import Request
from dpo_jax.types import PreferenceBatch


def write_judged(
    writer: Writer,
    path: Path,
    label: str,
    openings: Sequence[str],
    samples: int,
    *,
    seed: int,
    judge: RewardFunction,
    name: str,
    column: str = "score",
    reference: tuple[Llama, Any] | None = None,
) -> list[Row]:
    """Continue each opening `samples` times, judge, and keep the rows in `path`; or read them if they are there.

    Args:
      writer: its template is `raw`.
      openings: all different. A text depends on the seed, its opening's place among them, and its number.
      judge, name: gives a text its score, and what it is called in messages.
      column: what the score is called in the rows.
      reference: model and variables that the texts are also scored with (for the KL divergence), or None.

    Returns rows of `prompt`, `sample`, `response`, the score, `finish_reason` and `ids`, opening by opening; with a
    reference also `logps` and `reference_logps` of each token, at the sampling temperature.
    """
    if path.exists():
        say(f"{label}: from {path}")
        return read_lines(path)
    prompts = [writer.encoder.prompt_ids(opening) for opening in openings]
    place = {opening: i for i, opening in enumerate(openings)}
    requests = {(i, k): (i, k) for i in range(len(openings)) for k in range(samples)}
    settings = {"openings": list(openings), "samples": samples, "seed": seed, "sample": asdict(writer.config)}

    def key(row: Row) -> Request:
        return place[row["prompt"]], row["sample"]

    def judged(some: Some) -> list[Row]:
        asked = [openings[i] for (i, _), _ in some]
        texts = [response.text for _, response in some]
        numbers = np.asarray([i + 1 for (i, _), _ in some])
        scores = scores_of(judge, [opening_prompt(opening) for opening in asked], texts, numbers, name).tolist()
        return [
            {
                "prompt": opening,
                "sample": k,
                "response": response.text,
                column: score,
                "finish_reason": response.finish_reason,
                "ids": response.ids,
                "logps": response.logps,
            }
            for opening, ((_, k), response), score in zip(asked, some, scores, strict=True)
        ]

    def draws(rows: list[Row]) -> Iterator[Draw]:
        yield Draw(prompts, requests, seed, judged)
        if reference is not None:  # all texts are there
            rows.sort(key=key)
            _measure(*reference, [prompts[place[row["prompt"]]] for row in rows], rows, writer)

    return writer.write(
        path,
        label,
        settings | {"judge": judge.identity},
        draws,
        total=len(requests),
        key=key,
        counted=None,
        note=lambda rows: f"mean {column} {np.mean([row[column] for row in rows]):+.3f}  ",
    )


def _measure(
    model: Llama, variables: Any, prompts: Sequence[Sequence[int]], rows: Sequence[Row], writer: Writer
) -> None:
    """Add `reference_logps`, in batches of one shape, so that a row's figures do not depend on where it stopped."""
    width, size = -(-max(map(len, prompts)) // 32) * 32, writer.batch_size
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        asked, texts = prompts[start : start + size], [row["ids"] for row in some]
        fillers = [[0]] * (size - len(some))
        arrays: dict[str, Any] = {
            "prompts": _padded([*asked, *fillers], width),
            "prompt_lengths": np.asarray([*map(len, asked), *map(len, fillers)], np.int32),
            "responses": _padded([*texts, *fillers], writer.config.max_new_tokens)[:, None],
            "response_lengths": np.asarray([*map(len, texts), *map(len, fillers)], np.int32)[:, None],
            "weights": np.ones(size, np.float32),
            "rows": np.full(size, -1, np.int32),
        }
        group = PreferenceBatch(**arrays)
        logps = _score(variables, group, model=model, temperature=writer.config.temperature)
        for row, scores in zip(some, np.asarray(logps)[:, 0], strict=False):
            row["reference_logps"] = scores[: len(row["ids"])].tolist()


@partial(jax.jit, static_argnames=("model", "temperature"))
def _score(variables: Any, batch: PreferenceBatch, *, model: Llama, temperature: float) -> jax.Array:
    return response_logps(model.apply, variables, batch, layout="separate", temperature=temperature)


def _padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """int32 [B, width]."""
    return np.asarray([[*row, *[0] * (width - len(row))] for row in rows], np.int32)


def opening_prompt(opening: str) -> Prompt:
    """An opening as reward functions take it."""
    return Prompt((Message("user", opening),), opening)


def make_pairs(rows: Sequence[Row], column: str = "score") -> list[Row]:
    """Best against worst of the samples of each prompt, in the order of the prompts.

    Blank samples do not take part; where best and worst are equally good there is no pair.
    """
    pairs = []
    for prompt, group in by_prompt(rows):
        # A sample may end inside a character of several bytes; the broken one is no text to learn from.
        samples = [row | {"response": row["response"].rstrip("\N{REPLACEMENT CHARACTER}")} for row in group]
        samples = [row for row in samples if row["response"].strip()]
        if not samples:
            continue
        best, worst = (choose(samples, key=lambda row: row[column]) for choose in (max, min))
        if best[column] > worst[column]:
            row = {"prompt": prompt, "chosen": best["response"], "rejected": worst["response"]}
            pairs.append(row | {"score_chosen": best[column], "score_rejected": worst[column]})
    return pairs
