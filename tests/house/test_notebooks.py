"""The notebooks run from top to bottom, on the real SmolLM2 weights, and show what their text says they show."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.real, pytest.mark.slow]


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
