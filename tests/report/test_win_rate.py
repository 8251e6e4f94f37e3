"""`dpo-jax win-rate`: verdicts by hand, and length control against scikit-learn on the same design."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import chat_server
import numpy as np
import pytest

from dpo_jax import cli
from dpo_jax.files.jsonl import read_lines, write_lines
from dpo_jax.report.win_rates import controlled_figures, design, fit, fit_at, raw_figures


def drawn(seed: int, n: int = 400, phi: float = 1.0, theta: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Verdicts of 0 and 1 from the model itself, with answers that are longer on average; and the lengths."""
    rng = np.random.default_rng(seed)
    lengths, others = rng.integers(400, 1600, n).astype(float), rng.integers(200, 1200, n).astype(float)
    x = design(lengths, others)
    return (rng.random(n) < 1 / (1 + np.exp(-x @ [phi, theta]))).astype(float), lengths, others


def test_raw_figures_by_hand() -> None:
    found = raw_figures(np.asarray([1.0, 1.0, 0.5, 0.0, 0.75]), seed=0)
    assert [found[k] for k in ("wins", "losses", "ties", "n")] == [3, 1, 1, 5]
    assert found["win_rate"] == pytest.approx(0.65)
    assert found["discrete_win_rate"] == pytest.approx(0.7)
    assert found["standard_error"] == pytest.approx(np.std([1, 1, 0.5, 0, 0.75], ddof=1) / 5**0.5)
    assert found["interval"][0] < 0.65 < found["interval"][1]


def test_design_by_hand() -> None:
    x = design(np.asarray([3.0, 1.0, 2.0]), np.asarray([1.0, 1.0, 4.0]))
    np.testing.assert_allclose(x, [[np.tanh(1), 1], [0, 1], [np.tanh(-1), 1]])  # gaps 2, 0, -2: sample deviation 2
    with pytest.raises(ValueError, match="does not vary"):
        design(np.asarray([3.0, 4.0]), np.asarray([1.0, 2.0]))


@pytest.mark.parametrize("fractional", [False, True])
def test_coefficients_are_scikit_learns(fractional: bool) -> None:
    """alpaca_eval's `fit_LogisticRegressionCV`, step by step: folds, strengths and score by hand, then one fit."""
    from sklearn.linear_model import LogisticRegression

    verdicts, lengths, others = drawn(3, n=60)
    if fractional:
        verdicts = np.clip(verdicts * 0.7 + 0.1 + 0.1 * np.sin(np.arange(60)), 0, 1)
    x = design(lengths, others)
    theta, phi, strength = fit(x, verdicts)
    twice, labels, weights = np.r_[x, x], np.r_[np.ones(60, int), np.zeros(60, int)], np.r_[verdicts, 1 - verdicts]

    def made(c: float) -> Any:
        return LogisticRegression(
            C=c, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=123, tol=1e-4
        )

    from sklearn.model_selection import GroupKFold

    folds = list(GroupKFold(5).split(twice, labels, np.tile(np.arange(60), 2)))
    losses = []
    for c in np.logspace(-4, 4, 10):
        of_folds = []
        for train, test in folds:
            p = made(c).fit(twice[train], labels[train], sample_weight=weights[train]).predict_proba(twice[test])[:, 1]
            chance = np.where(labels[test] == 1, weights[test], 1 - weights[test])
            of_folds.append(-np.mean(chance * np.log(p) + (1 - chance) * np.log(1 - p)))
        losses.append(np.mean(of_folds))
    # Where hardly anything is penalised, strengths differ by less than liblinear's tolerance.
    chosen = int(np.argmin(np.abs(np.log(np.logspace(-4, 4, 10) / strength))))
    assert losses[chosen] == pytest.approx(min(losses), abs=1e-5)
    wanted = made(strength).fit(twice, labels, sample_weight=weights).coef_[0]
    np.testing.assert_allclose([phi, theta], wanted, atol=1e-6)
    np.testing.assert_allclose(fit_at(x, verdicts, strength), [theta, phi], atol=1e-6)


def test_length_alone_is_controlled_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """theta = 0, phi = 1, longer answers: the raw rate is far from 50 %, the controlled interval covers it."""
    monkeypatch.setattr("dpo_jax.report.win_rates.REFITS", 200)
    for seed in range(3):
        verdicts, lengths, others = drawn(seed)
        raw, controlled = raw_figures(verdicts, seed=0), controlled_figures(verdicts, lengths, others, seed=0)
        assert raw["interval"][0] > 0.5
        assert controlled["interval"][0] < 0.5 < controlled["interval"][1]
        assert controlled["phi"] == pytest.approx(1, abs=0.6)
        assert controlled["win_rate"] == pytest.approx(1 / (1 + np.exp(-controlled["theta"])))


def of_80(*verdicts: tuple[float, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Verdicts as (one, how often), shuffled, and lengths that have nothing to do with them."""
    rng = np.random.default_rng(5)
    lengths, others = rng.integers(1, 900, (2, 80)).astype(float)
    return rng.permutation(np.concatenate([np.full(n, value) for value, n in verdicts])), lengths, others


@pytest.mark.parametrize("loss", [0.0, 1.0])
def test_hardly_any_of_one_kind(
    loss: float, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Folds and samples without a loss, or without a win, are fitted in silence, and not the wrong way round."""
    monkeypatch.setattr("dpo_jax.report.win_rates.REFITS", 150)
    for few in (1, 3):
        found = controlled_figures(*of_80((1 - loss, 80 - few), (loss, few)), seed=0)
        low, high = found["interval"]
        assert (
            (0.8 < low <= found["win_rate"] <= high < 1) if loss == 0 else (0 < low <= found["win_rate"] <= high < 0.2)
        )
    assert capfd.readouterr().err == ""


def test_one_row_of_a_class_moves_no_coefficient() -> None:
    verdicts, lengths, others = of_80((1.0, 80))
    x = design(lengths, others)
    from scipy.optimize import minimize_scalar

    for strength in (0.0001, 0.046, 2.78):  # phi is 0: sum of C log(1 + exp(-theta)) + |theta|
        theta, phi = fit_at(x, verdicts, strength)
        best = minimize_scalar(lambda t, c=strength: 80 * c * np.logaddexp(0, -t) + abs(t), bounds=(0, 20))
        assert (theta, phi) == (pytest.approx(best.x, abs=1e-3), 0)
        assert fit_at(x, 1 - verdicts, strength) == pytest.approx((-theta, 0))


def test_where_length_control_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"folds chose \(C = 0.0001\) leaves no coefficient: these verdicts say nothing"
    ):
        controlled_figures(*of_80((1.0, 41), (0.0, 37), (0.5, 2)), seed=0)
    with pytest.raises(ValueError, match="leaves no coefficient"):
        controlled_figures(*of_80((0.5, 80)), seed=0)
    for value, name in ((1.0, "wins"), (0.0, "losses")):
        with pytest.raises(ValueError, match=f"all 80 verdicts are {name}, and there is nothing to fit"):
            controlled_figures(*of_80((value, 80)), seed=0)
    monkeypatch.setattr("dpo_jax.report.win_rates.fit", lambda x, verdicts: (0.0, 0.4, 0.01))
    monkeypatch.setattr("dpo_jax.report.win_rates.fit_at", lambda x, verdicts, strength: (0.0, 0.3))
    with pytest.raises(ValueError, match="leaves length alone"):
        controlled_figures(*of_80((1.0, 41), (0.0, 39)), seed=0)


def files(tmp_path: Path, pairs: list[tuple[str, str]], preferences: list[Any], swap: int = -1) -> list[str]:
    """The three files of answers (ours, theirs) and verdicts; row `swap` shows ours first."""
    ours = [{"prompt": f"q{i}", "response": a, "row": i} for i, (a, _) in enumerate(pairs)]
    theirs = [{"instruction": f"q{i}", "output": b, "generator": "b"} for i, (_, b) in enumerate(pairs)]
    said = [
        {"instruction": f"q{i}", "output_1": a if i == swap else b, "output_2": b if i == swap else a, "preference": p}
        for i, ((a, b), p) in enumerate(zip(pairs, preferences, strict=True))
    ]
    write_lines(tmp_path / "a.jsonl", ours)
    (tmp_path / "b.json").write_text(json.dumps(theirs))
    (tmp_path / "j.json").write_text(json.dumps(said))
    names = {"answers": "a.jsonl", "against": "b.json", "judgments": "j.json"}
    return [word for name, file in names.items() for word in (f"--{name}", str(tmp_path / file))]


PAIRS = [("a" * (3 + i), "b" * (7 - i)) for i in range(6)]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_jax.report.win_rates.REFITS", 20)
    given = files(tmp_path, PAIRS, [2, 1, 1.5, 0, 1.25, None], swap=1)
    assert cli.main(["win-rate", *given, "--json", "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert [found["raw"][k] for k in ("wins", "losses", "ties", "n")] == [2, 1, 2, 5], "row 1 was shown the other way"
    assert found["raw"]["win_rate"] == pytest.approx((1 + 1 + 0.5 + 0.5 + 0.25) / 5)
    assert found["left_out"] == {"no_verdict": 1, "not_judged": 1}
    assert found["mean_length"] == {"answers": 5.0, "against": 5.0}
    assert found["length_controlled"]["interval"][0] <= found["length_controlled"]["win_rate"]
    assert cli.main(["win-rate", *given]) == 0
    assert "2 wins, 1 losses, 2 ties" in capsys.readouterr().out


def test_a_judge_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scoring function, and an endpoint that is asked for pairs in both orders, once."""
    given = files(tmp_path, [*PAIRS, ("same", "same")], [2] * 7)
    there = tmp_path / "j.json"
    assert cli.main(["win-rate", *given, "--judge", "length"]) == 2
    assert "j.json: is there, and not of this command" in capsys.readouterr().err
    there.unlink()
    assert cli.main(["win-rate", *given, "--judge", "length", "--json"]) == 0
    out = capsys.readouterr().out
    assert [json.loads(out[out.index("{") :])["raw"][k] for k in ("wins", "losses", "ties")] == [3, 2, 2]
    said = json.loads(there.read_text())
    assert [row["preference"] for row in said] == [1, 1, 1.5, 2, 2, 2, 1.5]
    assert {(row["generator_1"], row["generator_2"]) for row in said} == {("b", "a")}, "a column, or the file's name"
    assert said[0]["output_2"] == PAIRS[0][0]

    def answer(body: dict[str, Any]) -> str:
        """The longer of two; no reading where one is aaa, and what stands first where one is bb."""
        first, second = re.findall(r"<answer [AB]>\n(.*?)\n</answer", body["messages"][-1]["content"])
        if "aaa" in (first, second):
            return "I would rather not."
        better = "A" if "bb" in (first, second) or len(first) > len(second) else "B"
        return f"[[{'C' if len(first) == len(second) else better}]]"

    with chat_server.serving(answer) as server:
        (tmp_path / "judge.yaml").write_text(f"ask: pair\nendpoint: {{url: '{server.url}', model: m}}\n")
        given[-1] = str(tmp_path / "asked.jsonl")
        words = ["win-rate", *given, "--judge", f"judge:{tmp_path / 'judge.yaml'}", "--json"]
        for _ in range(2):
            assert cli.main(words) == 0
            out = capsys.readouterr().out
            found = json.loads(out[out.index("{") :])
            said = [row["preference"] for row in read_lines(tmp_path / "asked.jsonl")]
            assert said == [None, 1, 1.5, 2, 2, 1.5, 1.5]
        assert set(server.answered.values()) == {1}
        assert found["left_out"]["no_verdict"] == 1
    (tmp_path / "judge.yaml").write_text("ask: pairs\n")
    assert cli.main([*words[:-3], "--judge", f"judge:{tmp_path / 'judge.yaml'}"]) == 2
    assert "--judge judge:" in capsys.readouterr().err


HALF = "\ud83d"
"""Of a surrogate pair."""


@pytest.mark.parametrize("name", ["j.json", "j.jsonl"])
def test_half_a_character_is_judged_written_and_read_again(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = files(tmp_path, PAIRS, [2] * 6)
    ours = [{"prompt": f"q{HALF}{i}", "response": f"{HALF}{a}"} for i, (a, _) in enumerate(PAIRS)]
    ours[1]["prompt"] = [{"role": "user", "content": f"q{HALF}"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ours))
    theirs = [{"instruction": row["prompt"], "output": b} for row, (_, b) in zip(ours, PAIRS, strict=True)]
    (tmp_path / "b.json").write_text(json.dumps(theirs))
    (tmp_path / "j.json").unlink()
    given[-1] = str(tmp_path / name)
    found = []
    for more in (("--judge", "length"), ("--judge", "length"), ()):
        assert cli.main(["win-rate", *given, *more, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] == found[2]
    assert found[0]["raw"]["n"] == 6
    assert found[0]["mean_length"]["answers"] == 6.5, "half a character counts as one"
    # Verdicts of another program on the same files spell it as they are given it.
    verdicts = [
        {"instruction": f"q{HALF}{i}", "output_1": b, "output_2": f"{HALF}{a}", "preference": 2}
        for i, (a, b) in enumerate(PAIRS)
        if i != 1
    ]
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in verdicts))
    assert cli.main(["win-rate", *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["raw"]["wins"] == 5


def test_an_instruction_that_looks_like_messages_is_a_text(tmp_path: Path) -> None:
    given = files(tmp_path, PAIRS, [2] * 6)
    asked = '[{"a":1}]'
    for name in ("a.jsonl", "b.json"):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace('"q0"', json.dumps(asked)))
    (tmp_path / "j.json").unlink()
    assert cli.main(["win-rate", *given, "--judge", "length"]) == 0
    assert read_lines(tmp_path / "j.json.pairs.jsonl")[0]["prompt"] == asked
    assert json.loads((tmp_path / "j.json").read_text())[0]["instruction"] == asked


def test_verdicts_that_went_through_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN is no verdict, as null is; what stands in a CSV is text."""
    given = files(tmp_path, PAIRS, [2.0, 1.0, float("nan"), 1.5, 0.0, None])
    assert cli.main(["win-rate", *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = json.loads((tmp_path / "j.json").read_text())
    names = ("instruction", "output_1", "output_2", "preference")
    table = [names, *([row[n] if row[n] == row[n] else None for n in names] for row in rows)]
    with open(tmp_path / "j.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)
    given[-1] = str(tmp_path / "j.csv")
    assert cli.main(["win-rate", *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert [found["raw"][k] for k in ("wins", "losses", "ties")] == [1, 1, 2]
    assert found["left_out"]["no_verdict"] == 2


def test_only_wins_is_said_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = files(tmp_path, PAIRS, [2] * 6)
    assert cli.main(["win-rate", *given, "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert json.loads(out)["length_controlled"] is None
    assert cli.main(["win-rate", *given]) == 0
    assert (
        "\nNo rate at equal length: all 6 verdicts are wins, and there is nothing to fit.\n" in capfd.readouterr().out
    )


def test_too_few_for_length_control(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["win-rate", *files(tmp_path, PAIRS[:3], [2, 1, 1]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["length_controlled"] is None
    assert "fewer than 5" in found["not_controlled"]


def _lines(path: Path, change: Any) -> None:
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("b.json", lambda rows: rows.pop(), "b.json: has no answer to 'q5'"),
        ("b.json", lambda rows: rows.append({"instruction": "z", "output": ""}), "a.jsonl: has no answer to 'z'"),
        ("b.json", lambda rows: rows.append(rows[0]), "row 7: instruction 'q0' stands in an earlier row"),
        ("b.json", lambda rows: rows[0].pop("output"), "row 1: has neither `instruction` and `output`"),
        ("j.json", lambda rows: rows[2].update(output_1="x"), "row 3: judges other texts than the answers"),
        ("j.json", lambda rows: rows[2].update(instruction="x"), "row 3: instruction 'x' is not in"),
        ("j.json", lambda rows: rows[2].update(preference=0.5), "row 3: preference = 0.5 is none of"),
        ("j.json", lambda rows: rows[2].update(preference="a"), "row 3: preference = 'a' is none of"),
        ("j.json", lambda rows: rows[2].update(preference=10**400), "row 3: preference = 1000"),
        ("j.json", lambda rows: rows[2].pop("output_2"), "row 3: `instruction`, `output_1` and `output_2`"),
        ("j.json", lambda rows: [row.update(preference=None) for row in rows], "none of its 6 rows holds a verdict"),
    ],
)
def test_bad_input_is_one_line(
    file: str, change: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = files(tmp_path, PAIRS, [2, 1, 2, 1, 2, 1])
    _lines(tmp_path / file, change)
    assert cli.main(["win-rate", *given]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
