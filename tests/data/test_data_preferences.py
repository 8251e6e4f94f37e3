"""Every layout of a row, and what is said about a bad one."""

from typing import Any

import pytest

from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.preferences import Pair, parse_pair
from dpo_jax.data.rows.problems import BadRow

USER = {"role": "user", "content": "Q?"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
PROMPT = (Message("user", "Q?"),)
HH = "\n\nHuman: Q?\n\nAssistant:"


def sharegpt(*turns: str) -> list[dict[str, str]]:
    return [dict(zip(("from", "value"), t.split(": ", 1), strict=True)) for t in turns]


LAYOUTS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "Q?", "chosen": "good", "rejected": "bad"},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "messages and text": {"prompt": [USER], "chosen": "good", "rejected": "bad"},
    "text and messages": {"prompt": "Q?", "chosen": [GOOD], "rejected": [BAD]},
    "answers repeat the prompt": {"prompt": "Q?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "one message each": {"prompt": "Q?", "chosen": GOOD, "rejected": BAD},
    "implicit messages": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "implicit text": {"chosen": HH + " good", "rejected": HH + " bad"},
    "prompt with turn marks": {"prompt": HH, "chosen": " good", "rejected": " bad"},
    "conversations": {
        "conversations": sharegpt("human: Q?"),
        "chosen": sharegpt("gpt: good")[0],
        "rejected": sharegpt("gpt: bad")[0],
    },
    "conversations and text": {"conversations": sharegpt("human: Q?"), "chosen": "good", "rejected": "bad"},
    "instruction": {"instruction": "Q?", "input": "", "chosen": "good", "rejected": "bad"},
    "question": {"question": "Q?", "system": "", "chosen": "good", "rejected": "bad"},
    "null columns": {"prompt": "Q?", "system": None, "margin": None, "chosen": "good", "rejected": "bad"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_mean_the_same(layout: str) -> None:
    pair = parse_pair(LAYOUTS[layout])
    assert (pair.messages, pair.chosen, pair.rejected, pair.extras) == (PROMPT, "good", "bad", {})


def test_raw_texts_are_as_the_row_spells_them() -> None:
    assert parse_pair(LAYOUTS["text"]).raw == ("Q?", "good", "bad")
    assert parse_pair(LAYOUTS["implicit text"]).raw == (HH, " good", " bad")
    assert parse_pair(LAYOUTS["prompt with turn marks"]).raw == (HH, " good", " bad")
    assert parse_pair(LAYOUTS["messages"]).raw == ("Q?", "good", "bad")
    assert parse_pair({**LAYOUTS["text"], "system": "S"}).raw is None


def test_system_instruction_and_several_turns() -> None:
    turns = (Message("system", "S"), Message("user", "1"), Message("assistant", "2"), Message("user", "3"))
    mine = [{"role": m.role, "content": m.content} for m in turns]
    answers = {"chosen": "good", "rejected": "bad"}
    rows: list[dict[str, Any]] = [
        {"prompt": mine, **answers},
        {"prompt": mine[1:], "system": "S", **answers},
        {"conversations": sharegpt("system: S", "human: 1", "gpt: 2", "human: 3"), **answers},
        {"chosen": [*mine, GOOD], "rejected": [*mine, BAD]},
        {"chosen": [*mine[1:], GOOD], "rejected": [*mine[1:], BAD], "system": "S"},
        {"prompt": "3", "chosen": [*mine, GOOD], "rejected": [*mine, BAD]},
        {
            "chosen": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant: good",
            "rejected": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant: bad",
            "system": "S",
        },
    ]
    for row in rows:
        assert parse_pair(row) == Pair(turns, "good", "bad", None), row
    pair = parse_pair({"instruction": "Translate.", "input": "Hund", **answers})
    assert pair.messages == (Message("user", "Translate.\nHund"),)


def test_neighbouring_turns_of_one_speaker_are_one_message() -> None:
    head = "\n\nHuman: 1\n\nAssistant: 2\n\nAssistant: 2b\n\nHuman: 3\n\nAssistant:"
    messages = parse_pair({"chosen": head + " a", "rejected": head + " b"}).messages
    assert messages == (Message("user", "1"), Message("assistant", "2\n\n2b"), Message("user", "3"))


def test_the_cut_is_the_last_turn_not_the_first_difference() -> None:
    """Answers that share their first words keep them."""
    pair = parse_pair({"chosen": HH + " Sure, here it is", "rejected": HH + " Sure, here I am"})
    assert (pair.chosen, pair.rejected) == ("Sure, here it is", "Sure, here I am")


def test_extra_columns() -> None:
    extras = {"score_chosen": 8, "score_rejected": 1.5, "margin": 6.5, "rating": "better", "source": "web", "id": 7}
    assert parse_pair({**LAYOUTS["text"], **extras}).extras == {
        "score_chosen": 8.0,
        "score_rejected": 1.5,
        "margin": 6.5,
        "rating": "better",
        "source": "web",
    }


def test_unpaired_rows() -> None:
    row = {"prompt": "Q?", "completion": [GOOD], "label": True}
    pair = parse_pair(row, needs_pairs=False)
    assert (pair.messages, pair.chosen, pair.rejected) == (PROMPT, "good", None)
    pair = parse_pair({**row, "label": False}, needs_pairs=False)
    assert (pair.chosen, pair.rejected) == (None, "good")
    assert parse_pair(LAYOUTS["text"], needs_pairs=False).rejected == "bad"


BROKEN: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"prompt": "Q?", "chosen": "good"}, "bad", ["missing field 'rejected'", "chosen, prompt"]),
    ({"prompt": "Q?", "chosen": "good", "rejcted": "bad"}, "bad", ["missing field 'rejected'", "'rejcted' meant"]),
    ({"prompt": "Q?", "chosen": "good", "rejected": None}, "bad", ["'rejected' is null"]),
    ({"prompt": None, "chosen": "good", "rejected": "bad"}, "bad", ["'prompt' is null"]),
    ({"chosen": "good", "rejected": "bad"}, "bad", ["missing field 'prompt'"]),
    ({"promt": "Q?", "chosen": "good", "rejected": "bad"}, "bad", ["missing field 'prompt'", "is 'promt' meant?"]),
    ({"messages": [USER, GOOD]}, "bad", ["missing field 'chosen'", "a dialogue is for sft (inspect --kind dialogues)"]),
    ({"chosen": [GOOD], "rejected": [BAD]}, "bad", ["missing field 'prompt'"]),
    ({"text": "x", "winner": "y"}, "bad", ["unknown column names", "text, winner", "prompt + chosen + rejected"]),
    ({}, "bad", ["unknown column names", "no columns"]),
    ({"prompt": "Q?", "chosen": " ", "rejected": "bad"}, "noise", ["empty completion", "'chosen'"]),
    ({"prompt": "Q?", "chosen": "good", "rejected": [{**BAD, "content": ""}]}, "noise", ["empty completion"]),
    ({"prompt": " ", "chosen": "good", "rejected": "bad"}, "bad", ["empty prompt"]),
    ({"prompt": "Q?", "chosen": "same", "rejected": "same"}, "bad", ["are the same"]),
    ({"prompt": "Q?", "chosen": 3, "rejected": "bad"}, "bad", ["'chosen' is not text", "int"]),
    ({"prompt": 3, "chosen": "good", "rejected": "bad"}, "bad", ["'prompt' is not text", "int"]),
    ({"prompt": [], "chosen": "good", "rejected": "bad"}, "bad", ["'prompt' is an empty list"]),
    ({"prompt": ["Q?"], "chosen": "good", "rejected": "bad"}, "bad", ["'prompt' holds something that is no message"]),
    ({"prompt": [{"role": "user"}], "chosen": "good", "rejected": "bad"}, "bad", ["lacks role/content", "role"]),
    ({"prompt": [{**USER, "content": 3}], "chosen": "a", "rejected": "b"}, "bad", ["content' is not text"]),
    ({"prompt": [{**USER, "role": "critic"}], "chosen": "a", "rejected": "b"}, "bad", ["unknown role", "'critic'"]),
    ({"prompt": [USER, GOOD], "chosen": "a", "rejected": "b"}, "bad", ["bad role order", "user assistant"]),
    ({"prompt": [USER, USER], "chosen": "a", "rejected": "b"}, "bad", ["bad role order"]),
    ({"prompt": [GOOD, USER], "chosen": "a", "rejected": "b"}, "bad", ["bad role order"]),
    ({"prompt": "Q?", "chosen": [USER], "rejected": [BAD]}, "bad", ["bad role order", "'chosen' must end with"]),
    ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "bad", ["does not continue the prompt"]),
    ({"prompt": "a\ud800", "chosen": "good", "rejected": "bad"}, "bad", ["broken Unicode", "character 2"]),
    ({"prompt": "Q?", "instruction": "Q?", "chosen": "a", "rejected": "b"}, "bad", ["several fields give a prompt"]),
    ({"question": "Q?", "input": "I", "chosen": "a", "rejected": "b"}, "bad", ["'input' without 'instruction'"]),
    ({"prompt": "Q?", "completion": "a", "label": True}, "bad", ["unpaired row", "kto"]),
    ({"chosen": HH + " a", "rejected": "\n\nHuman: other\n\nAssistant: b"}, "noise", ["no shared prompt"]),
    ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "other"}, BAD]}, "noise", ["no shared prompt"]),
    ({"chosen": HH + " ", "rejected": HH + " b"}, "noise", ["empty completion"]),
    ({"chosen": HH + " b", "rejected": HH + " b"}, "noise", ["are the same"]),
    ({"chosen": HH + " x\n\nAssistant: a", "rejected": HH + " x\n\nAssistant: b"}, "noise", ["bad role order"]),
    ({"chosen": "hm" + HH + " a", "rejected": "hm" + HH + " b"}, "bad", ["text before the first", "'hm'"]),
]


@pytest.mark.parametrize("case", BROKEN, ids=[f"{i} {words[0]}" for i, (_, _, words) in enumerate(BROKEN)])
def test_bad_rows_say_what_is_wrong(case: tuple[dict[str, Any], str, list[str]]) -> None:
    row, severity, words = case
    with pytest.raises(BadRow) as caught:
        parse_pair(row)
    assert caught.value.severity == severity
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_bad_unpaired_rows() -> None:
    row = {"prompt": "Q?", "completion": "a", "label": True}
    for change, word in (
        ({"label": 1}, "'label' is not true or false"),
        ({"label": None}, "'label' is null"),
        ({"prompt": None}, "'prompt' is null"),
        ({"completion": ""}, "empty completion"),
        ({"completion": [{**USER, "content": "other"}, GOOD]}, "does not continue the prompt"),
    ):
        with pytest.raises(BadRow, match=word):
            parse_pair({**row, **change}, needs_pairs=False)
