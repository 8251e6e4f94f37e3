"""The picture and the figures on each algorithm page are of the run whose command stands there."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import curves  # noqa: E402
from test_docs import ALGORITHMS  # noqa: E402

RUNS = json.loads(curves.RUNS.read_text(encoding="utf-8"))


def test_each_algorithm_has_its_run() -> None:
    names = {Path(page).stem for page in ALGORITHMS} - {"gatt"}  # which takes longer than a page's example may
    assert names == curves.PAGES.keys() == RUNS.keys() == {path.stem for path in curves.CURVES.glob("*.png")}


@pytest.mark.parametrize("name", curves.PAGES)
def test_the_page_shows_its_run(name: str) -> None:
    """(That the command parses, `test_docs.py` asks of all.)"""
    page, run = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"), RUNS[name]
    assert curves.command_of(page) == run["command"], (
        f"python benchmarks/curves.py {name} makes the run of this command"
    )
    assert f"--out runs/{name}" in run["command"]
    assert curves.written(name, page, run) == page
    assert 0 <= run["cpu_seconds"] < 5 * 60
    assert run["figures"].keys() == set(curves.PAGES[name].told)
    path = curves.CURVES / f"{name}.png"
    assert path.stat().st_size < 100_000
    picture = imread(path)
    assert picture.shape[1] >= 500
    assert picture[0, 0, :3].min() == 1, "on white, whatever the page is on"
    assert picture[..., :3].std() > 0.05, "something is drawn"


def test_the_table_of_before_and_after() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "before_after.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    table = page.partition(script["BEGIN"])[2].partition(script["END"])[0]
    assert table == script["table"](json.loads(script["FILE"].read_text(encoding="utf-8")))
