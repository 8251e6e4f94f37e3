"""The stage runner of all recipes: each stage once, stopped and gone on with, refused where something changed."""

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpo_jax.errors import InputError, Stopped
from dpo_jax.files.folder import STAGES, RunFolder, as_json
from dpo_jax.files.stages import Stage, Stages, content, last_figures


@dataclass(frozen=True)
class Options:
    out: str
    size: int = 1


def opened(command: str, out: Path, size: int = 1) -> Stages:
    return Stages(RunFolder(out, command, as_json(Options(str(out), size))))


class Chain:
    """Two stages that write files, the second from the first, and one that is a run."""

    def __init__(self, out: Path):
        self.out, self.done, self.stops = out.absolute(), [], False

    def copy(self, source: Path, target: Path) -> dict[str, float]:
        target.write_text(source.read_text() + "+")
        self.done.append(target.name)
        return {"letters": len(target.read_text()), "half": 0.5}

    def train(self) -> dict[str, float]:
        self.done.append("run")
        folder = RunFolder(self.out / "run", "dpo", {})
        folder.claim({})
        if self.stops:
            raise Stopped(signal.SIGTERM)
        folder.finish()
        return {}

    def perform(self, source: Path, size: int = 1) -> None:
        first, second = self.out / "first.txt", self.out / "second.txt"
        recipe = opened("recipe chain", self.out, size)
        stages = [
            Stage("first", (source, "smollm2"), first, lambda: self.copy(source, first)),
            Stage("a run", (first,), self.out / "run", self.train),
            Stage("second", (first, self.out / "run"), second, lambda: self.copy(first, second)),
        ]
        recipe.perform(stages, Options(str(self.out), size))
        recipe.finish()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "data.txt").write_text("a")
    return tmp_path / "data.txt"


def test_each_stage_is_done_once(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture) -> None:
    chain = Chain(tmp_path / "out")
    chain.stops = True
    with pytest.raises(Stopped) as stopped:
        chain.perform(source)
    assert stopped.value.code == 143
    assert chain.done == ["first.txt", "run"]
    assert "stopped; the same command goes on with it (1 stages after it)" in capsys.readouterr().err
    chain.stops = False
    chain.perform(source)
    assert chain.done == ["first.txt", "run", "run", "second.txt"]
    said = capsys.readouterr().err
    assert "3 stages, 1 done" in said
    assert "[1/3] first: done (letters 2, half 0.5)" in said
    assert (tmp_path / "out" / "second.txt").read_text() == "a++"
    chain.perform(source)
    assert len(chain.done) == 4
    assert capsys.readouterr().err == ""

    record = json.loads((tmp_path / "out" / STAGES).read_text())
    assert list(record) == ["first", "a run", "second"]
    assert record["first"]["inputs"] == {str(source): content(source), "smollm2": "smollm2"}
    assert record["first"]["figures"] == {"letters": 2, "half": 0.5}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_what_was_lost_is_made_again(tmp_path: Path, source: Path) -> None:
    chain = Chain(tmp_path / "out")
    chain.perform(source)
    (tmp_path / "out" / "second.txt").unlink()
    chain.perform(source)
    assert chain.done[3:] == ["second.txt"]


def test_other_options_and_other_inputs_are_refused(tmp_path: Path, source: Path) -> None:
    chain = Chain(tmp_path / "out")
    chain.stops = True
    with pytest.raises(Stopped):
        chain.perform(source)
    with pytest.raises(InputError, match=r"has --size 1, this command has 2"):
        chain.perform(source, size=2)
    source.write_text("b")
    with pytest.raises(InputError, match=r"data.txt is not what it was when the stage 'first' read it"):
        chain.perform(source)
    (tmp_path / "out" / STAGES).write_text("[")
    with pytest.raises(InputError, match="not readable"):
        chain.perform(source)
    with pytest.raises(InputError, match="holds a run of `dpo-jax recipe chain`"):
        opened("recipe other", tmp_path / "out")


def test_figures_are_the_newest_of_a_run(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 3.0, "eval_accuracy": 0.5}, {"step": 2, "loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert last_figures(tmp_path, {"loss": "loss", "accuracy": "eval_accuracy"}) == {"loss": 2.0, "accuracy": 0.5}
    assert last_figures(tmp_path / "absent", {"loss": "loss"}) == {}


def test_the_content_of_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("one")
    before = content(tmp_path / "a")
    (tmp_path / "a" / "x").write_text("longer")
    assert content(tmp_path / "a") != before
    folder = RunFolder(tmp_path / "run", "dpo", {"beta": 1})
    folder.claim({})
    before = content(tmp_path / "run")
    (tmp_path / "run" / "notes").write_text("mine")
    assert content(tmp_path / "run") == before
    folder.finish()
    assert content(tmp_path / "run") != before
    pool = tmp_path / "pool.yaml"
    pool.write_text("- {name: a, endpoint: {url: U, model: M, budget: 1}}")
    before = content(pool)
    pool.write_text("- name: a\n  endpoint: {url: U, model: M, budget: 2, concurrency: 4}")  # no reply is another
    assert content(pool) == before
    pool.write_text("- {name: a, endpoint: {url: U, model: N, budget: 1}}")
    assert content(pool) != before
    assert content("vader") == "vader"
    assert content("regex:a.py") == "regex:a.py"
    (tmp_path / "mine.py").write_text("def f(): ...")
    assert content(f"{tmp_path / 'mine.py'}:f") == content(tmp_path / "mine.py")
