"""Comparisons between the stages of a recipe: held-out prompts, ratings by a judge's gaps, accuracies."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.config import RewardLossConfig, RewardRun
from dpo_jax.data.rows.comparisons import parse_comparison
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.rows.ratings import RATINGS
from dpo_jax.data.sets.comparison_sets import load_comparisons
from dpo_jax.data.sets.dataset import check_lengths
from dpo_jax.data.sets.loader import eval_batches
from dpo_jax.files.jsonl import Row
from dpo_jax.judge.figures.rewards import figures
from dpo_jax.judge.loading import Setting, load_vocabulary
from dpo_jax.judge.reward_model import RewardModel
from dpo_jax.weights.opened import open_checkpoint


def is_heldout(prompt: Any, share: float, seed: int) -> bool:
    """Whether the comparisons of a prompt are held out: the same answer in every round, and for every set.

    prompt: what tells prompts apart, JSON-able.
    """
    text = json.dumps([seed, prompt], ensure_ascii=False)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _messages_of(row: Row) -> Any:
    """The prompt of a row as messages; the row itself where it cannot be read (whoever learns from it will say so)."""
    try:
        return [list(message) for message in parse_comparison(row).messages]
    except BadRow:
        return row


def parted(rows: Iterable[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(rows to learn from, held-out rows), whole prompts at a time."""
    learnt: list[Row] = []
    heldout: list[Row] = []
    for row in rows:
        (heldout if is_heldout(_messages_of(row), share, seed) else learnt).append(row)
    return learnt, heldout


def rated(pairs: Sequence[Row]) -> list[Row]:
    """Pairs with a `rating`, in place of the degrees that people chose in Llama 2: by quarters of the judge's gaps.

    The quarter with the largest gaps between the two scores is "significantly better", and so on.
    """
    gaps = np.asarray([pair["score_chosen"] - pair["score_rejected"] for pair in pairs])
    order = np.argsort(-gaps, kind="stable")
    places = np.empty(len(pairs), int)
    places[order] = np.arange(len(pairs)) * len(RATINGS) // max(len(pairs), 1)
    strongest = RATINGS[::-1]
    return [pair | {"rating": strongest[place]} for pair, place in zip(pairs, places.tolist(), strict=True)]


def accuracies(model: Path, sources: Sequence[Path], options: RewardRun) -> list[Row]:
    """Of a reward model on files of comparisons: `pairs`, `accuracy` and its standard `error` for each; no ties."""
    setting = Setting.of(options.mesh, options.data, options.train)
    architecture, tokenizer = load_vocabulary(place := open_checkpoint(model))
    rewards = RewardModel(*setting.load(place, tokenizer), mesh=setting.mesh, batch_size=options.train.batch_size)
    found = []
    for source in sources:
        rules = RewardLossConfig(ties="drop")
        vocabulary = architecture.vocab_size
        data = load_comparisons(
            str(source), tokenizer, options.data, rules, vocab_size=vocabulary, on_bad_rows=options.on_bad_rows
        )
        check_lengths(data, architecture, options.data.max_length)
        scores = rewards.rewards(eval_batches(data, options.train.batch_size, options.data.buckets))
        judged = figures(scores, data.response_lengths, data.ranks)
        found.append({"pairs": len(data), "accuracy": judged["eval_accuracy"], "error": judged["eval_accuracy_error"]})
    return found
