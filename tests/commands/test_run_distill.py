"""`dpo-jax distill` from end to end on tiny random models."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny

from dpo_jax import cli
from dpo_jax.files.log import read_metrics
from dpo_jax.train import session as training

pytestmark = pytest.mark.usefixtures("compile_roughly", "few_devices")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a wider teacher, a teacher of another vocabulary; dialogues of one answer."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", hidden=16, heads=2, kv_heads=1, layers=1)
    tiny.folder(folder / "teacher", hidden=32, heads=2, kv_heads=1, layers=1, seed=1)
    tiny.folder(folder / "other", hidden=16, heads=2, kv_heads=1, layers=1, vocab=300)
    rng = random.Random(0)
    rows = [{"prompt": f"{i}: {tiny.sentence(rng, 2)}", "response": tiny.sentence(rng, 1 + i)} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(inputs: Path, out: Path, *more: str) -> list[str]:
    args = ["distill", "--model", inputs / "model", "--teacher", inputs / "teacher", "--data", inputs / "rows.jsonl"]
    args += ["--out", out, "--train.batch_size", "8", "--train.steps", "6", "--distill.on_policy", "0.5"]
    args += ["--distill.beta", "0.5", "--sample.max_new_tokens", "6", "--data.template", "raw", "--data.max_length"]
    args += ["24", "--lora.rank", "4", "--optimizer.learning_rate", "1e-2", "--checkpoint.every", "1"]
    return [*map(str, args), "--checkpoint.keep", "7", "--mesh.fsdp", "1", *more]


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", runs.small_mesh)
        assert cli.main(words(inputs, out)) == 0
    return out


@pytest.mark.slow
def test_the_whole_run(whole: Path, inputs: Path) -> None:
    rows, samples = read_metrics(whole / "metrics.jsonl"), read_metrics(whole / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {row["rollout/on_policy"] for row in rows} == {0, 1}
    assert rows[-1]["loss"] < rows[0]["loss"]
    given = [json.loads(line) for line in (inputs / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        own = [s for s in samples if s["step"] == row["step"]]
        assert {s["by"] for s in own} == {"student" if row["rollout/on_policy"] else "data"}
        assert row["lengths/response"] == np.mean([s["tokens"] for s in own])
        assert row["val/contain_eos_token"] == np.mean([s["ended"] for s in own])
        if not row["rollout/on_policy"]:
            for sample in own:
                answer = given[sample["row"] - 1]["response"]
                assert answer == sample["response"] if sample["ended"] else answer.startswith(sample["response"])
    assert (whole / "report.html").exists()


@pytest.mark.slow
def test_stopped_and_gone_on(inputs: Path, whole: Path, tmp_path: Path) -> None:
    out, args = tmp_path / "run", words(inputs, tmp_path / "run")
    runs.stopped_and_gone_on(args, out, whole, step=4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teacher", "{inputs}/other"], "has another vocabulary than --model"),
        (["--teacher", "{inputs}/none"], "{inputs}/none"),
        (["--distill.beta", "1.5"], "--distill.beta 1.5 must lie in [0, 1]"),
        (["--eval_data", "e.jsonl"], "--eval_data has no effect in dpo-jax distill"),
        (
            ["--distill.on_policy", "0", "--sample.top_p", "0.9"],
            "--sample.top_p has no effect with --distill.on_policy 0",
        ),
        (["--distill.temperature", "inf"], "--distill.temperature inf must be finite"),
        (["--sample.temperature", "0"], "distillation learns from samples"),
        (["--data.max_length", "6"], "leaves no room for a prompt"),
    ],
)
def test_one_line_errors(more, message, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(words(inputs, tmp_path / "out", *(word.format(inputs=inputs) for word in more))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.format(inputs=inputs) in error


def test_prompts_alone_will_not_do_where_answers_are_learnt(inputs: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    assert cli.main(words(inputs, tmp_path / "out", "--data", str(tmp_path / "prompts.jsonl"))) == 2
    assert "row 1" in capsys.readouterr().err.strip().splitlines()[-1]
