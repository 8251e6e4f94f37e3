"""Messages and texts as rows of any layout hold them, checked one value at a time.

A message is {"role", "content"} or {"from", "value"}; roles are system (developer), user (human), assistant (gpt, ...),
tool. Content is a text, or a list of typed parts that are texts. A key that is null is absent. Of its other keys:

* `weight` (OpenAI: 0 or 1), `train` and `loss` (true or false) say whether a dialogue's turn is learnt, or context.
* `tool_calls` and the like say what no text here would: such rows are refused.
* All others go to the chat template, as `transformers` hands them on (`reasoning_content`, say). Those that it does not
  write are named.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.data.rows.problems import BadRow

MAX_TEXT = 2**20
"""Longest text of a row, in characters: some 250,000 tokens. What is longer takes long, and no context holds it."""


class Message(NamedTuple):
    """One turn.

    Attributes:
      role: system, user, assistant or tool.
      content: what is said.
      learn: whether the row wants the turn learnt; None where it says nothing.
      extra: (key, value) of what else the message has, for the chat template.
      tools: of the first message of a conversation: what the row's column `tools` holds, for the chat template.
    """

    role: str
    content: str
    learn: bool | None = None
    extra: tuple[tuple[str, Any], ...] = ()
    tools: Any = None

    def as_dict(self) -> dict[str, str]:
        """The message as functions of users and files see it."""
        return {"role": self.role, "content": self.content}


ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "chatbot", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
"""Every spelling of a role that is understood, and the role it means."""

MARKS = ("weight", "train", "loss")
"""Keys that say whether a turn is learnt."""
SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns that hold a system prompt."""
_SHOWN = 80
"""How many characters of names of columns a message shows."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_SPELLINGS = (("role", "content"), ("from", "value"))
_NO_TEXT = ("tool_calls", "function_call", "image", "images", "audio", "audios", "video", "videos")


def columns_of(row: dict[str, Any]) -> str:
    """The columns of a row, in words; of many the first."""
    names = sorted(map(str, row))
    shown = [name for i, name in enumerate(names) if sum(map(len, names[: i + 1])) <= _SHOWN]
    more = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
    return f"the columns are {', '.join(shown)}{more}" if row else "the row has no columns"


def text_of(value: object, name: str, longest: int | None = MAX_TEXT) -> str:
    """`value` of the field `name`, where it is text that can be encoded, not too long. Raises `BadRow`."""
    if not isinstance(value, str):
        raise BadRow(f"'{name}' is not text", f"it holds {type(value).__name__} {str(value)[:40]!r}; write a string")
    if longest is not None and len(value) > longest:
        detail = f"it has {len(value):,} characters, and at most {longest:,} are tokenised; shorten it"
        raise BadRow(f"'{name}' is too long", detail)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        detail = f"half of a surrogate pair at character {error.start + 1}; write the whole character"
        raise BadRow(f"'{name}' holds broken Unicode", detail) from error
    return value


def message_of(value: object, name: str) -> Message:
    """One message of the field `name`. Raises `BadRow`."""
    if not isinstance(value, dict):
        raise BadRow(f"'{name}' holds something that is no message", 'write {"role": ..., "content": ...}')
    value = {key: held for key, held in value.items() if held is not None}
    if wordless := [key for key in _NO_TEXT if value.get(key)]:  # such a message may have no content
        raise BadRow(f"{wordless[0]} in '{name}'", "only plain text messages are understood")
    for role_key, content_key in _SPELLINGS:
        if role_key in value and content_key in value:
            role = value[role_key]
            if not isinstance(role, str) or role not in ROLES:
                raise BadRow(f"unknown role in '{name}'", f"{str(role)[:40]!r}; understood are {', '.join(ROLES)}")
            content = _content(value[content_key], f"{name}: {content_key}")
            read = (role_key, content_key, *MARKS, *_NO_TEXT)
            extra = tuple((key, held) for key, held in value.items() if key not in read)
            return Message(ROLES[role], content, _learnt(value, name), extra)
    keys = ", ".join(sorted(map(str, value)))
    raise BadRow(f"a message in '{name}' lacks role/content", f"it has {keys or 'no fields'}; from/value will do too")


def _content(value: object, name: str) -> str:
    """What a message says: a text, or typed parts that are all texts, which stand end to end. Raises `BadRow`."""
    if not isinstance(value, list):
        return text_of(value, name)
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind not in _TEXT_PARTS:
            raise BadRow(f"a part of '{name}' is no text", f"it is of the type {str(kind)[:40]}")
        texts.append(text_of(part.get("text"), f"{name}: text"))
    return "".join(texts)


def _learnt(message: Mapping[str, Any], name: str) -> bool | None:
    """What the marks of a message say, false where they disagree. Raises `BadRow` for a mark between yes and no."""
    given = [key for key in MARKS if key in message]
    for key in given:
        if message[key] not in (0, 1):
            kinds = "0 nor 1" if key == "weight" else "true nor false"
            raise BadRow(f"a message's '{key}' in '{name}' is neither {kinds}", f"it is {str(message[key])[:40]!r}")
    return all(message[key] for key in given) if given else None


def turns_of(messages: Iterable[Message]) -> list[tuple[str, str]]:
    """(role, content) of each message: what makes two conversations the same."""
    return [message[:2] for message in messages]


def keys_beside(value: object) -> set[str]:
    """Keys of the messages in the field `value`, if it holds any, that are neither role nor content nor a mark."""
    found: set[str] = set()
    for message in value if isinstance(value, list) else [value]:
        if isinstance(message, dict):
            there = {str(key) for key, held in message.items() if held is not None}
            spelling = next((set(keys) for keys in _SPELLINGS if there.issuperset(keys)), None)
            found |= there - spelling - set(MARKS) if spelling else set()
    return found


def messages_of(value: list[object], name: str) -> tuple[Message, ...]:
    """The messages of the field `name`, at least one. Raises `BadRow`."""
    if not value:
        raise BadRow(f"'{name}' is an empty list", "give it a message, or remove the row")
    if name in ("conversations", "messages") and all(isinstance(m, str) for m in value):  # LIMA: the user speaks first
        said = zip(itertools.cycle(("user", "assistant")), value)
        return tuple(Message(role, text_of(text, name)) for role, text in said)
    messages: list[Message] = []
    for m in value:
        if isinstance(m, dict) and {*m} == {"input", "output"}:  # a user's turn with its answer, as Capybara has them
            said = (("user", m["input"]), ("assistant", m["output"]))
            messages += [Message(role, text_of(text, name)) for role, text in said]
        else:
            messages.append(message_of(m, name))
    return tuple(messages)


def check_tools(messages: Sequence[Message]) -> None:
    """Raise `BadRow` where a tool speaks other than behind an assistant's turn, or its turn would follow a user's."""
    for before, message, after in zip((None, *messages), messages, (*messages[1:], None), strict=False):
        if message.role == "tool":
            behind = before is not None and before.role in ("assistant", "tool")
            if not behind or (after is not None and after.role not in ("assistant", "tool")):
                roles = " ".join(m.role for m in messages[:12])
                detail = f"the roles are {roles}; it stands behind an assistant's turn, and the assistant goes on"
                raise BadRow("a tool's message out of place", detail)


def answer_of(value: object, name: str) -> tuple[Message, ...]:
    """An answer: a text, a message, or messages of which the last one is it. Raises `BadRow`."""
    if not isinstance(value, list | dict):
        return (Message("assistant", text_of(value, name)),)
    messages = messages_of(value if isinstance(value, list) else [value], name)
    if messages[-1].role != "assistant":
        detail = f"its last message has the role {messages[-1].role}"
        raise BadRow(f"bad role order: '{name}' must end with an assistant message", detail)
    return messages


def response_of(value: object, name: str) -> tuple[tuple[Message, ...], str]:
    """(the messages in front of a response that is compared, if any; its text). Raises `BadRow`."""
    messages = answer_of(value, name)
    if messages[-1].learn is False:
        raise BadRow(f"the answer in '{name}' is not to be learnt", f"by its {' or '.join(MARKS)}", "lost")
    return messages[:-1], messages[-1].content


def with_system(
    messages: tuple[Message, ...], row: dict[str, Any], where: str = "among the messages"
) -> tuple[Message, ...]:
    """`messages` with the text of the row's column `system` or `system_prompt` in front. Raises `BadRow`."""
    given = {text: name for name in SYSTEM_COLUMNS if (text := text_of(row.get(name) or "", name))}
    if not given:
        return messages
    if len(given) > 1:
        raise BadRow("two system prompts", f"'{SYSTEM_COLUMNS[0]}' and '{SYSTEM_COLUMNS[1]}' differ; keep one of them")
    [(system, name)] = given.items()
    if messages[0].role == "system":
        if messages[0].content == system:
            return messages
        raise BadRow("two system prompts", f"one in '{name}', one {where}; keep one of them")
    return (Message("system", system), *messages)


def with_tools(messages: tuple[Message, ...], row: dict[str, Any]) -> tuple[Message, ...]:
    """`messages`, the first of which carries the row's column `tools`: a list of JSON schemas, or its text."""
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools] if tools else []
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRow("'tools' is not a list of JSON objects", str(error)) from error
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("'tools' is not a list of JSON objects", f"it holds {str(tools)[:40]!r}")
    if not tools:
        return messages
    return (messages[0]._replace(tools=_without_nulls(tools)), *messages[1:])


def _without_nulls(value: Any) -> Any:
    """`value` without the keys that Arrow filled with null."""
    if isinstance(value, dict):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value


def history_of(value: object) -> tuple[Message, ...]:
    """The messages of the column `history`, a list of [user, assistant]. Raises `BadRow`."""
    if not isinstance(value, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in value):
        raise BadRow("'history' is no list of [user, assistant]", 'write [["question", "answer"], ...]')
    return tuple(
        Message(role, text_of(text, "history"))
        for turn in value
        for role, text in zip(("user", "assistant"), turn, strict=True)
    )
