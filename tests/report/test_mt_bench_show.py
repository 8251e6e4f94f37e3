"""`dpo-jax mt-bench show`: FastChat's judgement files, whose means, wins and ties are computed by hand here."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_jax import cli
from dpo_jax.data.sources.questions import CATEGORIES, category_of, read_questions
from dpo_jax.files.jsonl import write_lines


def single(question: float, model: str, score: Any, turn: float = 1, prompt: str = "single-v1", **more: Any) -> Any:
    """A row of gpt-4_single.jsonl."""
    prompt += "-multi-turn" if turn == 2 else ""
    told = {"user_prompt": "", "judgment": "", "tstamp": 0.5}
    return (
        {"question_id": question, "model": model, "judge": ["gpt-4", prompt], "score": score, "turn": turn}
        | told
        | more
    )


def pair(
    question: float, first: str, second: str, said: str, turn: int = 1, prompt: str = "pair-v2", **more: Any
) -> Any:
    """A row of gpt-4_pair.jsonl; `said`: the two winners."""
    names = {"1": "model_1", "2": "model_2", "t": "tie", "e": "error"}
    row = {"question_id": question, "model_1": first, "model_2": second, "judge": ["gpt-4", prompt], "turn": turn}
    return row | {"g1_winner": names[said[0]], "g2_winner": names[said[1]], "tstamp": 0.5} | more


def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], *options: str) -> Any:
    """What `show --json` prints of these rows."""
    write_lines(tmp_path / "j.jsonl", rows)
    capsys.readouterr()
    code = cli.main(["mt-bench", "show", "--judgments", str(tmp_path / "j.jsonl"), "--json", *options])
    out = capsys.readouterr()
    assert code == 0, out.err
    return json.loads(out.out)


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], *options: str) -> str:
    """The line that says why these rows are refused."""
    write_lines(tmp_path / "j.jsonl", rows)
    assert cli.main(["mt-bench", "show", "--judgments", str(tmp_path / "j.jsonl"), *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_what_is_left_out_is_of_the_models_asked_for(tmp_path, capsys, caplog) -> None:
    rows = [single(81, "a", 8), single(82, "a", -1), single(81, "b", 9), single(81, "b", 7, 2), single(82, "c", -1)]
    assert shown(tmp_path, capsys, rows)["left_out"] == {"unparsed": 2, "error": 0}
    assert "no judgement of c counts: not in the table" in caplog.text
    assert "means over unequal sets of questions: " in caplog.text
    assert "a 1 of turn 1" in caplog.text
    assert "b 1 of turn 1, 1 of turn 2" in caplog.text
    caplog.clear()
    assert shown(tmp_path, capsys, rows, "--models", "b")["left_out"] == {"unparsed": 0, "error": 0}
    assert not caplog.text
    assert "none of the judgements counts: 1 unparsed, 0 with an error\n" in refused(tmp_path, capsys, rows[-1:])


def test_categories_of_mt_benchs_ids() -> None:
    assert [category_of(81 + 10 * i, None) for i in range(8)] == list(CATEGORIES)
    assert [category_of(90 + 10 * i, None) for i in range(8)] == list(CATEGORIES)
    assert category_of(80, None) is category_of(161, None) is None


def test_single_judgements_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        single(81, "a", 8),
        single(81, "a", 5.5, 2),
        single(111, "a", 3, prompt="single-math-v1"),
        single(111, "a", -1, 2, "single-math-v1"),
        single(160, "a", 10, 2),
        single(81, "b", 9),
        single(82, "b", 1, error="the endpoint timed out"),
        single(83, "b", -1, judgment="$ERROR$"),
    ]
    found = shown(tmp_path, capsys, rows)
    assert (found["kind"], found["judgments"], found["left_out"]) == ("single", 5, {"unparsed": 1, "error": 2})
    a = found["models"]["a"]
    assert (a["mean"], a["n"]) == (26.5 / 4, 4), "over all judgements, not the mean of the turns' means"
    assert a["turns"] == {"1": 5.5, "2": 7.75}
    assert a["categories"] == {"writing": 6.75, "math": 3.0, "humanities": 10.0}
    assert a["turn_categories"] == {"1": {"writing": 8.0, "math": 3.0}, "2": {"writing": 5.5, "humanities": 10.0}}
    assert a["counts"]["categories"] == {"writing": 2, "math": 1, "humanities": 1}
    assert list(found["models"]) == ["b", "a"], "best first"
    assert list(shown(tmp_path, capsys, rows, "--models", "a")["models"]) == ["a"]


def test_pairs_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        pair(81, "a", "b", "11"),
        pair(82, "a", "b", "12"),  # follows the position: a tie
        pair(91, "b", "a", "22", 2, "pair-v2-multi-turn"),
        pair(92, "a", "b", "tt"),
        pair(93, "a", "b", "1t"),
        pair(121, "a", "b", "22", prompt="pair-math-v1"),
        pair(94, "a", "b", "1e"),
        pair(95, "a", "b", "11", error="refused"),
        pair(96, "a", "c", "22"),
    ]
    found = shown(tmp_path, capsys, rows, "--models", "a", "b")
    assert (found["kind"], found["judgments"], found["left_out"]) == ("pair", 6, {"unparsed": 0, "error": 2})
    a, b = found["models"]["a"], found["models"]["b"]
    assert [a[k] for k in ("wins", "losses", "ties", "n")] == [2, 1, 3, 6]
    assert (a["win_rate"], a["loss_rate"], a["win_rate_adjusted"]) == (2 / 6, 1 / 6, 3.5 / 6)
    assert [b[k] for k in ("wins", "losses", "ties")] == [1, 2, 3]
    assert found["swap_consistency"] == 4 / 6, "both for one model, or both a tie"
    assert a["turns"]["2"]["win_rate"] == 1.0
    assert [a["categories"]["writing"][k] for k in ("wins", "ties")] == [1, 1]
    assert [a["categories"]["coding"][k] for k in ("losses", "n")] == [1, 1]
    assert shown(tmp_path, capsys, rows, "--baseline", "c")["models"]["c"]["win_rate"] == 1.0


def test_what_pandas_writes_where_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that went through a table: NaN in each cell that a row has not, and so 81.0 for 81."""
    nan = float("nan")
    rows = [
        single(81.0, "a", 8.0, error=nan, judgment=nan),
        single(82.0, "a", 6.0, error="timed out"),
        single(83.0, "a", 4.0, error=nan) | {"turn": 2.0, "judge": nan},
        single(84, "a", nan, error="refused") | {"turn": nan},
    ]
    found = shown(tmp_path, capsys, rows)
    assert (found["judgments"], found["left_out"]) == (2, {"unparsed": 0, "error": 2})
    assert found["models"]["a"]["turns"] == {"1": 8.0, "2": 4.0}
    nothing = {"model": nan, "score": nan, "error": nan}
    rows = [pair(81.0, "a", "b", "11") | nothing, pair(82.0, "a", "b", "11", error="x") | {"g1_winner": nan}]
    found = shown(tmp_path, capsys, rows)
    assert (found["kind"], found["judgments"], found["left_out"]["error"]) == ("pair", 1, 1)
    twice = shown(tmp_path, capsys, [single(81, "a", 5), single(81.0, "a", 5)])
    assert twice["repeated"] == 1
    (tmp_path / "j.csv").write_text("question_id,model,score,turn,error\n81,a,8.5,1,\n82.0,a,7.5,2.0,\n83,a,,1,down\n")
    assert cli.main(["mt-bench", "show", "--judgments", str(tmp_path / "j.csv"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["models"]["a"]["turns"], found["left_out"]["error"]) == ({"1": 8.5, "2": 7.5}, 1)


def test_questions_that_went_through_a_table(tmp_path: Path) -> None:
    nan = float("nan")
    rows = [
        {"question_id": 1.0, "category": "math", "turns": ["1+1=?"], "reference": ["2"], "required_temperature": 0.5},
        {"question_id": 2.0, "category": "c", "turns": ["x\ud83d"], "reference": nan, "required_temperature": nan},
    ]
    write_lines(tmp_path / "q.jsonl", rows)
    first, second = read_questions(str(tmp_path / "q.jsonl")).values()
    assert (first.id, first.reference, first.temperature) == (1, ("2",), 0.5)
    assert (second.id, second.reference, second.temperature) == (2, (), None)
    assert second.turns == ("x\ufffd",), "no model can be told half a character"


def test_names_that_no_encoding_and_no_markup_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["m\ud83d", "[/b]x", "a :smile:", "名"]
    rows = [single(81, name, 9 - i) for i, name in enumerate(names)]
    out = tmp_path / "plots"
    assert list(shown(tmp_path, capsys, rows, "--out", str(out))["models"]) == names
    assert list(json.loads((out / "summary.json").read_text())["models"]) == names
    assert cli.main(["mt-bench", "show", "--judgments", str(tmp_path / "j.jsonl")]) == 0
    table = capsys.readouterr().out
    assert all(f"│ {name}" in table for name in ("m\ufffd", *names[1:]))


def test_another_set_of_questions_and_its_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = [
        {"question_id": 1, "category": "写作", "turns": ["写一首诗。", "再短一点。"]},
        {"question_id": 2, "category": "数学", "turns": ["1+1=?"], "reference": ["2"], "required_temperature": 0},
    ]
    write_lines(tmp_path / "q.jsonl", questions)
    rows = [single(1, "a", 4), single(1, "a", 6, 2), single(2, "a", 10), single(2, "b", 2)]
    out = tmp_path / "plots"
    found = shown(tmp_path, capsys, rows, "--questions", str(tmp_path / "q.jsonl"), "--out", str(out))
    assert found["models"]["a"]["categories"] == {"写作": 5.0, "数学": 10.0}
    assert json.loads((out / "summary.json").read_text()) == found
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("radar.png", "bars.png"))
    assert "question 3 is not in --questions" in refused(
        tmp_path, capsys, [*rows, single(3, "a", 1)], "--questions", str(tmp_path / "q.jsonl")
    )


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "j.jsonl", [pair(81, "a", "b", "11"), pair(82, "a", "b", "tt")])
    assert cli.main(["mt-bench", "show", "--judgments", str(tmp_path / "j.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "75.0%" in out
    assert "2 judgements count" in out


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([single(80, "a", 5)], (), "row 1: question 80 is none of MT-Bench's, 81 to 160"),
        ([single(81, "a", 5), single(82, "a", 5, prompt="single-v2")], (), "row 2: prompt single-v2, and row 1 has"),
        ([single(81, "a", 5), single(82, "a", 5, judge=["x", "single-v1"])], (), "row 2: judge x, and row 1 has gpt-4"),
        ([single(81, "a", 5), pair(82, "a", "b", "11")], (), "row 2: is pair, and row 1 is not"),
        ([pair(81, "a", "a", "11")], (), "row 1: names a twice"),
        ([single(81, "a", "8 of 10")], (), "row 1: score = '8 of 10' is no number"),
        ([single(81, "a", float("nan"))], (), "row 1: score = None is no number"),
        ([single(81, "a", 10**400)], (), "row 1: score = 1000000"),
        ([single(81, "a", 1e308), single(82, "a", 1e308)], (), "row 1: score = 1e+308 is no number up to 1e+09"),
        ([single(81, "a", -2)], (), "row 1: score = -2 is negative"),
        ([single(81, "a", 8, turn=0)], (), "row 1: turn = 0 is no whole number"),
        ([single(81, "a", 8, turn=1.5)], (), "row 1: turn = 1.5 is no whole number"),
        ([single(81, "a", 8, question_id="81a")], (), "row 1: question_id = '81a'"),
        ([single(81, "a", 8, question_id=81.5)], (), "row 1: question_id = 81.5"),
        ([single(81, "a", 8, question_id=float("nan"))], (), "row 1: question_id = None"),
        ([pair(81, "a", "b", "11", g2_winner=float("nan"))], (), "row 1: g2_winner = None is none of"),
        ([pair(81, "a", "b", "11", g2_winner="a")], (), "row 1: g2_winner = 'a' is none of"),
        ([single(81, "a", -1)], (), "none of the judgements counts: 1 unparsed"),
        ([{"question_id": 81, "turns": ["x"]}], (), "row 1: no judgement"),
        ([single(81, "a", 5)], ("--models", "z"), "z has no judgement that counts; those with one are a"),
        ([single(81, "a", 5)], ("--models", "a", "a"), "--models names a twice"),
        ([single(81, "a", 5)], ("--baseline", "a"), "--baseline has no effect on single judgements"),
    ],
)
def test_bad_input_is_one_line(
    rows: list[Any], options: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(tmp_path, capsys, rows, *options)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"turns": []}, "row 2 (question 7): has no text in each of its turns"),
        ({"turns": ["a", " "]}, "has no text in each of its turns"),
        ({"turns": "a"}, "turns = 'a' is not a list of texts"),
        ({"turns": ["a"], "category": None}, "category = None is no text"),
        ({"turns": ["a", "b"], "reference": ["c"]}, "has 2 turns and 1 reference answers"),
        ({"turns": ["a"], "required_temperature": -1}, "required_temperature = -1"),
        ({"turns": ["a"], "question_id": 81}, "this question_id stands in an earlier row"),
    ],
)
def test_bad_questions(row: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = {"question_id": 81, "category": "writing", "turns": ["a"]}
    write_lines(tmp_path / "q.jsonl", [first, {"question_id": 7, "category": "x"} | row])
    assert words in refused(tmp_path, capsys, [single(81, "a", 5)], "--questions", str(tmp_path / "q.jsonl"))


def test_the_two_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mt-bench", "--help"]) == 0
    assert "show" in capsys.readouterr().out
    assert cli.main(["mt-bench", "shwo"]) == 2
    assert "unknown mt-bench shwo; did you mean show?" in capsys.readouterr().err
