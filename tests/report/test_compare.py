"""`dpo-jax report`: runs on one page."""

import json
from pathlib import Path

import pytest

from dpo_jax import cli
from dpo_jax.report import compare, html


def run(folder: Path, beta: float, metric: str = "loss") -> Path:
    folder.mkdir(parents=True)
    options = {"model": "smollm2", "out": str(folder), "dpo": {"beta": beta, "loss": "sigmoid"}}
    (folder / "run.json").write_text(json.dumps({"command": "dpo", "finished": False, "given": options}))
    (folder / "config.json").write_text(json.dumps(options))
    rows = [{"step": step, metric: beta / step} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [
        str(run(tmp_path / "a", 0.1)),
        str(run(tmp_path / "b" / "run", 0.5)),
        str(run(tmp_path / "c" / "run", 0.5)),
    ]
    out = tmp_path / "page.html"
    assert cli.main(["report", *places, "--out", str(out)]) == 0
    assert "3 runs: a, " in capsys.readouterr().out
    told = compare.read_runs(places)
    assert [one.name for one in told] == ["a", places[1], places[2]], "two of one name are told apart"
    different, last, curves = compare.sections(told)
    assert different.table is not None
    assert last.table is not None
    assert list(different.table.rows) == [("--dpo.beta", 0.1, 0.5, 0.5)]
    assert ("loss", "0.0333333", "0.166667", "0.166667") in last.table.rows
    (plot,) = curves.plots
    assert [(series.label, series.y[0]) for series in plot.series] == [("a", 0.1), (places[1], 0.5), (places[2], 0.5)]
    assert "Options that differ" in out.read_text()
    assert cli.main(["report", *places, "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main(["report", *places, "--out", str(out), "--overwrite"]) == 0


def test_equal_options_and_other_figures(tmp_path: Path) -> None:
    places = [str(run(tmp_path / "a", 0.1)), str(run(tmp_path / "b", 0.1, "grad_norm"))]
    different, last, curves = compare.sections(compare.read_runs(places))
    assert different.note == "None but --out."
    assert last.table is not None
    assert ("loss", "0.0333333", "") in last.table.rows
    assert len(curves.plots) == 2


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = run(tmp_path / "first", 0.1)
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    assert cli.main(["report", str(here), str(run(tmp_path / "_r3", 0.1)), "--out", str(mine), "--overwrite"]) == 2
    assert "is no page of dpo_jax" in capsys.readouterr().err
    assert mine.read_text() == "{}"
    series = html.Series("_r3", [1, 2], [1, 2])
    (axes,) = html._figure(html.Plot("t", (series, series))).axes
    assert len(axes.get_legend().get_texts()) == 2, "matplotlib leaves out what begins with _"

    def refused(*places: Path) -> str:
        assert cli.main(["report", *map(str, places), "--out", str(tmp_path / "x.html")]) == 2
        return capsys.readouterr().err

    assert "two or more" in refused(here)
    assert "a run twice" in refused(here, here)
    assert f"did you mean {here}?" in refused(here, tmp_path / "frist")
    empty = run(tmp_path / "empty", 0.1)
    (empty / "metrics.jsonl").write_text("")
    assert "has no step yet" in refused(here, empty)
