"""`dpo-jax recipe frontier`: its estimators, and the whole of it on a tiny random model, interrupted and not."""

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny

from dpo_jax import cli
from dpo_jax.commands import ppo
from dpo_jax.commands.recipes import frontier
from dpo_jax.config import FrontierConfig, FrontierRun, LoraConfig, MeshConfig
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import read_lines
from dpo_jax.files.log import read_metrics
from dpo_jax.judge.rewards import continuations
from dpo_jax.report import frontier as frontier_report
from dpo_jax.train import session as training

pytestmark = pytest.mark.usefixtures("compile_roughly")

SIZES = FrontierConfig(
    prompts=12,
    samples=4,
    unseen=6,
    unseen_samples=2,
    best_of=4,
    new_tokens=6,
    batch_size=8,
    points=2,
    dpo_beta=(0.1,),
    dpo_steps=2,
    sft_steps=2,
    ppo_kl_coefficient=(0.05,),
    ppo_steps=2,
    ppo_batch_size=8,
    learning_rate=2e-2,
)


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    scores = np.random.default_rng(0).normal(size=(5, 8)).round(1)
    rows = [
        {"prompt": f"p{i}", "score": score, "ids": [1, 2]} for i, group in enumerate(scores.tolist()) for score in group
    ]
    found = frontier.best_of_n(rows, 8, seed=0)
    assert [row["n"] for row in found] == [1, 2, 4, 8]
    for row in found:
        means = [np.mean([max(x) for x in itertools.combinations(group, row["n"])]) for group in scores.tolist()]
        assert row["reward"] == pytest.approx(np.mean(means))
        assert row["reward_interval"][0] < row["reward"] < row["reward_interval"][1]
        assert row["kl"] == pytest.approx(math.log(row["n"]) - 1 + 1 / row["n"])
    assert found[0]["reward"] == pytest.approx(scores.mean())
    assert found[-1]["reward"] == pytest.approx(scores.max(axis=1).mean())


def test_the_kl_of_best_of_n_is_that_of_a_draw_without_ties() -> None:
    """The best of n of M equally likely responses: its KL divergence, summed up, nears the bound from below."""
    m = 20_000
    ranks = np.arange(1, m + 1) / m
    for n in (1, 2, 4, 16):
        chosen = ranks**n - (ranks - 1 / m) ** n
        divergence = float(np.sum(chosen * np.log(chosen * m)))
        assert divergence <= frontier.kl_bound(n) + 1e-12
        assert divergence == pytest.approx(frontier.kl_bound(n), abs=1e-3)


def text_rows(logps: np.ndarray, reference: np.ndarray, scores: np.ndarray, samples: int) -> list[dict]:
    return [
        {
            "prompt": f"p{i // samples}",
            "sample": i % samples,
            "ids": [1] * len(logps[i]),
            "logps": logps[i].tolist(),
            "reference_logps": reference[i].tolist(),
            "score": float(scores[i]),
        }
        for i in range(len(logps))
    ]


def test_the_kl_estimate_is_that_of_two_known_distributions() -> None:
    """Texts of two tokens, drawn independently from a distribution over three: the KL is twice that of a token."""
    rng = np.random.default_rng(0)
    p, q = np.asarray([0.5, 0.3, 0.2]), np.asarray([0.2, 0.3, 0.5])
    drawn = rng.choice(3, size=(4000, 2), p=p)
    rows = text_rows(np.log(p)[drawn], np.log(q)[drawn], drawn[:, 0], samples=2)
    found = frontier.measured(rows, seed=0)
    truth = 2 * float(np.sum(p * np.log(p / q)))
    assert found["kl_interval"][0] < truth < found["kl_interval"][1]
    assert found["kl"] == pytest.approx(truth, abs=0.06)
    assert found["kl_token"] == pytest.approx(found["kl"] / 2)
    assert found["reward"] == pytest.approx(drawn[:, 0].mean())
    same = frontier.measured(text_rows(np.log(p)[drawn], np.log(p)[drawn], drawn[:, 0], samples=2), seed=0)
    assert (same["kl"], same["kl_interval"]) == (0, (0, 0))


def test_the_comparison_says_who_wins_at_a_common_distance() -> None:
    def row(method, reward, kl, n=None):
        return {"method": method, "setting": "s", "step": None if n else 1, "n": n, "reward": reward, "kl": kl}

    results = [row("best of n", 0.0, 0.0, 1), row("best of n", 0.5, 1.0, 4)]
    results += [row("DPO", 0.4, 2.0), row("DPO", 0.9, 8.0), row("PPO", 0.6, 3.0), row("SFT on chosen", 0.1, 0.2)]
    found = frontier_report.comparison(results)
    assert found["within"]["kl"] == 3.0
    assert [found["within"][name]["reward"] for name in ("DPO", "PPO", "best of n")] == [0.4, 0.6, 0.5]
    assert found["best"]["DPO"]["reward"] == 0.9
    told = frontier_report.verdict({"results": results, "unseen_openings": 3, **found})
    assert told.index("PPO (s, step 1) +0.600") < told.index("DPO (s, step 1) +0.400")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama4"], "unknown recipe llama4"),
        (["fronteer"], "did you mean frontier?"),
        (["frontier"], "missing --out"),
        (["frontier", "--out", "o", "--recipe.points", "5"], "--recipe.points 5 does not divide --recipe.ppo_steps 12"),
        (["frontier", "--out", "o", "--recipe.prompts", "239"], "there are 240 openings in all"),
        (["frontier", "--out", "o", "--lora.rank", "0"], "--lora.rank must be positive"),
        (["frontier", "--out", "o", "--recipe.dpo_beta", "0.1", "0.1"], "all different"),
        (["frontier", "--out", "{full}"], "exists and is not a run of dpo-jax"),
    ],
)
def test_one_line_errors(words, message, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    assert cli.main(["recipe", *(word.format(full=tmp_path / "full") for word in words)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_the_overview_and_the_help(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["recipe", "--help"]) == 0
    assert "  frontier " in capsys.readouterr().out
    assert cli.main(["recipe", "frontier", "--help"]) == 0
    assert "--recipe.dpo_beta" in capsys.readouterr().out
    assert cli.main(["recipe"]) == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FrontierRun:
    """The options, with a tiny model and a reward function of the user's own; `out` is open."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", hidden=16, heads=2, kv_heads=1, layers=1)
    (folder / "mine.py").write_text(
        "def letters(prompts, responses):\n    return [sum(c.islower() for c in text) / 6 for text in responses]\n"
    )
    reward, lora = f"{folder / 'mine.py'}:letters", LoraConfig(rank=4)
    one = MeshConfig(data=1, fsdp=1, tensor=1)
    return FrontierRun(out="", model=str(folder / "model"), reward=reward, lora=lora, recipe=SIZES, mesh=one)


@pytest.fixture(scope="module")
def whole(run: FrontierRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted recipe."""
    out = tmp_path_factory.mktemp("whole") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_JAX_CACHE", str(out.parent / "cache"))
        patch.setattr(training, "make_mesh", runs.small_mesh)
        return frontier.recipe(dataclasses.replace(run, out=str(out)))


@pytest.mark.slow
def test_the_whole_recipe(run: FrontierRun, whole: Path, capsys) -> None:
    first = whole
    results = read_lines(first / "results.jsonl")
    points = [(row["method"], row["n"] or row["step"]) for row in results]
    runs_of = [(method, step) for method in ("DPO", "SFT on chosen", "PPO") for step in (1, 2)]
    assert points == [("best of n", 1), ("best of n", 2), ("best of n", 4), *runs_of]
    assert results[0]["reward"] < results[1]["reward"] < results[2]["reward"]
    assert results[2]["kl"] == pytest.approx(math.log(4) - 3 / 4)
    assert all(row["reward_interval"][0] <= row["reward"] <= row["reward_interval"][1] for row in results)
    assert all(row["kl"] != 0 for row in results[1:]), "training moved every policy"
    assert (first / "frontier.png").read_bytes().startswith(b"\x89PNG")
    report = (first / "report.html").read_text()
    assert "dpo-beta-0.1" in report
    assert "<svg" in report
    # What is learnt from and what is measured are apart, and the same for all.
    unseen = {row["prompt"] for row in read_lines(first / "unseen.jsonl")}
    assert not unseen & {row["prompt"] for row in read_lines(first / "samples.jsonl")}
    for path in (first / "points").iterdir():
        assert {row["prompt"] for row in read_lines(path)} == unseen
    record = json.loads((first / "stages.json").read_text())
    assert next(iter(record)) == "samples"
    assert str(first / "pairs.jsonl") in record["DPO beta 0.1"]["inputs"]

    # Once more: nothing is done again.
    frontier.recipe(dataclasses.replace(run, out=str(first)))
    shown = capsys.readouterr()
    assert "Within" in shown.out
    assert "samples" not in shown.err
    with pytest.raises(InputError, match=r"has --recipe.dpo_steps 2, this command has 4"):
        frontier.recipe(dataclasses.replace(run, out=str(first), recipe=dataclasses.replace(SIZES, dpo_steps=4)))


@pytest.mark.slow
def test_killed_it_gives_the_same_table(run: FrontierRun, whole: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Killed in the middle of the samples, of a point, and of PPO; then its inputs are changed below its feet."""
    first, second = whole, tmp_path / "second"
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(training, "make_mesh", runs.small_mesh)
    again = dataclasses.replace(run, out=str(second))
    take, written = ppo.Rollouts.prepare, continuations.scores_of

    def killed_in_ppo(self, state, batch):
        if batch.step == 1:
            raise KeyboardInterrupt
        return take(self, state, batch)

    def killed_in_a_point(*args, **options):
        if (second / "points").exists() and not list((second / "points").glob("*.jsonl")):
            raise KeyboardInterrupt
        return written(*args, **options)

    rng = random.Random(0)

    def killed_in_the_samples(*args, **options):
        if rng.random() < 0.5:
            raise KeyboardInterrupt
        return written(*args, **options)

    for owner, name, kill in (
        (continuations, "scores_of", killed_in_the_samples),
        (continuations, "scores_of", killed_in_a_point),
        (ppo.Rollouts, "prepare", killed_in_ppo),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, kill)
            with pytest.raises(KeyboardInterrupt):
                frontier.recipe(again)
    assert len(read_metrics(second / "ppo-kl-0.05" / "metrics.jsonl")) == 1
    with pytest.raises(InputError, match=r"has --recipe.dpo_steps 2, this command has 4"):
        frontier.recipe(dataclasses.replace(again, recipe=dataclasses.replace(SIZES, dpo_steps=4)))
    capsys.readouterr()
    frontier.recipe(again)
    assert "samples: done (texts 48" in capsys.readouterr().err
    assert (second / "results.jsonl").read_bytes() == (first / "results.jsonl").read_bytes()
    assert (second / "summary.json").read_bytes() == (first / "summary.json").read_bytes()

    (second / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"is not what it was when the stage 'DPO beta 0.1' read it"):
        frontier.recipe(again)
