"""What `mt-bench show` shows: tables, a radar of the categories, bars of the models by turn."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure

from dpo_jax.files.log import say
from dpo_jax.report import html, terminal

_TOP = 10  # of MT-Bench's scale
_CHINESE = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "SimHei", "PingFang SC")
_RATE = "win_rate_adjusted"


def _value(figures: Any) -> float:
    """The figure that stands for a model, a turn or a category: a mean score, or an adjusted win rate."""
    return figures[_RATE] if isinstance(figures, Mapping) else figures


def _names(models: Mapping[str, Any], part: str) -> list[str]:
    return list(dict.fromkeys(name for figures in models.values() for name in figures[part]))


def show(found: Mapping[str, Any]) -> None:
    """Print the tables to stdout."""
    models, single = found["models"], found["kind"] == "single"
    form = "{:.2f}" if single else "{:.1%}"
    head = ("mean", "n") if single else ("wins", "losses", "ties", "win rate", "adjusted", "swaps agree")
    turns, categories = _names(models, "turns"), _names(models, "categories")
    rows = []
    for name, row in models.items():
        rates = (f"{row[key]:.1%}" for key in ("win_rate", _RATE, "swap_consistency")) if not single else ()
        own = (form.format(row["mean"]), str(row["n"])) if single else tuple(str(row[k]) for k in head[:3])
        rows.append((name, *own, *rates, *_cells(row["turns"], turns, form)))
    whole = html.Table(("model", *head, *(f"turn {name}" for name in turns)), rows)
    rows = [(name, *_cells(row["categories"], categories, form)) for name, row in models.items()]
    by = html.Table(("model", *categories), rows)
    left = found["left_out"]
    title = "mean score of all judgements" if single else "a win: both orders agree; all else a tie"
    terminal.show(
        terminal.table(title, whole, left=1),
        terminal.table("by category" if single else "adjusted win rate by category", by, left=1),
        f"{found['judgments']} judgements count; left out: {left['unparsed']} unparsed, {left['error']} with an error",
    )


def _cells(part: Mapping[str, Any], names: list[str], form: str) -> list[str]:
    return [form.format(_value(part[name])) if name in part else "-" for name in names]


def radar(found: Mapping[str, Any]) -> Figure:
    """Each model's figure by category, on as many spokes as there are categories."""
    models, categories = found["models"], _names(found["models"], "categories")
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes: Any = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * i / len(categories) for i in range(len(categories))]
    for name, row in models.items():
        values = [_value(row["categories"][c]) if c in row["categories"] else math.nan for c in categories]
        axes.plot([*angles, angles[0]], [*values, values[0]], marker=".", label=html.plain(name))
    axes.set_xticks(angles, list(map(html.plain, categories)))
    axes.set_ylim(0, _top(found))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.05, 1.0))
    return figure


def bars(found: Mapping[str, Any]) -> Figure:
    """Each model's figure, of all judgements and by turn, as groups of bars."""
    models, turns = found["models"], _names(found["models"], "turns")
    figure = Figure(figsize=(max(4.0, 1.6 + 1.1 * len(models)), 3.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / (1 + len(turns))
    for i, label in enumerate(["all", *turns]):
        heights = [
            _value(row["turns"].get(label, math.nan)) if i else row["mean" if found["kind"] == "single" else _RATE]
            for row in models.values()
        ]
        at = [x + (i - len(turns) / 2) * width for x in range(len(models))]
        axes.bar(at, heights, width, label="all turns" if not i else f"turn {label}")
    axes.set_xticks(range(len(models)), list(map(html.plain, models)), rotation=20, ha="right")
    axes.set_ylim(0, _top(found))
    axes.set_ylabel("mean score" if found["kind"] == "single" else "adjusted win rate")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _top(found: Mapping[str, Any]) -> float:
    if found["kind"] == "pair":
        return 1.0
    every = [x for row in found["models"].values() for x in (*row["categories"].values(), *row["turns"].values())]
    return max(_TOP, *every)


def write_plots(out: Path, found: Mapping[str, Any]) -> None:
    """Write `radar.png` and `bars.png`. Raises `InputError` when the disk is full or not writable.

    Where no installed font has the letters of a label, such as Chinese ones, that is said.
    """
    there = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in _CHINESE if name in there)]
    with rc_context({**html.LOOK, "font.family": fonts}), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        html.write_figure(out / "radar.png", radar(found))
        html.write_figure(out / "bars.png", bars(found))
    if any("missing from font" in str(warning.message) for warning in said):
        say(f"{out}: labels show boxes where no font has their letters; install one, such as {_CHINESE[0]}")
