"""docs/long_context.md: what long sequences need, with and without `--mesh.context`, from compiled programs.

    python benchmarks/long_context.py --only 'lora/v5p:2x2x2/32768'   compile the cells whose name matches
    python benchmarks/long_context.py --show                          write tables and curve again from what is there

Cells are called TRAINING/TOPOLOGY/TOKENS. Llama-3.1-8B, bfloat16 computation, --train.remat full, shared prompts; all
devices share the sequence (--mesh.context). lora: rank 16 on bfloat16 weights; full: float32 weights and AdamW.

    dpo lora, dpo full    one pair a step, live reference: a shared prompt of an eighth of the tokens, each response
                          with it as long as TOKENS; `offload`: with --train.remat offload
    ppo lora, ppo full    8 responses of TOKENS to prompts of 2,048, a response at a time (--train.accumulate 8), one
                          update; a value model and a reward model of 8B too: the programs of an iteration
    grpo lora, grpo full  8 responses to one prompt, a reward function

What was found stands in docs/long_context.json; a cell that is there is not compiled again. Cells for H100s need
`pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt`, in the version of jaxlib.
"""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from dpo_jax.commands.plan import compile_plan, word_of
from dpo_jax.config import (
    ON_COMMAND_LINE,
    DataConfig,
    DPOLossConfig,
    DPORun,
    LoraConfig,
    MeshConfig,
    PlanRun,
    PPOLossConfig,
    PPORun,
    SampleConfig,
    TrainConfig,
    TrainingRun,
)
from dpo_jax.files.folder import write_atomically
from dpo_jax.files.log import say
from dpo_jax.model.architecture import RopeScaling
from dpo_jax.plan.compiling import plans_folder
from dpo_jax.plan.hardware import GIB, Topology
from dpo_jax.plan.jobs import Job
from dpo_jax.plan.programs import names
from dpo_jax.plan.shapes import SHAPES

DOCS = Path(__file__).resolve().parent.parent / "docs"
SHAPE = replace(SHAPES["llama3_8b"], max_position=131_072, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
LENGTHS = tuple(2**n for n in range(11, 18))
TRAININGS = {
    "dpo lora": "DPO, LoRA of rank 16",
    "dpo lora offload": "DPO, LoRA of rank 16, --train.remat offload",
    "dpo full": "DPO of all weights",
    "dpo full offload": "DPO of all weights, --train.remat offload",
    "ppo lora": "PPO, LoRA of rank 16",
    "ppo full": "PPO of all weights",
    "grpo lora": "GRPO, LoRA of rank 16",
    "grpo full": "GRPO of all weights",
}
ONE, EIGHT = ("v5p:1x1x1", "h100:1"), ("v5p:2x2x2", "h100:8")
CELLS = [
    *((kind, name, n) for kind in ("dpo lora", "dpo full") for n in (32_768, 131_072) for name in EIGHT),
    *((kind, name, 16_384) for kind in TRAININGS if not kind.startswith("dpo") for name in EIGHT),
    *((f"dpo {weights} offload", name, 131_072) for weights in ("lora", "full") for name in EIGHT),
    ("dpo lora offload", "h100:1", 131_072),
    *(("dpo lora", name, n) for name in (*EIGHT, *ONE) for n in LENGTHS),
]
PROMPT = 2048
"""Tokens of a prompt of PPO and GRPO."""
MARK = "<!-- made by benchmarks/long_context.py -->\n"


def training(kind: str, tokens: int, context: int) -> TrainingRun:
    """The options of a cell."""
    algorithm, weights, *offload = kind.split()
    common: dict[str, Any] = {
        "model": ON_COMMAND_LINE,
        "out": ON_COMMAND_LINE,
        "lora": LoraConfig(rank=16 if weights == "lora" else 0),
        "mesh": MeshConfig(data=1, fsdp=1, tensor=1, context=context),
    }
    train: dict[str, Any] = {"dtype": "bfloat16", "remat": "offload" if offload else "full", "layout": "shared"}
    if algorithm == "dpo":
        return DPORun(
            **common,
            data=DataConfig(max_length=tokens, max_prompt_length=tokens // 8),
            dpo=DPOLossConfig(reference="live"),
            train=TrainConfig(batch_size=1, **train),
        )
    loss = PPOLossConfig(epochs=1) if algorithm == "ppo" else PPOLossConfig(preset="grpo", epochs=1)
    return PPORun(
        **common,
        data=DataConfig(max_length=PROMPT + tokens, max_prompt_length=PROMPT),
        ppo=loss,
        reward="a model" if algorithm == "ppo" else "length",
        sample=SampleConfig(max_new_tokens=tokens),
        train=TrainConfig(batch_size=8, accumulate=8, **train),
    )


def plan(kind: str, name: str, tokens: int) -> dict[str, Any]:
    """One cell."""
    topology = Topology.parse(name)
    run = training(kind, tokens, topology.devices)
    prompt = tokens // 8 if isinstance(run, DPORun) else PROMPT
    response = tokens - prompt if isinstance(run, DPORun) else tokens
    job = Job(word_of(run), names(run)[0], run, SHAPE, name, prompt, response)
    options = PlanRun(topology=name, model_shape="llama3_8b", training=run)
    made = compile_plan(options, topology, job, plans_folder(None))
    worst = made.worst
    found: dict[str, Any] = {"fits": made.fits, "peak": worst.peak, "limit": worst.limit, "largest": worst.name}
    if made.seconds is not None:
        step = made.outcomes[0]
        sent = sum(one["sent"] for one in step.figures["collectives"])
        found |= {"seconds": made.seconds, "sent": sent, "attention": step.figures["attention"]}
        found |= {"host": step.figures["memory"]["host"]}
    return found


def cell(found: dict[str, Any] | None) -> str:
    """Of a table."""
    if found is None:
        return "·"
    size = "more" if found["peak"] is None else f"{found['peak'] / GIB:.1f}"
    host = f" + {found['host'] / GIB:.1f} on the host" if found.get("host") else ""
    if not found["fits"]:
        return f"{size}, no room"
    seconds = found["seconds"]
    return f"{size}{host}, {seconds:,.0f} s" if seconds >= 100 else f"{size}{host}, {seconds:.3g} s"


def tables(cells: dict[str, Any]) -> str:
    """The curve of each training."""
    lines = []
    for kind, title in TRAININGS.items():
        names = [name for name in (*ONE, *EIGHT) if any(key.startswith(f"{kind}/{name}/") for key in cells)]
        if not any(key.startswith(f"{kind}/") for key in cells):
            continue
        limits = [f"{t} ({Topology.parse(t).hardware.memory / GIB:.1f})" for t in names]
        lines += [f"\n{title}:\n", "| tokens | " + " | ".join(limits) + " |", "|---|" + "---|" * len(names)]
        for n in LENGTHS:  # rows of which nothing is compiled yet are left out
            if not any(f"{kind}/{t}/{n}" in cells for t in names):
                continue
            lines.append(f"| {n:,} | " + " | ".join(cell(cells.get(f"{kind}/{t}/{n}")) for t in names) + " |")
    return "\n".join(lines) + "\n"


LINES = {"v5p:1x1x1": "#1f77b4", "v5p:2x2x2": "#1f77b4", "h100:1": "#2ca02c", "h100:8": "#2ca02c"}


def draw(cells: dict[str, Any], path: Path) -> None:
    """The memory of a device against the tokens of a response with its prompt: one device dashed, eight solid."""
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for name, colour in LINES.items():
            topology, alone = Topology.parse(name), name in ONE
            for kind in ("dpo lora", "dpo lora offload"):
                found = {n: cells.get(f"{kind}/{name}/{n}") for n in LENGTHS}
                points = [(n, c["peak"] / GIB) for n, c in found.items() if c is not None and c["peak"] is not None]
                if len(points) < 2:
                    continue
                line = "" if len(points) < 3 else "--" if alone else "-"
                style: dict[str, Any] = {"linestyle": line, "marker": "o" if kind == "dpo lora" else "v"}
                label = f"{topology.devices} x {topology.name}{', offload' if 'offload' in kind else ''}"
                axes.plot(*zip(*points, strict=True), color=colour, markersize=4, label=label, **style)
            if alone:
                limit = topology.hardware.memory / GIB
                axes.axhline(limit, color=colour, linewidth=0.8, linestyle=":")
                axes.annotate(f"memory of {topology.name}", (LENGTHS[0], limit), va="bottom", color=colour)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(LENGTHS, [f"{n // 1024}k" for n in LENGTHS])
        ticks = [2**n for n in range(2, 9)]
        axes.set_yticks(ticks, map(str, ticks))
        axes.set(xlabel="tokens of a prompt and a response", ylabel="GiB of one device")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def main() -> None:
    """Fill in cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="pattern that names of cells must match")
    parser.add_argument("--show", action="store_true", help="only write the tables again")
    options = parser.parse_args()
    path, page = DOCS / "long_context.json", DOCS / "long_context.md"
    cells: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for kind, name, tokens in CELLS:
        key = f"{kind}/{name}/{tokens}"
        if options.show or key in cells or not re.search(options.only, key):
            continue
        cells[key] = plan(kind, name, tokens)
        say(f"{key}: {cell(cells[key])}")
        write_atomically(path, json.dumps(cells, indent=1, sort_keys=True) + "\n")
    text = page.read_text(encoding="utf-8")
    write_atomically(page, text[: text.index(MARK)] + MARK + tables(cells))
    draw(cells, DOCS / "long_context.png")


if __name__ == "__main__":
    main()
