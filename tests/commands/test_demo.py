"""`dpo-jax demo` on a tiny model: its stages, its figures, and that it resumes."""

import json

import numpy as np
import pytest
import tiny

from dpo_jax.commands import demo
from dpo_jax.complete.writing.openings import review_openings
from dpo_jax.config import DemoRun
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import read_lines
from dpo_jax.judge.rewards.continuations import make_pairs
from dpo_jax.report import demo as demo_report
from dpo_jax.report.statistics import interval

SIZE = demo.Size(prompts=24, samples=3, unseen=6, unseen_samples=2, new_tokens=12, epochs=1, batch_size=16)


def test_openings_are_many_neutral_and_differ():
    openings = review_openings(0)
    assert len(set(openings)) == len(openings) == 240
    assert sorted(openings) == sorted(review_openings(1))
    assert openings != review_openings(1)
    assert demo.FULL.prompts + demo.FULL.unseen <= len(openings)
    judge = demo.Vader()
    assert np.abs([judge(text) for text in openings]).mean() < 0.2


def test_pairs_are_best_against_worst():
    def row(prompt, text, score):
        return {"prompt": prompt, "response": text, "sentiment": score}

    rows = [row("a", "meh", 0.0), row("a", "good", 0.9), row("a", "bad", -0.4), row("a", "  ", -0.9)]
    rows += [row("b", "tie", 0.3), row("b", "same", 0.3), row("c", "cut \ufffd", 0.5), row("c", "no", -0.5)]
    assert make_pairs(rows, "sentiment") == [
        {"prompt": "a", "chosen": "good", "rejected": "bad", "score_chosen": 0.9, "score_rejected": -0.4},
        {"prompt": "c", "chosen": "cut ", "rejected": "no", "score_chosen": 0.5, "score_rejected": -0.5},
    ]


def rows_of(scores, logps=(-1.0, -2.0), reference=(-1.5, -2.5)):
    return [
        {
            "prompt": f"p{i // 2}",
            "sample": i % 2,
            "response": "text",
            "sentiment": score,
            "finish_reason": "length",
            "ids": [1, 2],
            "logps": list(logps),
            "reference_logps": list(reference),
        }
        for i, score in enumerate(scores)
    ]


def test_figures_are_paired_by_prompt():
    before, after = rows_of([0.0, 0.2, -0.5, 0.5], (-1, -1), (-1, -1)), rows_of([0.4, 0.4, 0.5, 0.3])
    found = demo_report.figures(before, after, seed=0)
    assert found["unseen_prompts"] == 2
    assert found["difference"] == pytest.approx((0.3 + 0.4) / 2)
    assert found["interval"] == pytest.approx((0.3, 0.4))
    assert found["before"]["kl"] == 0
    assert found["after"]["kl"] == pytest.approx(1.0)
    assert found["after"]["kl_token"] == pytest.approx(0.5)
    assert "rose" in demo_report.verdict(found)
    assert "fell" in demo_report.verdict(demo_report.figures(after, before, seed=0))


def test_the_bootstrap_interval_is_close_to_the_normal_one():
    values = np.random.default_rng(0).normal(0.2, 1, 400)
    low, high = interval(values, seed=0)
    error = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.01)


@pytest.mark.slow
def test_the_whole_demo_resumes_and_repeats(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    # Scores from the ids, so that a random model has something to learn from.
    monkeypatch.setattr(demo.Vader, "__call__", lambda self, text: len(set(text)) / 40 - 0.3)
    folder = str(tiny.folder(tmp_path / "model"))
    first = DemoRun(out=str(tmp_path / "first"), model=folder)
    demo.demo(first, SIZE)
    shown = capsys.readouterr()
    assert "mean sentiment" in shown.out
    assert "95 % interval" in " ".join(shown.out.split())
    assert "[5/5]" in shown.err
    out = tmp_path / "first"
    assert {"samples.jsonl", "pairs.jsonl", "before.jsonl", "dpo", "after.jsonl", "report.html", "summary.json"} <= {
        path.name for path in out.iterdir()
    }
    before, after = read_lines(out / "before.jsonl"), read_lines(out / "after.jsonl")
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after]
    assert not {row["prompt"] for row in before} & {row["prompt"] for row in read_lines(out / "samples.jsonl")}
    for row in before:
        np.testing.assert_allclose(row["logps"], row["reference_logps"], atol=1e-4)
    assert any(abs(sum(r["logps"]) - sum(r["reference_logps"])) > 1e-3 for r in after), "training moved the policy"

    # Interrupted in each stage's file and rerun: the same texts.
    second = tmp_path / "second"
    second.mkdir()
    for name in ("samples.jsonl", "before.jsonl"):
        (second / name).write_bytes((out / name).read_bytes())
    marker = json.loads((out / "run.json").read_text()) | {"finished": False}
    (second / "run.json").write_text(json.dumps(marker))
    demo.demo(DemoRun(out=str(second), model=folder), SIZE)
    for name in ("pairs.jsonl", "after.jsonl"):
        assert (second / name).read_bytes() == (out / name).read_bytes()
    a, b = (json.loads((o / "summary.json").read_text()) for o in (out, second))
    assert a.pop("seconds").keys() == b.pop("seconds").keys()
    assert a == b

    capsys.readouterr()
    demo.demo(first, SIZE)
    again = capsys.readouterr()
    assert "is finished" in again.err
    assert "mean sentiment" in again.out
    with pytest.raises(InputError, match="--seed 0, this command has 1"):
        demo.demo(DemoRun(out=str(out), model=folder, seed=1))


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not a run of dpo-jax"):
        demo.demo(DemoRun(out=str(tmp_path)))
