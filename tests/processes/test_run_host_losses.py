"""A few hosts lost, in a step, a save and a restore, and a full disk; the benchmark loses twenty."""

import subprocess
import sys
from pathlib import Path

import pytest
import runs

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.campaign
def test_lost_hosts_change_no_bit(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "host_losses.py"), "--work", str(tmp_path / "work")]
    command += ["--losses", "3", "--steps", "40", "--local"]
    done = subprocess.run(command, env=runs.one_device(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("differences: none")
