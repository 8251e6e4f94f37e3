"""A folder whose `auto_map` names programs of its own: none is run, whatever stands on stdin."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import tiny

from dpo_jax.errors import InputError
from dpo_jax.weights.pretrained import load_pretrained, save_pretrained
from dpo_jax.weights.tokenizer import load_tokenizer


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """(a model folder whose auto_map names `evil.py` in it, the file that `evil.py` would make)."""
    folder, marker = tiny.folder(tmp_path / "hostile"), tmp_path / "marker"
    classes = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    _add(folder / "config.json", auto_map=classes | {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    _add(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
        tokenizer_class="EvilTokenizer",
    )
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    return folder, marker


def _add(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("stdin", ["", "y\ny\ny\n"], ids=["closed", "y"])
def test_no_program_of_a_folder_is_run(
    hostile: tuple[Path, Path], stdin: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, marker = hostile
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    load_pretrained(str(folder))
    with contextlib.suppress(InputError):  # that it cannot be read without
        load_tokenizer(folder)
    assert not marker.exists()
    assert "y/N" not in capsys.readouterr().out, "nobody is asked either"


def test_an_exported_folder_names_no_program(hostile: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = hostile
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    model, variables = load_pretrained(str(folder))
    save_pretrained(tmp_path / "out", model, variables, tiny.tokenizer(), source=str(folder))
    for file in (tmp_path / "out").glob("*.json"):
        assert "auto_map" not in file.read_text(), file.name
