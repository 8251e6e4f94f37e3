"""What the Llama 3 recipe found: the versions as the judge sees them, and the reward models' accuracy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpo_jax.files.log import read_metrics
from dpo_jax.report import html

_HEAD = ("version", "score (95 %)", "DPO pairs", "best model before it", "reward model's accuracy on the newest")


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    found = []
    for row in summary["versions"]:
        cells = ("", "", "")
        if row["version"]:
            accuracy = f"{row['accuracy']:.3f}" if "accuracy" in row else ""
            cells = (str(row["pairs"]), f"V{row['written_by']}", accuracy)
        found.append((f"V{row['version']}", f"{row['score']:+.3f} ({row['low']:+.3f}, {row['high']:+.3f})", *cells))
    return found


def verdict(summary: Mapping[str, Any]) -> str:
    """The outcome in two sentences, whatever it is."""
    first, last, best = summary["versions"][0], summary["versions"][-1], summary["versions"][summary["best"]]
    count = summary["averaged"]
    averaged = "One model a round: nothing was averaged." if count == 1 else f"{count} models a round were averaged."
    return (
        f"By the judge {summary['judge']} the answers score {first['score']:+.3f} at V0 and {last['score']:+.3f} at"
        f" V{last['version']}; highest at V{best['version']} ({best['score']:+.3f}). {averaged}"
    )


def show(summary: Mapping[str, Any], out: Path) -> None:
    """Print the table to stdout."""
    table = Table(*_HEAD, title="Answers to the prompts, by the judge")
    for row in _rows(summary):
        table.add_row(*row)
    console = Console(width=max(Console().width, 110))
    console.print(table)
    console.print(verdict(summary), highlight=False, soft_wrap=True)
    console.print(
        f"Report: {out / 'report.html'}   best model: {summary['best_model']}", highlight=False, soft_wrap=True
    )


def write(out: Path, summary: Mapping[str, Any], runs: Sequence[Path]) -> None:
    """Write `report.html`; `runs`: the DPO stage of each round."""
    rows = summary["versions"]
    band = [row["low"] for row in rows], [row["high"] for row in rows]
    series = html.Series("score", [row["version"] for row in rows], [row["score"] for row in rows], band)
    plot = html.Plot("Mean score of the answers", (series,), x_label="version")
    note = "The prompts are those that the versions were trained on; the intervals are by bootstrap over them."
    sections = [html.Section("Versions", note, (plot,), table=html.Table(_HEAD, _rows(summary)))]
    for run in runs:
        curves = html.training_section(read_metrics(run / "metrics.jsonl"))
        sections.append(html.Section(run.parent.name, curves.note, curves.plots))
    html.write_report(out / "report.html", "Llama 3's rounds", verdict(summary), sections)
