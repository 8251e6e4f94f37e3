"""The notebooks run from top to bottom and show what their text says they show: 01 on the real SmolLM2 weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(monkeypatch):
    """Runs a notebook in its own folder with this checkout's package; returns a reader of its variables."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one CPU device, as a reader has
    monkeypatch.setenv("MPLBACKEND", "agg")

    def execute(name, *expressions):
        path = ROOT / "notebooks" / name
        notebook = nbformat.read(path, as_version=4)
        assert all(not cell.get("outputs") for cell in notebook.cells), f"{name} is kept without outputs: clear them"
        notebook.cells.append(nbformat.v4.new_code_cell(f"print({', '.join(expressions)}, sep='\\n')"))
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
        return [float(line) for line in notebook.cells[-1].outputs[0].text.split()]

    return execute


@pytest.mark.real
@pytest.mark.slow
def test_dpo_train_step(run):
    preference_loss, accuracy, before, after = run(
        "01_dpo_train_step.ipynb",
        "curves['loss'][0] - curves['nll_loss'][0]",
        "curves['rewards/accuracies'][-1]",
        "length_before",
        "length_after",
    )
    assert preference_loss == pytest.approx(0.693147, abs=1e-5)
    assert accuracy == 1
    assert after < before / 2


ONE, ON_TPU = "01_dpo_train_step.ipynb", "01_on_tpu_v5e8.ipynb"
BEFORE, BEHIND = 3, 2
"""Cells of its own that the TPU notebook has before and behind those of notebook 01."""


def cells_of(name):
    return json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))["cells"]


def test_the_notebook_for_tpus_is_notebook_01():
    cells = cells_of(ON_TPU)
    assert cells[BEFORE:-BEHIND] == cells_of(ONE), "copy the cells of notebook 01"
    assert "%pip install" in "".join(cells[1]["source"])


TINY = sorted(path.name for path in (ROOT / "notebooks").glob("0[2-9]*.ipynb"))
RUNNER = """
import json, sys, time, traceback

for path in sys.argv[1:]:
    cells = [c for c in json.load(open(path, encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells), f"{path} is kept without outputs: clear them"
    names, start = {"__name__": "__main__"}, time.process_time()
    try:
        for number, cell in enumerate(cells):
            exec(compile("".join(cell["source"]), f"{path}, code cell {number + 1}", "exec"), names)
    except Exception:
        traceback.print_exc()
        sys.exit(f"{path}: failed")
    print(f"{path}: {time.process_time() - start:.1f} s of CPU", flush=True)
"""


@pytest.mark.slow
def test_tiny_notebooks(tmp_path):
    # One process for all: JAX is imported once. Each asserts its effect in its own last cells.
    # Tiny programs run once: what XLA's costlier passes take would be more than they save.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    flags += " --xla_llvm_disable_expensive_passes=true"
    env = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    # On eight devices: what the TPU notebook adds, behind the cells of notebook 01 that it needs (no real weights).
    cells = cells_of(ON_TPU)
    needed = [cell for cell in cells[BEFORE : BEFORE + 8] if cell["cell_type"] == "code"]
    (tmp_path / ON_TPU).write_text(json.dumps({"cells": [cells[2], *needed, cells[-1]]}))
    words = [sys.executable, "-c", RUNNER, str(tmp_path / ON_TPU), *(str(ROOT / "notebooks" / name) for name in TINY)]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in TINY:
        text = (ROOT / "notebooks" / name).read_text(encoding="utf-8")
        assert "assert " in text, f"{name}: asserts nothing"
        assert "plt." in text, f"{name}: shows nothing"
