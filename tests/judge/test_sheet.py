"""People as judges: the page, what comes back from it, by hand."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dpo_jax.cli import main
from dpo_jax.files.jsonl import read_lines, write_lines
from dpo_jax.judge import sheet
from dpo_jax.judge.judge_agreement import cohen_kappa, gwet_ac1, table

NASTY = "<script>alert(1)</script> =1+1"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [{"prompt": f"q{i} {NASTY}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(12)]
    write_lines(tmp_path / "pairs.jsonl", rows)
    return tmp_path / "pairs.jsonl"


def page(pairs: Path, *words: str) -> str:
    out = pairs.with_name("page.html")
    assert main(["judge", "--data", str(pairs), "--sheet", str(out), *words]) == 0
    return out.read_text()


def lines(text: str) -> list[tuple[str, int, str]]:
    """Of each section: item, the pair's number, and the letter of the good response."""
    found = []
    for part in text.split("<section ")[1:]:
        left, right = re.findall(r'<div class="text">(.*?)</div>', part)
        item = re.match(r'id="(\d+-[0-9a-f]{12})"', part)[1]  # type: ignore[index]
        found.append((item, int(left.split()[-1]), "A" if left.startswith("good") else "B"))
        assert {left.split()[0], right.split()[0]} == {"good", "bad"}
    return found


def test_there_and_back(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page(pairs, "--seed", "3")
    assert NASTY not in text
    assert text.count("<script>") == 1
    assert "default-src 'none'" in text
    shown = lines(text)
    assert {letter for *_, letter in shown} == {"A", "B"}
    assert [number for _, number, _ in shown] != sorted(number for _, number, _ in shown)
    assert lines(page(pairs, "--seed", "3")) == shown != lines(page(pairs, "--seed", "4"))
    # Ann takes the good one but in item 0; Ben sees item 0 as a tie, and leaves item 1 out; Eve agrees with Ann.
    other = {"A": "B", "B": "A"}
    said = {
        "Ann": {i: other[good] if n == 0 else good for i, n, good in shown},
        "Ben": {i: "tie" if n == 0 else "" if n == 1 else good.lower() + " " for i, n, good in shown},
        "eve": {i: other[good] if n == 0 else good for i, n, good in shown},
    }
    for name, verdicts in said.items():
        head, tail = ("item,verdict", "") if name == "eve" else ("item,verdict,rater", f",{name}")
        body = "".join(f"{item},{verdict}{tail}\n" for item, verdict in verdicts.items())
        pairs.with_name(f"{name}.csv").write_text(f"\ufeff{head}\n{body}")
    read = [str(pairs.with_name(f"{name}.csv")) for name in said]
    out = pairs.with_name("out.jsonl")
    words = ["judge", "--data", str(pairs), "--seed", "3", "--out", str(out), "--read"]
    assert main([*words, *read, "--agreement"]) == 0
    screen = capsys.readouterr()
    assert "raters: Ann, Ben, eve" in screen.err + screen.out
    rows = read_lines(out)
    assert [row["verdict"] for row in rows] == ["b", *["a"] * 11]
    assert rows[1]["replies"] == [{"rater": "Ann", "read": "a"}, {"rater": "eve", "read": "a"}]
    found = json.loads(out.with_name("out.jsonl.agreement.json").read_text())
    assert found["accuracy"][0] == pytest.approx(11 / 12)
    assert main([*words, read[0], read[1]]) == 0  # one each: a tie
    assert read_lines(out)[0]["verdict"] == "tie"


def test_agreement_between_raters() -> None:
    verdicts = [{"x": "a", "y": "a"}, {"x": "a", "y": "b"}, {"x": "tie", "y": "tie"}, {"x": "b"}, {"z": "b"}]
    ((one, other, items, agreement, kappa, ac1),) = sheet.rater_agreement(verdicts)
    shares = table(np.asarray([0, 0, 2]), np.asarray([0, 1, 2]), 3)
    assert (one, other, items, agreement) == ("x", "y", 3, pytest.approx(2 / 3))
    assert (kappa, ac1) == (cohen_kappa(shares), gwet_ac1(shares))
    assert [one.verdict for one in sheet.judgements([*verdicts[:2], {}])] == ["a", "tie", None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("item,verdict\n{item},C\n", "line 2: verdict 'C' is none of A, B and tie"),
        ("item,verdict\n{item},=HYPERLINK(1)\n", "line 2: verdict '=HYPERLINK(1)' is none of"),
        ("item,verdict,rater\n{item},A,=1+1\n", "line 2: rater '=1+1' is no name"),
        ("item,verdict\n{item},A\n{item},A\n", "has judged item"),
        ("item,verdict\n1-000000000000,A\n", "line 2: item '1-000000000000' was not shown"),
        ("item,verdict\n{item}\n", "line 2: has not 2 cells"),
        ("item,verdict\n{item},A,B\n", "line 2: has not 2 cells"),
        ("verdict\nA\n", "the first line is to be item,verdict,rater"),
        ("item,verdict\n{item},\n", "no line holds a verdict"),
        ('item,verdict\n"{item}', "cannot be read as CSV"),
        ("item,verdict\n{item},A\n\x00\n", "line"),
    ],
)
def test_hostile_cells(content: str, message: str, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    item = lines(page(pairs))[0][0]
    (file := pairs.with_name("v.csv")).write_text(content.replace("{item}", item))
    capsys.readouterr()
    assert main(["judge", "--data", str(pairs), "--read", str(file), "--out", str(pairs.with_name("o.jsonl"))]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not pairs.with_name("o.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sheet", "p.html", "--out", "o"], "--out has no effect with --sheet"),
        (["--sheet", "p.html", "--model", "m"], "--sheet is for people"),
        (["--sheet", "p.html", "--agreement"], "--agreement has no effect with --sheet"),
        (["--read", "v.csv"], "--out is missing"),
        (["--read", "v.csv", "--out", "o", "--ask", "pair"], "--ask has no effect with --read"),
        (["--read", "v.csv", "--out", "o", "--function", "length"], "give one judge"),
        (["--read", "none.csv", "--out", "o"], "none.csv: cannot be read as CSV"),
    ],
)
def test_options(words: list[str], message: str, pairs: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(pairs.parent)
    assert main(["judge", "--data", str(pairs), *words]) == 2
    assert message in capsys.readouterr().err
