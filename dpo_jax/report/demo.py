"""What the demo found: its figures, the report, and the closing table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from dpo_jax.files.jsonl import Row
from dpo_jax.report import html, terminal
from dpo_jax.report.statistics import interval, kl_figures, moved, per_prompt
from dpo_jax.report.text_health import health


def _side(rows: Sequence[Row]) -> dict[str, Any]:
    scores = np.asarray([row["sentiment"] for row in rows])
    kl = kl_figures(rows)
    return {
        "sentiment": float(scores.mean()),
        "positive": float((scores >= 0.05).mean()),
        "negative": float((scores <= -0.05).mean()),
        "kl": kl["eval_kl"],
        "kl_token": kl["eval_kl_token"],
        "stopped": float(np.mean([row["finish_reason"] == "stop" for row in rows])),
        **health([row["ids"] for row in rows]),
    }


def figures(before: Sequence[Row], after: Sequence[Row], *, seed: int) -> dict[str, Any]:
    """All figures of the demo, from its rows on the unseen prompts.

    `difference` is the mean over prompts of (mean sentiment after - mean sentiment before), `interval` its 95 %
    bootstrap interval over prompts. KL is the Monte Carlo estimate on each side's own samples; before training it is 0
    up to rounding.
    """
    change = per_prompt(after, "sentiment") - per_prompt(before, "sentiment")
    return {
        "unseen_prompts": len(change),
        "before": _side(before),
        "after": _side(after),
        "difference": float(change.mean()),
        "interval": interval(change, seed=seed),
        "prompts_up": float((change > 0).mean()),
        "prompts_down": float((change < 0).mean()),
    }


_LINES = (
    ("mean sentiment (VADER, -1 to 1)", "sentiment", "+.3f"),
    ("positive texts", "positive", ".0%"),
    ("negative texts", "negative", ".0%"),
    ("KL to the reference, nats a text", "kl", ".2f"),
    ("KL to the reference, nats a token", "kl_token", ".3f"),
    ("distinct tokens / tokens", "distinct_1", ".3f"),
    ("distinct token pairs / pairs", "distinct_2", ".3f"),
    ("repeated 4-grams in a text", "repetition_4", ".1%"),
    ("tokens a text", "length", ".1f"),
    ("texts that ended by themselves", "stopped", ".0%"),
)


def _table(summary: Mapping[str, Any], *further: tuple[str, str, str]) -> html.Table:
    def cell(side: str, key: str, form: str) -> str:
        value = summary[side][key]
        return format(0.0 if abs(value) < 5e-5 else value, form)  # no "-0.00" for what is rounding

    lines = [(name, cell("before", key, form), cell("after", key, form)) for name, key, form in _LINES]
    return html.Table(("", "before", "after"), [*lines, *further])


def verdict(summary: Mapping[str, Any]) -> str:
    """The outcome in one sentence, whatever it is."""
    low, high = summary["interval"]
    return (
        f"On {summary['unseen_prompts']} unseen openings the mean sentiment {moved(low, high)}:"
        f" {summary['difference']:+.3f} (95 % interval {low:+.3f} to {high:+.3f}), at a KL divergence of"
        f" {summary['after']['kl']:.1f} nats a text."
    )


def _clip(text: str, length: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def show(summary: Mapping[str, Any], out: Path) -> None:
    """Print the closing table and some texts to stdout."""
    title = f"DPO on {summary['pairs']} pairs, {summary['unseen_prompts']} unseen openings"
    texts = Table(title="The same opening, the same random numbers", show_lines=True)
    for name in ("opening", "before", "after"):
        texts.add_column(name, ratio=1 if name == "opening" else 2)
    for opening, first, second in summary["examples"][:3]:
        texts.add_row(*(_clip(text).replace("[", r"\[") for text in (opening, first, second)))
    where = f"Report: {out / 'report.html'}   aligned model: {out / 'dpo' / 'model'}"
    terminal.show(terminal.table(title, _table(summary), left=1), texts, verdict(summary), where)


def write(
    out: Path, summary: dict[str, Any], before: Sequence[Row], after: Sequence[Row], pairs: Sequence[Row]
) -> None:
    """Write `report.html`; adds to `summary` the texts that `show` prints: the first sample of the first openings."""
    firsts = [(a, b) for a, b in zip(before, after, strict=True) if a["sample"] == 0]
    summary["examples"] = [(a["prompt"], a["response"], b["response"]) for a, b in firsts[:5]]
    axis = "VADER compound score"
    scores = {side: np.asarray([r["sentiment"] for r in rows]) for side, rows in (("before", before), ("after", after))}
    histogram = html.histogram("Sentiment of the texts", scores, np.linspace(-1, 1, 21), x_label=axis)
    grid = ((np.arange(len(before)) + 1) / len(before)).tolist()
    sorted_scores = tuple(html.Series(side, sorted(values.tolist()), grid) for side, values in scores.items())
    cumulative = html.Plot("Share of texts up to a score", sorted_scores, x_label=axis)
    low, high = summary["interval"]
    table = _table(
        summary,
        ("difference in mean sentiment", "", f"{summary['difference']:+.3f}"),
        ("its 95 % interval (bootstrap over openings)", "", f"{low:+.3f} to {high:+.3f}"),
        ("openings that went up", "", f"{summary['prompts_up']:.0%}"),
        ("openings that went down", "", f"{summary['prompts_down']:.0%}"),
    )
    side_by_side = [
        (a["prompt"], a["response"], f"{a['sentiment']:+.2f}", b["response"], f"{b['sentiment']:+.2f}")
        for a, b in firsts
    ]
    sections = [
        html.Section("Before and after", plots=(histogram, cumulative), table=table),
        html.run_section(out / "dpo"),
        html.Section(
            "Texts side by side",
            "The first sample of every unseen opening, drawn with the same random numbers; none is picked by hand.",
            table=html.Table(
                ("opening", "before", "score before", "after", "score after"), side_by_side, ("before", "after")
            ),
        ),
        html.Section(
            "Some of the pairs",
            table=html.Table(
                ("opening", "chosen", "rejected"),
                [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs[:10]],
                ("chosen", "rejected"),
            ),
        ),
    ]
    html.write_report(out / "report.html", "Controlled sentiment by DPO", verdict(summary), sections)
