"""How an option is refused: in one line, where the option is read."""

import datetime
from typing import Any

from dpo_jax.errors import InputError

ON_COMMAND_LINE = "(given on the command line)"
"""Stands in a CONFIG.py for a field that the command line must give: the model, the data, the run folder."""
OPEN: dict[str, Any] = {"model": ON_COMMAND_LINE, "out": ON_COMMAND_LINE}
"""What nearly every CONFIG.py leaves open; the data too, which need no word."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def require_day(date: str | None, option: str) -> None:
    """Refuse a day that is not written as YYYY-MM-DD."""
    try:
        same = date is None or datetime.date.fromisoformat(date).isoformat() == date
    except ValueError:
        same = False
    require(same, f"{option} {date} is no day; write it as YYYY-MM-DD")


def only_with(owner: object, choice: str, table: dict[str, tuple[str, ...]], section: str) -> None:
    """Refuse an option that was given though the value of `choice` makes it mean nothing."""
    chosen = getattr(owner, choice)
    for name, allowed in table.items():
        if getattr(owner, name) is not None and chosen not in allowed:
            raise InputError(
                f"--{section}.{name} has no effect with --{section}.{choice} {chosen};"
                f" it belongs to {', '.join(allowed)}"
            )
