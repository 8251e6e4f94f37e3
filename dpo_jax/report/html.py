"""The report of a run: one HTML file with its pictures inside, readable without a network.

It is built from sections (plots, tables, texts), so that any command can put its own together. Everything that comes
from outside (options, file names, texts of a model) is escaped.
"""

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpo_jax.config.names import option
from dpo_jax.files.folder import flatten, write_atomically
from dpo_jax.files.log import Row, read_metrics
from dpo_jax.headers import mended

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p.note { color: #666 } table { border-collapse: collapse; font-size: .92em }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e4e4e4 }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 14rem } th { font-weight: 600 }
.plots { display: flex; flex-wrap: wrap; gap: 1rem }
.plots figure { margin: 0; max-width: 100% } .plots svg { max-width: 100%; height: auto }
.table { overflow-x: auto } h1, p { overflow-wrap: anywhere }
"""


@dataclass(frozen=True)
class Series:
    """One line of a plot; `band` holds the lower and the upper ends of its intervals."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Plot:
    """Lines over a common x axis (and the `diagonal`), or with `bars` a histogram given as bin edges x and counts y."""

    title: str
    series: tuple[Series, ...]
    x_label: str = "step"
    bars: bool = False
    diagonal: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; `texts` names the columns that hold running text."""

    head: tuple[str, ...]
    rows: Sequence[Sequence[Any]]
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A heading, a line of explanation, and plots or a table; `drawings` are figures drawn elsewhere (`svg_of`)."""

    title: str
    note: str = ""
    plots: tuple[Plot, ...] = ()
    drawings: tuple[str, ...] = ()
    table: Table | None = None


HEAD = '<!doctype html>\n<html lang="en"><head>'
"""How every page of ours begins."""


def write_report(path: Path, title: str, summary: str, sections: Sequence[Section]) -> None:
    """Write the HTML file. Raises `InputError` when the disk is full or not writable."""
    body = "\n".join(_section(section) for section in sections)
    write_atomically(
        path,
        f'{HEAD}<meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n<p>{html.escape(summary)}</p>\n"
        f"{body}\n</body></html>\n",
    )


FIGURES = (
    ("Loss", ("loss", "eval_loss", "nll_loss")),
    ("Score", ("objective/scores", "eval_reward")),
    ("Rewards", ("rewards/chosen", "rewards/rejected", "rewards/helpfulness", "rewards/safety")),
    ("Perplexity", ("eval_perplexity",)),
    ("Token accuracy", ("mean_token_accuracy", "eval_mean_token_accuracy")),
    ("Entropy of the predictions", ("entropy", "eval_entropy", "policy/entropy_avg")),
    ("Accuracy of the rewards", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("Reward margin", ("rewards/margins", "eval_rewards/margins")),
    ("Log-probability of the responses", ("logps/chosen", "logps/rejected")),
    ("KL to the reference", ("kl", "eval_kl", "objective/kl")),
    ("Price of the KL divergence", ("kl_coefficient",)),
    ("Length of the responses (tokens)", ("lengths/response", "eval_length")),
    ("Value loss", ("loss/value_avg",)),
    ("Share of clipped tokens", ("policy/clipfrac_avg", "val/clipfrac_avg")),
    ("Learning rate", ("learning_rate",)),
    ("Gradient norm before clipping", ("grad_norm",)),
)
"""What is drawn of a run: the title of a plot, and the figures in it."""
CURVES = "Thin: each step. Bold: running mean."
"""What curves show."""


def training_section(rows: Sequence[Row], title: str = "Training") -> Section:
    """The curves of a run, from the rows of its metrics.jsonl; only those it has."""
    plots = []
    for name, figures in FIGURES:
        series = [of_run(rows, figure, figure) for figure in figures]
        shown = tuple(s for s in series if s.x)
        if shown:
            plots.append(Plot(name, shown))
    return Section(title, CURVES, plots=tuple(plots))


def run_section(folder: Path, title: str = "Training") -> Section:
    """The curves of the run in a folder."""
    return training_section(read_metrics(folder / "metrics.jsonl"), title)


def of_run(rows: Sequence[Row], name: str, label: str) -> Series:
    """A figure of a run as a line."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return Series(label, [x for x, _ in points], [y for _, y in points])


def final_section(rows: Sequence[Row]) -> Section:
    """The last value of each figure, and the first for comparison. Not every step has every figure."""
    if not rows:
        return Section("Final figures", "No step was made.")
    names = [name for name in dict.fromkeys(name for row in reversed(rows) for name in row) if name != "step"]
    end, cells = rows[-1]["step"], []
    for name in names:
        having = [row for row in rows if name in row]
        first, last = having[0], having[-1]
        late = "" if last["step"] == end else f" (step {last['step']})"
        cells.append((name, f"{_number(first[name])} (step {first['step']})", _number(last[name]) + late))
    return Section("Final figures", table=Table(("figure", "first", f"step {end}"), cells))


def options_section(config: Mapping[str, Any]) -> Section:
    """All options, as they were in force, under their names on the command line."""
    rows = [(option(name), "" if value is None else value) for name, value in flatten(config).items()]
    return Section("Options", table=Table(("option", "value"), rows))


def lengths_plot(title: str, lengths: Mapping[str, np.ndarray]) -> Plot:
    """Histogram of token counts, one outline for each kind of text."""
    top = max((int(values.max()) for values in lengths.values() if len(values)), default=1)
    return histogram(title, lengths, np.linspace(0, top + 1, 41), x_label="tokens")


def histogram(title: str, values: Mapping[str, np.ndarray], edges: np.ndarray, *, x_label: str) -> Plot:
    """How many of the values of each kind lie between neighbouring `edges`."""
    series = (Series(name, edges.tolist(), np.histogram(x, edges)[0].tolist()) for name, x in values.items())
    return Plot(title, tuple(series), x_label=x_label, bars=True)


def _number(value: float) -> str:
    return f"{value:.6g}"


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.note:
        parts.append(f'<p class="note">{html.escape(section.note)}</p>')
    if section.plots or section.drawings:
        drawn = (*map(_svg, section.plots), *section.drawings)
        figures = "".join(f"<figure>{svg}</figure>" for svg in drawn)
        parts.append(f'<div class="plots">{figures}</div>')
    if section.table is not None:
        parts.append(_table(section.table))
    return "\n".join(parts)


def _table(table: Table) -> str:
    kinds = [' class="text"' if name in table.texts else "" for name in table.head]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.head)
    rows = (
        "".join(f"<td{kind}>{html.escape(str(value))}</td>" for kind, value in zip(kinds, row, strict=True))
        for row in table.rows
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="table"><table><tr>{head}</tr>\n{body}</table></div>'


def _svg(plot: Plot) -> str:
    with rc_context(LOOK):
        return svg_of(_figure(plot))


def svg_of(figure: Figure) -> str:
    """A figure as SVG to stand in a report. Call it under `rc_context(LOOK)`."""
    text = _drawn(figure, FigureCanvasSVG, dpi=72, Date=None).decode()
    return text[text.index("<svg") :]


def png_of(plots: Sequence[Plot]) -> bytes:
    """Plots beside each other, two a row, as a PNG file."""
    columns = min(len(plots), 2)
    rows = -(-len(plots) // columns)
    with rc_context(LOOK):
        figure, panels = _panels(rows, columns)
        for axes, plot in zip(panels, plots, strict=False):
            _panel(axes, plot)
        for axes in panels:  # those left over
            axes.set_axis_off()
        return _drawn(figure, FigureCanvasAgg, dpi=110, Software=None)


def write_png(path: Path, plot: Plot) -> None:
    """The plot as a file of its own. Raises `InputError` when the disk is full or not writable."""
    with rc_context(LOOK):
        write_figure(path, _figure(plot))


def write_figure(path: Path, figure: Figure) -> None:
    """A figure as a PNG file. Call it under `rc_context(LOOK)`. Raises `InputError` when the disk is not writable."""
    write_atomically(path, _drawn(figure, FigureCanvasAgg, dpi=150))


def _drawn(figure: Figure, kind: type[FigureCanvasSVG] | type[FigureCanvasAgg], *, dpi: int, **metadata: None) -> bytes:
    """The bytes of a picture. By its canvas: `Figure.savefig` lays out and draws everything twice."""
    figure.set_dpi(dpi)
    canvas, buffer = kind(figure), io.BytesIO()
    write = canvas.print_svg if isinstance(canvas, FigureCanvasSVG) else canvas.print_png
    write(buffer, metadata=metadata)
    return buffer.getvalue()


# A fixed salt and no date: the same run gives the same file.
LOOK: dict[Any, Any] = {
    "svg.hashsalt": "dpo_jax",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


# Of a panel: room for tick labels of ten characters, a title above a power of ten, a label below. To measure what each
# takes is longer than to draw it.
_LEFT, _RIGHT, _BELOW, _ABOVE = 0.14, 0.05, 0.16, 0.16


def _panels(rows: int, columns: int) -> tuple[Figure, Sequence[Any]]:
    """A figure and its panels, row by row."""
    figure = Figure(figsize=(5.2 * columns, 3.0 * rows))
    places = {
        "left": _LEFT / columns,
        "right": 1 - _RIGHT / columns,
        "bottom": _BELOW / rows,
        "top": 1 - _ABOVE / rows,
        "wspace": (_LEFT + _RIGHT) / (1 - _LEFT - _RIGHT),
        "hspace": (_BELOW + _ABOVE) / (1 - _BELOW - _ABOVE),
    }
    return figure, list(figure.subplots(rows, columns, squeeze=False, gridspec_kw=places).flat)


def _figure(plot: Plot) -> Figure:
    figure, (axes,) = _panels(1, 1)
    _panel(axes, plot)
    return figure


def _panel(axes: Any, plot: Plot) -> None:
    for series in plot.series:
        _draw(axes, series, bars=plot.bars)
    if plot.diagonal:
        axes.axline((0, 0), slope=1, linewidth=0.6, color="0.6")
    axes.set_title(_named(plot.title), loc="left")
    axes.set_xlabel(_named(plot.x_label))
    axes.ticklabel_format(axis="y", useOffset=False)
    if all(isinstance(x, int) for series in plot.series for x in series.x):
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    if len(plot.series) > 1:
        axes.legend(frameon=False)


def _draw(axes: Any, series: Series, *, bars: bool) -> None:
    label = _named(series.label)
    if bars:
        axes.stairs(series.y, series.x, label=label)
        return
    if len(series.x) < 50:
        (line,) = axes.plot(series.x, series.y, label=label, marker="." if len(series.x) <= 20 else None)
        if series.band is not None:
            axes.fill_between(series.x, *series.band, color=line.get_color(), alpha=0.15, linewidth=0)
        return
    (line,) = axes.plot(series.x, series.y, linewidth=0.6, alpha=0.35)
    window = max(len(series.x) // 25, 5)
    mean = np.convolve(series.y, np.ones(window) / window, mode="valid")
    axes.plot(series.x[window - 1 :], mean, color=line.get_color(), label=label)


def plain(text: str) -> str:
    """Text as matplotlib draws it: without its formula signs, and without halves of characters."""
    return mended(text).replace("$", r"\$")


def _named(text: str) -> str:
    """`plain`, without the `_` at its head that keeps a line out of the legend."""
    return "\u200b" * text.startswith("_") + plain(text)
