"""An option has one name: in a CONFIG.py, in a run's files, in messages and on the command line."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dpo_jax import cli
from dpo_jax.config import DataConfig, DPORun, RejectionRun, RewardRun, SFTDataConfig, SFTRun, names
from dpo_jax.config.command_line.words import COMMANDS
from dpo_jax.errors import InputError
from dpo_jax.files.folder import RunFolder, as_json

GIVEN = ["--model", "m", "--data", "d.jsonl", "--out", "o"]
OLD = {"model": "m", "source": "d.jsonl", "out": "o"}


@pytest.fixture(autouse=True)
def told_anew() -> None:
    names._tell_once.cache_clear()


@pytest.mark.parametrize("word", COMMANDS)
def test_options_are_called_as_their_fields_are(word: str) -> None:
    """A section's own name stands for its files, and `from` is no name in Python: nothing else differs."""
    fields = {prefix + field.name for prefix, field in cli._walk(COMMANDS[word].options)}
    fields = {"data" if name == "data.files" else "from" if name == "from_" else name for name in fields}
    own = {name for name in cli.option_names(word) if not name.rpartition(".")[2].startswith("no_")}
    assert own <= fields


def test_a_config_says_what_the_command_line_says(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    given = cli.parse("dpo", [*GIVEN, "--data.max_length", "64", "--eval_data", "e.jsonl"])
    head = "from dpo_jax.config import *\nconfig = "
    path.write_text(f"{head}DPORun(model='m', data=DataConfig('d.jsonl', max_length=64), eval_data='e.jsonl', out='o')")
    assert cli.parse("dpo", [str(path)]) == given
    assert as_json(given)["data"] | {"files": "d.jsonl", "max_length": 64} == as_json(given)["data"]
    assert as_json(given)["eval_data"] == "e.jsonl"
    path.write_text(f"{head}RejectionRun(model='m', data='d.jsonl', out='o', reward='vader')")
    alone = cli.parse("rejection", [str(path)])
    assert (alone.data.files, alone.data.train_on) == ("d.jsonl", "last"), "the section's own defaults"
    assert cli.parse("rejection", [str(path), "--data", "a", "--data.max_length", "300"]).data.files == "a"
    path.write_text(f"{head}DPORun(model='m', data=DataConfig(max_length=64), out='o')")
    assert cli.parse("dpo", [str(path), "--data", "d.jsonl"]).data == given.data
    with pytest.raises(InputError, match="missing --data: the CONFIG leaves that to the command line"):
        cli.parse("dpo", [str(path)])


def test_the_help_says_that_data_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--data STR" in said
    assert "a row of each kind. (required)" in said.replace("│ ", "")


def test_names_of_the_version_before_are_read_once_more(caplog: pytest.LogCaptureFixture) -> None:
    old: Any = OLD
    with caplog.at_level(logging.WARNING):
        assert DPORun(**old) == DPORun(model="m", data="d.jsonl", out="o")  # pyright: ignore[reportArgumentType]
        assert DPORun(**old).data == DataConfig("d.jsonl")
    assert [record.message for record in caplog.records] == [
        'source= is called data now: write data="..."; the old name is read in this version only'
    ]
    whole: Any = old | {"eval_source": "e", "mix_source": "x", "data": DataConfig(max_length=9)}
    run = RewardRun(**whole)
    assert (run.data, run.eval_data, run.mix_data) == (DataConfig("d.jsonl", max_length=9), "e", "x")
    assert 'write data=DataConfig("...", ...)' in caplog.text
    assert RejectionRun(**old, reward="vader").data == SFTDataConfig("d.jsonl", train_on="last")
    with pytest.raises(TypeError, match="eval_source and eval_data, which are one option"):
        DPORun(**old, eval_source="a", eval_data="b")


def test_what_is_filled_in_has_an_options_name() -> None:
    run = SFTRun(model="m", data=SFTDataConfig("d.jsonl"), out="o")
    assert run.filled(data={"limit": 3}).data.limit == 3
    for wrong in ({"stepz": 3}, {"data": {"limits": 3}}):
        with pytest.raises(TypeError, match=r"has no (stepz|limits)"):
            run.filled(**wrong)


def test_an_older_config_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.py"
    path.write_text(
        "from dpo_jax.config import *\n"
        "config = SFTRun(model='m', source=ON_COMMAND_LINE, out='o', data=SFTDataConfig(max_length=64))"
    )
    assert cli.parse("sft", [str(path), "--data", "d"]).data == SFTDataConfig("d", max_length=64)
    assert capsys.readouterr().err.count("source= is called data now") <= 1


def test_an_older_run_is_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = as_json(SFTRun(model="m", data=SFTDataConfig("d.jsonl"), eval_data="e", out="o"))
    before = json.loads(json.dumps(now))
    before["source"], before["eval_source"] = before["data"].pop("files"), before.pop("eval_data")
    (tmp_path / "stages.json").write_text("{}")
    marker = {"command": "sft", "finished": False, "given": before}
    (tmp_path / "run.json").write_text(json.dumps(marker))
    (tmp_path / "config.json").write_text(json.dumps(before))
    folder = RunFolder(tmp_path, "sft", now)
    assert folder.open() == "unfinished"
    assert folder.resolved()["data.files"] == "d.jsonl"
    assert f"{tmp_path / 'run.json'}: written by an older version, which said source for data.files" in caplog.text
    now["data"]["files"] = "other.jsonl"
    with pytest.raises(InputError, match=r"has --data d\.jsonl, this command has other.jsonl"):
        RunFolder(tmp_path, "sft", now).open()
