"""`dpo-jax sft` from end to end on a tiny random model."""

import dataclasses
import json
import math
import os
import random
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import tiny
from safetensors.numpy import load_file

from dpo_jax import cli
from dpo_jax.commands import sft as run_sft
from dpo_jax.config import (
    CheckpointConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    SFTDataConfig,
    SFTLossConfig,
    SFTRun,
    TrainConfig,
)
from dpo_jax.data.sets.loader import TokenLoader
from dpo_jax.errors import InputError, Stopped
from dpo_jax.files.log import read_metrics
from dpo_jax.train import session as training
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("few_devices")


def dialogues(path: Path, rows: int, seed: int = 0) -> Path:
    """Write dialogues of one or two turns of made-up text; every answer ends alike, which can be learnt."""
    rng = random.Random(seed)
    lines = []
    for _ in range(rows):
        messages = []
        for _ in range(rng.randint(1, 2)):
            messages.append({"role": "user", "content": tiny.sentence(rng, rng.randint(2, 6))})
            messages.append({"role": "assistant", "content": tiny.sentence(rng, rng.randint(1, 4)) + " good good good"})
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model (`model`), training data and evaluation data."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", hidden=16, heads=4, kv_heads=2)
    dialogues(folder / "train.jsonl", rows=40)
    dialogues(folder / "eval.jsonl", rows=9, seed=1)
    return folder


def options(inputs: Path, out: Path, **changes) -> SFTRun:
    """Eight steps of four packed windows each, with evaluation and checkpoints on the way."""
    config = SFTRun(
        model=str(inputs / "model"),
        eval_data=str(inputs / "eval.jsonl"),
        out=str(out),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="cosine"),
        data=SFTDataConfig(str(inputs / "train.jsonl"), max_length=128, packing=True),
        train=TrainConfig(steps=8, batch_size=4, eval_every=4),
        checkpoint=CheckpointConfig(every=2, keep=2),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
    )
    return runs.changed(config, **changes)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", runs.small_mesh)
        return run_sft.train(options(inputs, tmp_path_factory.mktemp("whole") / "run"))


def test_the_whole_run(whole: Path) -> None:
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(9))
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 4, 8]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"] - 0.3
    assert evaluated[-1]["eval_mean_token_accuracy"] > evaluated[0]["eval_mean_token_accuracy"]
    for row in evaluated:
        assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"]))
    step = rows[1]
    assert {"loss", "grad_norm", "learning_rate", "mean_token_accuracy", "tokens_per_second", "padding"} <= set(step)
    assert 0 < step["target_tokens"] < step["tokens"] <= 4 * 128
    names = {path.name for path in whole.iterdir()}
    assert {"run.json", "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "model", "report.html"} <= names
    resolved = json.loads((whole / "config.json").read_text())
    assert resolved["train"]["steps"] == resolved["optimizer"]["total_steps"] == 8
    text = (whole / "report.html").read_text()
    assert f"Held-out loss {evaluated[0]['eval_loss']:.4f} before and {evaluated[-1]['eval_loss']:.4f} after" in text
    assert "rows used" in text
    assert "Perplexity" in text


def test_the_first_loss_is_that_of_the_model_as_transformers_computes_it(inputs: Path, whole: Path) -> None:
    """The held-out loss before training, by another implementation of model, template mask and mean."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "model")
    total, count = 0.0, 0
    for line in (inputs / "eval.jsonl").read_text().splitlines():
        ids: list[int] = []
        labels: list[int] = []
        for message in json.loads(line)["messages"]:
            head, body = f"<|im_start|>{message['role']}\n", f"{message['content']}<|im_end|>"
            for text, wanted in ((head, False), (body, message["role"] == "assistant"), ("\n", False)):
                new = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += new
                labels += new if wanted else [-100] * len(new)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum"))
        count += sum(label != -100 for label in labels)
    assert read_metrics(whole / "metrics.jsonl")[0]["eval_loss"] == pytest.approx(total / count, abs=1e-5)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process SIGTERM when the batch of `step` is drawn."""
    original = TokenLoader.__next__

    def draw(self):
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(TokenLoader, "__next__", draw)


def assert_same_run(a: Path, b: Path) -> None:
    assert runs.metrics(a) == runs.metrics(b)
    left, right = (load_file(out / "model" / "model.safetensors") for out in (a, b))
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_stopped_and_resumed_is_exact(
    inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(Stopped):
            run_sft.train(options(inputs, tmp_path / "run"))
    assert "stopped after step 5 of 8" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()
    run_sft.train(options(inputs, tmp_path / "run"))
    assert "going on after step 5 of 8" in capsys.readouterr().err
    assert_same_run(tmp_path / "run", whole)
    assert run_sft.train(options(inputs, tmp_path / "run")) == tmp_path / "run"
    assert "this run is finished" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sampled_run_resumes_exactly(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drawn ids follow from the seed and the step."""
    changes = {
        "sft": SFTLossConfig(loss="sampled", negatives=64, proposal="log_uniform"),
        "train": TrainConfig(steps=3, batch_size=4),
    }
    run_sft.train(options(inputs, tmp_path / "whole", **changes))
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            run_sft.train(options(inputs, tmp_path / "run", **changes))
    run_sft.train(options(inputs, tmp_path / "run", **changes))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    rows = runs.metrics(tmp_path / "run")
    assert "mean_token_accuracy" not in rows[1]
    assert "eval_mean_token_accuracy" in rows[-1]


def test_adapters_windows_of_one_and_a_named_template(inputs: Path, tmp_path: Path) -> None:
    config = options(
        inputs,
        tmp_path / "run",
        lora=LoraConfig(rank=2),
        data=SFTDataConfig(max_length=160, template="zephyr", train_on="last", buckets=1),
        train=TrainConfig(epochs=0.3, batch_size=8, accumulate=2),
        eval_data=None,
    )
    out = run_sft.train(config)
    rows = runs.metrics(out)
    assert [row["step"] for row in rows] == [1, 2]  # without held-out data there is no step 0
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all("lora_A" in name or "lora_B" in name for name in adapter)
    tokenizer = load_tokenizer(out / "model")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.startswith("<|user|>\nHi<|im_end|>")


def test_on_the_command_line(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from dpo_jax.config import *\n"
        "config = SFTRun(model=ON_COMMAND_LINE, out=ON_COMMAND_LINE,"
        " data=SFTDataConfig(max_length=2048, packing=True, train_on='all'), train=TrainConfig(epochs=2))\n"
    )
    words = [str(recipe), "--model", "M", "--data", "D", "--out", "O", "--data.max_length", "64"]
    parsed = cli.parse("sft", [*words, "--train.steps", "3"])
    assert isinstance(parsed, SFTRun)
    assert (parsed.data.max_length, parsed.data.packing, parsed.data.train_on) == (64, True, "all")
    assert (parsed.train.steps, parsed.train.epochs) == (3, None)
    assert cli.parse("sft", words[1:7]).optimizer.learning_rate == 2e-5
    mixed = cli.parse("sft", [*words[1:3], "--data", "a:0.7", "b:0.3", "--holdout", "0.1", "--out", "O"])
    assert (mixed.data.files, mixed.holdout, mixed.evaluates) == ("a:0.7,b:0.3", 0.1, True)
    for word in ("--train.layout", "--data.max_prompt_length"):
        assert cli.main(["sft", *words, word, "1"]) == 2
        assert "has no effect in dpo-jax sft" in capsys.readouterr().err


def test_it_ends_without_gain_and_exports_the_best(inputs: Path, tmp_path: Path) -> None:
    """A learning rate that spoils the model: the exported weights are those of the best checkpoint, not the last."""
    out = run_sft.train(
        options(
            inputs,
            tmp_path / "run",
            optimizer=OptimizerConfig(learning_rate=0.3, warmup_steps=1),
            train=TrainConfig(steps=8, batch_size=4, eval_every=1, stop_after=1),
            checkpoint=CheckpointConfig(every=2, keep=1, best="eval_loss"),
        )
    )
    losses = {row["step"]: row["eval_loss"] for row in read_metrics(out / "metrics.jsonl") if row["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 1 < 8
    assert {path.name for path in (out / "checkpoints").iterdir()} == {str(best), str(best + 1)}
    (_, kept), (_, exported) = load_pretrained(out / "checkpoints" / str(best)), load_pretrained(out / "model")
    jax.tree.map(np.testing.assert_array_equal, kept["params"], exported["params"])
    assert f"in {best} of 8 steps" in (out / "report.html").read_text()
    with pytest.raises(InputError, match=r"the run in it has --checkpoint.best eval_loss, this command has eval_perpl"):
        run_sft.train(
            options(
                inputs,
                out,
                optimizer=OptimizerConfig(learning_rate=0.3, warmup_steps=1),
                train=TrainConfig(steps=8, batch_size=4, eval_every=1, stop_after=1),
                checkpoint=CheckpointConfig(best="eval_perplexity"),
            )
        )


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": TrainConfig(batch_size=6, steps=1), "mesh": MeshConfig(4, 1, 2)}, r"batch_size 6 does not divide"),
        ({"model": "nowhere"}, r"nowhere: no such folder"),
        ({"files": "nowhere.jsonl"}, r"nowhere.jsonl"),
        ({"files": "a.jsonl:0.5,b.jsonl"}, r"b.jsonl has no weight and others have"),
        ({"eval_data": None, "holdout": 0.001}, r"leaves one side empty"),
        ({"train": TrainConfig(batch_size=4, frozen_dtype="bfloat16")}, r"frozen_dtype has no effect"),
        ({"eval_data": None}, r"eval_every has no effect"),
        ({"train": TrainConfig(batch_size=4, eval_every=1, stop_after=2)}, r"stop_after needs --checkpoint.best"),
        ({"data": SFTDataConfig(max_length=4)}, r"raise --data.max_length"),
        ({"data": SFTDataConfig(max_length=1024, template="nothing")}, r"template nothing"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(inputs: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run_sft.train(options(inputs, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_rows_that_are_no_dialogues_are_refused_with_their_numbers(inputs: Path, tmp_path: Path) -> None:
    lines = (inputs / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[4])
    row["messages"] = row["messages"][1:]
    lines[4] = json.dumps(row)
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"starts with the assistant \(first: row 5") as caught:
        run_sft.train(options(inputs, tmp_path / "run", files=str(tmp_path / "bad.jsonl")))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_options_without_effect() -> None:
    with pytest.raises(InputError, match=r"--data\.buckets has no effect with --data\.packing"):
        SFTDataConfig(packing=True, buckets=2)
    with pytest.raises(InputError, match=r"--holdout has no effect with --data.kind text"):
        SFTRun(model="M", out="O", holdout=0.1, data=SFTDataConfig("D", kind="text"))
    with pytest.raises(InputError, match="negatives has no effect"):
        SFTLossConfig(negatives=5)


def test_the_guard_stops_the_run(inputs: Path, tmp_path: Path) -> None:
    config = options(inputs, tmp_path / "run", optimizer=OptimizerConfig(learning_rate=1e30), eval_data=None)
    config = dataclasses.replace(config, train=TrainConfig(steps=8, batch_size=4))
    with pytest.raises(InputError, match=r"step [12]: .*of the data; the last checkpoint is intact"):
        run_sft.train(config)
