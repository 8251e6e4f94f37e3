"""`benchmarks/zephyr_arms.py` at toy size: all arms, the table, and nothing done twice."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import tiny

from dpo_jax.files.jsonl import write_lines

ROOT = Path(__file__).resolve().parents[2]


def data(folder: Path) -> Path:
    """A few rows in the layouts of the three sources."""
    draws = random.Random(0)

    def said() -> str:
        return tiny.sentence(draws, draws.randint(2, 6))

    people = []
    for i in range(12):
        asked = {"instruction": f"{i}: {said()}", "input": ""} | {f"annotator{k}": 1 for k in (1, 2, 3)}
        for names in ("one_two", "three_four"):
            people.append({**asked, "cmp_key": names, "response1": f"{said()} good", "response2": f"{said()} bad"})
    turns = [{"from": "human", "value": "hello"}]
    dialogues = [
        {"conversations": turns, **{side: {"from": "gpt", "value": said()} for side in ("chosen", "rejected")}}
        for _ in range(8)
    ]
    scored = [
        {"prompt": said(), "completions": [{"model": str(s), "response": said(), "score": s} for s in range(4)]}
        for _ in range(8)
    ]
    for name, rows in {
        "pandalm/pairs.jsonl": people,
        "dpo_en/pairs.jsonl": dialogues,
        "scored4_en/vicuna_eval.jsonl": scored,
    }.items():
        (folder / name).parent.mkdir(parents=True)
        write_lines(folder / name, rows)
    return folder


@pytest.mark.campaign
def test_four_arms_once(tmp_path: Path) -> None:
    model, out = tiny.folder(tmp_path / "model", hidden=16, heads=2, kv_heads=1, layers=1), tmp_path / "out"
    words = ["--data", data(tmp_path / "data"), "--out", out, "--model", model, "--seeds", "3", "--prompts", "6"]
    words += ["--judge_steps", "1", "--sft_steps", "1", "--epochs", "1", "--max_length", "96", "--new_tokens", "4"]
    command = [sys.executable, str(ROOT / "benchmarks" / "zephyr_arms.py"), *map(str, words), "--rank", "2"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], env=runs.one_device(), capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / "results.json").read_text())["arms"]
    assert list(found) == ["as it is", "dDPO, no dSFT", "dSFT", "dSFT twice", "dSFT, dDPO"]
    for name, seeds in found.items():
        assert seeds.keys() == {"3"}
        if name != "as it is":
            assert 0 <= seeds["3"]["win_rate"] <= 1
            assert ("win_rate_dsft" in seeds["3"]) == (name != "dSFT")
    config = json.loads((out / "seed3" / "dSFT_dDPO" / "config.json").read_text())
    assert (config["model"], config["data"]["template"]) == (str(out / "seed3" / "dSFT" / "model"), "zephyr")
    named = {json.loads(line)["prompt"] for line in (out / "data" / "prompts.jsonl").read_text().splitlines()}
    learnt = {json.loads(line)["prompt"] for line in (out / "data" / "judge.jsonl").read_text().splitlines()}
    assert (len(named), len(learnt)) == (6, 6)
    assert not named & learnt
    assert (out / "zephyr_arms.png").exists()

    made = {path: path.stat().st_mtime_ns for path in (out / "seed3").rglob("*.json*")}
    table = (out / "table.md").read_text()
    again = run()
    assert again.returncode == 0, again.stderr[-3000:]
    assert (out / "table.md").read_text() == table
    assert {path: path.stat().st_mtime_ns for path in made} == made
    other = run("--epochs", "2")
    assert other.returncode == 1
    assert "was begun with other values of --epochs" in other.stderr
