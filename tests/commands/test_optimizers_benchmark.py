"""`benchmarks/optimizers.py` on a tiny model: every arm it is asked for runs, and its table says what it measured."""

import json
import sys
from pathlib import Path

import pytest
import runs
import tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import optimizers


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> None:
    """Pictures are drawn here."""


def test_bytes_of_state(tmp_path: Path) -> None:
    """Next to a quarter of AdamW's but for the embedding, which stays float32; rows and columns are next to nothing."""
    model = str(tiny.folder(tmp_path, layers=3, hidden=64, heads=4))
    held = {arm: optimizers.state_bytes(model, options) for arm, options in optimizers.ARMS.items()}
    assert held["adamw, bfloat16 m"] == pytest.approx(0.75 * held["adamw"], rel=0.001)
    assert held["rmsprop"] == pytest.approx(0.5 * held["adamw"], rel=0.001)
    assert held["adafactor"] == held["adafactor, relative"] < 0.1 * held["adamw"]
    assert held["adafactor"] < held["adamw_8bit"] < held["rmsprop"] * 1.01


@pytest.mark.campaign
def test_it_measures_and_writes_after_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in runs.one_device().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(optimizers, "COMMON", [*optimizers.COMMON, "--data.buckets", "1"])  # one shape to compile
    model = tiny.folder(tmp_path / "model", layers=1, hidden=64)
    data = tiny.preferences(tmp_path / "pairs.jsonl", rows=24)
    words = ["--model", str(model), "--data", str(data), "--folder", str(tmp_path / "runs"), "--steps", "6"]
    words += ["--batch_size", "4", "--arms", "adamw_8bit"]
    optimizers.main(words)
    found = json.loads((tmp_path / "runs" / "optimizers.json").read_text())
    assert [(one["word"], one["arm"]) for one in found] == [
        (word, arm) for word in ("sft", "dpo") for arm in ("adamw", "adamw_8bit")
    ]
    assert all(one["peak_gib"] > 0 and one["seconds_per_step"] > 0 for one in found)
    assert len((tmp_path / "runs" / "optimizers.md").read_text().splitlines()) == 6
    assert (tmp_path / "runs" / "optimizers.png").stat().st_size > 10_000
    optimizers.main(words)  # nothing is made again, nothing forgotten
    assert json.loads((tmp_path / "runs" / "optimizers.json").read_text()) == found
