"""`dpo-jax pairs`: the named rules, on published scores and by hand."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from dpo_jax.cli import main
from dpo_jax.data.rows.binarise import mean_of_aspects, pick, repaired
from dpo_jax.data.rows.preferences import parse_pair
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
