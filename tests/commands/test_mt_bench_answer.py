"""`dpo-jax mt-bench answer`: FastChat's answer files, temperatures, the second turn, killed and gone on with."""

import json

import pytest
import tiny

from dpo_jax.cli import main
from dpo_jax.complete.writing import writer
from dpo_jax.data.sources.questions import CATEGORIES, Question, temperature_of
from dpo_jax.files.jsonl import read_lines, write_lines

QUESTIONS = [
    {"question_id": 90, "category": "writing", "turns": ["write of a film", "and a book"]},
    {"question_id": 81, "category": "math", "turns": ["the red question", "the blue one"], "reference": ["1", "2"]},
    {"question_id": 7, "category": "generic", "turns": ["hate?"]},
    {"question_id": 8, "category": "writing", "turns": ["we like", "the good"], "required_temperature": 0},
    {"question_id": 91, "category": "roleplay", "turns": ["be rude", "be kind"]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.folder(tmp_path_factory.mktemp("answer") / "model", layers=1))


@pytest.fixture
def questions(tmp_path):
    write_lines(tmp_path / "question.jsonl", QUESTIONS)
    return tmp_path / "question.jsonl"


def run(model, questions, out, *more):
    given = [
        "--model",
        model,
        "--questions",
        questions,
        "--out",
        out,
        "--sample.max_new_tokens",
        "8",
        "--batch_size",
        2,
    ]
    given += more
    return main(["mt-bench", "answer", *map(str, given)])


def answers(path):
    return {row["question_id"]: row["choices"][0]["turns"] for row in read_lines(path)}


def without_clock(path):
    return [{**row, "tstamp": 0} for row in read_lines(path)]


def test_temperatures_are_fastchats():
    given = {name: temperature_of(Question(1, name, ("a",))) for name in (*CATEGORIES, "generic")}
    assert given == {
        "writing": 0.7,
        "roleplay": 0.7,
        "extraction": 0,
        "math": 0,
        "coding": 0,
        "reasoning": 0,
        "stem": 0.1,
        "humanities": 0.1,
        "generic": 0.7,
    }
    assert temperature_of(Question(1, "math", ("a",), temperature=1.3)) == 1.3
    assert temperature_of(Question(1, "writing", ("a",), temperature=1e-5)) == 0


@pytest.mark.slow
def test_answers_of_two_turns_killed_and_gone_on_with(model, questions, tmp_path, monkeypatch, capsys):
    out, real, drawn = tmp_path / "model_answer" / "ours.jsonl", writer.serve, []

    def seen(*args, **told):
        drawn.append((told["config"].temperature, told["requests"]))
        yield from real(*args, **told)

    monkeypatch.setattr(writer, "serve", seen)
    assert run(model, questions, out) == 0
    assert "5 questions, 9 answers of ours" in " ".join(capsys.readouterr().err.split())
    first, second = [(1, 0), (3, 0)], [(0, 0), (2, 0), (4, 0)]
    assert drawn == [(0, first), (0.7, second), (0, first), (0.7, second[::2])], "a turn after the other"
    rows = read_lines(out)
    assert [row["question_id"] for row in rows] == [90, 81, 7, 8, 91], "in the order of the questions"
    for row, asked in zip(rows, QUESTIONS, strict=True):
        assert row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert row["model_id"] == "ours"
        assert [choice["index"] for choice in row["choices"]] == [0]
        assert len(row["choices"][0]["turns"]) == len(asked["turns"])
    assert len({row["answer_id"] for row in rows}) == 5
    found = answers(out)

    # Greedy answers are those of `generate`, the first answer standing in the dialogue of the second.
    dialogue = [{"role": "user", "content": "the red question"}, {"role": "assistant", "content": found[81][0]}]
    write_lines(
        tmp_path / "p.jsonl",
        [{"messages": dialogue[:1]}, {"messages": [*dialogue, {"role": "user", "content": "the blue one"}]}],
    )
    given = ["--model", model, "--prompts", tmp_path / "p.jsonl", "--sample.max_new_tokens", "8", "--batch_size", 2]
    capsys.readouterr()
    assert main(["generate", *map(str, given), "--sample.temperature", "0"]) == 0
    said = [json.loads(line)["response"] for line in capsys.readouterr().out.splitlines()]
    assert [text.rstrip("\N{REPLACEMENT CHARACTER}").strip() for text in said] == found[81]

    whole, calls = without_clock(out), []

    def breaks(*args, **told):
        calls.append(told["requests"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        yield from real(*args, **told)

    monkeypatch.setattr(writer, "serve", breaks)
    again = tmp_path / "again" / "ours.jsonl"
    assert run(model, questions, again) == 130
    assert not again.exists()
    assert run(model, questions, again) == 0
    assert calls == [first, second, first, first, second[::2]], "the first turn is not asked again"
    assert without_clock(again) == whole
    assert list(again.parent.iterdir()) == [again]
    assert run(model, questions, again, "--model_id", "other") == 2, "they are answers of ours"
    again.unlink()
    assert run(model, questions, again, "--seed", 1, "--model_id", "other") == 0
    other = answers(again)
    assert other[81] == found[81]
    assert other[90] != found[90]
    assert {row["model_id"] for row in read_lines(again)} == {"other"}


def test_the_file_is_fastchats(model, tmp_path):
    write_lines(tmp_path / "q.jsonl", QUESTIONS[1:2])
    assert run(model, tmp_path / "q.jsonl", tmp_path / "model_answer" / "ours.jsonl") == 0
    [row] = read_lines(tmp_path / "model_answer" / "ours.jsonl")
    assert row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert (row["question_id"], row["model_id"]) == (81, "ours")
    assert [choice.keys() for choice in row["choices"]] == [{"index", "turns"}]
    assert len(row["choices"][0]["turns"]) == 2


def test_errors(model, questions, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    for more, words in (
        (["--sample.temperature", "1"], "--sample.temperature"),
        (["--sample.top_p", "0.9"], "--sample.top_p"),
        (["--model_id", " "], "--model_id is blank"),
        (["--seed", "-1"], "--seed -1 must lie in"),
        (["--sample.max_new_tokens", "200"], "question 90 and 2 answers of up to 200 tokens may take"),
    ):
        assert run(model, questions, out, *more) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
    write_lines(questions, [{"question_id": 1, "category": "math", "turns": []}])
    assert run(model, questions, out) == 2
    assert "has no text in each of its turns" in capsys.readouterr().err
    assert not out.exists()
