"""Rows of preference files -> one form, whatever the layout.

Understood layouts (a column that is null counts as absent):

* `prompt`, `chosen`, `rejected`: each a text, or a list of messages; `chosen` and `rejected` may repeat the prompt.
* `chosen`, `rejected` alone, with the prompt inside: lists of messages, or text with the turn marks "\\n\\nHuman:" and
  "\\n\\nAssistant:" (Anthropic's HH). The last message, or what follows the last "\\n\\nAssistant:", is the response;
  all before it must be the same in both.
* `conversations` (ShareGPT: a list of from/value) with `chosen`, `rejected`.
* `instruction` with an optional `input` or `context` (Alpaca, Dolly), or `question`, with `context`, in place of
  `prompt`.
* `history` (LLaMA-Factory): a list of [user, assistant], what was said before such a prompt.
* `prompt`, `completion`, `label` (true or false): unpaired rows, for losses kto and apo_zero_unpaired only.
* With any of them, `as_spelled`: {"prompt", "chosen", "rejected"}, the texts that `--data.template raw` is to see. A
  store (see `store_schema.py`) holds it where they cannot be told from the messages.

An optional `system` or `system_prompt` column holds a system prompt, `tools` what the template may say of tools.
(Messages: see `messages.py`.)
"""

import difflib
import re
from dataclasses import dataclass, field, replace
from typing import Any

from dpo_jax.data.rows.layouts import EXTRA_COLUMNS, PAIR_COLUMNS, PROMPT_COLUMNS
from dpo_jax.data.rows.messages import (
    Message,
    check_tools,
    columns_of,
    history_of,
    messages_of,
    response_of,
    text_of,
    turns_of,
    with_system,
    with_tools,
)
from dpo_jax.data.rows.problems import BadRow, Severity
from dpo_jax.data.rows.ratings import Evidence, evidence_of
from dpo_jax.data.rows.readable import Readable, missing, readable

Extra = float | str
"""What a row tells beside its texts, where it can be used."""


@dataclass(frozen=True)
class Pair:
    """One prompt with its two responses; of an unpaired row, one response is None.

    Attributes:
      messages: the prompt: at most one system message, then user and assistant in turn, a user message last.
      chosen, rejected: the texts of the responses, without any template.
      raw: (prompt, chosen, rejected) as the row spells them, for `--data.template raw`; None where the prompt consists
        of several messages, which only a template can join.
      extras: those of the columns `EXTRA_COLUMNS` that the row has; who needs one looks whether it can be used.
    """

    messages: tuple[Message, ...]
    chosen: str | None
    rejected: str | None
    raw: tuple[str, str | None, str | None] | None
    extras: dict[str, Evidence] = field(default_factory=dict)


_TRUTH = {"true": True, "false": False}
"""A label as it stands, or as CSV spells it."""

_UNDERSTOOD = (
    "--data.columns {}=NAME reads another column; understood are prompt + chosen + rejected and the layouts of "
    "docs/data.md"
)
_HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
# user, assistant in turn, a user's turn or a tool's last; the assistant may call tools and go on: u(a(ta)*u)*
_PROMPT_ORDER = re.compile(r"u(?:a(?:t+a)*u)*(?:a(?:t+a)*t+)?")
_MARKS = re.compile(r"\n\n(Human|Assistant):")


def parse_pair(row: dict[str, Any], *, needs_pairs: bool = True, compared: bool = True) -> Pair:
    """Read one row of any layout (see the module).

    Args:
      row: column -> value.
      needs_pairs: refuse unpaired rows.
      compared: refuse a pair that prefers nothing, or has a blank response.

    Raises:
      BadRow: says which field, and how to mend it.
    """
    row = readable(row)
    pair = _parse(row, needs_pairs, compared)
    if row.get("tools") is not None:
        pair = replace(pair, messages=with_tools(pair.messages, row))
    spelled = row.get("as_spelled")
    return pair if spelled is None else replace(pair, raw=_as_spelled(spelled))


def _parse(row: Readable, needs_pairs: bool, compared: bool) -> Pair:
    extras = {name: evidence_of(row[name], name) for name in EXTRA_COLUMNS if name in row}
    if "completion" in row and not ("chosen" in row or "rejected" in row):
        return _unpaired(row, extras, needs_pairs)
    if not PAIR_COLUMNS.intersection(row) and "messages" not in row:
        raise BadRow("unknown column names", f"{columns_of(row)}; {_UNDERSTOOD.format('chosen')}")
    for name in ("chosen", "rejected"):
        if name not in row:
            raise _missing(row, name)
    prompt = _prompt(row)
    pair = _implicit(row, extras) if prompt is None else _explicit(prompt, row, extras)
    if not compared:
        return pair
    severity: Severity = "noise" if prompt is None else "bad"
    for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if text is not None and not text.strip():
            raise blank_response(f"'{name}'")
    if pair.chosen == pair.rejected:
        raise BadRow("'chosen' and 'rejected' are the same", "such a row prefers nothing: remove it", severity)
    return pair


def _as_spelled(value: object) -> tuple[str, str | None, str | None]:
    if not isinstance(value, dict) or "prompt" not in value:
        raise BadRow(
            "'as_spelled' is not understood", 'write {"prompt": ..., "chosen": ..., "rejected": ...}, all text'
        )
    prompt = text_of(value["prompt"], "as_spelled: prompt")
    said = [value.get(name) for name in ("chosen", "rejected")]
    chosen, rejected = (None if text is None else text_of(text, "as_spelled") for text in said)
    return prompt, chosen, rejected


def blank_response(name: str) -> BadRow:
    """What a blank response is, in every command: `name` says which."""
    return BadRow(f"empty completion: {name} is blank", "give it a text, or remove the row", "noise")


def _missing(row: Readable, name: str) -> BadRow:
    hint = _hint(row, name)
    dialogue = {"messages", "conversations"} & row.keys()
    understood = "a dialogue is for sft (inspect --kind dialogues)" if dialogue else _UNDERSTOOD.format(name)
    return missing(row, name, f"{columns_of(row)}{hint}; {understood}")


def _hint(row: Readable, name: str) -> str:
    """A column that may be `name` with a slip of the pen."""
    close = difflib.get_close_matches(name, [c for c in row if c not in PAIR_COLUMNS], n=1)
    return f"; is {close[0]!r} meant?" if close else ""


def _check_roles(messages: tuple[Message, ...], severity: Severity = "bad") -> None:
    """System first if at all, then user and assistant in turn, ending with a user message."""
    turns = messages[1:] if messages[0].role == "system" else messages
    roles = [m.role for m in turns]
    check_tools(turns)
    if not _PROMPT_ORDER.fullmatch("".join(role[0] for role in roles)):
        order = " ".join(m.role for m in messages[:12])
        detail = f"the prompt's roles are {order}; it takes at most one system message, then user and assistant in turn"
        raise BadRow("bad role order: the prompt must alternate and end with a user message", detail, severity)
    if any(m.role == "user" and not m.content.strip() for m in turns):
        raise BadRow("empty prompt: a user message is blank", "give it a text, or remove the row", severity)


def _prompt(row: Readable) -> tuple[tuple[Message, ...], str | None] | None:
    """(messages, the text as it stands or None) of an explicit prompt; None where the prompt is implicit."""
    given = [name for name in PROMPT_COLUMNS if name in row]
    if len(given) > 1:
        raise BadRow("several fields give a prompt", f"{', '.join(given)}; keep one of them")
    if "input" in row and given != ["instruction"] and not (given == ["question"] and "input" in row.sources):
        raise BadRow("'input' without 'instruction'", f"{columns_of(row)}; name the prompt's column 'prompt'")
    if not given:
        return None
    name = given[0]
    raw: str | None = None
    if isinstance(row[name], list) and name in ("prompt", "conversations"):
        messages = messages_of(row[name], name)
    else:
        raw = text_of(row[name], name)
        if "input" in row and isinstance(row.get("context"), str):
            raise BadRow("'context' and 'input' beside one prompt", "keep one of them")
        if extra := text_of(row.get("input", ""), "input"):
            raw = f"{raw}\n{extra}"
        if raw.startswith(_HUMAN) and raw.rstrip().endswith(ASSISTANT):
            messages = _turns(raw.rstrip().removesuffix(ASSISTANT))
        else:
            messages = (Message("user", raw),)
    if "history" in row and (history := history_of(row["history"])):
        if raw is None:
            raise BadRow("'history' beside a list of messages", "put all of the dialogue into one of them")
        messages, raw = (*history, *messages), None
    whole = with_system(messages, row, f"in '{name}'")
    if whole != messages:
        messages, raw = whole, None
    _check_roles(messages)
    if raw is None and len(messages) == 1:
        raw = messages[0].content
    return messages, raw


def parse_prompt(row: dict[str, Any]) -> tuple[tuple[Message, ...], str | None]:
    """Read one row of a file of prompts, to generate from.

    Args:
      row: `messages`, or one of `PROMPT_COLUMNS`, with what may stand beside it; a system prompt and `tools`, if any.
        Other columns are not read.

    Returns:
      The messages, a user message last, and the prompt as plain text (None where only a template can join them).

    Raises:
      BadRow: says which field, and how to mend it.
    """
    row = readable(row)
    if "messages" in row:
        if not isinstance(row["messages"], list):
            raise BadRow("'messages' is not a list", 'write [{"role": "user", "content": ...}]')
        row = row.of({**row, "conversations": row["messages"]})
    prompt = _prompt(row)
    if prompt is None:
        raise missing(row, "prompt", f"{columns_of(row)}; understood are prompt (a text) and messages")
    return with_tools(prompt[0], row), prompt[1]


def _explicit(prompt: tuple[tuple[Message, ...], str | None], row: dict[str, Any], extras: dict[str, Evidence]) -> Pair:
    messages, raw = prompt
    contexts: list[tuple[Message, ...]] = []
    texts: list[str] = []
    for name in ("chosen", "rejected"):
        context, text = response_of(row[name], name)
        if context and turns_of(context[-len(messages) :]) != turns_of(messages):
            detail = "give the prompt's own messages and one answer, or the answer alone"
            raise BadRow(f"'{name}' is a conversation that does not continue the prompt", detail)
        contexts.append(context or messages)
        texts.append(text)
    marked = raw is not None and raw.rstrip().endswith(ASSISTANT) and "as_spelled" not in row
    answers = [one_turn(text) for text in texts] if marked else texts
    if turns_of(contexts[0]) != turns_of(contexts[1]):
        raise BadRow("no shared prompt: 'chosen' and 'rejected' have different messages before the answer")
    # The conversations may tell more than the prompt field, such as a system message.
    if turns_of(contexts[0]) != turns_of(messages):
        messages, raw = contexts[0], None
        _check_roles(messages)
    return Pair(messages, *answers, raw=None if raw is None else (raw, texts[0], texts[1]), extras=extras)


def _implicit(row: Readable, extras: dict[str, Evidence]) -> Pair:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _implicit_text(text_of(chosen, "chosen"), text_of(rejected, "rejected"), row, extras)
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        detail = f"{columns_of(row)}; without a prompt column both must be text or both lists of messages"
        raise missing(row, "prompt", detail)
    prompt, chosen = response_of(chosen, "chosen")
    other, rejected = response_of(rejected, "rejected")
    if not prompt or not other:
        raise missing(row, "prompt", f"{columns_of(row)}, and 'chosen' or 'rejected' is one message without a prompt")
    if turns_of(prompt) != turns_of(other):
        raise BadRow(
            "no shared prompt",
            "the messages before the last differ between 'chosen' and 'rejected'; remove the row",
            "noise",
        )
    prompt, raw = with_system(prompt, row), None
    _check_roles(prompt)
    if len(prompt) == 1:
        raw = (prompt[0].content, chosen, rejected)
    return Pair(prompt, chosen, rejected, raw=raw, extras=extras)


def _implicit_text(chosen: str, rejected: str, row: Readable, extras: dict[str, Evidence]) -> Pair:
    cuts = []
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        cut = text.rfind(ASSISTANT)
        if cut < 0:
            detail = f"{columns_of(row)}{_hint(row, 'prompt')}; '{name}' has no \"\\n\\nAssistant:\" to find one by"
            raise missing(row, "prompt", detail)
        cuts.append(cut)
    if chosen[: cuts[0]] != rejected[: cuts[1]]:
        detail = "the texts before the last \"\\n\\nAssistant:\" differ between 'chosen' and 'rejected'; remove the row"
        raise BadRow("no shared prompt", detail, "noise")
    messages = with_system(_turns(chosen[: cuts[0]]), row)
    _check_roles(messages, "noise")
    mark = len(ASSISTANT)
    prompt, answers = chosen[: cuts[0] + mark], (chosen[cuts[0] + mark :], rejected[cuts[1] + mark :])
    raw = (prompt, answers[0], answers[1]) if messages[0].role != "system" else None
    return Pair(messages, *map(one_turn, answers), raw=raw, extras=extras)


def one_turn(answer: str) -> str:
    """What follows the last mark of the assistant, where no turn of the human's follows."""
    if _HUMAN in answer:
        raise BadRow('the text ends with a turn of "\\n\\nHuman:"', "it has no answer: remove the row", "noise")
    return answer.strip()


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


def _unpaired(row: Readable, extras: dict[str, Evidence], needs_pairs: bool) -> Pair:
    if needs_pairs:
        detail = (
            "'completion' and 'label' are for --dpo.loss kto or apo_zero_unpaired; others need 'chosen', 'rejected'"
        )
        raise BadRow("unpaired row", detail)
    if "label" not in row:
        raise _missing(row, "label")
    label = _TRUTH.get(str(row["label"]).lower()) if isinstance(row["label"], bool | str) else None
    if label is None:
        raise BadRow("'label' is not true or false", f"it holds {str(row['label'])[:40]!r}")
    prompt = _prompt(row)
    if prompt is None:
        raise _missing(row, "prompt")
    messages, raw = prompt
    context, text = response_of(row["completion"], "completion")
    if context and turns_of(context) != turns_of(messages):
        raise BadRow("'completion' is a conversation that does not continue the prompt", "give the answer alone")
    if not text.strip():
        raise blank_response("'completion'")
    chosen, rejected = (text, None) if label else (None, text)
    return Pair(messages, chosen, rejected, raw=None if raw is None else (raw, chosen, rejected), extras=extras)


def pair_row(prompt: str | list[dict[str, str]], chosen: str, rejected: str) -> dict[str, Any]:
    """A pair as a row of a file: a prompt of messages goes with responses of messages."""
    sides = {"chosen": chosen, "rejected": rejected}
    if isinstance(prompt, str):
        return {"prompt": prompt, **sides}
    return {"prompt": prompt, **{side: [{"role": "assistant", "content": text}] for side, text in sides.items()}}
