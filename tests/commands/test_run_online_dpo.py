"""`dpo-jax dpo --online` from end to end on a tiny random model."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny

from dpo_jax import cli
from dpo_jax.files.log import read_metrics
from dpo_jax.train import session as training

pytestmark = pytest.mark.usefixtures("compile_roughly", "few_devices")

REWARD = """
def some(prompts, responses):
    return [0.0 if p.startswith("3:") else sum(c.islower() for c in r) / 6 for p, r in zip(prompts, responses)]

def nan(prompts, responses):
    return [float("nan") if p.startswith("4:") else 1.0 for p in prompts]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", hidden=16, heads=2, kv_heads=1, layers=1)
    rng = random.Random(0)
    lines = [json.dumps({"prompt": f"{i}: {tiny.sentence(rng, rng.randint(1, 3))}"}) for i in range(8)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "mine.py").write_text(REWARD)
    return folder


def words(inputs: Path, out: Path, *more: str, reward: str = "some") -> list[str]:
    args = ["dpo", "--model", inputs / "model", "--online", "--data", inputs / "prompts.jsonl", "--out", out]
    args += ["--reward", f"{inputs / 'mine.py'}:{reward}", "--train.batch_size", "16", "--train.steps", "3"]
    args += ["--sample.max_new_tokens", "6", "--data.template", "raw", "--data.max_length", "22", "--lora.rank", "4"]
    args += ["--optimizer.learning_rate", "2e-2", "--checkpoint.every", "1", "--checkpoint.keep", "5"]
    return [*map(str, args), "--mesh.fsdp", "1", *more]


XPO = ("--online.opponent", "reference", "--online.exploration", "1e-3", "--online.missing_eos_penalty", "0.5")


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run against the reference."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", runs.small_mesh)
        assert cli.main(words(inputs, out, *XPO)) == 0
    return out


def test_the_whole_run(whole: Path, inputs: Path) -> None:
    rows, samples = read_metrics(whole / "metrics.jsonl"), read_metrics(whole / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert (whole / "report.html").exists()
    for row in rows:
        own = [s for s in samples if s["step"] == row["step"]]
        by = {name: [s for s in own if s["by"] == name] for name in ("policy", "reference")}
        assert len(by["policy"]) == len(by["reference"]) == 16
        mean = {name: np.mean([s[name] for s in by["policy"]]) for name in ("score", "kl")}
        assert row["objective/scores"] == pytest.approx(mean["score"], abs=1e-6)
        assert row["objective/kl"] == pytest.approx(mean["kl"], abs=1e-5)
        assert row["objective/rlhf_reward"] == pytest.approx(mean["score"] - 0.1 * mean["kl"], abs=1e-5)
        assert row["val/contain_eos_token"] == np.mean([s["ended"] for s in by["policy"]])
        pairs = list(zip(by["policy"], by["reference"], strict=True))
        ties = [a["score"] == b["score"] for a, b in pairs]
        assert row["rollout/ties"] == np.mean(ties) > 0, "the row of 3: always ties, but where one ended"
        wins = [a["score"] > b["score"] for (a, b), tie in zip(pairs, ties, strict=True) if not tie]
        assert row["rollout/wins"] == np.mean(wins)
        assert row["objective/scores_margin"] == pytest.approx(
            np.mean([abs(a["score"] - b["score"]) for a, b in pairs])
        )
        for (a, b), tie in zip(pairs, ties, strict=True):
            sides = {"chosen", "rejected"} if not tie else {None}
            assert {a["side"], b["side"]} == sides
            assert tie or (a["side"] == "chosen") == (a["score"] > b["score"])
        assert row["beta"] == 0.1
        assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"} <= set(row)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_stopped_and_gone_on(inputs: Path, whole: Path, tmp_path: Path) -> None:
    out, args = tmp_path / "run", words(inputs, tmp_path / "run", *XPO)
    runs.stopped_and_gone_on(args, out, whole, step=2)
    assert cli.main(args) == 0, "finished, which it says"


@pytest.mark.slow
def test_eight_devices_micro_batches_and_pieces_make_the_same_run(inputs: Path, whole: Path, tmp_path: Path) -> None:
    more = ["--mesh.data", "2", "--mesh.fsdp", "4", "--train.accumulate", "2", "--rollout_batch_size", "16"]
    assert cli.main(words(inputs, tmp_path / "run", *XPO, *more)) == 0
    for row, other in zip(runs.metrics(tmp_path / "run"), runs.metrics(whole), strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)
    texts = [[s["response"] for s in read_metrics(out / "samples.jsonl")] for out in (tmp_path / "run", whole)]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_best_of_four_and_the_mixture(inputs: Path, tmp_path: Path) -> None:
    """Four of the policy's own with SimPO's loss, drawn narrowly, which is not the policy's divergence; and the
    mixture's opponent, held-out prompts beside it."""
    four = ["--sample.weights", "int8", "--online.samples", "4", "--dpo.loss", "simpo", "--train.steps", "1"]
    assert cli.main(words(inputs, tmp_path / "four", *four)) == 0
    (row,) = read_metrics(tmp_path / "four" / "metrics.jsonl")
    assert row["objective/kl"] == pytest.approx(0, abs=1e-5)
    samples = read_metrics(tmp_path / "four" / "samples.jsonl")
    for i in range(0, len(samples), 4):
        sides = {s["side"]: s["score"] for s in samples[i : i + 4]}
        scores = [s["score"] for s in samples[i : i + 4]]
        if len(set(scores)) > 1:
            assert (sides["chosen"], sides["rejected"]) == (max(scores), min(scores))
    more = ["--online.opponent", "mixture", "--online.mixture", "0.5", "--train.steps", "1"]
    more += ["--eval_data", str(inputs / "prompts.jsonl")]
    assert cli.main(words(inputs, tmp_path / "mixed", *more)) == 0
    rows = read_metrics(tmp_path / "mixed" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[0]["eval_kl"] == pytest.approx(0, abs=1e-5)
    assert rows[1]["eval_kl"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dpo.loss", "kto"], "--dpo.loss kto does not go with --online"),
        (["--dpo.ties", "drop"], "--dpo.ties has no effect in dpo-jax dpo --online"),
        (["--online.samples", "1"], "--online.samples 1 must be at least 2"),
        (["--online.samples", "4", "--online.opponent", "reference"], "a pair is one response of each"),
        (["--online.mixture", "0.5"], "--online.mixture has no effect with --online.opponent policy"),
        (["--online.opponent", "mixture", "--online.mixture", "1"], "--online.mixture 1.0 must lie in"),
        (["--online.missing_eos_penalty", "inf"], "--online.missing_eos_penalty inf must be finite"),
        (["--online.exploration", "1e-5"], "it belongs to reference"),
        (["--rollout_batch_size", "3"], r"no multiple of 2 \(--online.samples\) that divides the 32 responses"),
        (["--sample.temperature", "0"], "online DPO learns from samples"),
        (
            ["--train.batch_size", "3", "--train.accumulate", "2"],
            "--train.batch_size 3 does not divide by --train.accumulate 2",
        ),
        (["--holdout", "0.5"], "unknown option --holdout"),
        (
            ["--reward", "{mine}:nan", "--mesh.fsdp", "1"],
            "the score of responses to row 5 of the prompts is not finite",
        ),
    ],
)
def test_one_line_errors(more, message, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = words(inputs, tmp_path / "out", *(word.format(mine=inputs / "mine.py") for word in more))
    if "--reward" in more:
        at = args.index("--reward")
        del args[at : at + 2]
    assert cli.main(args) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dpo-jax: error:")
    assert re.search(message, error), error


def test_offline_options_are_not_asked_for() -> None:
    assert cli.split_recipe_name(["dpo", "--model", "m", "--online"]) == ["dpo --online", "--model", "m"]
    assert cli.split_recipe_name(["dpo", "--model", "m"]) == ["dpo", "--model", "m"]
    assert cli.split_recipe_name(["ppo", "--online"]) == ["ppo", "--online"]
