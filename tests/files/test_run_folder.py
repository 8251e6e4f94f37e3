"""The run folder: new, unfinished, finished, somebody else's, another command's, other options."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpo_jax.errors import InputError
from dpo_jax.files.folder import RunFolder, flatten, write_atomically, write_json
from dpo_jax.files.jsonl import RowsFile, read_lines, write_once

GIVEN = {"model": "m", "data": {"files": "d.jsonl"}, "out": "runs/a", "dpo": {"beta": 0.1}, "mesh": {"data": 1}}


def claimed(path: Path) -> RunFolder:
    folder = RunFolder(path, "dpo", GIVEN)
    assert folder.open() == "new"
    folder.claim({**GIVEN, "resolved": True})
    return folder


def with_checkpoint(path: Path) -> None:
    (path / "checkpoints" / "10").mkdir(parents=True)


def test_a_run_goes_through_its_states(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    folder = claimed(path)
    assert json.loads((path / "config.json").read_text())["resolved"] is True
    assert RunFolder(path, "dpo", GIVEN).open() == "new"  # nothing was saved yet: it starts from the beginning
    with_checkpoint(path)
    assert RunFolder(path, "dpo", GIVEN).open() == "unfinished"
    folder.finish()
    assert RunFolder(path, "dpo", GIVEN).open() == "finished"


def test_opening_writes_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a", "dpo", GIVEN).open()
    assert not (tmp_path / "a").exists()


def test_other_options_are_refused_by_name(tmp_path: Path) -> None:
    claimed(tmp_path)
    with_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"has --dpo\.beta 0\.1, this command has 0\.5") as caught:
        RunFolder(tmp_path, "dpo", {**GIVEN, "dpo": {"beta": 0.5}}).open()
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"has --data d\.jsonl"):
        RunFolder(tmp_path, "dpo", {**GIVEN, "data": {"files": "e.jsonl"}}).open()


def test_an_option_that_an_earlier_version_did_not_have_is_off(tmp_path: Path) -> None:
    claimed(tmp_path)
    with_checkpoint(tmp_path)
    newer = {**GIVEN, "data": {"files": "d.jsonl", "empty_system": False, "other": None}}
    assert RunFolder(tmp_path, "dpo", newer).open() == "unfinished"
    newer["data"]["empty_system"] = True
    with pytest.raises(InputError, match=r"has no --data\.empty_system, this command has True"):
        RunFolder(tmp_path, "dpo", newer).open()


def test_another_mesh_or_name_may_go_on(tmp_path: Path) -> None:
    claimed(tmp_path)
    with_checkpoint(tmp_path)
    other = {"mesh": {"data": 8}, "train": {"crossing_dtype": "bfloat16"}, "out": "b"}
    assert RunFolder(tmp_path, "dpo", {**GIVEN, **other}).open() == "unfinished"


def test_the_seconds_of_a_command_that_judges_stay(tmp_path: Path) -> None:
    """They decide which responses score 0; those of a URL or a function decide nothing."""
    for name, given in (
        ("free", {"reward": ["vader", "https://host/"]}),
        ("bound", {"reward": ["vader", "run:check"]}),
        ("safe", {"reward": "vader", "safety_reward": "run:check"}),
    ):
        RunFolder(tmp_path / name, "ppo", {**given, "reward_timeout": 3}).claim({})
        with_checkpoint(tmp_path / name)
        again = RunFolder(tmp_path / name, "ppo", {**given, "reward_timeout": 4})
        if name == "free":
            assert again.open() == "unfinished"
        else:
            with pytest.raises(InputError, match=r"has --reward_timeout 3, this command has 4"):
                again.open()


def test_other_options_are_fine_before_the_first_checkpoint(tmp_path: Path) -> None:
    claimed(tmp_path)
    assert RunFolder(tmp_path, "dpo", {**GIVEN, "dpo": {"beta": 0.5}}).open() == "new"


def test_another_command_is_refused(tmp_path: Path) -> None:
    claimed(tmp_path)
    with pytest.raises(InputError, match="holds a run of `dpo-jax dpo`"):
        RunFolder(tmp_path, "sft", GIVEN).open()


@pytest.mark.parametrize("content", ["{", "[]", '{"command": "dpo"}', '{"command": "dpo", "finished": 0, "given": 3}'])
def test_a_damaged_marker_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match="not readable"):
        RunFolder(tmp_path, "dpo", GIVEN).open()


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="is not a run of dpo-jax"):
        RunFolder(tmp_path, "dpo", GIVEN).open()
    with pytest.raises(InputError, match="is not a run of dpo-jax"):
        RunFolder(tmp_path / "thesis.tex", "dpo", GIVEN).open()
    with pytest.raises(InputError, match="not a writable folder"):
        RunFolder(tmp_path / "thesis.tex" / "below", "dpo", GIVEN).open()


def test_unwritable_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "x", "text")
    write_atomically(tmp_path / "deep" / "x", "text")
    assert (tmp_path / "deep" / "x").read_text() == "text"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x"]


def test_a_killed_writer_leaves_nothing_for_ever(tmp_path: Path) -> None:
    """The next one takes over what it left, a folder that it had not made its own yet included."""
    (tmp_path / ".x.partial").write_text("longer than what comes")
    write_atomically(tmp_path / "x", "text")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "text")]
    out = tmp_path / "out"
    out.mkdir()
    (out / ".run.json.partial").write_text("{")
    folder = RunFolder(out, "dpo", GIVEN)
    assert folder.open() == "new"
    folder.claim(GIVEN)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "run.json"]


def test_killed_between_the_whole_file_and_its_part(tmp_path: Path) -> None:
    """The rows are read, nothing is made again, and what they grew as goes."""
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "rows.jsonl.part").write_text('{"settings": {}}\n{"a": 1}\n')
    assert write_once(tmp_path / "rows.jsonl", dict, lambda file: pytest.fail("made again")) == [{"a": 1}]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_half_a_character_is_read_as_it_was_written(tmp_path: Path) -> None:
    """In rows, in settings (an interrupted file is gone on with), and in a file of JSON."""
    row = {"text \udc00": "\ud83d 中文 😀", "at": 1}
    path = tmp_path / "rows.jsonl"
    with RowsFile(path, {"of": "\ud83d"}) as file:
        file.append([row])
    with RowsFile(path, {"of": "\ud83d"}) as file:
        assert file.rows == [row]
        file.finish()
    assert read_lines(path) == [row]
    assert "中文 😀" in path.read_text()
    write_json(tmp_path / "one.json", row, ensure_ascii=False)
    assert json.loads((tmp_path / "one.json").read_bytes()) == row


def test_writers_of_one_file_wait_for_each_other(tmp_path: Path) -> None:
    texts = [str(i) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(len(texts)) as pool:
        for _ in pool.map(lambda text: write_atomically(tmp_path / "x", text), texts * 5):
            assert (tmp_path / "x").read_text() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_flatten() -> None:
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b.c": 2, "b.d.e": 3}
