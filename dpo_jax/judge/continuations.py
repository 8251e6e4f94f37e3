"""Texts that go on with openings: written, judged, and measured under a second model. For `demo` and the recipes."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.complete.responses import Response, answers
from dpo_jax.config import SampleConfig
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.files.jsonl import Row, RowsFile, read_lines
from dpo_jax.files.log import ProgressBar, say
from dpo_jax.judge.reward_functions import RewardFunction, scores_of
from dpo_jax.model.groups import response_logps
from dpo_jax.model.llama import Llama
from dpo_jax.report.statistics import by_prompt
from dpo_jax.sample import Request
from dpo_jax.types import PreferenceBatch


@dataclass(frozen=True)
class Writer:
    """All that continuing openings takes, but for the weights.

    Attributes:
      model, tokenizer, encoder: of the models that write; the encoder's template is `raw`.
      config: with all terminators.
      batch_size: texts at once.
      judge, name: gives a text its score, and what it is called in messages.
      column: what the score is called in the rows.
    """

    model: Llama
    tokenizer: PreTrainedTokenizerBase
    encoder: ConversationEncoder
    config: SampleConfig
    batch_size: int
    judge: RewardFunction
    name: str
    column: str = "score"

    def write(
        self,
        path: Path,
        label: str,
        variables: Any,
        openings: Sequence[str],
        samples: int,
        *,
        seed: int,
        reference: Any = None,
        model: Llama | None = None,
    ) -> list[Row]:
        """Continue each opening `samples` times, judge, and keep the rows in `path`; or read them if they are there.

        Args:
          variables: of the model that writes.
          openings: all different. A text depends on the seed, its opening's place among them, and its number.
          reference: of the model that its texts are also scored with (for the KL divergence), or None.
          model: that writes, where it is built otherwise than `self.model` (with adapters).

        Returns rows of `prompt`, `sample`, `response`, the score, `finish_reason` and `ids`, opening by opening; with a
        reference also `logps` and `reference_logps` of each token, at the sampling temperature.
        """
        if path.exists():
            say(f"{label}: from {path}")
            return read_lines(path)
        wanted = [(i, k) for i in range(len(openings)) for k in range(samples)]
        prompts = [self.encoder.prompt_ids(opening) for opening in openings]
        settings = {"openings": list(openings), "samples": samples, "seed": seed, "sample": asdict(self.config)}
        settings |= {"judge": self.judge.identity}
        place = {opening: i for i, opening in enumerate(openings)}

        def request(row: Row) -> Request:
            return place[row["prompt"]], row["sample"]

        with RowsFile(path, settings) as file, ProgressBar(label, len(wanted), done=len(file.rows)) as bar:
            start, tokens = time.monotonic(), 0
            done = {request(row) for row in file.rows}
            for some in answers(
                self.model if model is None else model,
                variables,
                self.tokenizer,
                prompts,
                seed=seed,
                config=self.config,
                batch_size=self.batch_size,
                requests=[each for each in wanted if each not in done],
                raw=True,
            ):
                file.append(self._rows(openings, some))
                tokens += sum(len(response.ids) for _, response in some)
                mean = np.mean([row[self.column] for row in file.rows])
                speed = tokens / (time.monotonic() - start)
                bar.update(len(file.rows), f"mean {self.column} {mean:+.3f}  {speed:.0f} tokens/s")
            file.rows.sort(key=request)
            if reference is not None:
                self._measure(reference, prompts, file.rows, place)
            return file.finish()

    def _rows(self, openings: Sequence[str], some: Sequence[tuple[Request, Response]]) -> list[Row]:
        texts = [response.text for _, response in some]
        prompts = [opening_prompt(openings[i]) for (i, _), _ in some]
        numbers = np.asarray([i + 1 for (i, _), _ in some])
        scores = scores_of(self.judge, prompts, texts, numbers, self.name).tolist()
        return [
            {
                "prompt": openings[i],
                "sample": k,
                "response": response.text,
                self.column: score,
                "finish_reason": response.finish_reason,
                "ids": response.ids,
                "logps": response.logps,
            }
            for ((i, k), response), score in zip(some, scores, strict=True)
        ]

    def _measure(
        self, reference: Any, prompts: Sequence[Sequence[int]], rows: list[Row], place: dict[str, int]
    ) -> None:
        """Add `reference_logps`, in batches of one shape, so that a row's figures do not depend on where it stopped."""
        width = -(-max(map(len, prompts)) // 32) * 32
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            asked, texts = [prompts[place[row["prompt"]]] for row in some], [row["ids"] for row in some]
            fillers = [[0]] * (self.batch_size - len(some))
            arrays: dict[str, Any] = {
                "prompts": _padded([*asked, *fillers], width),
                "prompt_lengths": np.asarray([*map(len, asked), *map(len, fillers)], np.int32),
                "responses": _padded([*texts, *fillers], self.config.max_new_tokens)[:, None],
                "response_lengths": np.asarray([*map(len, texts), *map(len, fillers)], np.int32)[:, None],
                "weights": np.ones(self.batch_size, np.float32),
                "rows": np.full(self.batch_size, -1, np.int32),
            }
            group = PreferenceBatch(**arrays)
            logps = _score(reference, group, model=self.model, temperature=self.config.temperature)
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
            pairs.append(
                {
                    "prompt": prompt,
                    "chosen": best["response"],
                    "rejected": worst["response"],
                    "score_chosen": best[column],
                    "score_rejected": worst[column],
                }
            )
    return pairs


# ---------------------------------------------------------------- figures
