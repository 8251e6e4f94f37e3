"""What users say in dialogues: their turns in the rows of a file, split in two, and chained to dialogues of a length.

A row holds `turns` (a list of texts, as MT-Bench writes them), `messages` or `conversations` (of which the user's are
read), or one prompt (see `preferences.parse_prompt`). What assistants or systems said is not read.
"""

import random
from collections.abc import Sequence
from typing import Any

from dpo_jax.data.rows.messages import messages_of, text_of
from dpo_jax.data.rows.preferences import parse_prompt
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sources.checked_rows import CheckedRows, OnBadRows
from dpo_jax.errors import InputError

Turns = tuple[str, ...]
"""What a user says, one text a turn."""


def parse_user_turns(row: dict[str, Any]) -> Turns:
    """The user's turns of one row. Raises `BadRow`."""
    row = {name: value for name, value in row.items() if value is not None}
    name = next((name for name in ("turns", "messages", "conversations") if name in row), None)
    if name is None:
        messages, _ = parse_prompt(row)
        turns = tuple(m.content for m in messages if m.role == "user")
    elif not isinstance(row[name], list):
        raise BadRow(f"'{name}' is not a list", "write the turns of a dialogue, in order")
    elif name == "turns":
        turns = tuple(text_of(turn, name) for turn in row[name])
    else:
        turns = tuple(m.content for m in messages_of(row[name], name) if m.role == "user")
    if not turns:
        raise BadRow("no user turn", f"'{name}' holds nothing that a user says; remove the row")
    if not all(turn.strip() for turn in turns):
        raise BadRow("empty turn", "a turn of the user is blank; remove the row")
    return turns


def read_user_turns(
    source: str, *, limit: int | None = None, columns: str | None = None, on_bad_rows: OnBadRows = "refuse"
) -> tuple[Turns, ...]:
    """The user turns of every row of a file; rows that say the same are read once. `columns`: `--data.columns`.

    Raises `InputError` for an unreadable file, bad rows, or none that can be used.
    """
    return tuple(dict.fromkeys(CheckedRows(source, limit, columns=columns).read(parse_user_turns, on_bad_rows)))


def split(rows: Sequence[Turns], holdout: float, seed: int) -> tuple[tuple[Turns, ...], tuple[Turns, ...]]:
    """(for training, held out): about the share `holdout` of the rows is held out.

    No text of the one occurs in the other: a row of which only some turns do is in neither.
    """
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    held = set(order[: round(holdout * len(rows))])
    training = tuple(row for i, row in enumerate(rows) if i not in held)
    return training, apart_from(tuple(row for i, row in enumerate(rows) if i in held), training)


def apart_from(rows: Sequence[Turns], others: Sequence[Turns]) -> tuple[Turns, ...]:
    """The rows that share no text with `others`."""
    said = {turn for row in others for turn in row}
    return tuple(row for row in rows if not said.intersection(row))


def chain(rows: Sequence[Turns], *, turns: int, count: int, seed: int, source: str) -> list[Turns]:
    """`count` dialogues of exactly `turns` user turns: rows are put one behind the other, and cut where one is full.

    Rows are taken in a random order, each as often as any other, and no dialogue asks the same twice. A pure function
    of its arguments. Raises `InputError` where the rows hold fewer different turns; `source` names them.
    """
    different = len({turn for row in rows for turn in row})
    if different < turns:
        raise InputError(
            f"{source}: holds {different} different user turns, and a dialogue is to have {turns}; give more prompts,"
            " or fewer turns"
        )
    rng = random.Random(seed)
    deck: list[Turns] = []
    chains: list[Turns] = []
    while len(chains) < count:
        said: list[str] = []
        while len(said) < turns:
            if not deck:
                deck = rng.sample(list(rows), len(rows))
            said = list(dict.fromkeys((*said, *deck.pop())))
        chains.append(tuple(said[:turns]))
    return chains
