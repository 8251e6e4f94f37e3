"""What AI feedback came to: of each writer how many responses, their mean score, how often it wins a pair."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.files.jsonl import Row
from dpo_jax.report import html, terminal

_HEAD = ("model", "responses", "mean score", "pairs", "chosen", "share")


def figures(data: Sequence[Row], pairs: Sequence[Row]) -> dict[str, Any]:
    """JSON-able. `data`: rows in UltraFeedback's schema; `pairs`: of `dpo-jax pairs` on them."""
    every = [one for row in data for one in row["completions"]]
    wins = Counter(row["chosen_model"] for row in pairs)
    seen = Counter(name for row in pairs for name in (row["chosen_model"], row["rejected_model"]))
    models = []
    for name, count in Counter(one["model"] for one in every).most_common():
        given = [one["fine-grained_score"] for one in every if one["model"] == name]
        scores = [score for score in given if score is not None]
        models.append({
            "model": name,
            "responses": count,
            "mean score": sum(scores) / len(scores) if scores else None,
            "pairs": seen[name],
            "chosen": wins[name],
            "share": wins[name] / seen[name] if seen[name] else None,
        })  # fmt: skip
    return {
        "rows": len(data),
        "responses": len(every),
        "responses without a score": sum(one["fine-grained_score"] is None for one in every),
        "principles": dict(Counter(one["principle"] or "none" for one in every).most_common()),
        "pairs": len(pairs),
        "models": models,
    }


def models_table(models: Sequence[Mapping[str, Any]]) -> html.Table:
    """The writers of `figures`, a row each."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    return html.Table(_HEAD, [[cell(row[name]) for name in _HEAD] for row in models])


def agreement(name: str, found: Mapping[str, Any]) -> dict[str, str | int]:
    """How far a second judge, `name`, agrees with the first: figures of `dpo-jax judge --agreement`, as texts."""
    told: dict[str, str | int] = {"second judge": name, "its prompt": found["prompt"]}
    told |= {"pairs of responses": found["pairs"], "that the first tells apart": found["decided"]}
    told |= {"without a verdict of the second": found["unparsed"]}
    shown = {"accuracy": "both name the same response", "kappa": "Cohen's kappa", "ac1": "Gwet's AC1"}
    told |= {text: "{:.3f} ({:.3f} to {:.3f})".format(*found[key]) for key, text in shown.items() if key in found}
    return told


def markdown(found: Mapping[str, Any]) -> str:
    """The report."""
    lines = ["# AI feedback", ""]
    lines += [f"* {name}: {value}" for name, value in found.items() if not isinstance(value, dict | list)]
    lines += [f"* prompt to the judge: {name}" for name in found["prompts"]]
    lines += ["", f"| {' | '.join(_HEAD)} |", "|" + "---|" * len(_HEAD)]
    lines += [f"| {' | '.join(row)} |" for row in models_table(found["models"]).rows]
    for name, value in found.items():
        if isinstance(value, dict) and value:
            lines += ["", f"| {name} | |", "|---|---|", *(f"| {k} | {n} |" for k, n in value.items())]
    return "\n".join(lines) + "\n"


def show(found: Mapping[str, Any], out: Path) -> None:
    """Print the table of the writers."""
    title = f"{found['pairs']} pairs of {found['rows']} prompts, by {found['judge']}"
    table = terminal.table(title, models_table(found["models"]))
    terminal.show(table, f"{out / 'pairs.jsonl'}; report.md says the rest")
