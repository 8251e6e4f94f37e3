"""What `benchmarks/zephyr_small.py` writes: its judge's lessons say what people say, and its files are read."""

import argparse
import re
import sys
from pathlib import Path

import pytest
from test_zephyr_arms import ROOT, data

from dpo_jax import cli
from dpo_jax.complete.asking.writer_pool import read_pool, read_principles
from dpo_jax.judge.asked.judge_reward import read_judge
from dpo_jax.judge.asked.verdicts import ratings, verdict

sys.path.insert(0, str(ROOT / "benchmarks"))

import zephyr_small


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return data(tmp_path / "data")


def test_the_judge_learns_what_people_say_in_its_own_form(source: Path) -> None:
    found = zephyr_small.lessons(source)
    kinds = [row["messages"][-1]["content"] for row in found]
    assert {text[:4] for text in kinds} == {"Text", "[[A]", "[[B]"}
    for row, said in zip(found, kinds, strict=True):
        *_, asked, _ = [message["content"] for message in row["messages"]]
        if said.startswith("Text"):
            shown = re.findall(r"<Text \d+>\n(.*)", asked)
            given = ratings(said, len(shown), 1, 5)
            assert given is not None
            better = {text.split()[-1]: rating.value for text, rating in zip(shown, given, strict=True)}
            assert better == {"good": 4, "bad": 1}, "two of each: people let every good one win"
        else:
            first = asked.partition("<answer A>\n")[2].partition("\n</answer A>")[0]
            assert verdict(said) == ("A" if first.endswith("good") else "B")


def test_its_files_are_those_of_the_recipe(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    options = argparse.Namespace(data=source, model="smollm2", prompts=5, seeds=3)
    zephyr_small.write_files(options, out)
    pool = read_pool(str(out / "pool.yaml"))
    assert [writer.name for writer in pool] == ["SmolLM2", "our SFT", "our DPO", "scored4_en"]
    assert pool[1].model == str(out / "zephyr" / "sft")
    assert read_judge(f"judge:{out / 'judge.yaml'}").settled.ask == "list"
    assert read_principles(str(out / "principles.json"), "en").keys() == {"brevity"}
    assert len((out / "prompts.jsonl").read_text().splitlines()) == 5
    words = ["--seeds", "s", "--prompts", "p", "--pool", "p.yaml", "--judge", "judge:j.yaml", "--out", "o"]
    run = cli.parse("recipe zephyr", [str(zephyr_small.CONFIG), *words, "--aif.beside", "length"])
    assert (run.aif.samples, run.aif.beside, run.aif.critique) == (len(pool), "length", False)
