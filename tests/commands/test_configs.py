"""`dpo-jax configs`: what is listed, shown and copied is what the shipped recipes hold."""

import runpy
from pathlib import Path

import pytest

from dpo_jax import cli
from dpo_jax.commands.configs import whole
from dpo_jax.config import derive
from dpo_jax.config.shipped import shipped


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped())
    assert any(line.startswith("dpo_paper ") and "Rafailov et al. 2023" in line for line in lines)


@pytest.mark.parametrize("name", shipped())
def test_what_is_shown_is_the_recipe_and_needs_no_other(name: str, tmp_path: Path) -> None:
    text = whole(name)
    assert "derive" not in text
    (tmp_path / "c.py").write_text(text)
    module = runpy.run_path(str(tmp_path / "c.py"))
    assert module["config"] == derive(name)
    assert f"configs/{name}.py" in module["__doc__"]


def test_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["configs", "copy", "ppo_llama2_7b_v5p8"]) == 0
    assert "dpo-jax ppo ppo_llama2_7b_v5p8.py --model" in Path("ppo_llama2_7b_v5p8.py").read_text()
    assert cli.main(["configs", "copy", "dpo_paper", "--to", "my/own.py"]) == 0
    given = ["--model", "m", "--data", "d", "--out", "o"]
    assert cli.parse("dpo", ["my/own.py", *given]).optimizer.name == "rmsprop"
    capsys.readouterr()
    assert cli.main(["configs", "show", "dpo_paper"]) == 0
    assert 'name="rmsprop"' in capsys.readouterr().out or "name='rmsprop'" in whole("dpo_paper")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["copy", "dpo_paper"], "dpo_paper.py: is there already; choose another --to"),
        (["show", "dpo_papr"], "no CONFIG dpo_papr comes with this dpo_jax; did you mean dpo_paper?"),
        (["show"], "configs show needs a name (dpo-jax configs lists them)"),
        (["list", "dpo_paper"], "--name has no effect with configs list"),
        (["show", "dpo_paper", "--to", "x"], "--to has no effect with configs show"),
        (["print", "x"], "invalid choice"),
        (["show", "dpo_paper", "again"], "Unrecognized options: again"),
    ],
)
def test_one_line_errors(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dpo_paper.py").touch()
    assert cli.main(["configs", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
