"""Messages and texts as rows of any layout hold them, checked one value at a time.

A message is {"role", "content"} or {"from", "value"}; roles are system, user (human), assistant (gpt).
"""

from typing import Any, NamedTuple

from dpo_jax.data.problems import BadRow


class Message(NamedTuple):
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""Every spelling of a role that is understood, and the role it means."""


def columns_of(row: dict[str, Any]) -> str:
    """The columns of a row, in words."""
    return f"the columns are {', '.join(sorted(map(str, row)))}" if row else "the row has no columns"


def text_of(value: object, name: str) -> str:
    """`value` of the field `name`, where it is text that can be encoded. Raises `BadRow`."""
    if not isinstance(value, str):
        raise BadRow(f"'{name}' is not text", f"it holds {type(value).__name__} {str(value)[:40]!r}; write a string")
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
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if role_key in value and content_key in value:
            role = value[role_key]
            if not isinstance(role, str) or role not in ROLES:
                raise BadRow(f"unknown role in '{name}'", f"{str(role)[:40]!r}; understood are {', '.join(ROLES)}")
            if value.get("tool_calls"):
                raise BadRow(f"tool calls in '{name}'", "only plain text messages are understood")
            return Message(ROLES[role], text_of(value[content_key], f"{name}: {content_key}"))
    keys = ", ".join(sorted(map(str, value)))
    raise BadRow(f"a message in '{name}' lacks role/content", f"it has {keys or 'no fields'}; from/value will do too")


def messages_of(value: list[object], name: str) -> tuple[Message, ...]:
    """The messages of the field `name`, at least one. Raises `BadRow`."""
    if not value:
        raise BadRow(f"'{name}' is an empty list", "give it a message, or remove the row")
    return tuple(message_of(m, name) for m in value)


def response_of(value: object, name: str) -> tuple[tuple[Message, ...], str]:
    """(the messages in front of the response, if any; the response): a text, a message or messages. Raises `BadRow`."""
    if not isinstance(value, list | dict):
        return (), text_of(value, name)
    messages = messages_of(value if isinstance(value, list) else [value], name)
    if messages[-1].role != "assistant":
        detail = f"its last message has the role {messages[-1].role}"
        raise BadRow(f"bad role order: '{name}' must end with an assistant message", detail)
    return messages[:-1], messages[-1].content


def with_system(
    messages: tuple[Message, ...], row: dict[str, Any], where: str = "among the messages"
) -> tuple[Message, ...]:
    """`messages` with the text of the row's column `system` in front, if it has one. Raises `BadRow`."""
    system = text_of(row.get("system", ""), "system")
    if not system:
        return messages
    if messages[0].role == "system":
        raise BadRow("two system prompts", f"one in 'system', one {where}; keep one of them")
    return (Message("system", system), *messages)
