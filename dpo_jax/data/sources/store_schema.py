"""What the rows of a store look like: their columns, typed and documented, and how a row becomes a record.

A store is a TFDS data set (features.json says its columns) whose rows are in one form, whatever file they came from:

* preferences: `prompt` (messages), `chosen`, `rejected` (of more answers: the best and the worst) and the extra columns
  of `preferences.py`; of an unpaired row, one response is absent. `as_spelled` is there where the texts for
  `--data.template raw` are not these.
* dialogues: `messages`. `as_spelled` as above.
* text: `text` and, where the source has one, `source`.

`FORMAT` counts the changes after which an older reader would misread a store. A new optional column or a new kind of
rows is no such change: readers name what they do not know and go on.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from dpo_jax.data.rows import dialogues
from dpo_jax.data.rows.comparisons import compares_replies, parse_preference
from dpo_jax.data.rows.layouts import DIALOGUE_ROW, PAIR_COLUMNS, RENDERED, REPLIES_COLUMNS
from dpo_jax.data.rows.messages import Message, columns_of, keys_beside, text_of, turns_of
from dpo_jax.data.rows.preferences import Pair
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.rows.ratings import evidence_of
from dpo_jax.data.rows.readable import missing, readable

FORMAT = 1
Kind = Literal["preferences", "dialogues", "text"]
Row = dict[str, Any]


class Field(NamedTuple):
    """One column: `messages` (a list of role and content), `text` (absent or UTF-8), `number` (float64, NaN = absent).

    A slash in the name stands for a column within a column.
    """

    name: str
    type: Literal["messages", "text", "number"]
    doc: str


_SPELLED = "as the source spells it, where `--data.template raw` must see that"
_FIELDS = "JSON: for each message an object of its other keys, such as train; absent where there are none"
_TOOLS = "JSON: the tools that the template may describe"
FIELDS: dict[Kind, tuple[Field, ...]] = {
    "preferences": (
        Field("prompt", "messages", "at most one system message, then user and assistant in turn, a user message last"),
        Field("message_fields", "text", _FIELDS),
        Field("tools", "text", _TOOLS),
        Field("chosen", "text", "the preferred response; absent in an unpaired row of an undesirable response"),
        Field("rejected", "text", "the other response; absent in an unpaired row of a desirable response"),
        Field("as_spelled/prompt", "text", f"the prompt {_SPELLED}"),
        Field("as_spelled/chosen", "text", f"the chosen response {_SPELLED}"),
        Field("as_spelled/rejected", "text", f"the rejected response {_SPELLED}"),
        Field("score_chosen", "number", "a judge's score of the chosen response; NaN = absent"),
        Field("score_rejected", "number", "a judge's score of the rejected response; NaN = absent"),
        Field("margin", "number", "by how much the chosen response is better; NaN = absent"),
        Field("rating", "number", "how sure the preference is, as a number; NaN = absent"),
        Field("rating_text", "text", "how sure the preference is, in words"),
        Field("source", "text", "where the row comes from"),
    ),
    "dialogues": (
        Field("messages", "messages", "at most one system message, then user and assistant in turn, an answer last"),
        Field("message_fields", "text", _FIELDS),
        Field("tools", "text", _TOOLS),
        Field("as_spelled/prompt", "text", f"all before the last answer {_SPELLED}"),
        Field("as_spelled/answer", "text", f"the last answer {_SPELLED}"),
        Field("finish_reason", "text", "length where the last answer was cut, so that no terminator follows it"),
    ),
    "text": (
        Field("text", "text", "one document"),
        Field("source", "text", "where the row comes from"),
    ),
}


@dataclass(frozen=True)
class Parsed:
    """A row of a source, read: `columns` as `FIELDS` names them, the prompt that decides its split, its parts' texts.

    `prompt` is (role, text) a turn; of plain text it is the text. `parts` are what lengths are counted of;
    `unusable` names columns whose value is none of their type, and is not kept. `pair` is there of preferences.
    """

    columns: dict[str, Any]
    prompt: tuple[tuple[str, str], ...]
    parts: dict[str, str]
    unusable: tuple[str, ...] = ()
    pair: Pair | None = None


def kind_of(row: Row) -> Kind:
    """The kind of rows a source holds, by the columns of its first row. Raises `BadRow`."""
    there = readable(row)
    compared = there.keys() & {"chosen", "rejected"} or (compares_replies(there) and not dialogues.is_answer(there))
    if compared or {"completion", "label"} <= there.keys():
        return "preferences"
    if "text" in there and not there.keys() & RENDERED:
        return "text"
    return "dialogues"


def parse(row: Row, kind: Kind) -> Parsed:
    """Read one row of a source. Raises `BadRow`."""
    if kind == "preferences":
        return _parsed_pair(parse_preference(row, needs_pairs=False))
    if kind == "dialogues":
        return _parsed_dialogue(dialogues.parse_dialogue(row))
    if row.get("text") is None:
        raise missing(readable(row), "text", columns_of(row))
    text = text_of(row["text"], "text", None)
    if not text.strip():
        raise BadRow("empty document: 'text' is blank", severity="lost")
    source = None if row.get("source") is None else evidence_of(row["source"], "source")
    unusable = ("source",) if isinstance(source, BadRow) else ()
    return Parsed({"text": text, "source": None if unusable else source}, (("text", text),), {"text": text}, unusable)


def keys_lost(row: Row) -> set[str]:
    """Keys of answers that are compared, as "column: key": a store holds their texts alone."""
    ends = {name: row[name][-1:] for name in ("chosen", "rejected") if isinstance(row.get(name), list)}
    return {f"{name}: {key}" for name, end in ends.items() for key in keys_beside(end)}


def _parsed_pair(pair: Pair) -> Parsed:
    columns: dict[str, Any] = {"prompt": pair.messages, "chosen": pair.chosen, "rejected": pair.rejected}
    columns |= _beside(pair.messages)
    if not _tells(pair.messages, (pair.chosen, pair.rejected), pair.raw):
        columns |= _spelling(("prompt", "chosen", "rejected"), pair.raw)
    unusable = tuple(name for name, value in pair.extras.items() if isinstance(value, BadRow))
    for name, value in pair.extras.items():
        if name in unusable:
            continue
        columns["rating_text" if name == "rating" and isinstance(value, str) else name] = value
    parts = {"prompt": "\n".join(m.content for m in pair.messages)}
    parts |= {name: text for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected)) if text is not None}
    return Parsed(columns, tuple(turns_of(pair.messages)), parts, unusable, pair)


def _parsed_dialogue(dialogue: dialogues.Dialogue) -> Parsed:
    messages = dialogue.messages
    columns: dict[str, Any] = {"messages": messages} | _beside(messages)
    if not _tells(messages[:-1], (messages[-1].content,), dialogue.raw):
        columns |= _spelling(("prompt", "answer"), dialogue.raw)
    if dialogue.cut:
        columns["finish_reason"] = dialogues.CUT
    first = next(i for i, m in enumerate(messages) if m.role == "assistant")
    parts = {
        "prompt": "\n".join(m.content for m in messages[:first]),
        "answers": "\n".join(m.content for m in messages if m.role == "assistant"),
        "dialogue": "\n".join(m.content for m in messages),
    }
    return Parsed(columns, tuple(turns_of(messages[:first])), parts)


def _beside(messages: Sequence[Message]) -> dict[str, Any]:
    """The columns that hold what messages have beside role and content; what JSON cannot hold (a date), as text."""
    fields = [dict(m.extra) | ({} if m.learn is None else {"train": m.learn}) for m in messages]
    told = {"message_fields": fields if any(fields) else None, "tools": messages[0].tools}
    return {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in told.items() if value}


def _tells(prompt: Sequence[Message], answers: tuple[str | None, ...], raw: tuple[str | None, ...] | None) -> bool:
    """Whether the messages alone, read again, would give these answers and the raw texts."""
    if len(prompt) != 1:
        return raw is None
    return raw == (prompt[0].content, *answers) and not prompt[0].content.rstrip().endswith("\n\nAssistant:")


def _spelling(names: Sequence[str], raw: tuple[str | None, ...] | None) -> dict[str, Any]:
    return {} if raw is None else {f"as_spelled/{name}": text for name, text in zip(names, raw, strict=True)}


def columns_read(kind: Kind) -> frozenset[str]:
    """Columns of a source that its rows are made of, or that are kept as they stand."""
    if kind == "text":
        return frozenset(("text", "source"))
    return (PAIR_COLUMNS | REPLIES_COLUMNS if kind == "preferences" else DIALOGUE_ROW) | {"tools"}


def as_row(columns: Row, kind: Kind) -> Row:
    """A stored row, with absent columns left out, in a layout of the reader of its kind (see `preferences.py`)."""
    row = dict(columns)
    if "message_fields" in row:
        name = "prompt" if kind == "preferences" else "messages"
        fields = json.loads(row.pop("message_fields"))
        row[name] = [{**given, **turn} for turn, given in zip(row[name], fields, strict=True)]
    if kind != "preferences":
        return row
    if "rating_text" in row:
        row["rating"] = row.pop("rating_text")
    if ("chosen" in row) != ("rejected" in row):
        row["label"] = "chosen" in row
        row["completion"] = row.pop("chosen" if row["label"] else "rejected")
    return row


# ---------------------------------------------------------------- columns <-> records


def features(kind: Kind) -> Any:
    """The columns of `kind` as `tfds.features`."""
    import numpy as np
    import tensorflow_datasets as tfds

    lib = tfds.features

    def feature(field: Field) -> Any:
        if field.type == "text":
            return lib.Text(doc=field.doc, optional=True)
        if field.type == "number":  # "bytes" keeps all 64 bits; a float of tf.train.Example has 32
            return lib.Tensor(shape=(), dtype=np.float64, encoding="bytes", doc=field.doc)
        turn = {"role": lib.Text(doc="system, user or assistant"), "content": lib.Text(doc="what was said")}
        return lib.Sequence(turn, doc=field.doc)

    tree: dict[str, Any] = {}
    for field in FIELDS[kind]:
        outer, _, inner = field.name.partition("/")
        if inner:
            tree.setdefault(outer, {})[inner] = feature(field)
        else:
            tree[outer] = feature(field)
    return lib.FeaturesDict(tree, doc=f"one row of {kind}")


_NAN = struct.pack("<d", math.nan)


@cache
def example_class() -> Any:
    """tf.train.Example; importing TFDS takes half a second, so it is left to the first who needs it."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue] - made at run time


def serialise(columns: Mapping[str, Any], kind: Kind) -> bytes:
    """The record of a row: a tf.train.Example, as TFDS would write it, in a tenth of the time."""
    example = example_class()()
    feature = example.features.feature
    for name, type_, _ in FIELDS[kind]:
        value = columns.get(name)
        if type_ == "number":
            feature[name].bytes_list.value.append(_NAN if value is None else struct.pack("<d", value))
        elif value is None:
            continue
        elif type_ == "text":
            feature[name].bytes_list.value.append(value.encode())
        else:
            turns: tuple[Message, ...] = value
            feature[f"{name}/role"].bytes_list.value.extend([turn.role.encode() for turn in turns])
            feature[f"{name}/content"].bytes_list.value.extend([turn.content.encode() for turn in turns])
    return example.SerializeToString(deterministic=True)
