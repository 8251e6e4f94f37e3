"""People as judges: the page, what comes back from it, by hand."""

import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dpo_jax.cli import main
from dpo_jax.files.jsonl import read_lines, write_lines
from dpo_jax.judge.asked import sheet
from dpo_jax.report.statistics import cohen_kappa, gwet_ac1, table

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


def test_raters_who_always_say_a_tie_have_no_kappa(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = [item for item, *_ in lines(page(pairs))]
    read = [str(pairs.with_name(f"{name}.csv")) for name in ("[Ann]", "Ben")]
    for path in read:
        Path(path).write_text("item,verdict\n" + "".join(f"{item},tie\n" for item in items))
    words = ["judge", "--data", str(pairs), "--out", str(pairs.with_name("out.jsonl")), "--read", *read]
    capsys.readouterr()
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "nan" not in table
    assert re.search(r"│ Ben +│ \[Ann\] +│ 12 +│ 1\.000 +│ - +│ 1\.000 +│", table)


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
        ("item,verdict\n{item},C\n", "row 1 below the names: verdict 'C' is none of A, B and tie"),
        ("item,verdict\n{item},=HYPERLINK(1)\n", "row 1 below the names: verdict '=HYPERLINK(1)' is none of"),
        ("item,verdict,rater\n{item},A,=1+1\n", "row 1 below the names: rater '=1+1' is no name"),
        ("item,verdict\n{item},A\n{item},A\n", "has judged item"),
        ("item,verdict\n1-000000000000,A\n", "row 1 below the names: item '1-000000000000' was not shown"),
        ("item,verdict\n{item}\n", "line 2: 1, and the first line names 2 columns"),
        ("item,verdict\n{item},A,B\n", "line 2: 3, and the first line names 2 columns"),
        ("item,verdict,Verdict\n{item},A,B\n", "names the column 'verdict' twice"),
        ("verdict\nA\n", "the first line is to be item,verdict,rater"),
        ("item,verdict\n{item},\n", "no line holds a verdict"),
        ('item,verdict\n"{item}', "not readable as CSV"),
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
        (["--read", "v.csv", "--out", "o", "--batch_size", "3"], "--batch_size has no effect with --read"),
        (["--sheet", "p.html", "--dtype", "bfloat16"], "--dtype has no effect with --sheet"),
        (
            ["--sheet", "p.html", "--sample.top_k", "3", "--sample.temperature", "1"],
            "--sample has no effect with --she",
        ),
        (["--out", "o", "--function", "length", "--sample.max_new_tokens", "3"], "--sample has no effect with --func"),
        (
            ["--out", "o", "--endpoint.url", "http://x", "--endpoint.model", "m", "--batch_size", "3"],
            "with --endpoint.url",
        ),
        (["--sheet", "pairs.jsonl"], "pairs.jsonl: would be written over pairs.jsonl"),
        (["--sheet", "./there.txt"], "there.txt: is there, and is no page of --sheet"),
        (["--read", "there.txt", "--out", "there.txt"], "would be written over there.txt"),
        (["--read", "v.csv", "--out", "scores.jsonl"], "scores.jsonl: is there, and not written by --read"),
        (["--read", "none.csv", "--out", "o"], "none.csv: no such file"),
    ],
)
def test_options(words: list[str], message: str, pairs: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(pairs.parent)
    Path("there.txt").write_text("item,verdict\n")
    Path("scores.jsonl").write_text('{"row": 1, "verdict": "a", "replies": [{"text": "[[A]]", "read": "a"}]}\n')
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    assert main(["judge", "--data", "pairs.jsonl", *words]) == 2
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_what_spreadsheets_write(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (item, *_), (second, *_) = lines(page(pairs))[:2]
    files = {
        "german.csv": f"Item;Verdict;Rater;;\n {item} ;A;Änne;;\n;;;;\n{second};;Änne;;\n",
        "tabs.tsv": f'verdict\tnotes\titem\nb\tit\'s "odd"\t{item}\n',
        "packed.csv.gz": f"\ufeffitem,verdict\r\n{item},tie\r\n,\r\n",
    }
    for name, text in files.items():
        data = text.encode()
        pairs.with_name(name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    out = pairs.with_name("o.jsonl")
    read = [str(pairs.with_name(name)) for name in files]
    assert main(["judge", "--data", str(pairs), "--out", str(out), "--read", *read]) == 0
    (said,) = [row["replies"] for row in read_lines(out) if row["replies"]]
    assert [one["rater"] for one in said] == ["packed", "tabs", "Änne"]
    assert sorted(one["read"] for one in said) == ["a", "b", "tie"]
    assert "tabs.tsv: not read: 'notes'" in capsys.readouterr().err


NODE = """
const make = (id, values) => ({
  id, inputs: values.map(value => ({ value, checked: false })), querySelectorAll() { return this.inputs; },
  querySelector() { return this.inputs.find(one => one.checked) ?? null; } });
const sections = ["1-x", "2-y"].map(id => make(id, ["A", "B", "tie"])), on = {}, store = { item: PLACE };
const named = { rater: { value: "" }, count: {}, save: {} };
globalThis.addEventListener = (name, call) => { on[name] = call; };
globalThis.document = { documentElement: { dataset: { page: "p" } }, getElementById: id => named[id],
  querySelectorAll: () => sections, addEventListener, createElement: () => ({ click() {} }) };
globalThis.localStorage = { getItem: () => store.item, setItem: (_, text) => { store.item = text; } };
let saved; globalThis.Blob = class { constructor(parts) { saved = parts.join(""); } }; URL.createObjectURL = () => "";
const leaves = () => { let asked = false; on.beforeunload({ preventDefault() { asked = true; } }); return asked; };
{SCRIPT}
const found = [named.count.textContent, leaves()];
sections[1].inputs[2].checked = true; named.rater.value = "-=Ann, <b>"; on.input();
found.push(named.count.textContent, leaves()); named.save.onclick(); found.push(leaves(), saved, store.item);
console.log(JSON.stringify(found));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_page_counts_keeps_and_warns() -> None:
    def run(kept: str | None) -> list[object]:
        text = NODE.replace("PLACE", json.dumps(kept)).replace("SCRIPT", sheet._SCRIPT)
        done = subprocess.run(["node", "-e", f"(() => {{{text}}})()"], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    kept = json.dumps(["-=Ann, <b>", {"1-x": "", "2-y": "tie"}], separators=(",", ":"))
    saved = "item,verdict,rater\n1-x,,Ann b\n2-y,tie,Ann b\n"
    assert run(None) == ["0 of 2 chosen", False, "1 of 2 chosen", True, False, saved, kept]
    assert run(kept)[0] == "1 of 2 chosen"  # as after a reload
    assert run("no JSON")[0] == "0 of 2 chosen"
