"""What the frontier recipe found: the comparison in words, the plot, the table, the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from dpo_jax.files.jsonl import Row, read_lines
from dpo_jax.report import html, terminal

_MARKERS = {"DPO": "o", "PPO": "s", "SFT on chosen": "^", "best of n": "*"}
_WIDTH = 120  # of the table; narrower, its numbers would break over several lines
_HEAD = ("method", "setting", "step", "reward", "reward, 95 %", "KL", "KL, 95 %", "KL a token", "tokens")


def best_within(results: Sequence[Row], method: str, kl: float) -> Row | None:
    """The point of `method` with the highest reward at a KL divergence of at most `kl`; None where it has none."""
    points = [row for row in results if row["method"] == method and row["kl"] <= kl]
    return max(points, key=lambda row: row["reward"], default=None)


def comparison(results: Sequence[Row]) -> dict[str, Any]:
    """Each method's best point (`best`), and its best within the KL that DPO and PPO both reach (`within`)."""
    methods = list(dict.fromkeys(row["method"] for row in results))
    budget = min(max(row["kl"] for row in results if row["method"] == method) for method in ("DPO", "PPO"))
    within = {method: best_within(results, method, budget) for method in methods}
    return {
        "best": {method: best_within(results, method, float("inf")) for method in methods},
        "within": {"kl": budget, **within},
    }


def verdict(summary: Mapping[str, Any]) -> str:
    """What the table shows, in words, whichever method wins."""

    def told(found: Mapping[str, Any]) -> str:
        ordered = sorted((row for row in found.values() if row), key=lambda row: -row["reward"])
        return ", ".join(f"{_named(row)} {row['reward']:+.3f} at {row['kl']:.2f} nats" for row in ordered)

    within = dict(summary["within"])
    budget = within.pop("kl")
    start = next(row for row in summary["results"] if row["n"] == 1)
    return (
        f"The reference scores {start['reward']:+.3f} on {summary['unseen_openings']} unseen openings. Highest rewards:"
        f" {told(summary['best'])}. Within {budget:.2f} nats, which DPO and PPO both reach: {told(within)}."
    )


def _named(row: Row) -> str:
    step = "" if row["step"] is None else f", step {row['step']}"
    inside = f"{row['setting']}{step}".removeprefix(", ")
    return f"{row['method']} ({inside})"


def _range(interval: Sequence[float] | None, form: str) -> str:
    return "analytic" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def _table(summary: Mapping[str, Any]) -> html.Table:
    return html.Table(_HEAD, [_cells(row) for row in summary["results"]])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row["method"],
        row["setting"],
        "" if row["step"] is None else str(row["step"]),
        f"{row['reward']:+.3f}",
        _range(row["reward_interval"], "+.3f"),
        f"{row['kl']:.2f}",
        _range(row["kl_interval"], ".2f"),
        f"{row['kl_token']:.3f}",
        f"{row['tokens']:.1f}",
    )


def show(summary: Mapping[str, Any], out: Path) -> None:
    """Print the table and the comparison to stdout."""
    title = f"{summary['reward']} against KL(policy, reference), {summary['unseen_openings']} openings"
    where = f"Plot: {out / 'frontier.png'}   report: {out / 'report.html'}"
    terminal.show(terminal.table(title, _table(summary), left=2), verdict(summary), where, width=_WIDTH)


def draw(summary: Mapping[str, Any]) -> Figure:
    """Reward against KL divergence: a line for each run along training, bars for the intervals."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    results = summary["results"]
    runs = dict.fromkeys((row["method"], "" if row["n"] else row["setting"]) for row in results)
    start = next(row for row in results if row["n"] == 1)
    colours = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(method for method, _ in runs))}
    seen: dict[str, int] = {}
    for method, setting in runs:
        points = [row for row in results if row["method"] == method and setting in ("", row["setting"])]
        if method != "best of n":  # every run begins at the reference
            axes.plot([0, points[0]["kl"]], [start["reward"], points[0]["reward"]], ":", color="0.7", linewidth=0.8)
        number = seen[method] = seen.get(method, -1) + 1
        axes.errorbar(
            [row["kl"] for row in points],
            [row["reward"] for row in points],
            xerr=None if points[0]["kl_interval"] is None else _bars(points, "kl"),
            yerr=_bars(points, "reward"),
            label=html.plain(f"{method} {setting}".strip()),
            marker=_MARKERS.get(method, "o"),
            linestyle=("-", "--", "-.", ":")[number % 4],
            fillstyle=("full", "none", "left", "right")[number % 4],
            color=colours[method],
            markersize=5,
            linewidth=1,
            elinewidth=0.6,
            capsize=1.5,
        )
    axes.set_xlabel("KL(policy, reference), nats a text")
    axes.set_ylabel(html.plain(f"mean reward ({summary['reward']})"))
    axes.legend(frameon=False, fontsize=8)
    return figure


def _bars(points: Sequence[Row], name: str) -> list[list[float]]:
    """[[below ...], [above ...]] of the intervals."""
    ends = [row[f"{name}_interval"] for row in points]
    return [
        [max(row[name] - low, 0.0) for row, (low, _) in zip(points, ends, strict=True)],
        [max(high - row[name], 0.0) for row, (_, high) in zip(points, ends, strict=True)],
    ]


def write(out: Path, summary: Mapping[str, Any], runs: Mapping[Path, Path]) -> None:
    """Write `frontier.png` and `report.html`. `runs`: run folder -> the texts of its last checkpoint."""
    with rc_context(html.LOOK):
        figure = draw(summary)
        html.write_figure(out / "frontier.png", figure)
        drawing = html.svg_of(figure)
    note = (
        "Each point is a checkpoint, measured on the same unseen openings; the bars are 95 % intervals (bootstrap over"
        f" openings). KL is estimated from the policy's own texts at temperature {summary['temperature']:g}. Best of n:"
        " unbiased estimate from the reference's texts, with the analytic bound log n - (n-1)/n as its KL."
    )
    sections = [html.Section("Reward against KL", note, drawings=(drawing,), table=_table(summary))]
    for folder, texts in runs.items():
        curves = html.run_section(folder)
        note = f"{curves.note} The table: texts of the last checkpoint, the first of each of the first openings."
        table = html.Table(("opening", "text", "score"), _first_texts(texts), ("text",))
        sections.append(html.Section(folder.name, note, plots=curves.plots, table=table))
    html.write_report(out / "report.html", "Reward against KL divergence", verdict(summary), sections)


def _first_texts(path: Path) -> list[tuple[str, str, str]]:
    rows = [row for row in read_lines(path) if row["sample"] == 0][:4]
    return [(row["prompt"], row["response"], f"{row['score']:+.2f}") for row in rows]
