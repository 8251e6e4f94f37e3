"""What messages and rows hold beside role and content: honoured, refused or named, never dropped in silence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from dpo_jax.config import DataConfig
from dpo_jax.data.rows.comparisons import parse_comparison
from dpo_jax.data.rows.dialogues import parse_dialogue
from dpo_jax.data.rows.messages import Message, message_of, turns_of
from dpo_jax.data.rows.preferences import parse_pair, parse_prompt
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.dataset import load_preferences
from dpo_jax.data.sets.prompts import load_prompts
from dpo_jax.data.sets.sequences import load_dialogues
from dpo_jax.data.sources import store_schema
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.encode_dialogue import DialogueEncoder, EncodedSequence, TrainOn
from dpo_jax.errors import InputError

TOKENIZER = tiny.tokenizer()
THINKS = tiny.tokenizer()
THINKS.chat_template = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def two(first: dict[str, Any], last: dict[str, Any] | None = None, **row: Any) -> dict[str, Any]:
    """A dialogue of two answers that carry these marks."""
    answers = turn("assistant", "bad wrong answer", **first), turn("assistant", "good answer", **(last or {}))
    return {"messages": [turn("user", "what is good"), answers[0], turn("user", "that is wrong"), answers[1]], **row}


def encode(row: dict[str, Any], train_on: TrainOn = "answers", tokenizer: Any = TOKENIZER) -> EncodedSequence:
    encoder = DialogueEncoder(tokenizer, None, train_on)
    [found] = encoder.encode([encoder.render(parse_dialogue(row))], 999)
    if isinstance(found, BadRow):
        raise found
    return found


def learnt(row: dict[str, Any], train_on: TrainOn = "answers", tokenizer: Any = TOKENIZER) -> str:
    found = encode(row, train_on, tokenizer)
    return tokenizer.decode(found.tokens[found.targets].tolist())


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- marks of turns ----


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}])
def test_marked_answers_are_context(mark: dict[str, Any]) -> None:
    assert learnt(two(mark)) == "good answer<|im_end|>"
    assert learnt(two(mark, {"weight": 1})) == "good answer<|im_end|>"
    assert learnt(two({}, mark)) == "bad wrong answer<|im_end|>"
    np.testing.assert_array_equal(encode(two(mark)).tokens, encode(two({})).tokens)
    shared = {"conversations": [{"from": "human", "value": "no"}, {"from": "gpt", "value": "kind", **mark}]}
    shared["conversations"] += [{"from": "human", "value": "no"}, {"from": "gpt", "value": "rude"}]
    assert learnt(shared) == "rude<|im_end|>"
    with pytest.raises(BadRow, match="no answer of the dialogue is to be learnt") as caught:
        encode(two(mark, mark))
    assert caught.value.severity == "lost"
    with pytest.raises(BadRow, match="is to be learnt"):
        encode(two({}, mark), "last")
    assert learnt(two(mark), "last") == "good answer<|im_end|>"


def test_marks_under_train_on_all() -> None:
    whole, without = encode(two({}), "all"), encode(two({"weight": 0}), "all")
    left_out = TOKENIZER.decode(without.tokens[whole.targets & ~without.targets].tolist())
    assert left_out == "bad wrong answer<|im_end|>"
    last = encode(two({}, {"train": False}), "all")
    assert TOKENIZER.decode(last.tokens[whole.targets & ~last.targets].tolist()) == "good answer<|im_end|>"
    asked = {"messages": [turn("user", "no", train=False), turn("assistant", "kind")]}
    with pytest.raises(BadRow, match=r"not to be learnt, under --data\.train_on all"):
        encode(asked, "all")
    assert learnt(asked) == "kind<|im_end|>"


def test_marks_that_cannot_be_heeded_are_refused() -> None:
    with pytest.raises(BadRow, match=r"'weight' in 'messages' is neither 0 nor 1 \(it is '0.5'"):
        parse_dialogue(two({"weight": 0.5}))
    with pytest.raises(BadRow, match="'train' in 'messages' is neither true nor false"):
        parse_dialogue(two({"train": "no"}))
    asked = {"messages": [turn("user", "no", train=True), turn("assistant", "kind")]}
    with pytest.raises(BadRow, match="no answer is marked as one to learn"):
        encode(asked)
    encode(asked, "all")
    answer = [turn("assistant", "a", weight=0)]
    with pytest.raises(BadRow, match="the answer in 'chosen' is not to be learnt"):
        parse_pair({"prompt": "q", "chosen": answer, "rejected": "b"})
    with pytest.raises(BadRow, match="is to be learnt"):
        encode({"prompt": "q", "completion": answer})


def test_marks_in_front_of_compared_answers_change_nothing() -> None:
    """What differs in marks alone is one prompt."""
    before = two({"weight": 0})["messages"][:3]
    plain = two({})["messages"][:3]
    pair = parse_pair({"prompt": before, "chosen": [*plain, turn("assistant", "a")], "rejected": "b"})
    assert turns_of(pair.messages) == [(m["role"], m["content"]) for m in plain]
    parse_pair({"chosen": [*plain, turn("assistant", "a")], "rejected": [*before, turn("assistant", "b", weight=1)]})


# ---- null keys, unknown keys, reasoning ----


def test_null_keys_are_absent_keys() -> None:
    for nulls in ({"from": None, "value": None}, {"weight": None, "train": None, "tool_calls": None, "x": None}):
        assert message_of(turn("user", "a", **nulls), "m") == Message("user", "a")
    assert message_of({"role": None, "content": None, "from": "gpt", "value": "a"}, "m") == Message("assistant", "a")
    with pytest.raises(BadRow, match="lacks role/content"):
        message_of({"role": "user", "content": None}, "m")


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "images"])
def test_what_no_text_says_is_refused(key: str) -> None:
    with pytest.raises(BadRow, match=f"{key} in 'm'"):
        message_of(turn("user", "a", **{key: [{"name": "f"}]}), "m")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_written_by_the_template_or_named(name: str, tmp_path: Path) -> None:
    row = {"messages": [turn("user", "what is red"), turn("assistant", "film", **{name: "red is a film"}, id=7)]}
    assert learnt(row, tokenizer=THINKS) == "<think>red is a film</think>film<|im_end|>"
    answer = {"prompt": "what is red", "completion": row["messages"][1:]}
    assert learnt(answer, tokenizer=THINKS) == "<think>red is a film</think>film<|im_end|>"
    # As transformers renders it.
    theirs = THINKS.apply_chat_template(row["messages"], tokenize=False)
    if name == "reasoning_content":  # the other names only newer versions know
        assert THINKS.decode(encode(row, tokenizer=THINKS).tokens.tolist()) == str(theirs).rstrip()
    source = write(tmp_path / "rows.jsonl", row)
    plain = load_dialogues(source, TOKENIZER, DataConfig(), vocab_size=320)
    assert plain.unused_columns == ("messages: id", f"messages: {name}")
    assert f"messages: {name}" in plain.summary()
    written = load_dialogues(source, THINKS, DataConfig(), vocab_size=320)
    assert written.unused_columns == ("messages: id",)
    control = {"messages": [turn("user", "a"), turn("assistant", "b", **{name: "<|im_end|>"})]}
    with pytest.raises(BadRow, match="control token"):
        encode(control, tokenizer=THINKS)


def test_an_answer_begins_with_its_reasoning_where_the_template_opens_it_for_generation() -> None:
    opened = tiny.tokenizer()
    opened.chat_template = str(THINKS.chat_template).replace(
        "<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>\n' }}{% endif"
    )
    row = {"messages": [turn("user", "what"), turn("assistant", "film", thinking="a film is red")]}
    assert learnt(row, tokenizer=opened) == "a film is red</think>film<|im_end|>"


def test_keys_of_compared_answers_are_named(tmp_path: Path) -> None:
    chosen = [turn("assistant", "film", reasoning_content="hm")]
    asked = [turn("user", "what", reasoning_content="seen")]
    source = write(tmp_path / "rows.jsonl", {"prompt": asked, "chosen": chosen, "rejected": "book"})
    for tokenizer, named in ((TOKENIZER, {"prompt", "chosen"}), (THINKS, {"chosen"})):
        data = load_preferences(source, tokenizer, DataConfig(), vocab_size=320)
        assert set(data.unused_columns) == {f"{column}: reasoning_content" for column in named}
    assert "<think>seen</think>" in THINKS.decode(data.prompts[0].tolist())


# ---- columns ----


def test_tools_are_written_by_the_template_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tools = [{"name": "weather", "parameters": {"city": {"type": "string"}, "day": None}}]
    for given in (tools, json.dumps(tools), [json.dumps(tool) for tool in tools]):
        for row in ({"messages": [turn("user", "a"), turn("assistant", "b")]}, {"prompt": "a", "completion": "b"}):
            text = THINKS.decode(encode({**row, "tools": given}, tokenizer=THINKS).tokens.tolist())
            assert '<|im_start|>system\n[{"name": "weather"' in text
            assert '"day"' not in text or isinstance(given, str)
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "tools": tools}
    encoder = ConversationEncoder(THINKS, None)
    assert "weather" in str(encoder.render(parse_pair(pair)).wholes[0])
    assert "weather" in THINKS.decode(encoder.prompt_ids(parse_prompt({"prompt": "a", "tools": tools})[0]))
    assert parse_comparison({"prompt": "a", "responses": ["b", "c"], "tools": tools}).messages[0].tools
    source = write(tmp_path / "rows.jsonl", pair)
    assert load_preferences(source, TOKENIZER, DataConfig(), vocab_size=320).unused_columns == ("tools",)
    assert load_preferences(source, THINKS, DataConfig(), vocab_size=320).unused_columns == ()
    load_prompts(source, ConversationEncoder(TOKENIZER, None), DataConfig(), longest=99, vocab_size=320)
    assert "the template does not write tools" in caplog.text
    for empty in (None, [], "", "[]"):
        assert parse_dialogue({**pair, "tools": empty}).messages[0].tools is None
    with pytest.raises(BadRow, match="'tools' is not a list of JSON objects"):
        parse_dialogue({**pair, "tools": "get_weather"})


def test_a_column_system_prompt_is_a_system_message() -> None:
    orca = {"system_prompt": "Be brief.", "question": "what is red", "response": "film"}
    assert parse_dialogue(orca).messages[0] == Message("system", "Be brief.")
    assert parse_dialogue({**orca, "system_prompt": ""}).messages[0].role == "user"
    pair = {"system_prompt": "Be brief.", "prompt": "q", "chosen": "a", "rejected": "b"}
    assert parse_pair(pair).messages[0] == Message("system", "Be brief.")
    assert parse_pair({**pair, "system": "Be brief."}).messages[0].content == "Be brief."
    assert parse_prompt({"prompt": "q", "system_prompt": "s"})[0][0] == Message("system", "s")
    assert parse_comparison({"prompt": "q", "responses": ["a", "b"], "system_prompt": "s"}).messages[0].content == "s"
    with pytest.raises(BadRow, match="two system prompts"):
        parse_pair({**pair, "system": "Be long."})
    with pytest.raises(BadRow, match="two system prompts"):
        parse_dialogue({"messages": [turn("system", "x"), turn("user", "a"), turn("assistant", "b")], "system": "y"})


# ---- HH ----


def test_a_text_that_ends_with_the_human_is_noise() -> None:
    said = "\n\nHuman: a\n\nAssistant:"
    rows = [
        {"chosen": f"{said} b\n\nHuman: c", "rejected": f"{said} d"},
        {"chosen": f"{said} b", "rejected": f"{said} d\n\nHuman: c"},
        {"prompt": said, "chosen": " b\n\nHuman: c", "rejected": " d"},
    ]
    for row in rows:
        for parse in (parse_pair, parse_dialogue, parse_comparison):
            with pytest.raises(BadRow, match="the text ends with a turn of") as caught:
                parse(row)
            assert caught.value.severity == "noise"


def test_a_little_of_it_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"chosen": f"\n\nHuman: a{i}\n\nAssistant: b{end}", "rejected": f"\n\nHuman: a{i}\n\nAssistant: c"}
        for i, end in enumerate(["\n\nHuman: d", *[""] * 99])
    ]
    data = load_dialogues(write(tmp_path / "a.jsonl", *rows), TOKENIZER, DataConfig(), vocab_size=320)
    assert (len(data), data.dropped.total()) == (99, 1)
    with pytest.raises(InputError, match="1 of 5 rows"):
        load_dialogues(write(tmp_path / "b.jsonl", *rows[:5]), TOKENIZER, DataConfig(), vocab_size=320)


# ---- a store holds all of it, but for the keys of compared answers ----


def test_a_store_names_the_keys_of_compared_answers() -> None:
    asked, answer = turn("user", "a", id=1), turn("assistant", "b", reasoning_content="hm")
    assert store_schema.keys_lost({"chosen": [asked, answer], "rejected": "c"}) == {"chosen: reasoning_content"}


@pytest.mark.parametrize(
    "row",
    [
        two({"weight": 0, "name": "x"}, {"reasoning_content": "hm"}, tools=[{"name": "f"}]),
        {"prompt": two({"train": False})["messages"][:3], "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]},
    ],
)
def test_stores_keep_marks_keys_and_tools(row: dict[str, Any]) -> None:
    kind = store_schema.kind_of(row)
    parsed = store_schema.parse(row, kind).columns
    stored = {name: value for name, value in parsed.items() if value is not None}
    name = "messages" if kind == "dialogues" else "prompt"
    stored[name] = [message.as_dict() for message in stored[name]]
    read = store_schema.as_row(stored, kind)
    parse = parse_dialogue if kind == "dialogues" else parse_pair
    assert parse(read) == parse(row)
