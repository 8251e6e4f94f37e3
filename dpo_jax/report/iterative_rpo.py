"""What the Iterative RPO recipe found: accuracy by round, and of what each round was made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.report import html, terminal

TRAINED = {"loss": "loss", "chosen logp": "logps/chosen"}
"""Of a round's training, its last figures: what they are called here -> there."""
REASONS = ("all right", "all wrong", "right answers are cut or blank", "wrong answers are cut or blank")
"""Why a problem gives no pair."""
_SHORT = ("all right", "all wrong", "right ones cut", "wrong ones cut")
_HEAD = ("model", "held-out accuracy", "temperature", "right before", *_SHORT, "used", "pairs")
_NOTE = (
    "Shares of right answers; `right before` is that of what the model before answered, of which the pairs are made."
    " A problem that is all right or all wrong teaches nothing and is left out, and so is one whose right or wrong"
    " answers are all cut or blank."
)


def _table(summary: Mapping[str, Any]) -> html.Table:
    found = []
    for row in summary["rounds"]:
        accuracy = f"{row['accuracy']:.3f} ({row['low']:.3f}, {row['high']:.3f})" if "accuracy" in row else ""
        cells = ("",) * (len(_HEAD) - 2)
        if "pairs" in row:
            counts = (*REASONS, "used", "pairs")
            cells = (f"{row['temperature']:g}", f"{row['share right']:.3f}", *(str(row[name]) for name in counts))
        found.append((row["model"], accuracy, *cells))
    return html.Table(_HEAD, found)


def verdict(summary: Mapping[str, Any]) -> str:
    """The outcome in one sentence, whatever it is."""
    rows = summary["rounds"]
    if "accuracy" not in rows[0]:
        told = [f"{row['share right']:.3f}" for row in rows[1:]]
        return f"Share of right answers to the problems, before each round: {', '.join(told)}; none were held out."
    best = max(rows, key=lambda row: row["accuracy"])
    first, last = rows[0], rows[-1]
    return (
        f"Of {first['heldout']} held-out problems {first['accuracy']:.3f} are right at M0 and {last['accuracy']:.3f} at"
        f" {last['model']} (95 %: {last['low']:.3f} to {last['high']:.3f}); most at {best['model']}"
        f" ({best['accuracy']:.3f})."
    )


def show(summary: Mapping[str, Any], out: Path) -> None:
    """Print the table to stdout."""
    last = out / f"round-{len(summary['rounds']) - 1}" / "dpo" / "model"
    where = f"Report: {out / 'report.html'}   last model: {last}"
    terminal.show(terminal.table("Rounds", _table(summary)), verdict(summary), where, width=110)


def write(out: Path, summary: Mapping[str, Any], runs: Sequence[Path]) -> None:
    """Write `report.html`; `runs`: the training of each round."""
    rows = summary["rounds"]
    places, plots = list(range(len(rows))), []
    if "accuracy" in rows[0]:
        band = [row["low"] for row in rows], [row["high"] for row in rows]
        series = html.Series("held-out accuracy", places, [row["accuracy"] for row in rows], band)
        plots.append(html.Plot("Accuracy", (series,), x_label="round"))
    sections = [html.Section("Rounds", _NOTE, tuple(plots), table=_table(summary))]
    sections += [html.run_section(run, run.parent.name) for run in runs]
    html.write_report(out / "report.html", "Iterative RPO", verdict(summary), sections)
