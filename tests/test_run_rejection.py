"""`dpo-jax rejection` from end to end on a tiny random model."""

import dataclasses
import itertools
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import runs
import tiny

from dpo_jax.config import (
    CheckpointConfig,
    MeshConfig,
    OptimizerConfig,
    RejectionConfig,
    RejectionRun,
    SampleConfig,
    SFTDataConfig,
    TrainConfig,
)
from dpo_jax.data.token_loader import TokenLoader
from dpo_jax.errors import InputError
from dpo_jax.run import rejection, rejection_report, responses, training
from dpo_jax.run.rows import RowsFile, read_lines
from dpo_jax.weights.pretrained import load_pretrained

TEMPERATURES, SAMPLES, TRAINED, HELD_OUT = (0.7, 1.2), 4, 10, 10


def prompts(path: Path, rows: int, first: int = 0) -> Path:
    """A file of prompts, all within one bucket of the sampler."""
    rng = random.Random(first)
    lines = [json.dumps({"prompt": f"{first + i}: {tiny.sentence(rng, rng.randint(1, 3))}"}) for i in range(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model (`model`), prompts to train on and to hold out, and reward functions."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", hidden=16, heads=2, kv_heads=1, layers=1)
    prompts(folder / "train.jsonl", TRAINED)
    prompts(folder / "eval.jsonl", HELD_OUT, first=20)
    (folder / "mine.py").write_text(
        "def letters(prompts, responses):\n    return [sum(c.islower() for c in text) / 6 for text in responses]\n"
        "def same(prompts, responses):\n    return [1.0] * len(responses)\n"
        "def nan(prompts, responses):\n    return [float('nan') if p.startswith('4:') else 1.0 for p in prompts]\n"
    )
    return folder


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory):
    jax.config.update("jax_disable_most_optimizations", True)  # the model is tiny, compiling is not
    with runs.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def few_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "make_mesh", runs.small_mesh)
    monkeypatch.setattr(responses, "SCORED", 32)


def options(inputs: Path, out: Path, **changes: Any) -> RejectionRun:
    """Two iterations of four samples at two temperatures."""
    config = RejectionRun(
        model=str(inputs / "model"),
        source=str(inputs / "train.jsonl"),
        eval_source=str(inputs / "eval.jsonl"),
        out=str(out),
        reward=f"{inputs / 'mine.py'}:letters",
        rejection=RejectionConfig(samples=SAMPLES, temperatures=TEMPERATURES, iterations=2, eval_samples=SAMPLES),
        sample=SampleConfig(max_new_tokens=6),
        sample_batch_size=16,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        data=SFTDataConfig(template="raw", max_length=32, packing=True, train_on="last"),
        train=TrainConfig(steps=12, batch_size=4),
        checkpoint=CheckpointConfig(every=3),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", runs.small_mesh)
        return rejection.train(options(inputs, tmp_path_factory.mktemp("whole") / "run"))


def test_the_whole_run(whole: Path, inputs: Path) -> None:
    rows = read_lines(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    pools = []
    for t, row in zip((1, 2), rows[1:], strict=True):
        folder = whole / f"iteration-{t}"
        samples, scores = read_lines(folder / "samples.jsonl"), read_lines(folder / "scores.jsonl")
        order = [(r["row"], r["temperature"], r["sample"]) for r in samples]
        assert order == list(itertools.product(range(1, TRAINED + 1), TEMPERATURES, range(SAMPLES)))
        assert [(r["row"], r["temperature"], r["sample"]) for r in scores] == order
        for sample, score in zip(samples, scores, strict=True):
            assert score["score"] == np.float32(sum(c.islower() for c in sample["response"]) / 6)
        assert len({sample["response"] for sample in samples}) > 60
        every = np.asarray([score["score"] for score in scores]).reshape(TRAINED, -1)
        assert row["rewards/mean"] == pytest.approx(every.mean(), rel=1e-6)
        assert row["rewards/median"] == pytest.approx(np.median(every))
        assert row["rewards/best"] == pytest.approx(every.max(axis=1).mean(), rel=1e-6)

        # The pool holds the best ever, with where it comes from.
        pool = read_lines(folder / "pool.jsonl")
        assert len(pool) == TRAINED
        for p, best in enumerate(pool):
            higher = every[p].max() if not pools else max(every[p].max(), pools[-1][p]["score"])
            assert best["score"] == higher
            if best["iteration"] < t:
                assert best == pools[-1][p]
                continue
            wanted = {"prompt": best["prompt"], "temperature": best["temperature"], "sample": best["sample"]}
            (found,) = [s for s in samples if wanted.items() <= s.items()]
            assert found["response"] == best["completion"]
        pools.append(pool)
        assert read_lines(folder / "sft.jsonl") == pool
        assert row["rewards/pool"] == pytest.approx(np.mean([best["score"] for best in pool]))

        curves = json.loads((folder / "curves.json").read_text())
        assert curves["counts"] == [1, 2, 3, 4]
        for j in range(2):
            own = every[:, j * SAMPLES : (j + 1) * SAMPLES]
            assert curves["maximum"][j][0] == pytest.approx(own.mean(), abs=1e-5)
            assert curves["maximum"][j][-1] == pytest.approx(own.max(axis=1).mean(), abs=1e-5)
            assert curves["median"][j][-1] == pytest.approx(np.median(own, axis=1).mean(), abs=1e-5)
    assert {best["iteration"] for best in pools[1]} == {1, 2}
    assert read_lines(whole / "pool.jsonl") == pools[1]

    held_out = [np.asarray([s["score"] for s in read_lines(whole / f"iteration-{t}" / "heldout_scores.jsonl")])
                for t in range(3)]  # fmt: skip
    for row, scores in zip(rows, held_out, strict=True):
        assert row["eval_rewards/mean"] == pytest.approx(scores.mean(), rel=1e-6)
        assert row["eval_rewards/low"] <= row["eval_rewards/mean"] <= row["eval_rewards/high"]
        assert row["eval_rewards/change"] == pytest.approx(scores.mean() - held_out[0].mean(), abs=1e-6)
    assert rows[2]["eval_rewards/mean"] > rows[0]["eval_rewards/mean"]

    assert {path.name for path in (whole / "figures").iterdir()} == {
        "reward_by_samples_1.png",
        "reward_by_samples_2.png",
        "best_temperature.png",
        "reward_by_iteration.png",
    }
    report = (whole / "report.html").read_text()
    assert "Best temperature for the best of K" in report
    assert "Texts side by side" in report
    _, last = load_pretrained(whole)
    _, tuned = load_pretrained(whole / "iteration-2" / "sft")
    jax.tree.map(np.testing.assert_array_equal, last, tuned)
    _, before = load_pretrained(inputs / "model")
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(before), strict=True))


class Killed(BaseException):
    """What no code may catch."""


def die_in(name: str, appends: int, patch: pytest.MonkeyPatch) -> None:
    """Die while the file `name` is written, in the middle of a line."""
    append, count = RowsFile.append, itertools.count(1)

    def dying(file: RowsFile, rows: Any) -> None:
        append(file, rows)
        if str(file.path).endswith(name) and next(count) == appends:
            with open(file.part, "ab") as raw:
                raw.write(b'{"row": 1, "prom')
            raise Killed

    patch.setattr(RowsFile, "append", dying)


def stop_in_training(patch: pytest.MonkeyPatch, *, kill: bool) -> None:
    draw = TokenLoader.__next__

    def stopping(loader: TokenLoader) -> Any:
        if loader.step == 4:
            if kill:
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(loader)

    patch.setattr(TokenLoader, "__next__", stopping)


@pytest.mark.slow
def test_killed_in_each_stage(inputs: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is done twice, and the files are those of the run that nobody stopped."""
    config, out = options(inputs, tmp_path / "run"), tmp_path / "run"

    def killed(stop: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            stop(patch)
            with pytest.raises(Killed):
                rejection.train(config)

    killed(lambda patch: die_in("iteration-0/heldout.jsonl", 1, patch))
    killed(lambda patch: die_in("iteration-1/samples.jsonl", 2, patch))
    assert len(read_lines(out / "iteration-1" / "samples.jsonl.part")) > 16
    with pytest.raises(InputError, match=r"--rejection.samples 4, this command has 5"):
        rejection.train(dataclasses.replace(config, rejection=dataclasses.replace(config.rejection, samples=5)))
    killed(lambda patch: die_in("iteration-1/scores.jsonl", 2, patch))
    made = (out / "iteration-1" / "samples.jsonl").stat().st_mtime_ns
    killed(lambda patch: stop_in_training(patch, kill=True))
    with pytest.MonkeyPatch.context() as patch:
        stop_in_training(patch, kill=False)
        rejection.train(config)
    assert "stopped after step 5 of 12" in capsys.readouterr().err
    assert not (out / "iteration-1" / "sft" / "model").exists()
    killed(lambda patch: die_in("iteration-1/heldout.jsonl", 1, patch))
    killed(lambda patch: die_in("iteration-2/samples.jsonl", 4, patch))
    killed(lambda patch: patch.setattr(rejection_report, "write", lambda *_: (_ for _ in ()).throw(Killed)))
    rejection.train(config)
    assert (out / "iteration-1" / "samples.jsonl").stat().st_mtime_ns == made

    names = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    compared = [name for name in names if name.suffix in (".jsonl", ".png", ".json", ".safetensors")]
    compared = [
        name for name in compared if "sft" not in name.parts[:-1] and name.name not in ("run.json", "config.json")
    ]
    assert len(compared) > 25
    for name in compared:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    for t in (1, 2):
        assert runs.metrics(out / f"iteration-{t}" / "sft") == runs.metrics(whole / f"iteration-{t}" / "sft")
    assert rejection.train(config) == out
    assert "this run is finished" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"--rejection.iterations 2, this command has 3"):
        rejection.train(dataclasses.replace(config, rejection=dataclasses.replace(config.rejection, iterations=3)))
