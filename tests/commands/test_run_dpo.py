"""`dpo-jax dpo` from end to end on a tiny random model."""

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from safetensors.numpy import load_file

from dpo_jax.commands import dpo as run_dpo
from dpo_jax.config import (
    CheckpointConfig,
    DataConfig,
    DPOConfig,
    DPOLossConfig,
    DPORun,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from dpo_jax.data.sets.dataset import load_preferences
from dpo_jax.data.sets.loader import PreferenceLoader
from dpo_jax.errors import InputError, Stopped
from dpo_jax.files.log import read_metrics
from dpo_jax.judge.policy_logps import cache_key
from dpo_jax.train import session as training
from dpo_jax.weights.convert import convert
from dpo_jax.weights.pretrained import load_pretrained, save_pretrained
from dpo_jax.weights.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model (`model`), training data and evaluation data."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", hidden=16, heads=4, kv_heads=2)
    tiny.preferences(folder / "train.jsonl", rows=20)
    tiny.preferences(folder / "eval.jsonl", rows=7, seed=1)
    return folder


ONE_DEVICE = MeshConfig(data=1, fsdp=1, tensor=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(training, "make_mesh", runs.small_mesh)
    return tmp_path / "cache"


def options(inputs: Path, out: Path, **changes) -> DPORun:
    """Six steps on four rows each, with evaluation and checkpoints on the way."""
    config = DPORun(
        model=str(inputs / "model"),
        eval_data=str(inputs / "eval.jsonl"),
        out=str(out),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="cosine"),
        data=DataConfig(str(inputs / "train.jsonl"), max_length=96, buckets=1),
        train=TrainConfig(steps=6, batch_size=4, eval_every=4),
        checkpoint=CheckpointConfig(every=2, keep=2),
        mesh=ONE_DEVICE,
    )
    return runs.changed(config, **changes)


def weights(out: Path, name: str = "model/model.safetensors") -> dict[str, np.ndarray]:
    return load_file(out / name)


def assert_same_run(a: Path, b: Path) -> None:
    assert runs.metrics(a) == runs.metrics(b)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_JAX_CACHE", str(folder / "cache"))
        patch.setattr(training, "make_mesh", runs.small_mesh)
        return run_dpo.train(options(inputs, folder / "run"))


def test_the_whole_run(inputs: Path, whole: Path) -> None:
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 6]
    assert abs(rows[0]["loss"] - np.log(2)) < 1e-5  # the policy is the reference still
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["loss"] < 0.6
    assert rows[4]["epoch"] == 1.0
    names = {path.name for path in whole.iterdir()}
    assert {"run.json", "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "model", "report.html"} <= names
    resolved = json.loads((whole / "config.json").read_text())
    assert resolved["train"]["steps"] == resolved["optimizer"]["total_steps"] == 6
    assert sorted(int(path.name) for path in (whole / "checkpoints").iterdir()) == [4, 6]
    text = (whole / "report.html").read_text()
    assert text.count("<svg") >= 8
    assert "rows used" in text
    before = load_file(inputs / "model" / "model.safetensors")
    after = weights(whole)
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


def test_transformers_loads_the_result(whole: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(whole / "model")
    assert model.config.num_hidden_layers == 2
    assert transformers.AutoTokenizer.from_pretrained(whole / "model").chat_template == tiny.TEMPLATE


def test_a_finished_run_is_left_alone(inputs: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    assert run_dpo.train(options(inputs, whole)) == whole
    assert "this run is finished" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_another_configuration_is_refused(inputs: Path, whole: Path) -> None:
    with pytest.raises(InputError, match=r"has no --dpo\.beta, this command has 0\.3"):
        run_dpo.train(options(inputs, whole, dpo=DPOLossConfig(beta=0.3)))


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process SIGTERM when the batch of `step` is drawn."""
    original = PreferenceLoader.__next__

    def draw(self):
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(PreferenceLoader, "__next__", draw)


def test_stopped_and_resumed_is_exact(
    inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped) as stopped:
            run_dpo.train(options(inputs, tmp_path / "run"))
    assert stopped.value.code == 143
    assert "stopped after step 3 of 6" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()
    run_dpo.train(options(inputs, tmp_path / "run"))
    assert "going on after step 3 of 6" in capsys.readouterr().err
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_resumed_on_another_mesh(inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            run_dpo.train(options(inputs, tmp_path / "run"))
    run_dpo.train(options(inputs, tmp_path / "run", mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    for row, expected in zip(runs.metrics(tmp_path / "run"), runs.metrics(whole), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.slow
def test_other_data_under_the_same_name_is_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny.preferences(tmp_path / "data.jsonl", rows=20)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            run_dpo.train(options(inputs, tmp_path / "run", files=str(data)))
    tiny.preferences(data, rows=20, seed=9)
    with pytest.raises(InputError, match="belongs to another run: the data is"):
        run_dpo.train(options(inputs, tmp_path / "run", files=str(data)))


def relatives(inputs: Path, out: Path) -> DPORun:
    """Losses that remember and rank, a second adapter that moves, bfloat16, shared prompts, two micro-batches."""
    dpo = {"loss": "sigmoid,bco_pair,aot", "loss_weights": "0.8,0.2,1", "ld_alpha": 0.5}
    return options(
        inputs,
        out,
        dpo=DPOLossConfig(**dpo, reference="live", reference_sync_steps=2),
        lora=LoraConfig(rank=2),
        train=TrainConfig(steps=4, batch_size=4, accumulate=2, eval_every=2, dtype="bfloat16"),
        checkpoint=CheckpointConfig(every=1, keep=1),
    )


def test_what_losses_remember_is_resumed_exactly(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_dpo.train(relatives(inputs, tmp_path / "whole"))
    rows = runs.metrics(whole)
    assert rows[0]["loss/sigmoid"] == pytest.approx(np.log(2), abs=1e-3)
    assert {"loss/bco_pair", "loss/aot"} <= rows[-1].keys()
    weighted = {"sigmoid": 0.8, "bco_pair": 0.2, "aot": 1.0}
    for at in ("", "eval_"):
        summed = sum(weight * rows[-1][f"{at}loss/{name}"] for name, weight in weighted.items())
        assert rows[-1][f"{at}loss"] == pytest.approx(summed, rel=1e-5)
    assert rows[0]["rewards/running_mean"] != rows[-1]["rewards/running_mean"]
    arrays = json.loads((whole / "checkpoints" / "4" / "meta" / "metadata").read_text())["arrays"]
    kept = {name for name in arrays if name.startswith("['carried']")}
    assert any("lora_b" in name for name in kept)
    assert {"['carried']['reward_count']", "['carried']['reward_mean']"} <= kept
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            run_dpo.train(relatives(inputs, tmp_path / "run"))
    run_dpo.train(relatives(inputs, tmp_path / "run"))
    assert "going on after step 3 of 4" in capsys.readouterr().err
    assert_same_run(tmp_path / "run", whole)


def test_odpo_takes_scores_and_refuses_rows_without(inputs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (inputs / "train.jsonl").read_text().splitlines()]

    def run(name: str, **scores: float) -> Path:
        path = tmp_path / f"{name}.jsonl"
        each = [row | (scores if i == 6 else {"good": 7, "score_rejected": 5 - i / 8}) for i, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in each))
        return run_dpo.train(
            options(
                inputs,
                tmp_path / name,
                files=str(path),
                data=DataConfig(str(path), max_length=96, buckets=1, columns="score_chosen=good"),
                dpo=DPOLossConfig(loss="odpo"),
                eval_data=None,
                train=TrainConfig(steps=1, batch_size=20),
            )
        )

    for name, scores, message in (
        ("none", {}, "row 7: odpo takes its offset from the scores of both responses, and the row has none"),
        ("tie", {"good": 3, "score_rejected": 3}, "row 7: the chosen response scores 3 and the rejected 3"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            run(name, **scores)
        assert "\n" not in str(caught.value)
    found = runs.metrics(run("whole", good=9, score_rejected=1))[0]["loss"]
    gaps = [2 + i / 8 if i != 6 else 8 for i in range(20)]
    assert found == pytest.approx(np.mean(np.log1p(np.asarray(gaps))), abs=1e-4), "-log s(0 - log gap)"


def test_lora_exports_a_merged_model_and_an_adapter(inputs: Path, tmp_path: Path) -> None:
    config = options(
        inputs,
        tmp_path / "run",
        lora=LoraConfig(rank=2),
        eval_data=None,
        train=TrainConfig(steps=2, batch_size=4),
    )
    out = run_dpo.train(config)
    adapter = weights(out, "adapter/adapter_model.safetensors")
    assert all("lora_A" in name or "lora_B" in name for name in adapter)
    before, after = load_file(inputs / "model" / "model.safetensors"), weights(out)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed
    assert all("proj" in name for name in changed)
    named = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(inputs / "model")
    state = json.loads((out / "checkpoints" / "2" / "meta" / "metadata").read_text())
    assert not any("'params'" in name for name in state["arrays"])


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 2])
def test_live_reference_equals_cached(inputs: Path, tmp_path: Path, lora: int) -> None:
    found = {}
    for reference in ("cached", "live"):
        config = options(
            inputs,
            tmp_path / reference,
            dpo=DPOLossConfig(reference=reference),
            lora=LoraConfig(rank=lora),
            eval_data=None,
            train=TrainConfig(steps=3, batch_size=4),
        )
        found[reference] = runs.metrics(run_dpo.train(config))
    for cached, live in zip(found["cached"], found["live"], strict=True):
        assert cached["loss"] == pytest.approx(live["loss"], abs=1e-5)
        assert cached["rewards/margins"] == pytest.approx(live["rewards/margins"], abs=1e-4)


@pytest.mark.slow
def test_another_reference_model(inputs: Path, tmp_path: Path) -> None:
    other = tiny.folder(tmp_path / "other", hidden=32, seed=4)
    config = options(
        inputs, tmp_path / "run", reference=str(other), eval_data=None, train=TrainConfig(steps=1, batch_size=4)
    )
    first = runs.metrics(run_dpo.train(config))[0]
    assert first["rewards/chosen"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["simpo", "kto"])
def test_losses_with_other_needs(inputs: Path, tmp_path: Path, loss) -> None:
    config = options(
        inputs, tmp_path / "run", dpo=DPOLossConfig(loss=loss), train=TrainConfig(steps=2, batch_size=4, eval_every=1)
    )
    rows = runs.metrics(run_dpo.train(config))
    assert len(rows) == 2
    assert "eval_loss" in rows[-1]


def test_unpaired_rows_train_at_any_batch_size(inputs: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}: the question", "completion": f"{i} answer", "label": i % 3 == 0} for i in range(9)]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = options(
        inputs,
        tmp_path / "run",
        files=str(tmp_path / "train.jsonl"),
        eval_data=str(tmp_path / "eval.jsonl"),
        dpo=DPOLossConfig(loss="kto", nll_coefficient=0.1),
        train=TrainConfig(epochs=1, batch_size=1),
    )
    out = run_dpo.train(config)
    found = runs.metrics(out)
    assert [("rewards/chosen" in row, "rewards/rejected" in row) for row in found].count((True, False)) == 3
    assert [("nll_loss" in row, "logps/rejected" in row) for row in found].count((False, True)) == 6
    assert not any("rewards/accuracies" in row or "rewards/margins" in row for row in found)
    assert all(np.isfinite(value) for row in found for value in row.values())
    assert "eval_rewards/margins" in found[-1], "of the whole file the sides are there, if no pairs"
    assert "eval_rewards/accuracies" not in found[-1]
    assert "rewards/chosen" in (out / "report.html").read_text()


# ---------------------------------------------------------------- the reference cache


def test_the_reference_is_computed_once(
    inputs: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = options(inputs, tmp_path / "a", eval_data=None, train=TrainConfig(steps=1, batch_size=4))
    first = runs.metrics(run_dpo.train(config))
    (entry,) = (cache / "reference").iterdir()
    written = entry.stat().st_mtime_ns
    capsys.readouterr()
    config = dataclasses.replace(config, out=str(tmp_path / "b"), optimizer=OptimizerConfig(learning_rate=1e-4))
    second = runs.metrics(run_dpo.train(config))
    assert "4 rows from the cache" in capsys.readouterr().err, "one step of 4 pairs sees no other row"
    assert entry.stat().st_mtime_ns == written
    assert second[0]["loss"] == first[0]["loss"]


def test_the_cache_key_covers_all_that_decides_the_numbers(inputs: Path) -> None:
    text = load_tokenizer(inputs / "model")

    def data(**changes):
        return load_preferences(
            str(inputs / "train.jsonl"), text, DataConfig(**{"max_length": 96, **changes}), vocab_size=320
        )

    model, variables = load_pretrained(inputs / "model")
    bf16, _ = load_pretrained(inputs / "model", compute_dtype="bfloat16")
    longer_rope = model.clone(config=dataclasses.replace(model.config, rope_theta=1e6))
    other = jax.tree.map(lambda x: x + 1e-3, variables)
    plain = DPOConfig().objective
    keys = [
        cache_key(data(), model, variables, plain),
        cache_key(data(max_length=20), model, variables, plain),  # which cuts
        cache_key(data(template="zephyr"), model, variables, plain),
        cache_key(data(limit=19), model, variables, plain),
        cache_key(data(), bf16, variables, plain),
        cache_key(data(), longer_rope, variables, plain),
        cache_key(data(), model, other, plain),
        cache_key(data(), model, variables, plain._replace(mask_format_tokens=True)),
        cache_key(data(), model, variables, plain._replace(ld_alpha=0.5)),
        cache_key(data(), model, variables, plain._replace(ld_alpha=0.6)),
    ]
    assert len(set(keys)) == len(keys)
    assert cache_key(data(), model, variables, DPOConfig(beta=0.5, loss="ipo", ld_alpha=1.0).objective) == keys[0]


@pytest.mark.parametrize("damage", ["truncate", "flip", "text"])
@pytest.mark.slow
def test_a_damaged_cache_is_computed_again(
    inputs: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    config = options(inputs, tmp_path / "a", eval_data=None, train=TrainConfig(steps=1, batch_size=4))
    first = runs.metrics(run_dpo.train(config))
    (entry,) = (cache / "reference").iterdir()
    content = entry.read_bytes()
    middle = len(content) // 3
    damaged = {
        "truncate": content[:middle],
        "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "text": b"hello",
    }
    entry.write_bytes(damaged[damage])
    second = runs.metrics(run_dpo.train(dataclasses.replace(config, out=str(tmp_path / "b"))))
    assert "damaged" in capsys.readouterr().err
    assert second == first
    assert entry.read_bytes() == content


@pytest.mark.slow
def test_an_interrupted_reference_goes_on(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpo_jax import mesh
    from dpo_jax.judge import policy_logps

    config = options(inputs, tmp_path / "a", eval_data=None, train=TrainConfig(epochs=1, batch_size=4))
    put = mesh.put_batch
    started = itertools.count()

    def interrupted(devices, batch):
        if next(started) == 3:
            raise KeyboardInterrupt
        return put(devices, batch)

    with monkeypatch.context() as patch:
        patch.setattr(policy_logps, "SAVE_SECONDS", 0.0)
        patch.setattr(mesh, "put_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_dpo.train(config)
    computed = []
    monkeypatch.setattr(mesh, "put_batch", lambda devices, batch: computed.append(batch) or put(devices, batch))
    run_dpo.train(config)
    assert len(computed) == 3  # of five batches, two had been saved


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": TrainConfig(batch_size=6), "mesh": MeshConfig(4, 1, 2)}, r"batch_size 6 does not divide by 4"),
        ({"mesh": MeshConfig(data=1, fsdp=1, tensor=8)}, r"(?s)heads.*does not divide by 8"),
        ({"mesh": MeshConfig(data=3, fsdp=-1, tensor=1)}, r"8 devices do not divide by 3"),
        ({"model": "nowhere"}, r"nowhere: no such folder"),
        ({"files": "nowhere.jsonl"}, r"nowhere.jsonl"),
        ({"dpo": DPOLossConfig(loss="simpo"), "reference": "x"}, r"--reference has no effect"),
        ({"train": TrainConfig(batch_size=4, frozen_dtype="bfloat16")}, r"frozen_dtype has no effect"),
        (
            {
                "dpo": DPOLossConfig(reference="live", reference_sync_steps=2),
                "lora": LoraConfig(rank=2),
                "reference": "x",
            },
            "reference_sync_steps with --lora.rank",
        ),
        ({"eval_data": None}, r"eval_every has no effect"),
        ({"checkpoint": CheckpointConfig(best="loss")}, r"checkpoint.best loss"),
        (
            {"optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=6)},
            "warm-up of 6 steps does not fit into 6 steps",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(inputs: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run_dpo.train(options(inputs, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_rows_beyond_the_context_are_refused(inputs: Path, tmp_path: Path) -> None:
    short = tiny.folder(tmp_path / "short", hidden=16, max_position=24)
    with pytest.raises(InputError, match=r"the model's context is 24; set --data.max_length to at most 24"):
        run_dpo.train(options(inputs, tmp_path / "run", model=str(short)))


def test_a_folder_with_other_things_is_refused(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="is not a run of dpo-jax"):
        run_dpo.train(options(inputs, tmp_path / "run"))


def test_the_guard_stops_the_run(inputs: Path, tmp_path: Path) -> None:
    """A learning rate that blows the weights up: stopped in words, with no checkpoint that is not finite."""
    config = options(
        inputs,
        tmp_path / "run",
        eval_data=None,
        optimizer=OptimizerConfig(learning_rate=1e30),
        train=TrainConfig(steps=6, batch_size=4),
    )
    with pytest.raises(InputError, match=r"step [12]: .*of the data; the last checkpoint is intact"):
        run_dpo.train(config)
    assert not [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]


def test_several_files_with_weights_and_a_share_held_out(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped and resumed it is the same run; shares are logged and reported; other weights are another run."""
    words = f"{inputs / 'train.jsonl'}:0.75,{inputs / 'eval.jsonl'}:0.25"
    train = TrainConfig(steps=12, batch_size=4, eval_every=6)
    changes = {"files": words, "eval_data": None, "holdout": 0.3, "train": train}
    whole, resumed = (options(inputs, tmp_path / name, **changes) for name in ("whole", "resumed"))
    run_dpo.train(whole)
    told = "14 rows, 75.00% of the rows drawn, 2."
    assert told in capsys.readouterr().err
    assert told in (tmp_path / "whole" / "report.html").read_text()
    assert [row["step"] for row in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "eval_loss" in row] == [6, 12]
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(Stopped):
            run_dpo.train(resumed)
    assert not (tmp_path / "resumed" / "model").exists()
    run_dpo.train(resumed)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_a_step_of_more_rows_than_there_are_says_so(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dpo.train(options(inputs, tmp_path / "run", eval_data=None, train=TrainConfig(steps=1, batch_size=32)))
    assert "each step takes 32 rows (--train.batch_size), and there are 20" in capsys.readouterr().err


def test_the_adapters_that_a_run_began_with_are_merged_once(inputs: Path, tmp_path: Path) -> None:
    """Its checkpoints hold them, further trained: what is beneath is the model below all adapters."""
    base = tmp_path / "base"  # stored in bfloat16, so that weights are merged as they are stored
    convert(inputs / "model", base, dtype=jnp.bfloat16)
    model, variables = load_pretrained(base, lora=LoraConfig(rank=2))
    variables["adapters"] = jax.tree.map(lambda x: 0.01 + x, variables["adapters"])
    save_pretrained(tmp_path / "adapter", model, variables, None, source=base, merge=False)
    train = TrainConfig(steps=1, batch_size=4, dtype="bfloat16")
    out = run_dpo.train(options(inputs, tmp_path / "run", model=str(tmp_path / "adapter"), eval_data=None, train=train))
    convert(out / "checkpoints" / "1", tmp_path / "converted", dtype=jnp.float32)
    merged, converted = (load_file(folder / "model.safetensors") for folder in (out / "model", tmp_path / "converted"))
    for name, tensor in merged.items():
        np.testing.assert_array_equal(converted[name], tensor, err_msg=name)
