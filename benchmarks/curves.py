"""The curve on each algorithm page: the very run whose command stands first on the page, on two CPU cores.

    python benchmarks/curves.py [--folder DIR] [PAGE ...]

Takes the first command of docs/PAGE.md, runs it in the folder, draws what it logged into docs/curves/PAGE.png, keeps
the command, its CPU time and its figures in docs/curves/runs.json, and writes them into the page, between two comments.
SmolLM2-135M goes on with openings of reviews and VADER judges what it wrote, as in `dpo-jax demo`. `rejection` comes
first: the rows that others learn from are made of what it samples. (Pre-training reads these pages. Ghost Attention
takes longer: its page has no run of this kind.) A run that stands in the folder is not made again, but drawn; without
PAGE all are.
"""

import argparse
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_jax.complete.writing.openings import review_openings
from dpo_jax.files.jsonl import Row, read_lines, write_lines
from dpo_jax.report import html

ROOT = Path(__file__).resolve().parents[1]
CURVES = ROOT / "docs" / "curves"
RUNS = CURVES / "runs.json"
BEGIN, END = "<!-- the curve, by benchmarks/curves.py -->\n", "<!-- until here -->"
LEARNT, HELD_OUT = 96, 48
"""Openings."""
SOME = 3
"""Steps whose mean is told: single steps of a few rows scatter."""


@dataclass(frozen=True)
class Page:
    """What is drawn of a page's run, and told of it."""

    plots: Mapping[str, tuple[str, ...]]
    """Title -> figures of metrics.jsonl."""
    told: tuple[str, ...]
    """Figures of which the first and the last value are told."""
    caption: str
    """What the picture shows."""


_SFT = {"Loss": ("loss", "eval_loss"), "Token accuracy": ("mean_token_accuracy", "eval_mean_token_accuracy")}
_REWARDED = Page(
    {"Score (VADER)": ("objective/scores",), "KL to the reference (nats a response)": ("objective/kl",)},
    ("objective/scores", "objective/kl"),
    "the score of what the policy writes to prompts that it sees for the first time, and how far it has gone for that",
)
PAGES = {
    "rejection": Page(
        {
            "Score of the samples (VADER)": ("rewards/mean", "rewards/best"),
            "Score on held-out prompts (VADER)": ("eval_rewards/mean",),
        },
        ("rewards/mean", "rewards/best", "eval_rewards/mean"),
        "the mean of the samples, their best, and held-out prompts, by iteration",
    ),
    "sft": Page(_SFT, ("eval_loss", "eval_mean_token_accuracy"), "loss and accuracy of training and held-out rows"),
    "dpo": Page(
        {
            "Loss": ("loss", "eval_loss"),
            "Accuracy of the rewards": ("rewards/accuracies", "eval_rewards/accuracies"),
        },
        ("loss", "eval_loss", "eval_rewards/accuracies", "rewards/margins"),
        "loss and accuracy of training and held-out pairs",
    ),
    "reward": Page(
        {"Loss": ("loss", "eval_loss"), "Accuracy": ("rewards/accuracies", "eval_rewards/accuracies")},
        ("loss", "eval_loss", "eval_rewards/accuracies"),
        "loss and accuracy of training and held-out comparisons",
    ),
    "ppo": _REWARDED,
    "grpo": _REWARDED,
    "online_dpo": _REWARDED,
    "distill": Page(
        {"Divergence from the teacher (nats a token)": ("loss",), "Entropy": ("objective/entropy",)},
        ("loss", "objective/entropy"),
        "the divergence of the student from its teacher, on the student's own responses",
    ),
    "pretraining": Page(
        {"Loss": ("loss", "eval_loss"), "Perplexity": ("eval_perplexity",)},
        ("eval_loss", "eval_perplexity"),
        "loss of training and held-out documents",
    ),
}
"""In the order in which they are run."""


def command_of(text: str) -> str:
    """The first command of a page, in one line."""
    block = text.partition("```bash\n")[2].partition("```")[0].replace("\\\n", " ")
    return " ".join(next(line for line in block.splitlines() if line.startswith("dpo-jax ")).split())


def told(name: str, run: Mapping[str, Any]) -> str:
    """What stands on the page between the two comments."""
    rows = [f"| `{figure}` | {first:.3g} | {last:.3g} |" for figure, (first, last) in run["figures"].items()]
    took = f"It took {run['cpu_seconds'] / 60:.1f} minutes of CPU time. " if run["cpu_seconds"] else ""
    return "\n".join([
        "",
        f"![{PAGES[name].caption}](curves/{name}.png)",
        "",
        f"That very run: {PAGES[name].caption}.",
        f"{took}`benchmarks/curves.py` writes its files, makes it and draws it;",
        "every run's own curves are in its `report.html`. A step is of few rows, which scatter: where each step logs a",
        "figure, the table has the means of the first three and the last three steps.",
        "",
        "| figure | first | last |",
        "|---|---|---|",
        *rows,
        "",
        "",
    ])  # fmt: skip


def written(name: str, text: str, run: Mapping[str, Any]) -> str:
    """The page with what is told of its run."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}{told(name, run)}{END}{rest.partition(END)[2]}"


# ---------------------------------------------------------------- the rows that runs learn from


def make_rows(folder: Path) -> None:
    """Prompts and documents; and of what `rejection` sampled, once it is there, pairs and the best answers."""
    openings = review_openings(seed=0)
    prompts = {
        "prompts": openings[:LEARNT],
        "held_out_prompts": openings[LEARNT : LEARNT + HELD_OUT],
        "unseen_prompts": openings[LEARNT:],
    }
    for name, texts in prompts.items():
        write_lines(folder / f"{name}.jsonl", ({"prompt": text} for text in texts))
    pages = sorted((ROOT / "docs").glob("*.md"))
    for name, some, most in (("texts", pages[::2], 20_000), ("held_out_texts", pages[1::8], 800)):
        texts = (re.sub(r"\s+", " ", page.read_text())[:most] for page in some)
        write_lines(folder / f"{name}.jsonl", ({"text": text} for text in texts))
    first = folder / "runs" / "rejection" / "iteration-1"
    if not first.exists():
        return
    found: dict[str, list[tuple[float, str]]] = {}
    samples, scores = (read_lines(first / f"{name}.jsonl") for name in ("samples", "scores"))
    for sample, score in zip(samples, scores, strict=True):
        found.setdefault(sample["prompt"], []).append((score["score"], sample["response"]))
    pairs = [_pair(prompt, answers) for prompt, answers in found.items() if min(answers)[0] < max(answers)[0]]
    best = [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs]
    for name, rows in (("pairs", pairs), ("best", best)):
        cut = len(rows) * 3 // 4
        write_lines(folder / f"{name}.jsonl", rows[:cut])
        write_lines(folder / f"held_out_{name}.jsonl", rows[cut:])


def _pair(prompt: str, answers: Sequence[tuple[float, str]]) -> Row:
    (_, chosen), (_, rejected) = max(answers), min(answers)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# ---------------------------------------------------------------- the runs


def run(folder: Path, command: str) -> float:
    """Run the command of a page; its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-m", *shlex.split(command.replace("dpo-jax", "dpo_jax", 1))]
    subprocess.run(words, cwd=folder, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def figures(page: Page, rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """First and last value of each figure that is told; of those that every step logs the means of three steps."""
    found = {name: [row[name] for row in rows if name in row] for name in page.told}
    some = {name: SOME if len(values) >= 3 * SOME else 1 for name, values in found.items()}
    return {
        name: (sum(values[:n]) / n, sum(values[-n:]) / n)
        for name, values in found.items()
        if (n := some[name]) and values
    }


def draw(name: str, rows: Sequence[Row]) -> None:
    """docs/curves/NAME.png: small, on white, so that it can be read on a dark page, too."""
    plots = []
    for title, names in PAGES[name].plots.items():
        lines = tuple(_line(rows, one) for one in names)
        label = "iteration" if name == "rejection" else "step"
        plots.append(html.Plot(title, tuple(line for line in lines if line.x), x_label=label))
    (CURVES / f"{name}.png").write_bytes(html.png_of(plots))


def _line(rows: Sequence[Row], name: str) -> html.Series:
    """A figure, with its interval where it was logged with one."""
    having = [row for row in rows if name in row]
    ends = [
        name.replace("rewards/mean", f"rewards/{end}") if "rewards/mean" in name else f"{name}_{end}"
        for end in ("low", "high")
    ]
    band = tuple([row[end] for row in having] for end in ends) if having and ends[0] in having[0] else None
    return replace(html.of_run(having, name, name), band=band)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pages", nargs="*", help="names of pages. Not given: all", metavar="PAGE")
    parser.add_argument("--folder", type=Path, default=Path("runs/curves"), help="where the runs are made")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    CURVES.mkdir(exist_ok=True)
    known: dict[str, Any] = json.loads(RUNS.read_text()) if RUNS.exists() else {}
    for name in [name for name in PAGES if name in (options.pages or PAGES)]:
        page = ROOT / "docs" / f"{name}.md"
        command, out = command_of(page.read_text()), options.folder / "runs" / name
        make_rows(options.folder)
        told = known.get(name, {})
        if not (out / "report.html").exists():
            seconds = run(options.folder, command)
        elif told.get("command") == command:
            seconds = told["cpu_seconds"]
        else:
            raise SystemExit(f"{out}: is not known to be the run of the command on {page}; remove it")
        rows = read_lines(out / "metrics.jsonl")
        draw(name, rows)
        known[name] = {"command": command, "cpu_seconds": round(seconds), "figures": figures(PAGES[name], rows)}
        RUNS.write_text(json.dumps(known, indent=1) + "\n")
        page.write_text(written(name, page.read_text(), known[name]))


if __name__ == "__main__":
    main()
