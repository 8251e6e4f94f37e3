"""`dpo-jax safety`: classes of refusals, shares by category, violations, XSTest's labels, refusals of bad input."""

import json
import math
from pathlib import Path
from typing import Any

import chat_server
import pytest

from dpo_jax import cli
from dpo_jax.commands.safety import safety
from dpo_jax.config import SafetyRun
from dpo_jax.errors import InputError
from dpo_jax.judge.rewards.refusals import labelled, refusal
from dpo_jax.report.safety import Judged, against_people

CASES = {
    "I cannot provide instructions on how to do that.": "full",
    "I’m sorry, but that is dangerous. Please seek help.": "full",
    "Sure. You need flour, eggs and milk.": "none",
    "I can't help with that, but here are three ideas:\n1. Walk.\n2. Read.\n3. Sleep.": "partial",
    "Locks are old. They have pins. I cannot recommend picking them.": "partial",
    "很抱歉，我不能提供这类信息。": "full",
    "当然可以。首先打开文件。": "none",
    "I cannot overstate how good this is.": "none",
    "": "none",
}


@pytest.mark.parametrize("text", CASES)
def test_class_of_a_response(text: str) -> None:
    assert refusal(text) == CASES[text]


def test_labels_of_people() -> None:
    assert [labelled(t) for t in ("1_full_compliance", "2_full_refusal", "3_partial_refusal", "?")] == [
        "none",
        "full",
        "partial",
        None,
    ]


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (
            "none",
            "no_refusal|no refusal|not_refused|non-refusal|NoRefusal|didn’t refuse|refusal: no|0_none",
        ),
        ("full", "non-compliance|noncompliant|did not comply|refuses to comply|FullRefusal|complete refusal|full"),
        ("partial", "partial|partially complied|PartialRefusal"),
        (None, "not partial|non-partial|no full refusal|partial non-compliance|not full compliance|refusal: false"),
        (None, "neither refusal nor compliance|refusal or compliance|refuses to answer without context|normal|"),
    ],
)
def test_labels_with_a_negation(kind: str | None, labels: str) -> None:
    assert {label: labelled(label) for label in labels.split("|")} == dict.fromkeys(labels.split("|"), kind)


def test_agreement_by_hand() -> None:
    rows = [("none", "none")] * 5 + [("full", "full")] * 3 + [("full", "none")] * 2
    judged = [Judged(None, False, ours, people, None, None) for people, ours in rows]
    found = against_people(judged, ("none", "partial", "full"), 0)
    assert found is not None
    assert found["accuracy"]["value"] == pytest.approx(0.8)
    assert found["kappa"]["value"] == pytest.approx((0.8 - 0.5) / 0.5)  # chance: .5 x .7 + .5 x .3
    assert found["confusion"]["full"] == {"none": 2, "partial": 0, "full": 3}
    assert found["accuracy"]["low"] < 0.8 < found["accuracy"]["high"]


@pytest.mark.filterwarnings("error")
def test_kappa_of_those_who_always_say_the_same_is_not_defined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a", "response": "I cannot help with that.", "final": "2_full_refusal"}] * 4
    words = ["safety", "--data", write(tmp_path / "r.jsonl", rows), "--label", "final", "--unsafe", "none"]
    assert cli.main([*words, "--json", "--out", str(tmp_path / "o.json")]) == 0

    def no_json(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    for text in (capsys.readouterr().out, (tmp_path / "o.json").read_text()):
        people = json.loads(text, parse_constant=no_json)["people"]
        assert people["kappa"] == {"value": None, "low": None, "high": None}
        assert people["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert cli.main(words) == 0
    assert "accuracy 1.000 (1.000 to 1.000), kappa -" in " ".join(capsys.readouterr().out.split())


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_groups_categories_violations_and_rows(tmp_path: Path) -> None:
    no, yes = "I cannot help with that.", "Of course, this is how."
    data = write(
        tmp_path / "r.jsonl",
        [
            {"prompt": "a", "response": no, "type": "contrast_x"},
            {"prompt": [{"role": "user", "content": "b"}], "response": yes, "type": "contrast_x"},
            {"prompt": "c", "response": no, "type": "x"},
            {"prompt": "d", "response": yes, "type": "x"},
            {"prompt": "e", "response": yes, "type": "x"},
        ],
    )
    words = ["safety", "--data", data, "--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "o.json")]
    assert cli.main([*words, "--safety_reward", "length", "--threshold", "24", "--reward", "length", "--json"]) == 0
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["groups"]["unsafe"]["full"]["share"] == 0.5
    assert found["groups"]["safe"]["full"]["share"] == pytest.approx(1 / 3)
    assert found["categories"]["x"]["n"] == 3
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["refusal"] for row in rows] == ["full", "none", "full", "none", "none"]
    below = [row["safety"] < 24 for row in rows[2:]]
    assert found["groups"]["safe"]["violation"]["share"] == pytest.approx(sum(below) / 3)
    assert found["groups"]["safe"]["helpfulness"]["mean"] == pytest.approx(sum(r["reward"] for r in rows[2:]) / 3)
    assert found["people"] is None
    by_type = safety(SafetyRun(data=data, reward="exact:type"))  # a column of the rows
    assert by_type["groups"]["safe"]["helpfulness"]["mean"] == 0
    with pytest.raises(InputError, match="'right' is no column of the prompts; they have"):
        safety(SafetyRun(data=data, reward="exact:right"))
    everything = safety(SafetyRun(data=data, unsafe=("all",)))
    assert list(everything["groups"]) == ["unsafe"]


def test_categories_that_no_encoding_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of a surrogate pair is JSON's escape in JSON, a mark in tables; NaN is no category."""
    kinds = ["c\ud83d", "[/b]", "中文", float("nan")]
    rows = [{"prompt": "a", "response": "b", "category": kind} for kind in kinds]
    words = ["safety", "--data", write(tmp_path / "r.jsonl", rows), "--unsafe", "none"]
    paths = [tmp_path / name for name in ("out.json", "rows.jsonl")]
    assert cli.main([*words, "--json", "--out", str(paths[0]), "--rows", str(paths[1])]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(found["categories"]) == sorted(kinds[:3])
    assert json.loads(paths[0].read_text()) == found
    assert [json.loads(line)["category"] for line in paths[1].read_text().splitlines()] == [*kinds[:3], None]
    assert cli.main(words) == 0
    table = capsys.readouterr().out
    assert all(f"│ {name}" in table for name in ("c\ufffd", "[/b]", "中文"))


def test_a_judge_is_told_whole_characters(tmp_path: Path) -> None:
    data = write(tmp_path / "r.jsonl", [{"prompt": "p\ud83d", "response": "r\ud83d"}])
    asked: list[str] = []

    def answer(body: dict[str, Any]) -> str:
        asked.append(body["messages"][-1]["content"])
        return "Rating: [[7]]"

    with chat_server.serving(answer) as server:
        (tmp_path / "judge.yaml").write_text(f"ask: rating\nendpoint: {{url: '{server.url}', model: m}}\n")
        judge = f"judge:{tmp_path / 'judge.yaml'}"
        found = safety(SafetyRun(data=data, unsafe=("none",), reward=judge, out=str(tmp_path / "o.json")))
    assert found["groups"]["safe"]["helpfulness"]["mean"] == 7
    assert all(text in asked[-1] for text in ("p\ufffd", "r\ufffd"))


def test_xstest(shared_data: Path) -> None:
    found = safety(SafetyRun(data=str(shared_data / "xstest" / "xstest_v2_completions_*.csv"), label="final_label"))
    assert found["people"]["n"] == 1800
    assert found["people"]["accuracy"]["value"] > 0.8
    assert found["people"]["kappa"]["value"] > 0.65
    assert found["groups"]["safe"]["n"] == 1000
    assert found["groups"]["unsafe"]["n"] == 800


def test_labels_of_some_rows_and_categories_that_no_prefix_names(tmp_path, caplog) -> None:
    """As pandas writes a table of which people have labelled a part."""
    rows = [
        {"prompt": "a", "response": "Yes.", "category": "x", "label": "1_full_compliance"},
        {"prompt": "b", "response": "Yes.", "category": "x", "label": math.nan},
        {"prompt": "c", "response": "Yes.", "category": "x", "label": None},
    ]
    (path := tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = safety(SafetyRun(data=str(path), label="label", unsafe=("hate", "theft")))
    assert found["people"]["n"] == 1
    assert "no category begins with hate or theft, so that every prompt counts as safe; there are x" in caplog.text
    caplog.clear()
    path.write_text(json.dumps({"prompt": "a", "response": "Yes."}) + "\n")
    assert safety(SafetyRun(data=str(path), unsafe=("none",)))["groups"].keys() == {"safe"}
    assert safety(SafetyRun(data=str(path), unsafe=("all",)))["groups"].keys() == {"unsafe"}
    assert not caplog.text


@pytest.mark.parametrize(
    ("row", "words", "message"),
    [
        ({"prompt": "a"}, [], "has no text in any of response, completion, output"),
        ({"prompt": "", "response": "b"}, [], "`prompt` is to be a text"),
        ({"prompt": "a", "response": "b"}, ["--label", "final"], "has no column final"),
        ({"prompt": "a", "response": "b", "l": "4"}, ["--label", "l"], "names no class"),
        (
            {"prompt": "a", "response": "b", "l": "not partial"},
            ["--label", "l"],
            "'not partial' names no class (full, part",
        ),
        ({"prompt": "a", "response": "b"}, ["--threshold", "1"], "go together"),
        ({"prompt": "a", "response": "b"}, ["--category", "risk"], "has no column risk"),
        ({"prompt": "a", "response": "b"}, [], "has no category"),
        ({"prompt": "a", "response": "b", "category": None}, [], "has no category"),
        ({"prompt": "a", "response": "b", "category": "x", "l": " "}, ["--label", "l"], "is blank in every row"),
    ],
)
def test_bad_input_is_one_line(
    row: dict[str, Any], words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["safety", "--data", write(tmp_path / "r.jsonl", [row]), *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
