"""What the Llama 3 recipe found: the versions as the judge sees them, and the reward models' accuracy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.report import html, terminal

_HEAD = ("version", "score (95 %)", "DPO pairs", "best model before it", "reward model's accuracy on the newest")


def _table(summary: Mapping[str, Any]) -> html.Table:
    found = []
    for row in summary["versions"]:
        cells = ("", "", "")
        if row["version"]:
            accuracy = f"{row['accuracy']:.3f}" if "accuracy" in row else ""
            cells = (str(row["pairs"]), f"V{row['written_by']}", accuracy)
        found.append((f"V{row['version']}", f"{row['score']:+.3f} ({row['low']:+.3f}, {row['high']:+.3f})", *cells))
    return html.Table(_HEAD, found)


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
    table = terminal.table("Answers to the prompts, by the judge", _table(summary))
    where = f"Report: {out / 'report.html'}   best model: {summary['best_model']}"
    terminal.show(table, verdict(summary), where, width=110)


def write(out: Path, summary: Mapping[str, Any], runs: Sequence[Path]) -> None:
    """Write `report.html`; `runs`: the DPO stage of each round."""
    rows = summary["versions"]
    band = [row["low"] for row in rows], [row["high"] for row in rows]
    series = html.Series("score", [row["version"] for row in rows], [row["score"] for row in rows], band)
    plot = html.Plot("Mean score of the answers", (series,), x_label="version")
    note = "The prompts are those that the versions were trained on; the intervals are by bootstrap over them."
    sections = [html.Section("Versions", note, (plot,), table=_table(summary))]
    sections += [html.run_section(run, run.parent.name) for run in runs]
    html.write_report(out / "report.html", "Llama 3's rounds", verdict(summary), sections)
