"""`dpo-jax configs`: what is listed, shown and copied is what the shipped recipes hold."""

import runpy
from pathlib import Path

import pytest

from dpo_jax import cli
from dpo_jax.commands.configs import whole
from dpo_jax.config import derive
from dpo_jax.config.command_line.shipped import shipped
from dpo_jax.errors import InputError


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


GIVEN = ["--model", "m", "--data", "d", "--out", "o"]


def test_a_name_stands_for_its_file() -> None:
    assert cli.parse("dpo", ["zephyr_ddpo", *GIVEN]) == cli.parse("dpo", [str(shipped()["zephyr_ddpo"]), *GIVEN])
    assert cli.parse("plan", ["dpo_paper", "--topology", "v5e:2x2"]).training.optimizer.name == "rmsprop"


YAML = """
command: dpo
from: zephyr_ddpo
data: {files: [a.jsonl:0.7, b.jsonl:0.3], max_length: 768, date: 2026-07-26, shuffle: false}
dpo: {beta: 5e-2, loss: hinge}
optimizer.clip_norm: null
lora: {rank: 8, targets: [q_proj, v_proj]}
train.steps: 7
"""


def test_yaml_says_what_the_command_line_would(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(YAML)
    words = "--data.max_length 768 --data.date 2026-07-26 --data.no_shuffle --dpo.beta 0.05 --dpo.loss hinge"
    words += " --optimizer.clip_norm None --lora.rank 8 --lora.targets q_proj v_proj --train.steps 7"
    given = ["--model", "m", "--data", "a.jsonl:0.7", "b.jsonl:0.3", "--out", "o"]
    expected = cli.parse("dpo", ["zephyr_ddpo", *given, *words.split()])
    assert cli.parse("dpo", [str(file), "--model", "m", "--out", "o"]) == expected
    # What stands behind it counts, and what it leaves open is asked for.
    assert cli.parse("dpo", [str(file), "--model", "m", "--out", "o", "--dpo.beta", "1"]).dpo.beta == 1
    with pytest.raises(InputError, match="missing --model: the CONFIG"):
        cli.parse("dpo", [str(file), "--out", "o"])
    assert cli.parse("plan", [str(file), "--topology", "v5e:2x2"]).training.train.steps == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dpo.beta: 1", "does not say which command it is for; begin it with the line `command: dpo`"),
        ("- dpo", "holds no options under their names"),
        ("command: eval", "`command: eval` is none that takes a CONFIG"),
        ("command: sft", "is for dpo-jax sft, not for dpo-jax dpo"),
        ("command: dpo\ndpo.bta: 1", "c.yaml: unknown option --dpo.bta; did you mean --dpo.beta?"),
        ("command: dpo\ndpo: {loss: no}", "c.yaml: invalid choice 'false' for argument '--dpo.loss'"),
        ("command: dpo\ndpo.beta: -1", "c.yaml: --dpo.beta -1.0 must be positive"),
        ("command: dpo\nfrom: other.yaml", "`from` names a shipped recipe or a CONFIG.py"),
        ("command: dpo\nfrom: zephyr_dpo", "did you mean zephyr_ddpo?"),
        ("command: dpo\ntrain: {steps: 1, steps: 2}", "steps stands there twice"),
        ("command: dpo\na: &x [1]\nb: *x", "aliases (*name) are not read"),
        ("command: !!timestamp foo", "cannot be read as YAML"),
        ("command: dpo\nx: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("command: dpo\n1: 2", "1 is no name of an option"),
        ("command: dpo\nlora.targets: [[q]]", "a list holds single values"),
        ("command: dpo\nlora.targets: [--out]", "--out in a list would be read as an option"),
        ("command: [", "cannot be read as YAML"),
    ],
)
def test_yaml_errors(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert cli.main(["dpo", str(tmp_path / "c.yaml"), *GIVEN]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert said.count("c.yaml") <= 2
