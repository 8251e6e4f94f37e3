"""`dpo-jax sft --data.kind text` from end to end on a tiny random model: pre-training on documents and mixtures."""

import json
import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import runs
import tiny
from safetensors.numpy import load_file

from dpo_jax import cli
from dpo_jax.align import sft
from dpo_jax.commands import sft as run_sft
from dpo_jax.config import (
    CheckpointConfig,
    EnergyConfig,
    MeshConfig,
    OptimizerConfig,
    SFTConfig,
    SFTDataConfig,
    SFTLossConfig,
    SFTRun,
    TrainConfig,
)
from dpo_jax.data.sets.documents import load_documents
from dpo_jax.data.sets.text_windows import TextLoader
from dpo_jax.errors import InputError, Stopped
from dpo_jax.files.log import read_metrics
from dpo_jax.train import session as training
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("few_devices")

LENGTH, BATCH, STEPS = 32, 4, 8


def documents(path: Path, rows: int, seed: int = 0, column: str = "text") -> Path:
    """Write `rows` documents of made-up text, most of them longer than a window."""
    rng = random.Random(seed)
    path.write_text("".join(json.dumps({column: tiny.sentence(rng, rng.randint(3, 60))}) + "\n" for _ in range(rows)))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model (`model`), two sources (a.jsonl, b.txt) and held-out documents."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", hidden=16, heads=4, kv_heads=2)
    documents(folder / "a.jsonl", rows=20)
    documents(folder / "eval.jsonl", rows=5, seed=1)
    rng = random.Random(2)
    (folder / "b.txt").write_text("\n\n".join(tiny.sentence(rng, 12) for _ in range(9)))
    return folder


def options(inputs: Path, out: Path, **changes) -> SFTRun:
    """Eight steps of four windows each, more than an epoch."""
    config = SFTRun(
        model=str(inputs / "model"),
        out=str(out),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="cosine"),
        data=SFTDataConfig(str(inputs / "a.jsonl"), kind="text", max_length=LENGTH),
        train=TrainConfig(steps=STEPS, batch_size=BATCH),
        checkpoint=CheckpointConfig(every=2, keep=2),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
    )
    return runs.changed(config, **changes)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run over a mixture, with held-out documents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", runs.small_mesh)
        return run_sft.train(mixed(inputs, tmp_path_factory.mktemp("whole") / "run"))


def mixed(inputs: Path, out: Path, **changes) -> SFTRun:
    changes = {
        "files": f"{inputs / 'a.jsonl'}:0.75,{inputs / 'b.txt'}:0.25",
        "eval_data": str(inputs / "eval.jsonl"),
        "data": SFTDataConfig(kind="text", max_length=LENGTH, separator="blank_line"),
        "train": TrainConfig(steps=STEPS, batch_size=BATCH, peak_flops=1e12),
        "energy": EnergyConfig(device_watts=65.0),
        **changes,
    }
    return options(inputs, out, **changes)


def test_the_whole_run(whole: Path) -> None:
    rows = read_metrics(whole / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.3
    assert {row["tokens"] for row in trained} == {BATCH * LENGTH}, "every window is full"
    assert {row["padding"] for row in trained} == {0}
    assert rows[-1]["eval_loss"] < next(row["eval_loss"] for row in rows if "eval_loss" in row)
    for row in trained:
        assert row["mfu"] == pytest.approx(row["tflops_per_device"])
        assert row["tflops_per_device"] > 0


def test_the_report_says_what_it_cost_and_how_often_sources_were_seen(whole: Path) -> None:
    text = (whole / "report.html").read_text()
    assert "65 W x PUE 1.1" in text
    assert "0.385 kg/kWh" in text
    assert "median mfu" in text
    assert text.count("epochs in this run") == 2


def test_a_run_that_was_stopped_goes_on_exactly(
    whole: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = mixed(inputs, tmp_path / "run")
    step, asked = run_sft.sft.jit_train_step, []

    def stopping(*args):
        inner = step(*args)

        def run(state, batch):
            asked.append(1)
            if len(asked) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(state, batch)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(run_sft.sft, "jit_train_step", stopping)
        with pytest.raises(Stopped):
            run_sft.train(config)
    assert len(asked) < STEPS
    assert "stopped after step" in capsys.readouterr().err
    out = run_sft.train(config)
    assert "going on after step" in capsys.readouterr().err
    assert runs.metrics(out) == runs.metrics(whole)
    expected, found = (load_file(path / "model" / "model.safetensors") for path in (whole, out))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("documents", ["masked", "joined"])
def test_a_window_is_its_sequences_one_by_one(inputs: Path, documents: Any) -> None:
    """masked: the loss of a window is that of its pieces of documents apart; joined: that of one long sequence."""
    model, variables = load_pretrained(inputs / "model")
    tokenizer = load_tokenizer(inputs / "model")
    data = load_documents(str(inputs / "a.jsonl"), tokenizer, vocab_size=320)
    loader = TextLoader([data], [None], length=LENGTH, batch_size=BATCH, seed=0, documents=documents, workers=0)
    batch = next(loader)
    config = SFTConfig(packed=documents == "masked")
    found = jax.jit(partial(sft.eval_step, config=config))(sft.init_state(model, variables, config), batch)
    logits = jax.jit(lambda ids: model.apply(variables, model.apply(variables, ids), method="logits"))
    for row in range(BATCH):
        nll = 0.0
        cuts = np.flatnonzero(np.diff(batch.segments[row])) + 1
        for ids in np.split(batch.tokens[row], cuts):
            padded = np.pad(ids, (0, LENGTH - len(ids)))  # causal: what follows changes nothing
            logps = np.asarray(jax.nn.log_softmax(logits(padded[None])[0]))
            nll -= sum(logps[t - 1, ids[t]] for t in range(1, len(ids)))
        assert found["nll"][row] == pytest.approx(nll, rel=1e-5)


def test_words(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--model {inputs / 'model'} --data {inputs / 'a.jsonl'}:3 {inputs / 'b.txt'}:1 --data.kind text"
    words += f" --data.max_length {LENGTH} --data.documents joined --train.steps 1 --train.batch_size 4"
    words += f" --mesh.fsdp 1 --out {tmp_path / 'run'}"
    assert cli.main(["sft", *words.split()]) == 0
    said = capsys.readouterr().err
    assert "75.00% of the tokens" in said
    assert "causal attention, counted half" in said
    assert "no mfu is logged: the peak of cpu is not known here" in said
    (row,) = (row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row)
    assert row["target_tokens"] == BATCH * (LENGTH - 1), "joined: all but the first of a window"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": "{}/a.jsonl:0.5,{}/b.txt:0"}, r"b\.txt:0: the weight 0 must be a positive number"),
        ({"files": "{}/a.jsonl:-1"}, r"the weight -1 must be a positive number"),
        ({"files": "{}/a.jsonl:1,{}/b.txt"}, r"b\.txt has no weight and others have"),
        ({"files": "{}/gone.jsonl:1,{}/b.txt:1"}, r"gone\.jsonl"),
        ({"eval_data": "{}/eval.jsonl:1,{}/b.txt:2"}, r"weights in --eval_data have no effect"),
        ({"data": {"max_length": 512}}, r"--data\.max_length 512: the model's context is 256"),
        ({"data": {"separator": "blank_line"}}, r"--data\.separator has no effect: .*a\.jsonl holds rows"),
        ({"energy": EnergyConfig(pue=1.2)}, r"--energy\.pue has no effect: the power of cpu"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(inputs: Path, tmp_path: Path, changes: dict, message: str) -> None:
    changes = {
        name: value.replace("{}", str(inputs))
        if isinstance(value, str)
        else SFTDataConfig(**{"kind": "text", "max_length": LENGTH, **value})
        if isinstance(value, dict)
        else value
        for name, value in changes.items()
    }
    with pytest.raises(InputError, match=message) as caught:
        run_sft.train(options(inputs, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "text", "train_on": "all"},
        {"kind": "text", "packing": True},
        {"kind": "text", "buckets": 2},
        {"kind": "text", "template": "llama2"},
        {"separator": "blank_line"},
        {"documents": "joined"},
    ],
)
def test_options_without_effect_are_refused(change: dict) -> None:
    with pytest.raises(InputError, match=r"has no effect with --data\.kind"):
        SFTDataConfig(**change)


@pytest.mark.slow
def test_the_sampled_loss_counts_only_what_it_computes(inputs: Path, tmp_path: Path) -> None:
    rates = {}
    for loss in (SFTLossConfig(), SFTLossConfig(loss="sampled", negatives=16)):
        out = run_sft.train(options(inputs, tmp_path / loss.loss, sft=loss, train=TrainConfig(steps=1, batch_size=4)))
        row = next(row for row in read_metrics(out / "metrics.jsonl") if "loss" in row)
        rates[loss.loss] = row["tflops_per_device"] * row["seconds_per_step"]
    assert rates["sampled"] < rates["exact"]
