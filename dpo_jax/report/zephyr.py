"""What the Zephyr recipe found: answers before and after distilled DPO, the win rate, the distance, the writers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.files.jsonl import Row
from dpo_jax.report import html, terminal
from dpo_jax.report.feedback import models_table
from dpo_jax.report.samples import prompt_text

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


def _figures(summary: Mapping[str, Any]) -> html.Table:
    rows: list[tuple[str, ...]] = [
        (name, *(f"{summary['health'][side][name]:.3f}" for side in ("before", "after"))) for name in _HEALTH
    ]
    rows += [(name, "", f"{summary['eval'][name]:.4f}") for name in _EVAL if name in summary["eval"]]
    return html.Table(("figure", "dSFT", "dDPO"), rows)


def _two_judges(feedback: Mapping[str, Any]) -> list[html.Section]:
    """A section where a second judge rated the responses, too."""
    if "agreement" not in feedback:
        return []
    note = f"What the judge {feedback['judge']} and a second one say of the same responses, two at a time."
    rows = [(name, str(value)) for name, value in feedback["agreement"].items()]
    return [html.Section("Two judges", note, table=html.Table(("figure", ""), rows))]


def show(summary: Mapping[str, Any], out: Path) -> None:
    """Print the figures."""
    table = terminal.table(f"{summary['dialogues']} dialogues, {summary['pairs']} pairs", _figures(summary))
    where = f"Report: {out / 'report.html'}   model: {out / 'dpo' / 'model'}"
    terminal.show(table, verdict(summary), where)


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
        (prompt_text(old["prompt"]), old["response"], new["response"], names[said["verdict"]])
        for old, new, said in zip(before, after, verdicts, strict=True)
    ][:_SHOWN]
    head = ("prompt", "dSFT", "dDPO", "better")
    sections = [
        html.Section("Figures", "Of the answers to held-out prompts.", table=_figures(summary)),
        html.Section(
            "Answers",
            "To the first held-out prompts; all stand in before.jsonl and after.jsonl.",
            table=html.Table(head, texts, head[:3]),
        ),
        html.Section("AI feedback", "Which model wins how often in the pairs.", table=models_table(feedback["models"])),
        *_two_judges(feedback),
        html.run_section(out / "sft", "Distilled SFT"),
        html.run_section(out / "dpo", "Distilled DPO"),
    ]
    html.write_report(out / "report.html", "Zephyr", verdict(summary), sections)
