"""Dialogues: every layout of a row, and which tokens of a conversation are to be predicted."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers_for_tests import CHATML_SPECIALS, LLAMA3_SPECIALS, byte_level, llama2
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import DataConfig
from dpo_jax.data.rows.dialogues import Dialogue, parse_dialogue
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.sequences import SequenceDataset, load_dialogues
from dpo_jax.data.tokens.encode_dialogue import DialogueEncoder, EncodedSequence, TrainOn
from dpo_jax.errors import InputError

SYSTEM = Message("system", "Be brief.")
TURNS = (
    Message("user", "Hi"),
    Message("assistant", "Hello"),
    Message("user", "Who?"),
    Message("assistant", "颜色 and\nme!"),
)
DIALOGUE = Dialogue((SYSTEM, *TURNS), None)


def spelled(*turns: Message, keys: tuple[str, str] = ("role", "content")) -> list[dict[str, str]]:
    human = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{keys[0]: m.role if keys[0] == "role" else human[m.role], keys[1]: m.content} for m in turns]


def sharegpt(*turns: Message) -> list[dict[str, str]]:
    return spelled(*turns, keys=("from", "value"))


# ---- layouts ---------------------------------------------------------------------------------------------------------

SHORT: dict[str, dict[str, Any]] = {
    "messages": {"messages": spelled(*TURNS[:2])},
    "conversations": {"conversations": sharegpt(*TURNS[:2])},
    "messages and a copy of the prompt": {"prompt": "Hi ", "messages": spelled(*TURNS[:2])},
    "prompt and completion": {"prompt": "Hi", "completion": "Hello"},
    "both as messages": {"prompt": spelled(TURNS[0]), "completion": spelled(TURNS[1])},
    "completion repeats the prompt": {"prompt": spelled(TURNS[0]), "completion": spelled(*TURNS[:2])},
    "a good unpaired row": {"prompt": "Hi", "completion": "Hello", "label": True},
    "response": {"prompt": "Hi", "response": "Hello"},
    "question and answer": {"question": "Hi", "answer": "Hello"},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "llama factory": {"instruction": "Hi", "input": None, "output": "Hello", "history": [], "system": ""},
    "dolly": {"instruction": "Hi", "context": "", "response": "Hello", "category": "qa"},
    "messages and response": {"messages": spelled(TURNS[0]), "response": "Hello"},
    "preferences": {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
    "implicit preferences": {"chosen": spelled(*TURNS[:2]), "rejected": spelled(TURNS[0], Message("assistant", "No"))},
    "HH": {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
}


@pytest.mark.parametrize("layout", SHORT)
def test_layouts_mean_the_same(layout: str) -> None:
    assert parse_dialogue(SHORT[layout]).messages == TURNS[:2]


def test_several_turns_and_system_prompts() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": spelled(SYSTEM, *TURNS)},
        {"messages": spelled(*TURNS), "system": "Be brief."},
        {"conversations": sharegpt(SYSTEM, *TURNS)},
        {"instruction": "Who?", "output": TURNS[3].content, "history": [["Hi", "Hello"]], "system": "Be brief."},
        {"prompt": spelled(SYSTEM, TURNS[0]), "completion": spelled(*TURNS[1:])},
        {"prompt": spelled(SYSTEM, *TURNS[:3]), "completion": TURNS[3].content},
        {"prompt": spelled(SYSTEM, *TURNS[:3]), "chosen": TURNS[3].content, "rejected": "No"},
    ]
    for row in rows:
        assert parse_dialogue(row) == DIALOGUE, row
    row = {"instruction": "Sum up.", "context": "A text.", "response": "Text."}
    assert parse_dialogue(row).messages[0].content == "Sum up.\nA text."
    assert parse_dialogue({"messages": spelled(Message("system", ""), *TURNS)}).messages[0].content == ""


def test_raw_texts() -> None:
    for layout in ("prompt and completion", "alpaca", "messages", "preferences"):
        assert parse_dialogue(SHORT[layout]).raw == ("Hi", "Hello")
    assert parse_dialogue(SHORT["HH"]).raw == ("\n\nHuman: Hi\n\nAssistant:", " Hello")
    assert parse_dialogue({**SHORT["alpaca"], "history": [["a", "b"]]}).raw is None


U, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
BROKEN: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"messages": [A, U, A]}, "bad", ["starts with the assistant", "assistant user assistant"]),
    ({"messages": [U, U, A]}, "bad", ["two turns in a row of one role", "messages 1 and 2", "user"]),
    ({"messages": [U, A, A]}, "bad", ["two turns in a row of one role", "messages 2 and 3", "assistant"]),
    ({"messages": [U, A, U]}, "bad", ["no answer at the end"]),
    ({"messages": [U]}, "bad", ["no assistant turn", "user"]),
    ({"messages": [{"role": "system", "content": "S"}]}, "bad", ["no assistant turn", "system"]),
    ({"messages": [A]}, "bad", ["starts with the assistant"]),
    ({"messages": [U, {**A, "content": " \n"}]}, "noise", ["empty turn", "message 2, of the assistant"]),
    ({"messages": [{**U, "content": ""}, A]}, "bad", ["empty turn", "message 1, of the user"]),
    ({"messages": [U, {"role": "system", "content": "S"}, A]}, "bad", ["system message inside the dialogue"]),
    ({"messages": [U, {**A, "role": "critic"}]}, "bad", ["unknown role in 'messages'", "'critic'"]),
    ({"messages": []}, "bad", ["'messages' is an empty list"]),
    ({"messages": "Hi"}, "bad", ["'messages' is not a list"]),
    (
        {"messages": [U, A], "conversations": [U, A]},
        "bad",
        ["several fields give the dialogue", "messages, conversations"],
    ),
    ({"messages": [U, A], "output": "A"}, "bad", ["several fields give the dialogue", "messages, output"]),
    ({"messages": [U, A], "prompt": "Other"}, "bad", ["'prompt' is not the first user message"]),
    ({"messages": [{"role": "system", "content": "S"}, U, A], "system": "T"}, "bad", ["two system prompts"]),
    ({"prompt": "Q", "output": "A", "response": "A"}, "bad", ["several fields give an answer", "response, output"]),
    ({"prompt": "Q", "instruction": "Q", "output": "A"}, "bad", ["several fields give a prompt"]),
    ({"prompt": "Q"}, "bad", ["missing field: none of completion, response, answer, output"]),
    ({"prompt": "Q", "reponse": "A"}, "bad", ["is 'reponse' meant?"]),
    ({"output": "A"}, "bad", ["missing field 'prompt'"]),
    ({"text": "A"}, "bad", ["unknown column names", "text"]),
    ({}, "bad", ["unknown column names", "no columns"]),
    ({"prompt": "Q", "output": " "}, "noise", ["empty turn"]),
    ({"prompt": "Q", "output": 3}, "bad", ["'output' is not text"]),
    ({"prompt": "Q", "output": "\ud800"}, "bad", ["broken Unicode"]),
    ({"prompt": "Q", "output": "A", "history": "B"}, "bad", ["'history' is no list"]),
    ({"prompt": "Q", "output": "A", "history": [["B"]]}, "bad", ["'history' is no list"]),
    ({"prompt": "Q", "output": "A", "history": [["B", ""]]}, "noise", ["empty turn", "message 2"]),
    ({"prompt": [U], "output": "A", "history": 7}, "bad", ["'history' is no list"]),
    ({"prompt": "Q", "completion": [{**U, "content": "other"}, A]}, "bad", ["does not continue the prompt"]),
    ({"instruction": "Q", "input": "a", "context": "b", "output": "A"}, "bad", ["'context' and 'input'"]),
    ({"prompt": "Q", "completion": "A", "label": False}, "lost", ["'label' is false"]),
    ({"prompt": "Q", "chosen": "A"}, "bad", ["missing field 'rejected'"]),
]


@pytest.mark.parametrize("case", BROKEN, ids=[f"{i} {words[0]}" for i, (_, _, words) in enumerate(BROKEN)])
def test_bad_rows_say_what_is_wrong(case: tuple[dict[str, Any], str, list[str]]) -> None:
    row, severity, words = case
    with pytest.raises(BadRow) as caught:
        parse_dialogue(row)
    assert caught.value.severity == severity
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


# ---- masks -----------------------------------------------------------------------------------------------------------

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@functools.cache
def tokenizer(template: str | None = None, *, bos: bool = False, merged: bool = False) -> PreTrainedTokenizerBase:
    specials = (*CHATML_SPECIALS, *LLAMA3_SPECIALS)
    begin = "<|begin_of_text|>" if bos else None
    words = ("\n\n",) if merged else ()
    return byte_level(specials, bos=begin, add_bos=bos, words=words, chat_template=template)


def encode(
    text: PreTrainedTokenizerBase,
    template: str | None,
    dialogue: Dialogue = DIALOGUE,
    train_on: TrainOn = "answers",
    max_length: int = 1000,
) -> EncodedSequence:
    encoder = DialogueEncoder(text, template, train_on)
    [encoded] = encoder.encode([encoder.render(dialogue)], max_length)
    if isinstance(encoded, BadRow):
        raise encoded
    assert encoded.tokens.dtype == np.int32
    assert encoded.targets.shape == encoded.tokens.shape
    assert not encoded.targets[0]
    return encoded


def predicted(text: PreTrainedTokenizerBase, encoded: EncodedSequence) -> list[str]:
    """Each run of neighbouring targets, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], encoded.targets, [False]])))
    return [str(text.decode(encoded.tokens[a:b].tolist())) for a, b in edges.reshape(-1, 2)]


ENDS = {"chatml": "<|im_end|>", "zephyr": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": " <|im_end|>"}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", ENDS)
def test_targets_are_the_answers_and_their_terminators(template: str, bos: bool) -> None:
    text, end = tokenizer(bos=bos), ENDS[template]
    space = " " if template == "llama2" else ""
    answers = [f"{space}{m.content}{end}" for m in TURNS if m.role == "assistant"]
    encoded = encode(text, template)
    assert predicted(text, encoded) == answers
    assert predicted(text, encode(text, template, train_on="last")) == answers[-1:]
    everything = encode(text, template, train_on="all")
    assert everything.targets.tolist() == [False] + [True] * (len(everything.tokens) - 1)
    for other in (encode(text, template, train_on="last"), everything):
        np.testing.assert_array_equal(other.tokens, encoded.tokens)
    # The ids are those of the rendered whole, one BOS at most, and nothing behind the last terminator.
    whole = DialogueEncoder(text, template, "all").render(DIALOGUE).text
    assert encoded.tokens.tolist() == text(whole, add_special_tokens=bos and template != "llama3")["input_ids"] or (
        template == "llama2" and encoded.tokens.tolist() == text(whole, add_special_tokens=False)["input_ids"]
    )
    assert (encoded.tokens == text.bos_token_id).sum() == int(bos)
    assert text.decode(encoded.tokens[-1:]) == end.strip()


@pytest.mark.parametrize("template", [*ENDS, "raw", MARKED])
def test_an_answer_that_was_cut_has_no_terminator(template: str) -> None:
    """All else is as with one; what is left out stands at the end."""
    named = template in ENDS or template == "raw"
    text = tokenizer() if named else tokenizer(template)
    row = {"prompt": "Hi", "completion": "Hello and"}
    cut = parse_dialogue({**row, "finish_reason": "length"})
    assert cut == dataclasses.replace(parse_dialogue({**row, "finish_reason": "stop"}), cut=True)
    answers = {"train_on": "last"} if named else {}
    encoded = encode(text, template if named else None, cut, **answers)
    whole = encode(text, template if named else None, parse_dialogue(row), **answers)
    assert [answer.strip() for answer in predicted(text, encoded)] == ["Hello and"]
    n = len(encoded.tokens)
    assert 0 < n < len(whole.tokens)
    assert whole.tokens[:n].tolist() == encoded.tokens.tolist()
    assert whole.targets[:n].tolist() == encoded.targets.tolist()
    assert not encoded.cut


def test_raw_takes_the_texts_as_they_stand() -> None:
    encoded = encode(tokenizer(bos=True), "raw", Dialogue(TURNS[:2], ("Q: ", "A.")))
    assert tokenizer(bos=True).decode(encoded.tokens) == "<|begin_of_text|>Q: A.<|im_end|>"
    assert predicted(tokenizer(bos=True), encoded) == ["A.<|im_end|>"]
    spelt = encode(tokenizer(bos=True), "raw", Dialogue(TURNS[:2], ("Q: ", "A.<|im_end|>")))
    np.testing.assert_array_equal(spelt.tokens, encoded.tokens)
    with pytest.raises(BadRow, match="raw takes one prompt"):
        encode(tokenizer(), "raw")


def test_marks_and_prefixes_give_transformers_own_mask(shared_data: Path) -> None:
    """`{% generation %}` marks, rendered prefixes, and transformers' return_assistant_tokens_mask: one and the same."""
    lines = (shared_data / "oasst_zh" / "sft.jsonl").read_text().splitlines()
    dialogues = [parse_dialogue(json.loads(line)) for line in lines[:120]]
    marked, plain = tokenizer(MARKED), tokenizer(UNMARKED)
    assert DialogueEncoder(marked, None, "answers")._template.marks_answers  # type: ignore[union-attr]
    assert not DialogueEncoder(plain, None, "answers")._template.marks_answers  # type: ignore[union-attr]
    for dialogue in dialogues:
        theirs = marked.apply_chat_template(
            [m.as_dict() for m in dialogue.messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        for text in (marked, plain):
            encoded = encode(text, None, dialogue, max_length=10**6)
            n = len(encoded.tokens)
            assert encoded.tokens.tolist() == theirs["input_ids"][:n]
            assert encoded.targets.tolist() == [bool(x) for x in theirs["assistant_masks"][:n]]
            assert text.decode(theirs["input_ids"][n:]) == "\n"


@pytest.mark.parametrize("body", ["{{ m['content'] }}{% endgeneration %}<|im_end|>\n", None])
def test_marks_that_end_before_or_behind_the_terminator(body: str | None) -> None:
    old = "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    template = MARKED.replace(old, body or "{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}")
    assert template != MARKED
    assert predicted(tokenizer(template), encode(tokenizer(template), None)) == [
        "Hello<|im_end|>",
        f"{TURNS[3].content}<|im_end|>",
    ]


def test_marks_that_are_not_one_an_answer_are_refused() -> None:
    once = MARKED.replace("m['role'] == 'assistant' %}", "loop.last %}")
    with pytest.raises(BadRow, match=r"marks are not one an answer \(1 of 2"):
        encode(tokenizer(once), None)
    nothing = MARKED.replace("{{ m['content'] + '<|im_end|>' }}{% endgen", "{% endgen")
    nothing = nothing.replace("{% endgeneration %}", "{% endgeneration %}{{ m['content'] + '<|im_end|>' }}")
    with pytest.raises(BadRow, match="hold no whole answer"):
        encode(tokenizer(nothing), None)


def test_a_template_that_drops_earlier_turns_has_a_last_answer_only() -> None:
    drops = UNMARKED.replace("{{ m['content'] +", "{{ (m['content'] if loop.last else '...') +", 1)
    assert drops != UNMARKED
    with pytest.raises(BadRow, match=r"differently once other turns follow \(.*\{% generation %\}") as caught:
        encode(tokenizer(drops), None)
    assert caught.value.severity == "bad"
    for train_on in ("last", "all"):
        encoded = encode(tokenizer(drops), None, train_on=train_on)
        assert predicted(tokenizer(drops), encoded)[-1].endswith(f"{TURNS[3].content}<|im_end|>")
    assert predicted(tokenizer(drops), encode(tokenizer(drops), None, Dialogue(TURNS[:2], None))) == ["Hello<|im_end|>"]


def test_a_template_without_a_turn_end_gets_eos_at_the_end() -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    text = tokenizer(template)
    encoded = encode(text, None)
    first, last = predicted(text, encoded)
    assert first.rstrip("\n") == "Hello"
    assert last == f"{TURNS[3].content}<|im_end|>"


def test_a_token_across_the_start_of_an_answer_belongs_to_it() -> None:
    text = tokenizer(merged=True)
    dialogue = Dialogue((TURNS[0], Message("assistant", "\ngood"), TURNS[2], Message("assistant", "ok")), None)
    assert predicted(text, encode(text, "chatml", dialogue)) == ["\n\ngood<|im_end|>", "ok<|im_end|>"]


def test_answers_that_spell_terminators_or_control_tokens() -> None:
    text = tokenizer()

    def said(answer: str) -> Dialogue:
        return Dialogue((TURNS[0], Message("assistant", answer), *TURNS[2:]), None)

    np.testing.assert_array_equal(
        encode(text, "chatml", said("A<|im_end|>")).tokens, encode(text, "chatml", said("A")).tokens
    )
    with pytest.raises(BadRow, match="control token"):
        encode(text, "chatml", said("a <|im_end|> b"))
    with pytest.raises(BadRow, match="empty turn"):
        encode(text, "chatml", said("<|im_end|>"))


def test_a_long_dialogue_keeps_its_start() -> None:
    text = tokenizer()
    whole = encode(text, "chatml")
    first = int(np.flatnonzero(whole.targets)[0])
    for length in (first + 1, len(whole.tokens) - 1):
        cut = encode(text, "chatml", max_length=length)
        assert cut.cut
        np.testing.assert_array_equal(cut.tokens, whole.tokens[:length])
        np.testing.assert_array_equal(cut.targets, whole.targets[:length])
    assert not whole.cut
    for train_on, length in (("answers", first), ("last", len(whole.tokens) // 2), ("all", 1)):
        with pytest.raises(BadRow, match=r"no token of an answer is left.*--data\.max_length") as caught:
            encode(text, "chatml", train_on=train_on, max_length=length)  # type: ignore[arg-type]
        assert caught.value.severity == "lost"


@pytest.mark.parametrize("legacy", [False, True])
def test_llama2_ids_and_masks_turn_by_turn(shared_data: Path, tmp_path: Path, legacy: bool) -> None:
    """SentencePiece itself, turn by turn as Meta's chat_completion, says which ids an answer has."""
    pieces = sentencepiece.SentencePieceProcessor(str(shared_data / "tokenizers" / "llama2.tokenizer.model"))
    text = llama2(shared_data, tmp_path, legacy=legacy)
    lines = (shared_data / "oasst_zh" / "sft.jsonl").read_text().splitlines()
    dialogues = [parse_dialogue(json.loads(line)) for line in lines[::3]]
    assert max(len(d.messages) for d in dialogues) == 6
    encoder = DialogueEncoder(text, "llama2", "answers")
    last = DialogueEncoder(text, "llama2", "last")
    rendered = [encoder.render(d) for d in dialogues]
    lasts = last.encode([last.render(d) for d in dialogues], 10**6)
    for dialogue, encoded, final in zip(dialogues, encoder.encode(rendered, 10**6), lasts, strict=True):
        tokens, targets = [1], [False]
        start = 0
        for user, assistant in zip(dialogue.messages[::2], dialogue.messages[1::2], strict=True):
            prompt = pieces.encode(f"[INST] {user.content.strip()} [/INST]")
            turn = [*pieces.encode(f"[INST] {user.content.strip()} [/INST] {assistant.content.strip()} "), 2]
            assert turn[: len(prompt)] == prompt
            start = len(tokens) + len(prompt)
            tokens += turn
            targets += [False] * len(prompt) + [True] * (len(turn) - len(prompt))
        assert isinstance(encoded, EncodedSequence)
        assert isinstance(final, EncodedSequence)
        assert encoded.tokens.tolist() == final.tokens.tolist() == tokens
        assert encoded.targets.tolist() == targets
        assert final.targets.tolist() == [False] * start + [True] * (len(tokens) - start)


# ---- data sets -------------------------------------------------------------------------------------------------------


def load(tmp_path: Path, rows: list[Any], **options: Any) -> SequenceDataset:
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    config = DataConfig(template="chatml", max_length=options.pop("max_length", 64), limit=options.pop("limit", None))
    return load_dialogues(str(source), tokenizer(), config, vocab_size=600, **options)


def test_rows_of_several_layouts_in_one_file(tmp_path: Path) -> None:
    rows = [*SHORT.values(), {"messages": spelled(*TURNS)}]
    data = load(tmp_path, [*rows[:4], "", *rows[4:]])
    assert len(data) == len(rows) == data.rows_read
    assert data.row_numbers.tolist() == [*range(1, 5), *range(6, len(rows) + 2)]
    assert data.tokens.lengths.tolist() == data.targets.lengths.tolist() == data.lengths.tolist()
    for i in range(len(SHORT)):
        np.testing.assert_array_equal(data.tokens[i], data.tokens[0])
        np.testing.assert_array_equal(data.targets[i], data.targets[0])
    assert data.target_lengths.tolist() == [int(data.targets[i].sum()) for i in range(len(data))]
    assert data.unused_columns == ("category",)
    assert data.terminators == (tokenizer().eos_token_id,)
    assert f"{len(rows)} of {len(rows)} rows" in data.summary()
    assert "0 rows cut" in data.summary()
    assert "columns not used: category" in data.summary()
    assert load(tmp_path, rows, limit=2).row_numbers.tolist() == [1, 2]


def test_bad_rows_refuse_the_file_or_are_skipped(tmp_path: Path) -> None:
    rows = [{"messages": [A, U, A]}, {"messages": [U, U, A]}, "{", SHORT["messages"], {"messages": [A, U, A]}]
    with pytest.raises(InputError, match=r"4 of 5 rows.*2 x the dialogue starts with the assistant \(first: row 1"):
        load(tmp_path, rows)
    data = load(tmp_path, rows, on_bad_rows="skip")
    assert data.row_numbers.tolist() == [4]
    assert data.dropped.total() == 4
    assert "two turns in a row of one role" in data.problems
    with pytest.raises(InputError, match="none of 1 rows can be used"):
        load(tmp_path, rows[:1], on_bad_rows="skip")


def test_cut_and_lost_rows_are_counted(tmp_path: Path) -> None:
    long = {"prompt": "Hi", "output": "x" * 80}
    data = load(tmp_path, [long, {"prompt": "x" * 80, "output": "A"}, SHORT["alpaca"]])
    assert data.row_numbers.tolist() == [1, 3]
    assert (data.cut, data.lengths[0]) == (1, 64)
    assert data.dropped == {"no token of an answer is left to predict": 1}
    assert data.terminators[0] not in data.tokens[0][-5:]


def test_fingerprint_follows_ids_and_targets(tmp_path: Path) -> None:
    rows = [{"messages": spelled(*TURNS)}, SHORT["alpaca"]]
    first = load(tmp_path, rows).fingerprint
    assert first == load(tmp_path, [{**r, "id": 7} for r in rows]).fingerprint
    assert first != load(tmp_path, rows[::-1]).fingerprint
    assert first != load(tmp_path, rows, train_on="last").fingerprint


def test_ids_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(SHORT["alpaca"]))
    with pytest.raises(InputError, match=r"row 1: the tokenizer gives the id .* embedding has 100 rows"):
        load_dialogues(str(tmp_path / "a.jsonl"), tokenizer(), DataConfig(template="chatml"), vocab_size=100)


def test_real_chinese_dialogues(shared_data: Path, tmp_path: Path) -> None:
    source, text = str(shared_data / "oasst_zh" / "sft.jsonl"), llama2(shared_data, tmp_path)
    config = DataConfig(template="llama2", max_length=8192)
    data = load_dialogues(source, text, config, vocab_size=32000)
    assert (len(data), data.cut, data.dropped.total()) == (766, 0, 0)
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    for i in range(0, 766, 5):
        answers = [a.strip() for _, a in rows[i]["history"]] + [rows[i]["output"].strip()]
        encoded = EncodedSequence(data.tokens[i], data.targets[i], False)
        assert [p.strip() for p in predicted(text, encoded)] == [f"{a} </s>" for a in answers]
        assert (data.tokens[i] == 1).sum() == 1
        assert (data.tokens[i] == 2).sum() == len(answers)
