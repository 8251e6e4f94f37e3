"""A few hosts lost, in a step, a save and a restore, and a full disk; the benchmark loses twenty."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.multiprocess
def test_lost_hosts_change_no_bit(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "host_losses.py"), "--work", str(tmp_path / "work")]
    done = subprocess.run([*command, "--losses", "3", "--local"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("differences: none")
