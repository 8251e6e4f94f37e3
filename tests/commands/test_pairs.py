"""`dpo-jax pairs`: the named rules, on published scores and by hand."""

import json
import math
import os
import random
import warnings
from collections import Counter
from pathlib import Path

import pytest

from dpo_jax import voice
from dpo_jax.cli import main
from dpo_jax.data.rows.binarise import mean_of_aspects, overall_score, pick, repaired
from dpo_jax.data.rows.corrupt import corrupt, edit_distance
from dpo_jax.data.rows.preferences import parse_pair
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.rows.readable import readable

DATA = Path(os.environ.get("DPO_JAX_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("more", "count"),
    [(["zephyr"], 74), (["best_worst"], 74), (["all"], 322), (["zephyr", "--ties", "strict"], 37)],
)
def test_published_scores(tmp_path, more, count) -> None:
    source = DATA / "scored4_en" / "vicuna_eval.jsonl"
    if not source.exists():
        pytest.skip("scored4_en is not in $DPO_JAX_DATA")
    assert main(["pairs", "--data", str(source), "--out", str(tmp_path / "p.jsonl"), "--rule", *more]) == 0
    found = rows(tmp_path / "p.jsonl")
    assert len(found) == count
    assert all(row["score_chosen"] > row["score_rejected"] for row in found)
    read = parse_pair(readable(found[0]))
    assert (read.chosen, read.rejected) == (found[0]["chosen"], found[0]["rejected"])


def test_rules_by_hand() -> None:
    dropped: Counter[str] = Counter()
    assert set(pick([1, 3, 2], "all", key="0")) == {(1, 2), (1, 0), (2, 0)}
    assert pick([1, 3, 2], "best_worst", key="0") == [(1, 0)]
    assert {pick([1, 3, 2], "zephyr", key=str(i))[0] for i in range(40)} == {(1, 0), (1, 2)}
    assert {pick([3, 3, 1], "zephyr", key=str(i))[0] for i in range(40)} == {(0, 2), (1, 2)}
    for scores, more, why in (
        ([2, 2], {}, "all scores are equal"),
        ([3, 3, 1], {"strict": True}, "the best score is shared"),
        ([3], {}, "fewer than two scored responses"),
    ):
        assert pick(scores, "zephyr", key="0", dropped=dropped, **more) == []
        assert dropped[why] == 1
    found = [pick([3, 3, 1], "ultrafeedback_binarized", key=str(i), dropped=dropped) for i in range(40)]
    assert 0 < sum(not one for one in found) == dropped["the one drawn scores as much as the best"] < 40


def completion(overall: float, *ratings: str) -> dict:
    aspects = {f"aspect{i}": {"Rating": rating, "Rationale": ""} for i, rating in enumerate(ratings)}
    return {
        "model": f"m{overall}",
        "response": f"r{overall} {ratings}",
        "overall_score": overall,
        "annotations": aspects,
    }


def test_ultrafeedback_schema_and_its_repair(tmp_path, capsys) -> None:
    assert mean_of_aspects(completion(7, "5", "N/A", "2")) == 3.5
    assert mean_of_aspects(completion(7, "N/A")) is None
    assert mean_of_aspects(completion(7, "5", math.nan, "n/a")) == 5  # as pandas writes what is not there
    with pytest.raises(BadRow, match="no number"):
        mean_of_aspects(completion(7, "inf"))
    odd = (math.nan, math.inf, True, None, 10**400)
    assert [overall_score(completion(value)) for value in (*odd, 3)] == [*[None] * 5, 3.0]
    assert repaired(completion(10, "1", "3")) == (1, True, False)
    assert repaired(completion(10, "3", "4")) == (None, True, True)
    assert repaired(completion(10, "5", "4")) == (10, False, False)
    assert repaired(completion(8, "1")) == (8, False, False)
    data, out = tmp_path / "u.jsonl", tmp_path / "p.jsonl"
    data.write_text(
        json.dumps({"instruction": "q", "completions": [completion(10, "1", "1"), completion(6, "4", "4")]}) + "\n"
    )
    args = ["pairs", "--data", str(data), "--out", str(out)]
    assert main([*args, "--rule", "zephyr"]) == 0
    assert rows(out)[0]["chosen_model"] == "m6"
    assert main([*args, "--rule", "ultrafeedback_binarized"]) == 0
    assert rows(out)[0]["chosen_model"] == "m10"
    assert "1 overall scores of 10 contradict" in capsys.readouterr().err
    assert main([*args, "--rule", "ultrafeedback_binarized", "--repair", "ultrafeedback"]) == 0
    assert rows(out)[0]["chosen_model"] == "m6"
    assert main([*args, "--repair", "ultrafeedback"]) == 2
    assert "--repair has no effect with --rule zephyr" in capsys.readouterr().err


def test_scores_of_a_judge(tmp_path, capsys) -> None:
    """`dpo-jax judge --out s.jsonl`, then `dpo-jax pairs --scores s.jsonl`: no script between them."""
    data, scores, out = (tmp_path / f"{name}.jsonl" for name in ("rows", "scores", "pairs"))
    lists = [["a", "a b c", "a b"], ["one two", "one"], ["same", "size"]]
    said = [{"prompt": f"q{i}", "responses": one, "scores": [9] * len(one)} for i, one in enumerate(lists)]
    data.write_text("".join(json.dumps(row) + "\n" for row in said))
    assert main(["judge", "--data", str(data), "--function", "length", "--out", str(scores)]) == 0
    args = ["pairs", "--data", str(data), "--out", str(out), "--rule", "best_worst", "--scores", str(scores)]
    assert main(args) == 0
    found = [(row["chosen"], row["rejected"], row["row"]) for row in rows(out)]
    assert found == [("a b c", "a", 1), ("one two", "one", 2)]  # not the rows' own scores, which are all 9
    assert "1 times: all scores are equal" in capsys.readouterr().err

    judged = rows(scores)
    judged[0]["scores"][1] = None  # unparsed
    scores.write_text("\n\n".join(map(json.dumps, judged)))  # as an editor leaves it: blank lines, and no last end
    assert main(args) == 0
    assert rows(out)[0]["chosen"] == "a b"
    assert "1 responses left out: the judge gave them no score" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([{"row": 1, "scores": [1, 2]}], "1 x not judged (first: row 2: --scores"),
        ([{"row": 1, "scores": [1, 2]}, {"row": 2, "scores": [1]}], "1 scores in --scores"),
        ([{"row": row, "scores": [1, 2]} for row in (1, 2, 3)], "row 3 is none of the 2 rows"),
        ([{"row": 1, "scores": [1, 2]}] * 2, "row 2: row 1 for the second time"),
        ([{"row": 1, "scores": [1, "2"]}], "row 1: no row number with a list of scores"),
        ([{"row": 1, "scores": [1, math.nan]}], "row 1: no row number with a list of scores"),
        ([{"prompt": "q", "responses": ["a", "b"]}], "row 1: no row number with a list of scores"),
        ([{"row": 1, "scores": [1, 10**400]}], "row 1: no row number with a list of scores"),
        ([{"row": n, "scores": [1, 2], "judged": "0" * 16} for n in (1, 2)], "2 x other texts were judged"),
        ("{", "row 1: malformed JSON"),
        (None, "no such file"),
    ],
)
def test_scores_of_other_rows(tmp_path, capsys, lines, why) -> None:
    data, scores = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"q{i}", "responses": ["a", "b c"]}) + "\n" for i in range(2)))
    if lines is not None:
        scores.write_text(lines if isinstance(lines, str) else "".join(json.dumps(row) + "\n" for row in lines))
    args = ["pairs", "--data", str(data), "--out", str(tmp_path / "p.jsonl"), "--scores", str(scores)]
    assert main(args) == 2
    assert why in capsys.readouterr().err.replace("\n", " ")
    assert main([*args, "--rule", "corrupt"]) == 2
    assert "--scores has no effect with --rule corrupt" in capsys.readouterr().err


# ---- right solutions made wrong in one place -----------------------------------------------------------------------


def test_edit_distances_by_hand() -> None:
    for a, b, n in (("kitten", "sitting", 3), ("", "abc", 3), ("same", "same", 0), ("12", "21", 2), ("aXa", "aa", 1)):
        assert edit_distance(a, b) == edit_distance(b, a) == n


def test_edit_distances_by_the_table() -> None:
    rng = random.Random(0)
    for _ in range(100):
        a, b = ("".join(rng.choice("abc。") for _ in range(rng.randrange(70))) for _ in range(2))
        before = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            row = [i]
            for j, y in enumerate(b, 1):
                row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
            before = row
        assert edit_distance(a, b) == before[-1]
    long = "x" + "".join(rng.choice("abcdef") for _ in range(5000)) + "y"
    assert edit_distance("z" + long[1:-1] + "z", long) == 2


def test_a_response_that_was_cut_is_in_no_pair(tmp_path, capsys) -> None:
    """By either kind of score: a pair's responses are whole, and DPO would learn that it ends there."""
    annotated = [completion(3, "3"), completion(5, "5"), completion(1, "1")]
    annotated[1]["finish_reason"], annotated[0]["finish_reason"] = "length", "stop"
    scored = [{"text": text, "score": score} for text, score in (("a", 1), ("b", 9), ("c", 2))]
    scored[1]["finish_reason"] = "length"
    for name, row in (("completions", annotated), ("responses", scored)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "q", name: row}) + "\n")
        out = tmp_path / "p.jsonl"
        assert main(["pairs", "--data", str(tmp_path / f"{name}.jsonl"), "--out", str(out), "--rule", "all"]) == 0
        (pair,) = rows(out)
        assert (pair["score_chosen"], pair["score_rejected"]) == ((3, 1) if name == "completions" else (2, 1))
        assert "1 responses left out: they were cut" in capsys.readouterr().err


def test_one_number_changes_and_nothing_else() -> None:
    solution = "She has 12 + 1,250 = 1,262 coins. Half is 0.5 of it: 631."
    seen = set()
    for key in map(str, range(200)):
        found = corrupt(solution, "number", key=key)
        assert found is not None
        old, new = found.changed
        seen.add(old)
        assert len(old) == len(new)
        assert float(old.replace(",", "")) != float(new.replace(",", ""))
        assert new == "0" or not new.startswith("0") or old.startswith("0")
        differ = sum(x != y for x, y in zip(solution, found.text, strict=True))
        assert 0 < edit_distance(solution, found.text) <= differ <= len(old)
        assert corrupt(solution, "number", key=key) == found
    assert seen == {"12", "1,250", "1,262", "0.5", "631"}
    assert corrupt("no number", "number", key="0") is None
    assert corrupt("\uff15 of full width", "number", key="0") is None


def test_two_neighbouring_steps_change_places() -> None:
    lines = "one\n\ntwo\nthree\n"
    found = {corrupt(lines, "step", key=str(i)) for i in range(40)}
    assert {one.text for one in found if one} == {"two\n\none\nthree\n", "one\n\nthree\ntwo\n"}
    assert {one.text for i in range(9) if (one := corrupt("A. B!  C", "step", key=str(i)))} == {"B! A.  C", "A. C  B!"}
    wide = {corrupt("一。二！ 三？", "step", key=str(i)) for i in range(9)}
    assert {one.text for one in wide if one} == {"二！一。 三？", "一。三？ 二！"}
    quoted = corrupt("「一。」と二。三。", "step", key="0")
    assert quoted is not None
    assert quoted.text == "三。「一。」と二。"
    for same in ("only one step", "x\nx\n", ""):
        assert corrupt(same, "step", key="0") is None


def test_the_command_corrupts(tmp_path, capsys) -> None:
    given = [{"prompt": f"q{i}", "response": f"3 + {i} = {3 + i}"} for i in range(5)]
    several = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "b"},
    ]
    given += [
        {"prompt": "q", "response": "no number"},
        {"messages": [*several, {"role": "assistant", "content": "22"}]},
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    words = ["pairs", "--data", str(tmp_path / "s.jsonl"), "--out", str(tmp_path / "p.jsonl")]
    assert main([*words, "--rule", "corrupt"]) == 0
    assert "6 pairs of 7 rows, one number changed in each" in (said := capsys.readouterr().err)
    assert "1 rows have no number to change" in said
    found = rows(tmp_path / "p.jsonl")
    assert [row["row"] for row in found] == [1, 2, 3, 4, 5, 7]
    assert [row["chosen"] for row in found[:5]] == [row["response"] for row in given[:5]]
    assert found[5]["prompt"] == several
    for row in found:
        read = parse_pair(readable(row))
        assert edit_distance(read.chosen, read.rejected) == row["edit_distance"] > 0
    for more, message in (
        (["--rule", "zephyr", "--corrupt", "step"], "--corrupt has no effect with --rule zephyr"),
        (["--rule", "corrupt", "--ties", "strict"], "--ties has no effect with --rule corrupt"),
        (["--rule", "corrupt", "--repair", "ultrafeedback"], "--repair has no effect with --rule corrupt"),
        (["--rule", "corrupt", "--corrupt", "step"], "no solution has a step to change"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["pairs --out out", "judge --function length --out out", "safety", "judge --sheet p.html"]
)
def test_every_line_beside_json_is_json(words: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "prompt;response;chosen;rejected\nq;a;longer;b\n"
    Path("rows.csv").write_text(rows)
    try:
        code = main([*words.split(), "--data", "rows.csv", "--json"])
        warnings.warn("of Python", stacklevel=1)
    finally:
        voice.talk("lines")
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert code in (0, 2)
    said = {one["text"]: one["event"] for one in told if "text" in one}
    assert said["rows.csv: semicolons stand between its cells, as in its first line"] == "warning"
    assert said["warning: of Python"] == "warning"


@pytest.mark.parametrize(
    "words",
    [
        "pairs --data rows.jsonl --out rows.jsonl",
        "pairs --data tests.jsonl:0.5,rows.jsonl:0.5 --out ./rows.jsonl",
        "judge --data rows.jsonl --function length --out rows.jsonl",
        "win-rate --answers rows.jsonl --against b.json --judgments v.json --out rows.jsonl",
        "win-rate --answers rows.jsonl --against rows.jsonl --judge length --judgments rows.jsonl",
        "generate --model m --prompts rows.jsonl --out link.jsonl",
        "logps --model m --data rows.jsonl --out rows.jsonl",
        "score --model m --data rows.jsonl --out rows.jsonl",
        "safety --data rows.jsonl --out rows.jsonl",
        "safety --data rows.jsonl --out new.jsonl --rows new.jsonl",
        "mt-bench answer --model m --questions rows.jsonl --out rows.jsonl",
        "mt-bench judge --model m --questions q.jsonl --answers a.jsonl rows.jsonl --out rows.jsonl --mode single",
    ],
)
def test_no_command_writes_over_what_it_reads(words: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    text = json.dumps({"prompt": "q", "response": "a", "chosen": "a", "rejected": "b"}) + "\n"
    Path("rows.jsonl").write_text(text)
    Path("link.jsonl").symlink_to("rows.jsonl")
    assert main(words.split()) == 2
    assert "jsonl: would be written over " in capsys.readouterr().err
    assert Path("rows.jsonl").read_text() == text
    assert {path.name for path in Path().iterdir()} == {"rows.jsonl", "link.jsonl"}
