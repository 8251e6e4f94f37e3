"""Rows of instruction and dialogue files -> one form, whatever the layout.

Understood layouts (a column that is null counts as absent):

* `messages`, or `conversations` (ShareGPT): the whole dialogue as a list of messages. Copies of its turns, as a prompt
  (UltraChat) and an answer (Magpie), may stand beside it.
* `prompt`, `instruction` or `question` with an optional `input` or `context` (Alpaca, Dolly), or a list of messages
  that a user ends; and the answer to it in `completion`, `response`, `answer` or `output`: a text, or a list of
  messages.
* `history` (LLaMA-Factory): a list of [user, assistant], what was said before the instruction.
* preference rows (see `preferences.py`): the dialogue that ends with `chosen`, as Zephyr and the DPO paper train on. Of
  unpaired rows (`label`) those with a good completion.

A `system` or `system_prompt` column holds a system prompt, `tools` what the template may say of tools; turns that are
marked as not to be learnt: see `messages.py`. `finish_reason` "length" (`dpo-jax generate` writes it) says that the
last answer was cut: it is learnt without a terminator. With `messages`, `as_spelled`: {"prompt", "answer"}, the texts
that `--data.template raw` is to see (see `store_schema.py`).

A dialogue has at most one system message, in front, then user
and assistant in turn, the user first, the assistant last; no turn is blank (a system message may be).
"""

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_jax.data.rows.comparisons import compares_replies, parse_preference
from dpo_jax.data.rows.layouts import ANSWERS, DIALOGUE_COLUMNS, DIALOGUE_ROW, PROMPT_COLUMNS
from dpo_jax.data.rows.messages import (
    SYSTEM_COLUMNS,
    Message,
    answer_of,
    check_tools,
    columns_of,
    messages_of,
    text_of,
    turns_of,
    with_system,
    with_tools,
)
from dpo_jax.data.rows.preferences import parse_prompt
from dpo_jax.data.rows.problems import BadRow, Severity
from dpo_jax.data.rows.readable import Readable, missing, readable

CUT = "length"
"""The `finish_reason` of an answer that was cut."""

UNDERSTOOD = (
    "--data.columns response=NAME reads another column; understood are messages, prompt + response and the layouts of "
    "docs/data.md"
)


@dataclass(frozen=True)
class Dialogue:
    """What was said, in turn.

    Attributes:
      messages: at most one system message, then user and assistant in turn, an assistant message last.
      raw: (prompt, answer) as the row spells them, for `--data.template raw`; None where the prompt consists of several
        messages, which only a template can join.
      cut: the last answer does not end where it ends here, so no terminator follows.
    """

    messages: tuple[Message, ...]
    raw: tuple[str, str] | None
    cut: bool = False


def parse_dialogue(row: dict[str, Any]) -> Dialogue:
    """Read one row of any layout (see the module).

    Raises `BadRow`: says which field, and how to mend it.
    """
    row = readable(row)
    if not DIALOGUE_ROW.intersection(row):
        raise BadRow("unknown column names", f"{columns_of(row)}; {UNDERSTOOD}")
    if str(row.get("label")).lower() == "false":
        raise BadRow("'label' is false: no answer to learn from", severity="lost")
    severity: Severity = "bad"
    if "chosen" in row or "rejected" in row or (compares_replies(row) and not is_answer(row)):
        pair = parse_preference(row, compared=False)
        assert pair.chosen is not None, "a pair has both"
        raw = None if pair.raw is None else (pair.raw[0], pair.chosen if pair.raw[1] is None else pair.raw[1])
        dialogue = Dialogue((*pair.messages, Message("assistant", pair.chosen)), raw)
        if not any(name in row for name in (*PROMPT_COLUMNS, "messages")):
            severity = "noise"  # implicit prompts, where a turn is blank here and there
    else:
        given = next((name for name in DIALOGUE_COLUMNS if name in row), None)
        messages = None if given is None else _list_of_messages(row, given)
        dialogue = _answered(row) if given is None or messages is None else _whole(row, given, messages)
    _check_turns(dialogue.messages, severity)
    messages = with_tools(dialogue.messages, row)
    return replace(dialogue, messages=messages, cut=row.get("finish_reason") == CUT)


def is_answer(row: dict[str, Any]) -> bool:
    """Whether `output` is one answer, spelled as messages, and no list of several."""
    value = row.get("output")
    return isinstance(value, list) and all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in value)


def _list_of_messages(row: dict[str, Any], name: str) -> tuple[Message, ...] | None:
    """The messages of a whole dialogue; None where they are the prompt of an answer in another column."""
    if not isinstance(row[name], list):
        raise BadRow(f"'{name}' is not a list", 'write [{"role": "user", "content": ...}, ...]')
    messages = messages_of(row[name], name)
    answered = any(answer in row for answer in ANSWERS)
    return None if answered and messages[-1].role == "user" else messages


def _whole(row: dict[str, Any], name: str, messages: tuple[Message, ...]) -> Dialogue:
    """A row with the whole dialogue in the field `name`."""
    others = [
        other for other in (*DIALOGUE_COLUMNS, *PROMPT_COLUMNS, *ANSWERS, "history") if other in row and other != name
    ]
    first = next((m.content for m in messages if m.role == "user"), None)
    if others == ["prompt"] and isinstance(row["prompt"], str) and first is not None:
        if row["prompt"].strip() != first.strip():
            raise BadRow(f"'prompt' is not the first user message of '{name}'", "keep one of the two columns")
    elif others and not (
        {*PROMPT_COLUMNS}.intersection(others) and all(_copied(row[other], other, messages) for other in others)
    ):
        raise BadRow("several fields give the dialogue", f"{', '.join((name, *others))}; keep one of them")
    whole = with_system(messages, row, f"in '{name}'")
    if "as_spelled" in row:
        return Dialogue(whole, _as_spelled(row["as_spelled"]))
    return Dialogue(whole, (whole[0].content, whole[1].content) if len(whole) == 2 else None)


def _copied(value: object, name: str, messages: Sequence[Message]) -> bool:
    """Whether the column `name` repeats a turn of the dialogue."""
    role = "user" if name in PROMPT_COLUMNS else "assistant"
    return isinstance(value, str) and any(value.strip() == m.content.strip() for m in messages if m.role == role)


def _as_spelled(value: object) -> tuple[str, str]:
    if not isinstance(value, dict) or not {"prompt", "answer"} <= value.keys():
        raise BadRow("'as_spelled' is not understood", 'write {"prompt": ..., "answer": ...}, both text')
    return text_of(value["prompt"], "as_spelled: prompt"), text_of(value["answer"], "as_spelled: answer")


def _answered(row: Readable) -> Dialogue:
    """A row with a prompt and its answer in columns of their own."""
    answers = [name for name in ANSWERS if name in row]
    if len(answers) > 1:
        raise BadRow("several fields give an answer", f"{', '.join(answers)}; keep one of them")
    if not answers:
        raise _no_answer(row)
    asked = (*PROMPT_COLUMNS, "messages", "input", "context", "history", *SYSTEM_COLUMNS)
    prompt, raw = parse_prompt(row.of({name: row[name] for name in asked if name in row}))
    *said, answer = answer_of(row[answers[0]], answers[0])
    if said and said[0].role != "assistant":  # it repeats the prompt
        if turns_of(said[: len(prompt)]) != turns_of(prompt):
            detail = "give the answer alone, or the whole dialogue as 'messages'"
            raise BadRow(f"'{answers[0]}' is a conversation that does not continue the prompt", detail)
        said = said[len(prompt) :]
    messages = (*prompt, *said, answer)
    return Dialogue(messages, None if raw is None or said else (raw, answer.content))


def _no_answer(row: Readable) -> BadRow:
    if name := next((name for name in ANSWERS if name in row.nulls), None):
        return missing(row, name, "")
    near = (c for c in row if c not in DIALOGUE_ROW and difflib.get_close_matches(c, ANSWERS, n=1))
    hint = next((f"; is {c!r} meant?" for c in near), "")
    return BadRow(f"missing field: none of {', '.join(ANSWERS)}", f"{columns_of(row)}{hint}; {UNDERSTOOD}")


def _check_turns(messages: tuple[Message, ...], severity: Severity) -> None:
    """Raise `BadRow` where the turns are not those of a dialogue (see the module)."""
    start = 1 if messages[0].role == "system" else 0
    turns = messages[start:]
    roles = [m.role for m in turns]
    where = f"the roles are {' '.join(m.role for m in messages[:12])}"
    if "system" in roles:
        raise BadRow("a system message inside the dialogue", f"{where}; it may only stand in front", severity)
    if "assistant" not in roles:
        raise BadRow("no assistant turn", f"{where}; there is nothing to learn from", severity)
    if roles[0] == "assistant":
        raise BadRow("the dialogue starts with the assistant", f"{where}; give the user's turn before it", severity)
    if roles[-1] == "user":
        raise BadRow("no answer at the end", f"{where}; remove the last turn, or give its answer", severity)
    check_tools(turns)
    if roles[-1] == "tool":
        raise BadRow("no answer at the end", f"{where}; a tool has the last word", severity)
    for i, (role, following) in enumerate(itertools.pairwise(roles), start + 1):
        if role == following != "tool":
            detail = f"messages {i} and {i + 1} are both of the role {role}; join them"
            raise BadRow("two turns in a row of one role", detail, severity)
    for i, message in enumerate(turns, start + 1):
        if not message.content.strip() and message.role != "tool":
            detail = f"message {i}, of the {message.role}, is blank; remove the row"
            raise BadRow("empty turn", detail, "noise" if message.role == "assistant" else severity)
