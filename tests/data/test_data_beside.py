"""Columns beside the texts: read by who needs them, in nobody else's way; and blank responses, one rule for all."""

import datetime
import decimal
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from dpo_jax import cli
from dpo_jax.config import DataConfig, RewardLossConfig
from dpo_jax.data.rows.ratings import number_of
from dpo_jax.data.sets.comparison_sets import load_comparisons, load_responses
from dpo_jax.data.sets.dataset import load_preferences
from dpo_jax.data.sets.prompts import load_prompts
from dpo_jax.data.sets.sequences import load_dialogues
from dpo_jax.data.sources import store_schema
from dpo_jax.data.sources.files import read_rows
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.errors import InputError

TOKENIZER = tiny.tokenizer()
OPTIONS: dict[str, Any] = {"vocab_size": 320}
PAIR = {"prompt": "what is red", "chosen": "film", "rejected": "book"}
ODD = {
    "rating": [1, 2],
    "margin": "much",
    "score_chosen": math.nan,
    "score_rejected": 10**400,
    "source": {"name": "web", "id": 3},
    "agreement": "most",
    "labels": [0, 1],
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def learnt(source: str, on_bad_rows: Any = "refuse", **rules: Any) -> Any:
    return load_comparisons(
        source, TOKENIZER, DataConfig(), RewardLossConfig(**rules), on_bad_rows=on_bad_rows, **OPTIONS
    )


# ---- values that nobody asked for ----


def test_values_that_a_command_does_not_need_stop_nobody(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [PAIR, PAIR | ODD])
    data = load_preferences(source, TOKENIZER, DataConfig(), **OPTIONS)
    assert len(data) == 2
    assert all(value is None for values in data.extras.values() for value in values)
    names = {"rating", "margin", "score_chosen", "score_rejected", "source"}
    assert names <= {*data.unused_columns}
    assert not names & {*data.used_columns}
    some = load_preferences(
        write(tmp_path / "b.jsonl", [PAIR | {"rating": 1}, PAIR | ODD]), TOKENIZER, DataConfig(), **OPTIONS
    )
    assert "rating of 1 rows" in some.unused_columns
    assert "rating" in some.used_columns
    assert some.extras["rating"] == [1, None]
    assert len(learnt(source)) == 2
    assert len(load_responses(source, TOKENIZER, DataConfig(), **OPTIONS)) == 2
    assert len(load_dialogues(source, TOKENIZER, DataConfig(), **OPTIONS)) == 2
    parsed = store_schema.parse(PAIR | ODD, "preferences")
    assert set(parsed.unusable) == {"rating", "margin", "score_chosen", "score_rejected", "source"}
    assert "rating" not in parsed.columns
    assert store_schema.parse({"text": "a", "source": {"b": 1}}, "text").unusable == ("source",)


def test_an_integer_of_thousands_of_digits_stops_nobody(tmp_path: Path) -> None:
    text = json.dumps(PAIR)[:-1] + f', "margin": {"1" * 5000}}}'
    for name, written in (("a.jsonl", text), ("a.json", f"[{text}]")):
        (tmp_path / name).write_text(written)
        assert len(load_preferences(str(tmp_path / name), TOKENIZER, DataConfig(), **OPTIONS)) == 1
        with pytest.raises(InputError, match=r"'margin' is not a finite number \(first: row 1: it holds 'inf'"):
            learnt(str(tmp_path / name), margin="column")


@pytest.mark.parametrize(
    ("margin", "column", "value"),
    [
        ("column", "margin", "much"),
        ("column", "margin", math.nan),
        ("column", "margin", 10**400),
        ("small", "rating", [1, 2]),
        ("score_gap", "score_rejected", "seven"),
        ("agreement", "agreement", None),
    ],
)
def test_what_is_needed_is_refused_by_row_and_column(tmp_path: Path, margin: str, column: str, value: Any) -> None:
    right = PAIR | {"margin": 1, "rating": 2, "score_chosen": 3, "score_rejected": 1, "agreement": 0.5}
    source = write(tmp_path / "rows.jsonl", [right, right | {column: value}])
    with pytest.raises(InputError, match=rf"1 of 2 rows cannot be used: .*{column}.*row 2") as caught:
        learnt(source, margin=margin)
    assert "\n" not in str(caught.value)
    assert len(learnt(source)) == 2


def test_labels_are_read_where_a_head_asks_for_them(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [PAIR | {"labels": ["a"]}, PAIR | {"labels": {"safety": ["safe"] * 3}}])
    assert len(learnt(source)) == 2
    with pytest.raises(InputError, match=r"'labels' does not fit the responses \(first: row 1") as caught:
        learnt(source, multi_class=("safety=safe,unsafe",))
    assert "'labels: safety' does not fit the responses (first: row 2" in str(caught.value)


def test_scores_that_only_order_are_not_needed_to_be_scored(tmp_path: Path) -> None:
    two = {"prompt": "what", "response_a": "film", "response_b": "book", "score_a": "good", "score_b": math.nan}
    many = {"prompt": "what", "responses": ["film", "book"], "scores": ["x", None]}
    equal = {"prompt": "what", "chosen": "film", "rejected": "film"}
    source = write(tmp_path / "rows.jsonl", [two, many, equal])
    assert len(load_responses(source, TOKENIZER, DataConfig(), **OPTIONS)) == 3
    with pytest.raises(InputError, match="'score_a' is not a finite number"):
        learnt(source)


def test_the_tag_of_a_safety_reward_is_read_where_there_is_one(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "what", "safety": "unknown"}])
    encoder = ConversationEncoder(TOKENIZER, None)
    assert len(load_prompts(source, encoder, DataConfig(), longest=99, tagged=False, **OPTIONS)) == 1
    with pytest.raises(InputError, match="'safety' is neither true nor false"):
        load_prompts(source, encoder, DataConfig(), longest=99, **OPTIONS)


def test_numbers() -> None:
    assert number_of(decimal.Decimal("1.50"), "x") == 1.5
    for value in (10**400, math.inf, "one", None, True, [1]):
        with pytest.raises(ValueError, match="'x' is not a finite number"):
            number_of(value, "x")


# ---- Parquet ----

_BROKEN_TEXT = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])), pa.py_buffer(b"a\xff")]
)
_SECONDS = pa.struct([("b", pa.timestamp("s"))])
_TURN = pa.struct([("role", pa.string()), ("content", pa.string()), ("at", pa.timestamp("ns", "Europe/Berlin"))])
_SAID = [
    {"role": "user", "content": "what is red", "at": 1700000000123456789},
    {"role": "assistant", "content": "film", "at": None},
]
COLUMNS: dict[str, pa.Array] = {
    "nanoseconds": pa.array([1700000000123456789, None], pa.timestamp("ns")),
    "zone": pa.array([1, 2], pa.timestamp("us", "Not/AZone")),
    "far date": pa.array([2**30, -(2**30)], pa.date32()),
    "far time": pa.array([2**62, 1], pa.timestamp("us")),
    "duration": pa.array([2**62 + 1, 1], pa.duration("ns")),
    "clock": pa.array([1, 2], pa.time64("ns")),
    "decimal": pa.array([decimal.Decimal("1.5"), None]),
    "bytes": pa.array([b"\xff\x00", b""]),
    "codes": pa.array(["a", "b"]).dictionary_encode(),
    "large": pa.array(["a", "b"], pa.large_string()),
    "view": pa.array([[1], []], pa.list_view(pa.int64())),
    "dates": pa.array([[1], None], pa.list_(pa.timestamp("ns"))),
    "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.timestamp("ns"))),
    "nested": pa.array([{"a": [{"b": 2**50}, None]}, None], pa.struct([("a", pa.list_(_SECONDS))])),
    "broken text": _BROKEN_TEXT,
    "nothing": pa.nulls(2),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two good rows among columns of every kind."""
    path = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    columns = {name: pa.array([text] * 2) for name, text in PAIR.items()}
    columns["rejected"] = pa.array([[{"role": "assistant", "content": "book", "at": 1}]] * 2, pa.list_(_TURN))
    columns["messages"] = pa.array([_SAID] * 2, pa.list_(_TURN))
    pq.write_table(pa.table({**columns, **COLUMNS}), path)
    return str(path)


def test_parquet_of_every_kind_is_read(table: str, tmp_path: Path) -> None:
    first, second = (row for _, row in read_rows(table))
    assert first["nanoseconds"] == "2023-11-14 22:13:20.123456789"
    assert first["messages"][0]["at"] == "2023-11-14 22:13:20.123456789Z"
    assert str(second["broken text"]) == "text that is not UTF-8"
    assert (first["broken text"], first["codes"], first["large"], first["view"]) == ("a", "a", "a", [1])
    data = load_preferences(table, TOKENIZER, DataConfig(), **OPTIONS)
    assert len(data) == 2
    assert "rejected: at" in data.unused_columns
    tiny.folder(tmp_path / "model")
    words = ["inspect", "--model", tmp_path / "model", "--data", table]
    assert cli.main([str(word) for word in words]) == 0


def test_only_a_value_that_is_needed_stops_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": _BROKEN_TEXT, "chosen": ["film"] * 2, "rejected": ["book"] * 2}), path)
    with pytest.raises(InputError, match=r"1 of 2 rows cannot be used: 1 x 'prompt' is not text \(first: row 2.*UTF-8"):
        load_preferences(str(path), TOKENIZER, DataConfig(), **OPTIONS)


def test_decimal_scores_are_numbers_and_dates_are_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    margins = {"decimal": [decimal.Decimal("0.5")] * 2, "date": [datetime.date(2024, 1, 1)] * 2}
    for kind, margin in margins.items():
        pq.write_table(pa.table({**{name: [text] * 2 for name, text in PAIR.items()}, "margin": margin}), path)
        if kind == "decimal":
            assert learnt(str(path), margin="column").margins.tolist() == [0.5, 0.5]
        else:
            with pytest.raises(InputError, match="'margin' is not a finite number"):
                learnt(str(path), margin="column")


# ---- blank responses ----

BLANK: dict[str, dict[str, Any]] = {
    "explicit": PAIR | {"rejected": " "},
    "implicit": {"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: a\n\nAssistant: b"},
    "list": {"prompt": "what", "responses": ["film", ""]},
    "two": {"prompt": "what", "response_a": "film", "response_b": "\n", "score_a": 2, "score_b": 1},
    "terminator": PAIR | {"chosen": "<|im_end|>"},
    "dialogue": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
    "answer": {"prompt": "what", "response": ""},
}


@pytest.mark.parametrize("kind", BLANK)
def test_blank_responses_go_by_one_rule(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dialogue = kind in ("dialogue", "answer")
    good = {"prompt": "what", "response": "film"} if dialogue else PAIR
    readers = [load_dialogues] if dialogue else [learnt] if kind in ("list", "two") else [load_preferences, learnt]

    def read(reader: Any, source: str, on_bad_rows: str = "refuse") -> Any:
        if reader is learnt:
            return learnt(source, on_bad_rows)
        return reader(source, TOKENIZER, DataConfig(), on_bad_rows=on_bad_rows, **OPTIONS)

    rare = write(tmp_path / "rare.jsonl", [good] * 99 + [BLANK[kind]])
    often = write(tmp_path / "often.jsonl", [good] * 17 + [BLANK[kind]] * 3)
    always = write(tmp_path / "always.jsonl", [BLANK[kind]] * 3)
    for reader in readers:
        caplog.clear()
        assert len(read(reader, rare)) == 99
        assert "left out 1 x empty" in caplog.text
        assert "1 of 100 rows (1.0%)" in caplog.text
        with pytest.raises(InputError) as caught:
            read(reader, often)
        for told in ("3 of 20 rows", "15.0%", "--on_bad_rows skip", "up to 2%"):
            assert told in str(caught.value)
        assert len(read(reader, often, "skip")) == 17
        for on_bad_rows in ("refuse", "skip"):
            with pytest.raises(InputError, match="none of 3 rows can be used: 3 x empty") as caught:
                read(reader, always, on_bad_rows)
            assert "--on_bad_rows" not in str(caught.value)


def test_what_is_not_learnt_may_be_blank(tmp_path: Path) -> None:
    """`sft` reads the chosen answer of a pair, and not the other."""
    source = write(tmp_path / "rows.jsonl", [PAIR | {"rejected": ""}, PAIR | {"rejected": "film"}])
    assert len(load_dialogues(source, TOKENIZER, DataConfig(), **OPTIONS)) == 2


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "a"}, {"prompt": "b", "chosen": "c"}],
        [{"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]}] * 2,
        [PAIR | {"rejected": " "}, PAIR | {"rejected": "film"}],
    ],
)
def test_bad_rows_that_are_all_there_is(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match="none of 2 rows can be used: ") as caught:
        load_preferences(source, TOKENIZER, DataConfig(), **OPTIONS)
    assert "skip" not in str(caught.value)
