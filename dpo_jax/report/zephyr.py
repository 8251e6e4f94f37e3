"""What the Zephyr recipe found: answers before and after distilled DPO, the win rate, the distance, the writers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpo_jax.files.jsonl import Row
from dpo_jax.files.log import read_metrics
from dpo_jax.report import html

_SHOWN = 8  # held-out prompts whose answers stand in the report
_HEALTH = ("repetition_4", "looping", "distinct_2", "length")
_EVAL = ("eval_rewards/accuracies", "eval_rewards/margins", "eval_kl", "eval_kl_token_k3")


def verdict(summary: Mapping[str, Any]) -> str:
    """The outcome in one sentence, whatever it is."""
    found, asked, judge = summary["win_rate"], summary["prompt"], summary["judge"]
    if asked is not None:
        whose = "published" if asked["published"] else "this project's"
        judge += f" (asked for: {asked['ask']}; {whose} prompt: {asked['name']})"
    if found is None:
        return f"The judge {judge} gave no verdict on {summary['held-out prompts']} pairs of answers."
    low, high = found["interval"]
    return (
        f"By the judge {judge} the answers after distilled DPO beat those before it in"
        f" {found['win_rate']:.1%} of {found['n']} held-out prompts (95 % interval {low:.1%} to {high:.1%};"
        f" {found['wins']} wins, {found['ties']} ties, {found['losses']} losses, {summary['without a verdict']} without"
        " a verdict)."
    )


def _figures(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (name, *(f"{summary['health'][side][name]:.3f}" for side in ("before", "after"))) for name in _HEALTH
    ]
    return rows + [(name, "", f"{summary['eval'][name]:.4f}") for name in _EVAL if name in summary["eval"]]


def show(summary: Mapping[str, Any], out: Path) -> None:
    """Print the figures."""
    table = Table("figure", "dSFT", "dDPO", title=f"{summary['dialogues']} dialogues, {summary['pairs']} pairs")
    for row in _figures(summary):
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(verdict(summary), highlight=False, soft_wrap=True)
    console.print(f"Report: {out / 'report.html'}   model: {out / 'dpo' / 'model'}", highlight=False, soft_wrap=True)


def write(
    out: Path,
    summary: Mapping[str, Any],
    before: Sequence[Row],
    after: Sequence[Row],
    verdicts: Sequence[Row],
    feedback: Mapping[str, Any],
) -> None:
    """Write `report.html`. `feedback`: report.json of AI feedback."""
    names = {"a": "dDPO", "b": "dSFT", "tie": "tie", None: "none"}
    texts = [
        (_text(old["prompt"]), old["response"], new["response"], names[said["verdict"]])
        for old, new, said in zip(before, after, verdicts, strict=True)
    ][:_SHOWN]
    head = ("prompt", "dSFT", "dDPO", "better")
    models = [
        tuple(
            "" if row[name] is None else f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name])
            for name in row
        )
        for row in feedback["models"]
    ]
    sections = [
        html.Section(
            "Figures",
            "Of the answers to held-out prompts.",
            table=html.Table(("figure", "dSFT", "dDPO"), _figures(summary)),
        ),
        html.Section(
            "Answers",
            "To the first held-out prompts; all stand in before.jsonl and after.jsonl.",
            table=html.Table(head, texts, head[:3]),
        ),
        html.Section(
            "AI feedback",
            "Which model wins how often in the pairs.",
            table=html.Table(tuple(feedback["models"][0]), models),
        ),
    ]
    for name, title in (("sft", "Distilled SFT"), ("dpo", "Distilled DPO")):
        curves = html.training_section(read_metrics(out / name / "metrics.jsonl"))
        sections.append(html.Section(title, curves.note, plots=curves.plots))
    html.write_report(out / "report.html", "Zephyr", verdict(summary), sections)


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
