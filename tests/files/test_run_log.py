"""The log: what is written and shown, the warning about falling chosen log-probabilities, full disks, the report."""

import io
import itertools
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import voice
from dpo_jax.errors import InputError
from dpo_jax.files.log import DriftWarning, MetricLog, ProgressBar, read_metrics, show_log, summary_text
from dpo_jax.report import html


def test_what_is_printed_may_be_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its encoding has not is JSON's escape, so that JSON stays JSON."""
    said = {"half": "\ud83d", "name": "中 😀 é"}
    for encoding, spelled in (("utf-8", "中 😀 é"), ("latin-1", "\\u4e2d \\ud83d\\ude00 é"), ("ascii", "\\u00e9")):
        written = {name: io.BytesIO() for name in ("stdout", "stderr")}
        for name, into in written.items():
            monkeypatch.setattr(sys, name, io.TextIOWrapper(into, encoding=encoding))
        voice.spell_out()
        print(json.dumps(said, ensure_ascii=False), flush=True)
        voice.tell(said)
        for into in written.values():
            text = into.getvalue().decode(encoding)
            assert json.loads(text) == said
            assert spelled in text
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    voice.spell_out()


def rows(n: int, *, chosen: float, accuracy: float, noise: float = 1.0) -> list[dict[str, float]]:
    """n rows in which logps/chosen and accuracy move by `chosen` and `accuracy` in all."""
    rng = np.random.default_rng(0)
    at = np.linspace(0, 1, n)
    return [
        {
            "step": i + 1,
            "logps/chosen": -50 + chosen * at[i] + noise * float(rng.standard_normal()),
            "rewards/accuracies": 0.5 + accuracy * at[i],
        }
        for i in range(n)
    ]


def warnings(series: list[dict[str, float]]) -> list[str]:
    drift = DriftWarning()
    return [text for row in series if (text := drift.add(row))]


def test_it_warns_once_when_chosen_falls_while_accuracy_rises() -> None:
    said = warnings(rows(200, chosen=-30, accuracy=0.4))
    assert len(said) == 1
    assert "chosen responses have become less likely" in said[0]
    assert "\n" not in said[0]


@pytest.mark.parametrize(
    "quiet", [{"chosen": 5, "accuracy": 0.4}, {"chosen": -30, "accuracy": -0.2}, {"chosen": 0, "accuracy": 0.4}]
)
def test_it_is_quiet_otherwise(quiet: dict[str, float]) -> None:
    assert warnings(rows(200, **quiet, noise=5.0)) == []


def test_change_of_chosen_is_logged_from_the_first_step(tmp_path: Path) -> None:
    with MetricLog(tmp_path, total=2) as log:
        log.write({"step": 1, "logps/chosen": -10.0})
        log.write({"step": 2, "logps/chosen": -12.5})
    assert [row["logps/chosen_change"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0.0, -2.5]


def test_notes_go_where_stderr_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running bar puts itself in the place of stderr, so that lines do not tear it; so may a test."""
    show_log()
    for _ in range(2):
        now = io.StringIO()
        monkeypatch.setattr(sys, "stderr", now)
        logging.getLogger("dpo_jax.model").info("a note")
        assert now.getvalue() == "a note\n"


def test_the_report_calls_options_as_the_command_line_does() -> None:
    given = {"eval_data": None, "mix_data": "b.jsonl", "data": {"files": "a.jsonl", "max_length": 8}}
    table = html.options_section(given | {"sft": {"data": {"files": "c"}}}).table
    assert table is not None
    names = [row[0] for row in table.rows]
    assert names == ["--eval_data", "--mix_data", "--data", "--data.max_length", "--sft.data"]


def test_only_the_writing_process_touches_the_disk(tmp_path: Path) -> None:
    with MetricLog(tmp_path / "run", total=1, writes=False) as log:
        log.write({"step": 1, "loss": 0.5})
        log.sync()
    assert not (tmp_path / "run").exists()


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        MetricLog(tmp_path / "file", total=1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here to stand for a full disk")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match="cannot be written"), MetricLog(tmp_path, total=1) as log:
        log.write({"step": 1, "loss": 0.5})


def test_progress_without_a_terminal_is_plain_lines(capfd: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("training", 3, every_seconds=0.0) as bar:
        bar.update(1, "loss 0.6931")
        bar.update(3, "loss 0.5000")
    assert capfd.readouterr().err.splitlines() == ["training 1/3 loss 0.6931  0 s left", "training 3/3 loss 0.5000"]


def test_progress_says_what_time_is_left(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0.0, 20.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with ProgressBar("training", 400, done=10) as bar:
        bar.update(11, "loss 0.5")
        bar.update(12, "loss 0.4")
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["training 11/400 loss 0.5  4:19:20 left", "training 12/400 loss 0.4  6:28:00 left"]


def test_what_is_compiled_for_the_first_step_is_not_expected_again(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.chain([0.0, 600.0, 600.0], itertools.count(610.0, 0.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with ProgressBar("training", 11) as bar:
        bar.update(1)
        bar.update(2)
        bar._line()
    assert capfd.readouterr().err.splitlines()[-1] == "training 2/11  1:30 left"


@pytest.fixture
def talking() -> Iterator[None]:
    yield
    voice.talk("lines")


@pytest.mark.usefixtures("talking")
def test_quiet_says_warnings_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    voice.talk("quiet")
    show_log()
    with MetricLog(tmp_path, total=200) as log:
        log.bar._every = 0.0
        for row in rows(200, chosen=-30, accuracy=0.4):
            log.write({**row, "step": int(row["step"])})
    logging.getLogger("dpo_jax.model").info("a note")
    logging.getLogger("dpo_jax.model").warning("a warning")
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("warning: at step")
    assert second == "a warning"


@pytest.mark.usefixtures("talking")
def test_json_is_one_object_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    voice.talk("json")
    show_log()
    with MetricLog(tmp_path, total=2) as log:
        log.bar._every = 0.0
        logging.getLogger("dpo_jax.model").info("a note")
        log.write({"step": 1, "loss": 0.5})
    note, progress = map(json.loads, capfd.readouterr().err.splitlines())
    assert note == {"event": "note", "text": "a note"}
    assert progress["seconds"] >= 0
    assert progress["seconds_left"] >= 0
    assert {name: progress[name] for name in ("event", "of", "done", "total", "figures")} == {
        "event": "progress",
        "of": "training",
        "done": 1,
        "total": 2,
        "figures": {"step": 1, "loss": 0.5},
    }


def test_the_bar_shows_the_figures_that_are_there() -> None:
    row = {"loss": 0.5, "rewards/accuracies": 0.75, "tokens_per_second": 1234.5}
    assert summary_text(row) == "loss 0.5000  accuracy 0.75  tokens/s 1,234"
    assert summary_text({"loss": 0.5}) == "loss 0.5000"
    ppo = {"loss": 0.5, "objective/scores": 1.0, "objective/kl": 2.0}
    assert summary_text(ppo) == "score 1.000  KL 2.00", "the two that tell most"


def test_the_report_is_self_contained_and_escaped(tmp_path: Path) -> None:
    log = [
        {"step": i, "loss": 1.0 / i, "eval_loss": 0.5, "rewards/chosen": 0.1 * i, "learning_rate": 1e-6}
        for i in range(1, 80)
    ]
    evil = "<script>alert('$x$')</script>"
    sections = [
        html.final_section(log),
        html.training_section(log),
        html.Section(
            evil,
            note=evil,
            plots=(html.lengths_plot(evil, {evil: np.arange(30), "none": np.zeros(0, int)}),),
            table=html.Table(("prompt", "text"), [(evil, evil)], texts=("text",)),
        ),
        html.options_section({"model": evil, "dpo": {"beta": 0.1}, "reference": None}),
    ]
    path = tmp_path / "report.html"
    html.write_report(path, evil, evil, sections)
    text = path.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "src=" not in text
    assert text.count("<svg") == 4  # loss, rewards, learning rate, lengths
    assert "--dpo.beta" in text
    html.write_report(tmp_path / "again.html", evil, evil, sections)
    assert (tmp_path / "again.html").read_text() == text


def test_a_report_of_no_steps(tmp_path: Path) -> None:
    html.write_report(tmp_path / "r.html", "t", "s", [html.final_section([]), html.training_section([])])
    assert "No step was made" in (tmp_path / "r.html").read_text()


def test_metrics_of_a_killed_process_are_read_up_to_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
