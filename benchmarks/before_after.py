"""The table at the end of docs/dpo_to_mt_bench.md: SmolLM2 before and after the DPO run of `curves.py`.

    python benchmarks/curves.py --folder DIR rejection dpo
    python benchmarks/before_after.py --folder DIR

Runs the commands of the page's last section in the folder, and writes what came out into the page and into
docs/curves/before_after.json. Commands whose files are there are not run again.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.files.jsonl import read_lines, write_lines
from dpo_jax.judge.rewards.shipped import Vader
from dpo_jax.report.statistics import interval

ROOT = Path(__file__).resolve().parents[1]
PAGE, FILE = ROOT / "docs" / "dpo_to_mt_bench.md", ROOT / "docs" / "curves" / "before_after.json"
BEGIN, END = "<!-- the table, by benchmarks/before_after.py -->\n", "<!-- until here -->"
QUESTIONS = (
    ("writing", "Write two sentences about a train that is late.", "Now make them rhyme."),
    ("roleplay", "You are a ship's cook. What is for dinner?", "The captain hates fish. What do you say to him?"),
    (
        "reasoning",
        "Ann is taller than Ben, and Ben is taller than Cem. Who is the shortest?",
        "And who is the tallest?",
    ),
    ("math", "What is 17 + 26?", "And twice that?"),
    ("coding", "Write a Python function that adds two numbers.", "Let it add three."),
    ("extraction", "Name the colours in: a red car, a blue door, a green hat.", "Which of them is a hat?"),
    ("stem", "Why is the sky blue?", "Explain it to a child in a sentence."),
    ("humanities", "Name a play by Shakespeare.", "What is it about, in a sentence?"),
)
SIDES = ("before", "after")
REFERENCES = {
    "reasoning": ["Cem.", "Ann."],
    "math": ["43", "86"],
    "coding": ["def add(a, b):\n    return a + b", "def add(a, b, c):\n    return a + b + c"],
}


def commands(text: str) -> list[str]:
    """Those of the last block of the page."""
    block = text.rpartition("```bash\n")[2].partition("```")[0].replace("\\\n", " ")
    return [" ".join(line.split()) for line in block.splitlines() if line.startswith("dpo-jax ")]


def _ends(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    found = np.asarray(values, np.float64)
    low, high = interval(found, seed=0)
    return {"mean": float(found.mean()), "low": low, "high": high}


def measured(folder: Path) -> dict[str, Any]:
    """All figures, of the files that the commands wrote."""
    told: dict[str, Any] = {}
    judge = Vader()
    for side in SIDES:
        rows = read_lines(folder / f"{side}.jsonl")
        told[f"vader_{side}"] = _ends([judge(row["response"]) for row in rows])
        told[f"words_{side}"] = _ends([len(row["response"].split()) for row in rows])
    told["prompts"] = len(rows)
    for name in ("eval", "win_rate"):
        told[name] = json.loads((folder / f"{name}.json").read_text())
    judged = read_lines(folder / "single.jsonl")
    scores = {side: [row["score"] for row in judged if row["model"] == side] for side in SIDES}
    told["readable"] = {side: [sum(score > 0 for score in found), len(found)] for side, found in scores.items()}
    return told


def table(told: Mapping[str, Any]) -> str:
    """What stands on the page between the two comments."""

    def ends(found: Mapping[str, float], form: str = ".2f") -> str:
        return f"{found['mean']:{form}} ({found['low']:{form}} to {found['high']:{form}})"

    rate, level = told["win_rate"]["raw"], told["win_rate"]["length_controlled"]
    accuracy, error = (told["eval"][f"eval_rewards/accuracies{end}"] for end in ("", "_error"))
    many, pairs = told["prompts"], told["eval"]["pairs"]
    readable = {side: f"{found} of {of}" for side, (found, of) in told["readable"].items()}
    both = [
        (f"VADER's score, {many} unseen openings", *(ends(told[f"vader_{side}"]) for side in SIDES)),
        ("words an answer", *(ends(told[f"words_{side}"], ".1f") for side in SIDES)),
        ("wins against before, by VADER", "", f"{_rate(rate['win_rate'], rate['interval'])}"),
        ("the same at equal length", "", _rate(level["win_rate"], level["interval"]) if level else "-"),
        (f"{pairs} held-out pairs ordered as the data do", "", f"{accuracy:.2f}, standard error {error:.2f}"),
        ("replies of SmolLM2 as MT-Bench's judge that hold a score", *(readable[side] for side in SIDES)),
    ]
    rows = "\n".join(f"| {' | '.join(row)} |" for row in both)
    return (
        f"\n| figure (95 % interval) | before | after |\n|---|---|---|\n{rows}\n\n"
        f"VADER made the pairs too, and knows words only; {pairs} pairs give wide intervals. How much a model of 135M\n"
        "parameters is worth as a judge, the last row says. For a real table take the judge of step 3, and\n"
        "`dpo-jax mt-bench show` as in step 4.\n\n"
    )


def _rate(value: float, interval: Sequence[float]) -> str:
    return f"{value:.0%} ({interval[0]:.0%} to {interval[1]:.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("runs/curves"), help="where `curves.py` made its runs")
    folder: Path = parser.parse_args().folder
    rows = [
        {"question_id": i, "category": category, "turns": [*turns]}
        | ({"reference": REFERENCES[category]} if category in REFERENCES else {})
        for i, (category, *turns) in enumerate(QUESTIONS, 1)
    ]
    write_lines(folder / "questions_mt.jsonl", rows)
    for command in commands(PAGE.read_text()):
        words = shlex.split(command)
        if (folder / words[words.index("--out") + 1]).exists():
            continue
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-m", "dpo_jax", *words[1:]], cwd=folder, check=True, env=environment)
    told = measured(folder)
    FILE.write_text(json.dumps(told, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table(told)}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
