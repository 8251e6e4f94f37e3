"""`--train.frozen_dtype int8|nf4` from end to end: QLoRA, and references in fewer bits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
from safetensors.numpy import load_file

from dpo_jax import cli
from dpo_jax.train import loop, session
from dpo_jax.weights.pretrained import load_pretrained


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", hidden=64, heads=4, kv_heads=2)
    tiny.preferences(folder / "train.jsonl", rows=16)
    return folder


@pytest.fixture(autouse=True)
def one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "make_mesh", runs.small_mesh)


def words(inputs: Path, out: Path, command: str = "dpo", **options: Any) -> list[str]:
    given = {
        "train.steps": 4,
        "train.batch_size": 4,
        "data.max_length": 96,
        "data.buckets": 1,
        "optimizer.learning_rate": 1e-2,
        **options,
    }
    told = ["--model", str(inputs / "model"), "--data", str(inputs / "train.jsonl"), "--out", str(out)]
    told += ["--mesh.data", "1", "--mesh.fsdp", "1"]
    return [command, *told, *(str(x) for name, value in given.items() for x in (f"--{name}", value))]


BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "qlora.py"
QLORA = {"train.frozen_dtype": "nf4", "lora.rank": 2}


def test_stopped_and_gone_on_it_has_the_same_bits(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**QLORA, "train.dtype": "bfloat16", "train.accumulate": 2, "checkpoint.every": 2}
    assert cli.main(words(inputs, tmp_path / "whole", **options)) == 0
    some = words(inputs, tmp_path / "some", **options)
    save = loop.Checkpoints.save

    def then_die(self: Any, *args: Any, **more: Any) -> None:
        save(self, *args, **more)
        self.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Checkpoints, "save", then_die)
        assert cli.main(some) == 130
    assert [path.name for path in (tmp_path / "some" / "checkpoints").iterdir()] == ["2"]
    assert cli.main(some) == 0
    assert runs.metrics(tmp_path / "some") == runs.metrics(tmp_path / "whole")
    for name in ("model/model", "adapter/adapter_model"):
        here, there = (load_file(tmp_path / x / f"{name}.safetensors") for x in ("some", "whole"))
        for key in there:
            np.testing.assert_array_equal(here[key], there[key], err_msg=key)
    base = json.loads((tmp_path / "whole" / "base.json").read_text())
    assert (
        base["quantised"]
        == json.loads((tmp_path / "whole" / "adapter" / "base.json").read_text())["quantised"]
        == "nf4"
    )
    # A checkpoint, the adapter and the merged model are one model.
    merged = load_pretrained(tmp_path / "whole" / "model")[1]["params"]
    for name in ("checkpoints/4", "adapter"):
        model, variables = load_pretrained(tmp_path / "whole" / name)
        held, adapters = (variables[x]["layers"]["mlp"]["up_proj"] for x in ("params", "adapters"))
        sums = held["kernel"] + model.lora.scale * adapters["lora_a"] @ adapters["lora_b"]
        np.testing.assert_allclose(sums, merged["layers"]["mlp"]["up_proj"]["kernel"], atol=1e-5)
        np.testing.assert_array_equal(
            variables["params"]["embed_tokens"]["embedding"], merged["embed_tokens"]["embedding"]
        )


def test_a_live_reference_says_its_error(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"train.frozen_dtype": "int8", "dpo.reference": "live", "train.steps": 1}
    assert cli.main(words(inputs, tmp_path / "run", **options)) == 0
    said = capsys.readouterr()
    told = next(x for x in (said.out + said.err).splitlines() if x.startswith("reference policy in int8"))
    mean = float(told.partition("off by ")[2].split()[0])
    assert 0 < mean < 0.05


def test_a_reward_model(inputs: Path, tmp_path: Path) -> None:
    assert cli.main(words(inputs, tmp_path / "run", "reward", **QLORA)) == 0
    assert all(np.isfinite(row["loss"]) for row in runs.metrics(tmp_path / "run"))
    variables = load_pretrained(tmp_path / "run" / "adapter")[1]
    assert set(variables) == {"params", "adapters", "heads"}
    assert float(np.abs(variables["adapters"]["layers"]["mlp"]["up_proj"]["lora_b"]).max()) > 0


@pytest.mark.parametrize("command", ["grpo", "ppo"])
def test_what_is_sampled_from_quantised_weights(inputs: Path, tmp_path: Path, command: str) -> None:
    options = {**QLORA, "reward": "length", "sample.max_new_tokens": 8, "train.steps": 1}
    options |= {"ppo.group_size": 4} if command == "grpo" else {}
    line = words(inputs, tmp_path / "run", command, **options)
    del line[(buckets := line.index("--data.buckets")) : buckets + 2]
    assert cli.main(line) == 0
    rows = runs.metrics(tmp_path / "run")
    assert rows
    assert all(np.isfinite(x) for row in rows for x in row.values() if isinstance(x, float))


@pytest.mark.parametrize(("command", "more"), [("dpo", {}), ("sft", {}), ("reward", {})])
def test_without_effect_it_is_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, more: dict[str, Any]
) -> None:
    assert cli.main(words(inputs, tmp_path / "run", command, **{"train.frozen_dtype": "int8"}, **more)) == 2
    assert "--train.frozen_dtype has no effect" in capsys.readouterr().err


@pytest.mark.campaign
def test_the_benchmark(inputs: Path, tmp_path: Path) -> None:
    line = [sys.executable, str(BENCHMARK), "--model", str(inputs / "model"), "--data", str(inputs / "train.jsonl")]
    line += ["--out", str(tmp_path), "--steps", "3", "--rows", "16", "--train.batch_size", "4"]
    line += ["--data.max_length", "96", "--data.buckets", "1"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=runs.one_device())
    table = [row for row in done.stdout.splitlines() if row.startswith("| ")]
    assert [row.split()[1] for row in table[1:]] == ["float32", "int8", "nf4"]
    kept = json.loads((tmp_path / "qlora.json").read_text())
    assert all(len(one["losses"]) == 3 and one["peak GB"] > 0 for one in kept)
