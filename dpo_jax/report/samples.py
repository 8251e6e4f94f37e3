"""What a report shows of responses and their scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.files.jsonl import read_lines
from dpo_jax.files.log import Row, read_metrics
from dpo_jax.report import html

TRAINING_SAMPLES = "training_samples.jsonl"
"""Of a run folder: what the policy wrote to fixed prompts, by step (`train/fixed_prompts.py`)."""
_SHOWN = 4
_STEPS = 8


def samples_section(path: Path) -> html.Section:
    """Some responses of the first and of the last iteration, with their scores."""
    rows: list[Any] = read_metrics(path)
    steps = sorted({row["step"] for row in rows})
    ends = dict.fromkeys((*steps[:1], *steps[-1:]))
    shown = [row for step in ends for row in [row for row in rows if row["step"] == step][:_SHOWN]]
    cells = [
        (row["step"], prompt_text(row["prompt"]), prompt_text(row["response"]), f"{row['score']:.4g}") for row in shown
    ]
    head = ("step", "prompt", "response", "score")
    note = "The first responses of the first and of the last iteration; all of them are in samples.jsonl."
    return html.Section("Samples", note, table=html.Table(head, cells, texts=("prompt", "response")))


def training_samples(folder: Path) -> list[dict[str, Any]]:
    """The answers to fixed prompts in a run folder, step after step; none where the run has none."""
    path = folder / TRAINING_SAMPLES
    return read_lines(path) if path.exists() else []


def fixed_section(rows: Sequence[Mapping[str, Any]]) -> html.Section:
    """Answers to fixed prompts: a row a step, a column a prompt."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    said = {(row["step"], row["prompt"]): row["response"] for row in rows}
    steps = sorted({step for step, _ in said})
    places = dict.fromkeys(round(i * (len(steps) - 1) / (_STEPS - 1)) for i in range(_STEPS))
    shown = [steps[i] for i in places]
    heads = tuple(f"prompt {i}" for i in range(1, len(prompts) + 1))
    cells = [("", *prompts), *((step, *(said.get((step, prompt), "") for prompt in prompts)) for step in shown)]
    some = (
        ""
        if len(shown) == len(steps)
        else f" Here are {len(shown)} of {len(steps)} steps; all are in {TRAINING_SAMPLES}."
    )
    note = f"Greedy answers to the same prompts as the policy learnt.{some}"
    return html.Section("Samples during training", note, table=html.Table(("step", *heads), cells, texts=heads))


def compared_section(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> html.Section:
    """The last answers of several runs to each fixed prompt: a row a prompt, a column a run."""
    last = {name: [row for row in rows if row["step"] == rows[-1]["step"]] for name, rows in runs.items()}
    prompts = dict.fromkeys(row["prompt"] for rows in last.values() for row in rows)
    said = {(name, row["prompt"]): row["response"] for name, rows in last.items() for row in rows}
    cells = [(prompt, *(said.get((name, prompt), "") for name in runs)) for prompt in prompts]
    steps = ", ".join(f"{name}: step {rows[-1]['step']}" for name, rows in runs.items())
    head = ("prompt", *runs)
    return html.Section("Samples", f"The last greedy answers ({steps}).", table=html.Table(head, cells, texts=head))


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt, or an episode, as one text, for people."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def progress(rows: list[Row]) -> str:
    """Score and KL divergence at the beginning and at the end, in a sentence; in another those of held-out prompts."""
    learnt = [row for row in rows if "objective/scores" in row]  # not that of an evaluation before the first step
    first, last = learnt[0], learnt[-1]
    told = (
        f"Mean score {first['objective/scores']:.3f} in the first iteration and {last['objective/scores']:.3f} in the"
        f" last, at a KL divergence of {last['objective/kl']:.2f} nats a response."
    )
    return " ".join(filter(None, (told, _heldout_progress(rows))))


def _heldout_progress(rows: list[Row]) -> str:
    """With the intervals; nothing where there was no evaluation."""
    evaluated = [row for row in rows if "eval_reward" in row]
    if not evaluated:
        return ""

    def told(row: Row) -> str:
        return f"{row['eval_reward']:.3f} ({row['eval_reward_low']:.3f} to {row['eval_reward_high']:.3f})"

    first, last = evaluated[0], evaluated[-1]
    return (
        f"Held-out prompts: {told(first)} at step {first['step']} and {told(last)} at step {last['step']}, at a KL"
        f" divergence of {last['eval_kl']:.2f} nats a response."
    )
