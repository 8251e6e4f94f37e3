"""Rows of preference files -> one form, whatever the layout.

Understood layouts (a column that is null counts as absent):

* `prompt`, `chosen`, `rejected`: each a text, or a list of messages; `chosen` and `rejected` may repeat the prompt.
* `chosen`, `rejected` alone, with the prompt inside: lists of messages, or text with the turn marks "\\n\\nHuman:" and
  "\\n\\nAssistant:" (Anthropic's HH). The last message, or what follows the last "\\n\\nAssistant:", is the response;
  all before it must be the same in both.
* `conversations` (ShareGPT: a list of from/value) with `chosen`, `rejected`.
* `instruction` and, optionally, `input` (Alpaca), or `question` (Orca), in place of `prompt`.
* `prompt`, `completion`, `label` (true or false): unpaired rows, for the KTO loss only.

A message is {"role", "content"} or {"from", "value"}; roles are system, user (human), assistant (gpt). An optional
`system` column holds a system prompt.
"""

import difflib
import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dpo_jax.data.problems import BadRow, Severity

Extra = float | str


class Message(NamedTuple):
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Pair:
    """One prompt with its two responses; of an unpaired row, one response is None.

    Attributes:
      messages: the prompt: at most one system message, then user and assistant in turn, a user message last.
      chosen, rejected: the texts of the responses, without any template.
      raw: (prompt, chosen, rejected) as the row spells them, for `--data.template raw`; None where the prompt consists
        of several messages, which only a template can join.
      extras: those of the columns `EXTRA_COLUMNS` that the row has.
    """

    messages: tuple[Message, ...]
    chosen: str | None
    rejected: str | None
    raw: tuple[str, str | None, str | None] | None
    extras: dict[str, Extra] = field(default_factory=dict)


NUMBER_COLUMNS = ("score_chosen", "score_rejected", "margin")
EXTRA_COLUMNS = (*NUMBER_COLUMNS, "rating", "source")
PROMPT_COLUMNS = ("prompt", "conversations", "instruction", "question")
RESPONSE_COLUMNS = ("chosen", "rejected", "completion", "label")
COLUMNS = frozenset((*PROMPT_COLUMNS, *RESPONSE_COLUMNS, *EXTRA_COLUMNS, "input", "system"))
"""Every column that is read. Others are carried in many published files (ids, copies); they are ignored, and named."""

UNDERSTOOD = (
    "understood are prompt + chosen + rejected, chosen + rejected with the prompt inside, conversations or instruction "
    "(+ input) or question + chosen + rejected, and prompt + completion + label"
)
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_MARKS = re.compile(r"\n\n(Human|Assistant):")


def parse_pair(row: dict[str, Any], *, needs_pairs: bool = True) -> Pair:
    """Read one row of any layout (see the module).

    Args:
      row: column -> value.
      needs_pairs: refuse unpaired rows.

    Raises:
      BadRow: says which field, and how to mend it.
    """
    row = {name: value for name, value in row.items() if value is not None}
    extras = _extras(row)
    if "completion" in row and not ("chosen" in row or "rejected" in row):
        return _unpaired(row, extras, needs_pairs)
    if not COLUMNS.intersection(row):
        raise BadRow("unknown column names", f"{_columns(row)}; {UNDERSTOOD}")
    for name in ("chosen", "rejected"):
        if name not in row:
            raise _missing(row, name)
    prompt = _prompt(row)
    pair = _implicit(row, extras) if prompt is None else _explicit(prompt, row, extras)
    severity: Severity = "noise" if prompt is None else "bad"
    for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if text is not None and not text.strip():
            raise BadRow(f"empty completion: '{name}' is blank", "give it a text, or remove the row", severity)
    if pair.chosen == pair.rejected:
        raise BadRow("'chosen' and 'rejected' are the same", "such a row prefers nothing: remove it", severity)
    return pair


def _columns(row: dict[str, Any]) -> str:
    return f"the columns are {', '.join(sorted(map(str, row)))}" if row else "the row has no columns"


def _missing(row: dict[str, Any], name: str) -> BadRow:
    close = difflib.get_close_matches(name, [c for c in row if c not in COLUMNS], n=1)
    hint = f"; is {close[0]!r} meant?" if close else ""
    return BadRow(f"missing field '{name}'", f"{_columns(row)}{hint}; {UNDERSTOOD}")


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"'{name}' is not text", f"it holds {type(value).__name__} {str(value)[:40]!r}; write a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        detail = f"half of a surrogate pair at character {error.start + 1}; write the whole character"
        raise BadRow(f"'{name}' holds broken Unicode", detail) from error
    return value


def _extras(row: dict[str, Any]) -> dict[str, Extra]:
    extras: dict[str, Extra] = {}
    for name in EXTRA_COLUMNS:
        if name not in row:
            continue
        value = row[name]
        if name == "source" or (name == "rating" and isinstance(value, str)):
            extras[name] = _text(value, name)
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadRow(f"'{name}' is not a finite number", f"it holds {str(value)[:40]!r}")
        else:
            extras[name] = float(value)
    return extras


def _message(value: object, name: str) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"'{name}' holds something that is no message", 'write {"role": ..., "content": ...}')
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if role_key in value and content_key in value:
            role = value[role_key]
            if not isinstance(role, str) or role not in _ROLES:
                raise BadRow(f"unknown role in '{name}'", f"{str(role)[:40]!r}; understood are {', '.join(_ROLES)}")
            if value.get("tool_calls"):
                raise BadRow(f"tool calls in '{name}'", "only plain text messages are understood")
            return Message(_ROLES[role], _text(value[content_key], f"{name}: {content_key}"))
    keys = ", ".join(sorted(map(str, value)))
    raise BadRow(f"a message in '{name}' lacks role/content", f"it has {keys or 'no fields'}; from/value will do too")


def _messages(value: list[object], name: str) -> tuple[Message, ...]:
    if not value:
        raise BadRow(f"'{name}' is an empty list", "give it a message, or remove the row")
    return tuple(_message(m, name) for m in value)


def _check_roles(messages: tuple[Message, ...], severity: Severity = "bad") -> None:
    """System first if at all, then user and assistant in turn, ending with a user message."""
    turns = messages[1:] if messages[0].role == "system" else messages
    roles = [m.role for m in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        order = " ".join(m.role for m in messages[:12])
        detail = f"the prompt's roles are {order}; it takes at most one system message, then user and assistant in turn"
        raise BadRow("bad role order: the prompt must alternate and end with a user message", detail, severity)
    if any(m.role == "user" and not m.content.strip() for m in turns):
        raise BadRow("empty prompt: a user message is blank", "give it a text, or remove the row", severity)


def _prompt(row: dict[str, Any]) -> tuple[tuple[Message, ...], str | None] | None:
    """(messages, the text as it stands or None) of an explicit prompt; None where the prompt is implicit."""
    given = [name for name in PROMPT_COLUMNS if name in row]
    if len(given) > 1:
        raise BadRow("several fields give a prompt", f"{', '.join(given)}; keep one of them")
    if "input" in row and given != ["instruction"]:
        raise BadRow("'input' without 'instruction'", f"{_columns(row)}; name the prompt's column 'prompt'")
    if not given:
        return None
    name = given[0]
    raw: str | None = None
    if isinstance(row[name], list) and name in ("prompt", "conversations"):
        messages = _messages(row[name], name)
    else:
        raw = _text(row[name], name)
        if name == "instruction" and (extra := _text(row.get("input", ""), "input")):
            raw = f"{raw}\n{extra}"
        if raw.startswith(_HUMAN) and raw.rstrip().endswith(_ASSISTANT):
            messages = _turns(raw.rstrip().removesuffix(_ASSISTANT))
        else:
            messages = (Message("user", raw),)
    system = _text(row.get("system", ""), "system")
    if system:
        if messages[0].role == "system":
            raise BadRow("two system prompts", f"one in 'system', one in '{name}'; keep one of them")
        messages, raw = (Message("system", system), *messages), None
    _check_roles(messages)
    if raw is None and len(messages) == 1:
        raw = messages[0].content
    return messages, raw


def parse_prompt(row: dict[str, Any]) -> tuple[tuple[Message, ...], str | None]:
    """Read one row of a file of prompts, to generate from.

    Args:
      row: `messages`, or one of `PROMPT_COLUMNS`; an optional `system`. Other columns are not read.

    Returns:
      The messages, a user message last, and the prompt as plain text (None where only a template can join them).

    Raises:
      BadRow: says which field, and how to mend it.
    """
    row = {name: value for name, value in row.items() if value is not None}
    if "messages" in row:
        if not isinstance(row["messages"], list):
            raise BadRow("'messages' is not a list", 'write [{"role": "user", "content": ...}]')
        row["conversations"] = row.pop("messages")
    prompt = _prompt(row)
    if prompt is None:
        raise BadRow("missing field 'prompt'", f"{_columns(row)}; understood are prompt (a text) and messages")
    return prompt


def _response(value: object, name: str) -> tuple[tuple[Message, ...], str]:
    """(the messages in front of the response, if any; the response)."""
    if not isinstance(value, list | dict):
        return (), _text(value, name)
    messages = _messages(value if isinstance(value, list) else [value], name)
    if messages[-1].role != "assistant":
        detail = f"its last message has the role {messages[-1].role}"
        raise BadRow(f"bad role order: '{name}' must end with an assistant message", detail)
    return messages[:-1], messages[-1].content


def _explicit(prompt: tuple[tuple[Message, ...], str | None], row: dict[str, Any], extras: dict[str, Extra]) -> Pair:
    messages, raw = prompt
    contexts: list[tuple[Message, ...]] = []
    texts: list[str] = []
    for name in ("chosen", "rejected"):
        context, text = _response(row[name], name)
        if context and context[-len(messages) :] != messages:
            detail = "give the prompt's own messages and one answer, or the answer alone"
            raise BadRow(f"'{name}' is a conversation that does not continue the prompt", detail)
        contexts.append(context or messages)
        texts.append(text)
    answers = [text.strip() for text in texts] if raw is not None and raw.rstrip().endswith(_ASSISTANT) else texts
    if contexts[0] != contexts[1]:
        raise BadRow("no shared prompt: 'chosen' and 'rejected' have different messages before the answer")
    if contexts[0] != messages:  # the conversations tell more than the prompt field, such as a system message
        messages, raw = contexts[0], None
        _check_roles(messages)
    return Pair(messages, *answers, raw=None if raw is None else (raw, texts[0], texts[1]), extras=extras)


def _implicit(row: dict[str, Any], extras: dict[str, Extra]) -> Pair:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _implicit_text(_text(chosen, "chosen"), _text(rejected, "rejected"), row, extras)
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        detail = f"{_columns(row)}; without a prompt column both must be text or both lists of messages"
        raise BadRow("missing field 'prompt'", detail)
    prompt, chosen = _response(chosen, "chosen")
    other, rejected = _response(rejected, "rejected")
    if not prompt or not other:
        raise BadRow(
            "missing field 'prompt'", f"{_columns(row)}, and 'chosen' or 'rejected' is one message without a prompt"
        )
    if prompt != other:
        raise BadRow(
            "no shared prompt",
            "the messages before the last differ between 'chosen' and 'rejected'; remove the row",
            "noise",
        )
    prompt, raw = _with_system(prompt, row), None
    _check_roles(prompt)
    if len(prompt) == 1:
        raw = (prompt[0].content, chosen, rejected)
    return Pair(prompt, chosen, rejected, raw=raw, extras=extras)


def _with_system(messages: tuple[Message, ...], row: dict[str, Any]) -> tuple[Message, ...]:
    system = _text(row.get("system", ""), "system")
    if not system:
        return messages
    if messages[0].role == "system":
        raise BadRow("two system prompts", "one in 'system', one among the messages; keep one of them")
    return (Message("system", system), *messages)


def _implicit_text(chosen: str, rejected: str, row: dict[str, Any], extras: dict[str, Extra]) -> Pair:
    cuts = []
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        cut = text.rfind(_ASSISTANT)
        if cut < 0:
            detail = f"{_columns(row)}, and '{name}' has no \"\\n\\nAssistant:\" to find a prompt by"
            raise BadRow("missing field 'prompt'", detail)
        cuts.append(cut)
    if chosen[: cuts[0]] != rejected[: cuts[1]]:
        detail = "the texts before the last \"\\n\\nAssistant:\" differ between 'chosen' and 'rejected'; remove the row"
        raise BadRow("no shared prompt", detail, "noise")
    messages = _with_system(_turns(chosen[: cuts[0]]), row)
    _check_roles(messages, "noise")
    mark = len(_ASSISTANT)
    prompt, answers = chosen[: cuts[0] + mark], (chosen[cuts[0] + mark :], rejected[cuts[1] + mark :])
    raw = (prompt, answers[0], answers[1]) if messages[0].role != "system" else None
    return Pair(messages, answers[0].strip(), answers[1].strip(), raw=raw, extras=extras)


def _turns(text: str) -> tuple[Message, ...]:
    """HH text -> messages. Neighbouring turns of one speaker, which HH has here and there, are one message."""
    head, *rest = _MARKS.split("\n\n" + text if text.startswith("Human:") else text)
    if head.strip():
        raise BadRow('text before the first "\\n\\nHuman:"', f"{head.strip()[:40]!r}; put it into a column 'system'")
    messages: list[Message] = []
    for speaker, said in zip(rest[::2], rest[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1].role == role:
            messages[-1] = Message(role, f"{messages[-1].content}\n\n{said.strip()}")
        else:
            messages.append(Message(role, said.strip()))
    if not messages:
        raise BadRow('empty prompt: nothing before "\\n\\nAssistant:"', "remove the row", "noise")
    return tuple(messages)


def _unpaired(row: dict[str, Any], extras: dict[str, Extra], needs_pairs: bool) -> Pair:
    if needs_pairs:
        detail = "'completion' and 'label' are for --dpo.loss kto; other losses need 'chosen' and 'rejected'"
        raise BadRow("unpaired row", detail)
    if "label" not in row:
        raise _missing(row, "label")
    if not isinstance(row["label"], bool):
        raise BadRow("'label' is not true or false", f"it holds {str(row['label'])[:40]!r}")
    prompt = _prompt(row)
    if prompt is None:
        raise _missing(row, "prompt")
    messages, raw = prompt
    context, text = _response(row["completion"], "completion")
    if context and context != messages:
        raise BadRow("'completion' is a conversation that does not continue the prompt", "give the answer alone")
    if not text.strip():
        raise BadRow("empty completion: 'completion' is blank", "give it a text, or remove the row")
    chosen, rejected = (text, None) if row["label"] else (None, text)
    return Pair(messages, chosen, rejected, raw=None if raw is None else (raw, chosen, rejected), extras=extras)
