"""The DPO step of Llama-2-7B, compiled for a TPU slice that is not here (libtpu compiles without a TPU)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install libtpu (in the test extra)"),
]

PARAMETERS = 6_738_415_616  # of Llama-2-7B
GIB = 2**30


def compile_step(**wanted):
    """The figures that `ahead_of_time.py` prints, in GiB a device."""
    root = Path(__file__).resolve().parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(root / "tests" / "ahead_of_time.py"), json.dumps(wanted)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_llama_2_7b_trains_on_16_chips_of_v5e():
    """Full fine-tuning with a live bfloat16 reference; 16 pairs whose sequences have 1024 + 1024 tokens."""
    memory = compile_step(platform="tpu", topology="v5e:4x4", pairs=16, prompt=1024, response=1024)
    assert memory["splash"]
    # Weights, two Adam moments, the reference: 4 + 8 + 2 bytes a parameter, and nothing large is on every device.
    assert memory["arguments"] == pytest.approx(PARAMETERS * 14 / 16 / GIB, rel=0.01)
    assert memory["not_donated"] < 0.01
    assert memory["peak"] < 10.0
    assert memory["arguments"] + memory["temporaries"] < 15.75


def test_splash_attention_is_split_over_heads():
    """Tensor parallelism, separate sequences and a cached reference, at two layers."""
    memory = compile_step(
        platform="tpu", topology="v5e:4x4", pairs=16, prompt=512, response=512, layers=2, fsdp=4, tensor=4,
        layout="separate", reference="cached",
    )  # fmt: skip
    assert memory["splash"]
    assert memory["peak"] < 3.0
