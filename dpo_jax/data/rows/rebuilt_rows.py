"""Rows of published sets whose answers are not texts in columns of their own: what the readers know, made of them.

`layouts.py` names the columns; here stand whether a row is of that form, and what it is made into. Each maker returns
the row's values under the readers' names, and the places of those that a message may have to name.
"""

import json
from typing import Any

from dpo_jax.data.rows.problems import BadRow

Row = dict[str, Any]
Places = dict[str, tuple[str, ...]]
Rebuilt = tuple[Row, Places]

ARENA = ("prompt", "response_a", "response_b")
WINNERS = ("winner_model_a", "winner_model_b", "winner_tie")
_PAIR = ("question", "chosen", "rejected")


def is_labelled_dialogue(row: Row) -> bool:
    """Whether a dialogue of ms-swift's KTO ends with an answer that `label` calls good or bad."""
    messages, label = row["messages"], row.get("label")
    last = messages[-1] if isinstance(messages, list) and messages else None
    answered = isinstance(last, dict) and last.get("role", last.get("from")) in ("assistant", "gpt")
    others = {"prompt", "completion", "chosen", "rejected", "rejected_response", "rejected_messages", "responses"}
    return answered and str(label).lower() in ("true", "false") and not others & row.keys()


def is_lists_of_texts(row: Row) -> bool:
    """Whether `chosen` and `rejected` are lists of plain texts, as RewardBench 2 has them."""
    return all(
        isinstance(row[name], list) and row[name] and all(isinstance(text, str) for text in row[name])
        for name in ("chosen", "rejected")
    )


def ranked_lists(row: Row) -> Rebuilt:
    """Every answer of `chosen` is better than every one of `rejected`; within either list nothing is compared."""
    good, bad = row["chosen"], row["rejected"]
    places = ("chosen",) * len(good) + ("rejected",) * len(bad)
    return {"responses": [*good, *bad], "ranks": [1] * len(good) + [2] * len(bad)}, {"responses": places}


def is_arena(row: Row) -> bool:
    """Whether a prompt with two responses is as the Arena has them: lists of turns, or the three columns of a vote."""
    return row.keys() >= {*WINNERS} or all(_listed(row[name]) for name in ARENA)


def arena_votes(row: Row) -> Rebuilt:
    """Two answers to a prompt, each a JSON list with one text a turn (or plain texts), and three columns of the vote.

    Raises `BadRow`.
    """
    said = {name: _listed(row[name]) for name in ARENA}
    places: Places = {"responses": ARENA[1:]}
    better = {"better": _winner(row)} if row.keys() >= {*WINNERS} and "better" not in row else {}
    if not any(said.values()):
        return {"prompt": row["prompt"], "responses": [row[name] for name in ARENA[1:]]} | better, places
    asked, *others = said.values()
    answers = [answer for answer in others if answer and asked and len(answer) == len(asked)]
    if not asked or len(answers) < len(others):
        turns = ", ".join(f"'{name}' {len(texts or ())}" for name, texts in said.items())
        raise BadRow("prompt and responses do not have the same turns", f"as JSON lists: {turns}; remove the row")
    if len(asked) == 1:
        return {"prompt": asked[0], "responses": [answer[0] for answer in answers]} | better, places
    talks = [
        [m for q, a in zip(asked, answer, strict=True) for m in (_turn("user", q), _turn("assistant", a))]
        for answer in answers
    ]
    return {"responses": talks} | better, places


def _turn(role: str, text: Any) -> Row:
    return {"role": role, "content": text}


def _winner(row: Row) -> int | str:
    marks = [str(row[name]).strip().lower() for name in WINNERS]
    won = [name for name, mark in zip(WINNERS, marks, strict=True) if mark in ("1", "1.0", "true")]
    if len(won) != 1 or not set(marks) <= {"0", "0.0", "false", "1", "1.0", "true"}:
        held = ", ".join(f"{name}={mark[:10]}" for name, mark in zip(WINNERS, marks, strict=True))
        raise BadRow("no vote: exactly one of winner_model_a, winner_model_b, winner_tie must be 1", held)
    return (0, 1, "tie")[WINNERS.index(won[0])]


def _listed(value: Any) -> list[Any] | None:
    """The list that `value` is, or spells as JSON; None where it is another text."""
    if isinstance(value, list):
        return value
    found = _loaded(value, "[")
    return found if isinstance(found, list) else None


def _loaded(value: Any, start: str) -> Any:
    if not isinstance(value, str) or not value.lstrip().startswith(start):
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def is_spelled_pair(row: Row) -> bool:
    """Whether `text` is a JSON object of question, chosen and rejected, as RLHF-V's is."""
    if not isinstance(row["text"], str) or '"rejected"' not in row["text"]:
        return False
    found = _loaded(row["text"], "{")
    return isinstance(found, dict) and found.keys() >= {*_PAIR}


def spelled_pair(row: Row) -> Rebuilt:
    """The pair that `text` spells. Raises `BadRow` where it is about an image."""
    if "image" in row:
        detail = "leave the column 'image' out to train on the texts of 'text' alone"
        raise BadRow("RLHF-V: the pair in 'text' is about an image, which no model here sees", detail)
    question, chosen, rejected = (json.loads(row["text"])[name] for name in _PAIR)
    return {"prompt": question, "chosen": chosen, "rejected": rejected}, {}
