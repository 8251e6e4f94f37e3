"""Rewards that can be checked, and commands of the user."""

import datetime
import decimal
import json
import sys

import numpy as np
import pytest

from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.errors import InputError
from dpo_jax.judge.rewards.command import code_of
from dpo_jax.judge.rewards.functions import check_reward, scores_of, try_out
from dpo_jax.judge.rewards.shipped import last_number, repetition, shipped


def scores(spec: str, texts: list[str], right: object = None, *, timeout: float | None = None) -> list[float]:
    prompts = [Prompt((), "p", {"right": right})] * len(texts)
    judge = shipped(spec, timeout=timeout, memory=None)
    return scores_of(judge, prompts, texts, np.arange(1, len(texts) + 1), spec).tolist()


@pytest.mark.parametrize(
    ("spec", "right", "texts", "expected"),
    [
        ("exact:right", "Paris", [" Paris\n", "paris", "Paris.", "in Paris"], [1, 1, 1, 0]),
        ("exact:right", ["a", 3], ["3", "a", "b", "$3.0$", "3 or 4"], [1, 1, 0, 1, 0]),
        ("numeric:right", "1e999", ["1e999", "1e998", "1e9999"], [1, 0, 0]),
        ("numeric:right", "6 * 7\n#### 42", ["It is 42.", "42.00001", "-42", "none", "24 42.1"], [1, 1, 0, 0, 0]),
        ("numeric:right", -1234.5, ["-1,234.5", "= -1.2345e3", "5-1234.5"], [1, 1, 0]),
        ("numeric:right", "-18", ["so −18", "x = - 18", "-$18", "18", "－１８"], [1, 1, 1, 0, 1]),
        ("numeric:right", "1/2", ["0.5", "3/2", "2"], [1, 0, 0]),
        ("exact:right", "50%", ["50", "50\\%", "0.5"], [1, 1, 0]),
        ("format:<think>.*</think>[^<]+", None, ["<think>a\nb</think>c", "x<think>a</think>c", ""], [1, 0, 0]),
        ("json", None, ['{"a": 1}', "[1, 2] 3", "NaN", "", "[" * 100_000], [1, 0, 0, 0, 0]),
        ("ramp:2:6", None, ["", "ab", "abc", "abcd", "abcdefg"], [1, 1, 0.75, 0.5, 0]),
        ("ramp:6:2", None, ["ab", "abc", "abcdefg"], [0, 0.25, 1]),
        ("repetition:2", None, ["a b c", "a b a B", "a a a a a", "a"], [0, -1 / 3, -3 / 4, 0]),
    ],
)
def test_values_by_hand(spec, right, texts, expected) -> None:
    np.testing.assert_allclose(scores(spec, texts, right), expected, rtol=1e-6)


def test_numbers_of_texts() -> None:
    for text, number in (
        ("1,234,567", "1,234,567"),
        ("1,2345", "2345"),
        ("x=.5", ".5"),
        ("7-3", "3"),
        ("2 -3", "-3"),
        ("no", None),
    ):
        assert last_number(text) == number, text
    assert repetition("", 1) == 0


def test_a_schema_of_json(tmp_path) -> None:
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    (path := tmp_path / "schema.json").write_text(json.dumps(schema))
    assert scores(f"json:{path}", ['{"n": 1}', '{"n": "1"}', "{}", "n"]) == [1, 0, 0, 0]
    for text, message in (
        ('{"type": 3}', "is no JSON schema"),
        ("{", "Expecting property name"),
        ('{"$ref": "https://example.com/x.json"}', "refers to what it does not hold"),
        ("3", "is no JSON schema: it holds 3, not an object"),
        ("null", "is no JSON schema: it holds null, not an object"),
        ('{"$schema": 5}', r"its \$schema is 5, not a URI"),
        ('{"$ref": "#"}', "refers to itself without end"),
        ('{"$id": "http://[", "$ref": "x"}', "is no JSON schema: Invalid IPv6 URL"),
        ("[" * 100_000, "nested too deep"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            scores(f"json:{path}", ["1"])


def test_a_response_that_no_schema_foresees_scores_0(tmp_path) -> None:
    (path := tmp_path / "schema.json").write_text('{"items": {"$ref": "#"}, "multipleOf": 0.5}')
    texts = ["[[1.5]]", "[" * 300 + "]" * 300, "9" * 400, "1e999"]
    assert scores(f"json:{path}", texts) == [1, 0, 0, 0]


def test_mathematics() -> None:
    pytest.importorskip("math_verify")
    texts = ["so $\\boxed{\\frac{1}{2}}$", "the answer is 0.5", "the answer is $2$"]
    assert scores("math:right", texts, "\\frac{1}{2}") == [1, 1, 0]
    judge = shipped("math:right", timeout=None, memory=None)
    for right, same, other in (  # of each of these a part alone was once read
        ("2\\sqrt{3}", "$\\sqrt{12}$", "$2$"),
        ("10\\pi", "so $10\\pi$", "$10$"),
        ("3x+2", "$2+3x$", "$3$"),
        ("[0, 1)", "$[0, 1)$", "$1$"),
        ("The total is 3 dollars.", "it is 3", "it is 4"),
        ("so \\boxed{3}", "$3$", "$4$"),
    ):
        assert judge([Prompt((), "p", {"right": right})] * 2, [same, other]) == [1, 0], right
    with pytest.raises(InputError, match=r"none that math-verify reads.*responses to row 1 of the prompts"):
        scores("math:right", ["1"], "")


CHECK = """
import json, os, sys, time
asked = json.loads(sys.stdin.readline())
code = asked["code"]
assert "SECRET" not in os.environ and os.listdir() == []
if "hang" in code: time.sleep(60)
if "greedy" in code: x = bytearray(4 << 30)
if "word" in code: print("good")
else: print("some words"); print(float(code.strip() == asked["columns"]["right"]))
"""


def test_a_command_of_the_user(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("SECRET", "x")
    (path := tmp_path / "check.py").write_text(CHECK)
    spec = f"run:{sys.executable} {path}"
    texts = ["Look:\n```python\nx = 1\n```\nDone.", "x = 2", "hang", "greedy"]
    assert scores(spec, texts, "x = 1", timeout=3) == [1, 0, 0, 0]
    assert "of 4 responses 1 ran out of time, 1 ended with an error: they score 0" in caplog.text
    with pytest.raises(InputError, match="no list of numbers: 'good' for responses to row 1"):
        scores(spec, ["word"], "x")
    try_out(shipped(spec, timeout=None, memory=None), [Prompt((), "p", {"right": ""})], np.arange(1), spec)
    with pytest.raises(InputError, match=r"no command runs in 1 MiB; give more --reward_memory"):
        shipped(spec, timeout=None, memory=1)
    assert code_of("```\na\n```\n```c\nb\n```") == "b\n"


def test_a_command_that_cannot_be_run_is_told_before_anything_is_sampled(caplog) -> None:
    for command, message in (
        ("run:env no-such-command", r"could not run \(exit status 127, for a response without code\)"),
        ("run:sh -c 'exit 125'", r"could not run \(exit status 125"),  # what docker ends with where it does not run
        ("run:echo good", "the last line that it prints is no number: 'good'"),
    ):
        judge = shipped(command, timeout=None, memory=None)
        with pytest.raises(InputError, match=message):
            try_out(judge, [Prompt((), "p")], np.arange(1), command)
    # Within a run a program of a model may end so, which is no reason to stop; that the command is gone is one.
    assert scores("run:sh -c 'grep -q die && exit 127; echo 1'", ["die", "a"]) == [0, 1]
    assert "of 2 responses 1 ended with an exit status of 125 to 127" in caplog.text
    with pytest.raises(InputError, match=r"could not run \(exit status 127, for a response without code\)"):
        scores("run:sh -c 'exit 127'", ["a"])


def test_what_a_command_reads_and_what_decides_its_scores(tmp_path) -> None:
    (path := tmp_path / "check.py").write_text(
        "import json\nread = json.loads(input())['columns']\n"
        "print(float(read == {'at': '2026-01-02', 'b': 'YQ==', 'd': '1.50'}))"
    )
    spec = f"run:{sys.executable} {path}"
    columns = {"at": datetime.date(2026, 1, 2), "b": b"a", "d": decimal.Decimal("1.50")}
    judge = shipped(spec, timeout=None, memory=None)
    assert judge([Prompt((), "p", columns)], ["a"]) == [1]
    assert judge.identity == shipped(spec, timeout=10, memory=1024).identity
    assert judge.identity != shipped(spec, timeout=9, memory=None).identity
    path.write_text(path.read_text() + "\n")
    assert judge.identity != shipped(spec, timeout=None, memory=None).identity


def test_a_command_keeps_the_name_that_it_is_given(tmp_path, monkeypatch) -> None:
    (tmp_path / "real.sh").write_text("#!/bin/sh\ncase $0 in /*/link) echo 1;; *) echo 0;; esac\n")
    (tmp_path / "real.sh").chmod(0o755)
    (tmp_path / "link").symlink_to("real.sh")  # as the Python of a virtual environment is one
    monkeypatch.chdir(tmp_path)
    assert scores("run:./link", ["a"]) == [1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact:", "name the column of the right answers, such as exact:answer"),
        ("format:(", "missing"),
        ("ramp:2", "write ramp:A:B"),
        ("ramp:2:2", "write ramp:A:B"),
        ("repetition:0", "write repetition:N"),
        ("run:no-such-command", "is no command"),
        ("run:'", "No closing quotation"),
        ("json:/no/such.json", "No such file"),
    ],
)
def test_one_line_errors(spec, message) -> None:
    with pytest.raises(InputError, match=message):
        shipped(spec, timeout=None, memory=None)


def test_a_language_without_a_script_of_its_own_and_a_column_that_is_not_there() -> None:
    class Options:
        reward_timeout = reward_memory = None

    judge = check_reward("language:fr", Options())
    assert judge([], ["Le chat est assis sur la chaise.", "The cat sits on the chair.", " "]) == [1, 0, 0]
    with pytest.raises(InputError, match="'right' is no column of the prompts; they have answer"):
        try_out(check_reward("exact:right", Options()), [Prompt((), "p", {"answer": 1})], np.arange(1), "exact:right")
    some, exact = (
        [Prompt((), "p", {"right": 1}), Prompt((), "p", {"right": float("nan")})],
        check_reward("exact:right", Options()),
    )
    try_out(exact, some, np.asarray([1, 7]), "exact:right")  # beside others
    with pytest.raises(InputError, match=r"exact:right: row 7 of the prompts: no value in 'right', and nothing else"):
        try_out(exact, some, np.asarray([1, 7]), "exact:right", needed=True)
    assert shipped("runs/rm", timeout=None, memory=None) is None
