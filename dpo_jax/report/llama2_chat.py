"""What the Llama 2-Chat recipe found: the versions as the judge sees them, and the reward models' accuracies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpo_jax.files.jsonl import read_lines
from dpo_jax.files.log import read_metrics
from dpo_jax.report import html

_WIDTH = 120  # of the tables; narrower, their numbers would break over several lines
_NOTE = (
    "Share of held-out comparisons that a reward model judges as the judge does. Reward model r has learnt from the"
    " comparisons that were given and from those of V0 ... V(r-1); what stands to the right of them is new to it."
)


def _versions(summary: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: each version, and the mean score of its answers by each judge."""
    names = [name for name in summary["versions"][0] if name.endswith(" score")]
    rows = [(f"V{row['version']}", row["by"], *(f"{row[name]:+.3f}" for name in names)) for row in summary["versions"]]
    return ("version", "by", *names), rows


def _accuracies(summary: Mapping[str, Any], kind: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: accuracy of each reward model on each distribution, with its standard error."""
    cells = {
        (row["reward_model"], row["distribution"]): f"{row['accuracy']:.3f} ± {row['error']:.3f} ({row['pairs']})"
        for row in summary["accuracy"]
        if row["kind"] == kind
    }
    numbers = sorted({number for number, _ in cells})
    names = sorted({name for _, name in cells}, key=lambda name: (name != "given", name))
    rows = [(f"{kind} {number}", *(cells.get((number, name), "") for name in names)) for number in numbers]
    return ("reward model", *(name.upper() if name != "given" else name for name in names)), rows


def _kinds(summary: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["kind"] for row in summary["accuracy"]))


def verdict(summary: Mapping[str, Any]) -> str:
    """The outcome in one sentence, whatever it is."""
    rows = summary["versions"]
    best = max(rows, key=lambda row: row["helpful score"])
    return (
        f"By the judge {summary['judge']} the answers score {rows[0]['helpful score']:+.3f} at V0 and"
        f" {rows[-1]['helpful score']:+.3f} at V{rows[-1]['version']}; highest at V{best['version']}"
        f" ({best['helpful score']:+.3f})."
    )


def show(summary: Mapping[str, Any], out: Path) -> None:
    """Print the tables to stdout."""
    console = Console(width=max(Console().width, _WIDTH))
    tables = [("Answers to the prompts, by the judge", *_versions(summary))]
    for kind in _kinds(summary):
        tables.append((f"Accuracy of the {kind} reward models on held-out comparisons", *_accuracies(summary, kind)))
    for title, head, rows in tables:
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(verdict(summary), highlight=False, soft_wrap=True)
    console.print(
        f"Report: {out / 'report.html'}   last model: {out / 'ppo' / 'model'}", highlight=False, soft_wrap=True
    )


def write(out: Path, summary: Mapping[str, Any], models: Sequence[Path]) -> None:
    """Write `report.html`; `models`: the run folders of the versions."""
    sections = [
        html.Section(
            "Versions",
            "Mean score of the answers.",
            plots=(_progress(summary),),
            table=html.Table(*_versions(summary)),
        )
    ]
    for kind in _kinds(summary):
        table = html.Table(*_accuracies(summary, kind))
        sections.append(
            html.Section(f"Accuracy of the {kind} reward models", _NOTE, (_shift(summary, kind),), table=table)
        )
    rows = []
    for row in summary["versions"]:
        judged = [x for x in read_lines(out / f"v{row['version']}" / "judged.jsonl") if x["sample"] == 0][:3]
        rows += [(f"V{row['version']}", _text(x["prompt"]), x["response"], f"{x['score']:+.3f}") for x in judged]
    head = ("version", "prompt", "answer", "score")
    note = "The first answer to the first prompts; all of them stand in v*/judged.jsonl."
    sections.append(html.Section("Answers", note, table=html.Table(head, rows, ("prompt", "answer"))))
    for folder in models:
        curves = html.training_section(read_metrics(folder / "metrics.jsonl"))
        sections.append(html.Section(folder.name, curves.note, plots=curves.plots))
    html.write_report(out / "report.html", "Llama 2-Chat in small", verdict(summary), sections)


def _progress(summary: Mapping[str, Any]) -> html.Plot:
    versions = [row["version"] for row in summary["versions"]]
    names = [name for name in summary["versions"][0] if name.endswith(" score")]
    series = tuple(html.Series(name, versions, [row[name] for row in summary["versions"]]) for name in names)
    return html.Plot("Mean score of the answers", series, x_label="version")


def _shift(summary: Mapping[str, Any], kind: str) -> html.Plot:
    """Accuracy against the version that wrote the comparisons, a line for each reward model."""
    found: dict[int, list[tuple[int, float]]] = {}
    for row in summary["accuracy"]:
        if row["kind"] == kind and row["distribution"] != "given":
            point = (int(row["distribution"].removeprefix("v")), row["accuracy"])
            found.setdefault(row["reward_model"], []).append(point)
    series = tuple(
        html.Series(f"reward model {number}", [x for x, _ in points], [y for _, y in points])
        for number, points in sorted(found.items())
    )
    return html.Plot("Accuracy on what each version writes", series, x_label="version")


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
