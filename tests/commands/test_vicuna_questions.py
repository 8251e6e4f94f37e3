"""`benchmarks/vicuna_questions.py`: its judge's lessons, and all of it once with a tiny model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import tiny
from test_zephyr_arms import ROOT, data

from dpo_jax.judge.asked.verdicts import verdict

sys.path.insert(0, str(ROOT / "benchmarks"))

import vicuna_questions

SINGLE = """[Question]
{question}

[The Start of Assistant's Answer]
{answer}
[The End of Assistant's Answer]"""
PAIR = """[User Question]
{question}

[The Start of Assistant A's Answer]
{answer_a}
[The End of Assistant A's Answer]

[The Start of Assistant B's Answer]
{answer_b}
[The End of Assistant B's Answer]"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The rows of the arms' sources, with Vicuna's questions and prompts in FastChat's fields."""
    folder = data(tmp_path / "data")
    scored = [json.loads(line) for line in (folder / "scored4_en" / "vicuna_eval.jsonl").read_text().splitlines()]
    questions = [
        {"question_id": n, "category": ("generic", "math")[n % 2], "turns": [row["prompt"]]}
        for n, row in enumerate(scored[:4], 1)
    ]
    prompts = [
        {"name": name, "type": kind, "system_prompt": "Be impartial.", "prompt_template": text, "output_format": form}
        for kind, form, names, text in (
            ("single", "[[rating]]", ("single-v1", "single-math-v1"), SINGLE),
            ("pairwise", "[[A]]", ("pair-v2", "pair-math-v1"), PAIR),
        )
        for name in names
    ]
    files = {
        "scored4_en/vicuna_eval.jsonl": [row | {"reference": "four"} for row in scored],
        "vicuna_questions/question.jsonl": questions,
        "judge_prompts/fastchat_judge_prompts.jsonl": prompts,
    }
    for name, rows in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_judge_learns_what_people_say(source: Path) -> None:
    found = vicuna_questions.lessons(source, source / "judge_prompts" / "fastchat_judge_prompts.jsonl")
    told = [row["messages"] for row in found]
    scores = [(asked["content"], reply["content"]) for _, asked, reply in told if "Rating" in reply["content"]]
    assert len(told) == 2 * len(scores) > 0
    for asked, reply in scores:
        good = asked.splitlines()[4].endswith("good")
        assert reply == f"Rating: [[{10 if good else 1}]]"
    for _, asked, reply in told:
        if "Rating" not in reply["content"]:
            first = re.findall(r"Assistant A's Answer\]\n(.*)", asked["content"])[0]
            assert verdict(reply["content"]) == ("A" if first.endswith("good") else "B")


@pytest.mark.campaign
def test_all_of_it_once(source: Path, tmp_path: Path) -> None:
    model, out = tiny.folder(tmp_path / "model", hidden=16, heads=2, kv_heads=1, layers=1), tmp_path / "out"
    words = ["--data", source, "--out", out, "--model", model, "--dpo_steps", "1", "--judge_steps", "1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "vicuna_questions.py"), *map(str, words)]
    for _ in range(2):  # the second time everything is there
        done = subprocess.run(
            [*command, "--tokens", "8", "--agreement", "2"],
            env=runs.one_device(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    text = (out / "table.md").read_text()
    assert done.stdout == text
    for told in ("single: no reply has a reading", "2 pairs of PandaLM that it has not seen: no verdict has a reading"):
        assert told in text
    seconds = json.loads((out / "results.json").read_text())["seconds"]
    assert set(seconds) == {"judge", "dpo", "tried", "answer_before", "answer_after", "judged_single", "judged_pair"}


def test_what_is_read_is_shown(tmp_path: Path) -> None:
    for name in ("single", "pair"):
        (tmp_path / f"shown_{name}.txt").write_text(f"| {name} |\n")
    judge = {"pairs": 9, "accuracy": (0.5, 0.25, 0.75), "flip_share": (0.1, 0.0, 0.2)}
    told = {"read": {"single": 3, "pair": 2}, "judge": judge, "seconds": {"judge": 61.2}, "device": "cpu"}
    text = vicuna_questions.table(tmp_path, told)
    assert text.startswith("| single |\n\n| pair |\n\nJudge, on 9 pairs")
    assert "0.500 (0.250 to 0.750)" in text
    assert text.endswith("judge 61 s on cpu.\n")
