"""What the Llama 2-Chat recipe found: the versions as the judge sees them, and the reward models' accuracies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.files.jsonl import read_lines
from dpo_jax.report import html, terminal
from dpo_jax.report.samples import prompt_text

_WIDTH = 120  # of the tables; narrower, their numbers would break over several lines
_NOTE = (
    "Share of held-out comparisons that a reward model judges as the judge does. Reward model r has learnt from the"
    " comparisons that were given and from those of V0 ... V(r-1); what stands to the right of them is new to it."
)


def _judges(summary: Mapping[str, Any]) -> list[str]:
    return [name for name in summary["versions"][0] if name.endswith(" score")]


def _versions(summary: Mapping[str, Any]) -> html.Table:
    """Each version, and the mean score of its answers by each judge."""
    names = _judges(summary)
    rows = [(f"V{row['version']}", row["by"], *(f"{row[name]:+.3f}" for name in names)) for row in summary["versions"]]
    return html.Table(("version", "by", *names), rows)


def _accuracies(summary: Mapping[str, Any], kind: str) -> html.Table:
    """Accuracy of each reward model on each distribution, with its standard error."""
    cells = {
        (row["reward_model"], row["distribution"]): f"{row['accuracy']:.3f} ± {row['error']:.3f} ({row['pairs']})"
        for row in summary["accuracy"]
        if row["kind"] == kind
    }
    numbers = sorted({number for number, _ in cells})
    names = sorted({name for _, name in cells}, key=lambda name: (name != "given", name))
    rows = [(f"{kind} {number}", *(cells.get((number, name), "") for name in names)) for number in numbers]
    return html.Table(("reward model", *(name.upper() if name != "given" else name for name in names)), rows)


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
    tables = [terminal.table("Answers to the prompts, by the judge", _versions(summary))]
    for kind in _kinds(summary):
        title = f"Accuracy of the {kind} reward models on held-out comparisons"
        tables.append(terminal.table(title, _accuracies(summary, kind)))
    where = f"Report: {out / 'report.html'}   last model: {out / 'ppo' / 'model'}"
    terminal.show(*tables, verdict(summary), where, width=_WIDTH)


def write(out: Path, summary: Mapping[str, Any], models: Sequence[Path]) -> None:
    """Write `report.html`; `models`: the run folders of the versions."""
    plots = (_progress(summary),)
    sections = [html.Section("Versions", "Mean score of the answers.", plots, table=_versions(summary))]
    for kind in _kinds(summary):
        title, plots = f"Accuracy of the {kind} reward models", (_shift(summary, kind),)
        sections.append(html.Section(title, _NOTE, plots, table=_accuracies(summary, kind)))
    rows = []
    for row in summary["versions"]:
        judged = [x for x in read_lines(out / f"v{row['version']}" / "judged.jsonl") if x["sample"] == 0][:3]
        rows += [(f"V{row['version']}", prompt_text(x["prompt"]), x["response"], f"{x['score']:+.3f}") for x in judged]
    head = ("version", "prompt", "answer", "score")
    note = "The first answer to the first prompts; all of them stand in v*/judged.jsonl."
    sections.append(html.Section("Answers", note, table=html.Table(head, rows, ("prompt", "answer"))))
    sections += [html.run_section(folder, folder.name) for folder in models]
    html.write_report(out / "report.html", "Llama 2-Chat in small", verdict(summary), sections)


def _progress(summary: Mapping[str, Any]) -> html.Plot:
    versions = [row["version"] for row in summary["versions"]]
    series = tuple(html.Series(name, versions, [row[name] for row in summary["versions"]]) for name in _judges(summary))
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
