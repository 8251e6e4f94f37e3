"""`dpo-jax bench`: figures of what is here, for the programs that a training command runs."""

import json
from pathlib import Path

import pytest
import tiny

from dpo_jax import cli
from dpo_jax.plan.measured import seconds_of

FAST = ["--seconds", "0.05"]


def error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["bench", *words]) == 2
    *_, line = capsys.readouterr().err.splitlines()  # what is being measured stands before it
    return line.removeprefix("dpo-jax: error: ")


def test_dpo_with_its_loader_and_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.folder(tmp_path / "m")
    tiny.preferences(tmp_path / "pairs.jsonl", 24)
    out = tmp_path / "bench.json"
    words = ["dpo", "--model", str(tmp_path / "m"), "--data", str(tmp_path / "pairs.jsonl"), "--out", str(out), *FAST]
    words += ["--data.max_length", "64", "--train.batch_size", "8", "--folder", str(tmp_path), "--mesh.context", "2"]
    assert cli.main(["bench", *words]) == 0
    found = json.loads(out.read_text())
    step = found["programs"]["train step"]
    assert found["device"]["count"] == 8
    assert found["mesh"] == {"data": 1, "fsdp": 4, "context": 2, "tensor": 1}
    assert step["tokens"] == 8 * (32 + 32 + 32)
    assert step["tokens_per_second"] == pytest.approx(step["tokens"] / step["seconds"])
    assert 0 < step["fastest"] <= step["seconds"] <= step["p95"]
    assert step["runs"] >= 3
    assert step["peak_process_gib"] > 0
    assert step["plan"] is None, "the planner has no figures of a CPU"
    assert found["checkpoint"]["megabytes"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "m", "pairs.jsonl"], "it is removed"
    assert found["loader"]["batches"] == 3
    assert 0 < found["loader"]["real_tokens_share"] < 1
    said = capsys.readouterr().out
    assert "train step" in said
    assert "of a batch" in said


def test_grpo_measures_its_sampler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.folder(tmp_path / "m")
    words = ["grpo", "--model", str(tmp_path / "m"), "--reward", "length", "--train.batch_size", "8", *FAST]
    words += ["--ppo.group_size", "2", "--sample.max_new_tokens", "8", "--data.max_length", "24", "--no-checkpoint"]
    words += ["--out", str(tmp_path / "bench.json")]
    assert cli.main(["bench", *words]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found["programs"]) == ["train step", "measure", "generate"]
    assert "checkpoint" not in found
    sampler = found["programs"]["generate"]
    assert sampler["tokens_per_second"] == pytest.approx(8 * 8 / sampler["seconds"])
    assert sampler["prefill_tokens_per_second"] == pytest.approx(4 * 16 / sampler["prefill_seconds"])
    assert "sampler: prefill" in capsys.readouterr().out


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert error(capsys).startswith("missing CONFIG.py: dpo-jax bench CONFIG.py (")
    assert "no model is named: give --model_shape" in error(capsys, "dpo")
    assert "did you mean --model_shape?" in error(capsys, "dpo", "--model_shap", "x")
    assert "--seconds 0.0 must be positive" in error(capsys, "dpo", "--seconds", "0")
    assert "--folder has no effect without --checkpoint" in error(capsys, "dpo", "--folder", "x", "--no-checkpoint")
    assert "does not divide by 8" in error(
        capsys, "dpo", "--model_shape", "smollm2_135m", "--train.batch_size", "3", "--data.max_length", "64"
    )


def test_percentile_and_median() -> None:
    found = seconds_of(lambda: None, budget=1e9, least=1, most=20)
    assert found["runs"] == 20
    assert found["fastest"] <= found["seconds"] <= found["p95"]
