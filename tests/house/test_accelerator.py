"""`benchmarks/accelerator.sh` at toy size, on whatever is here."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_measures_and_writes_after_each_case(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "benchmarks" / "accelerator.sh"), str(tmp_path), "--toy", "--sections"]
    run = subprocess.run([*command, "attention", "large"], capture_output=True, text=True, timeout=300, check=True)
    found = json.loads((tmp_path / "accelerator.json").read_text())
    assert found.keys() == {"device", "attention", "large"}, run.stdout
    for figures in found["attention"].values():
        assert 0 < figures["error"] < 5e-3
    assert len(found["large"]) == 2
    for figures in found["large"].values():
        assert figures["tokens_per_second"] > 0
        assert figures["plan"]["all_overlaps"] <= figures["plan"]["nothing_overlaps"]
