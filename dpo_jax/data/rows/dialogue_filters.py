"""Why a dialogue is not learnt from: phrases of its answers, their length, their language.

Zephyr (Tunstall et al. 2023, section 4.1) removes dialogues in which the assistant says that it has no emotions or
opinions. The phrases stand in `phrases/no_feelings.json`, lists of regular expressions by language; a file of the same
form adds others.
"""

import json
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from dpo_jax.errors import InputError

Turns = Sequence[dict[str, str]]
Filter = Callable[[Turns], str | None]
"""What is wrong with a dialogue, for the report, or None."""

SURE = 0.5
"""Smallest confidence with which a text's language is taken for known: a shorter one may be any."""


def answers(messages: Turns) -> list[str]:
    """What the assistant says in a dialogue."""
    return [message["content"] for message in messages if message["role"] == "assistant"]


def phrase_lists(files: Sequence[str] = ()) -> dict[str, re.Pattern[str]]:
    """Name of a list -> its phrases as one expression: the packaged list by language, then `files`.

    Raises `InputError` for a file that is no JSON object of language -> list of regular expressions.
    """
    packaged = resources.files("dpo_jax.data.rows").joinpath("phrases", "no_feelings.json").read_text(encoding="utf-8")
    found = {f"no feelings or opinions ({language})": phrases for language, phrases in json.loads(packaged).items()}
    for file in files:
        path = Path(file).expanduser()
        try:
            lists = json.loads(path.read_text(encoding="utf-8"))
            found |= {f"{path.name} ({language})": [str(x) for x in phrases] for language, phrases in lists.items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"--filter.phrases {file}: not readable as {{language: [phrase, ...]}}: {error}"
            ) from error
    try:
        return {name: re.compile("|".join(phrases), re.IGNORECASE) for name, phrases in found.items() if phrases}
    except re.error as error:
        raise InputError(f"--filter.phrases: a phrase is no regular expression: {error}") from error


def says(lists: dict[str, re.Pattern[str]]) -> Filter:
    """Dialogues with an answer that holds one of these phrases."""

    def reason(messages: Turns) -> str | None:
        for answer in answers(messages):
            text = answer.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
            for name, phrases in lists.items():
                if phrases.search(text):
                    return f"phrase: {name}"
        return None

    return reason


def length(least: int, most: int) -> Filter:
    """Dialogues with an answer of less than `least` or more than `most` characters."""

    def reason(messages: Turns) -> str | None:
        sizes = [len(answer.strip()) for answer in answers(messages)]
        return (
            "an answer is too short" if min(sizes) < least else "an answer is too long" if max(sizes) > most else None
        )

    return reason


def language(allowed: Sequence[str], identify: Callable[[str], tuple[str, float]]) -> Filter:
    """Dialogues with a turn surely in another language. `identify(text)`: code and confidence."""

    def reason(messages: Turns) -> str | None:
        for message in messages:
            code, sure = identify(message["content"])
            if code not in allowed and sure >= SURE:
                return f"language: {code}"
        return None

    return reason
