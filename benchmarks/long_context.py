"""docs/long_context.md: what long sequences need, with and without `--mesh.context`, from compiled programs.

    python benchmarks/long_context.py --only 'lora/v5p:2x2x2/32768'   compile the cells whose name matches
    python benchmarks/long_context.py --show                          write the tables again from what is there

Cells are called TRAINING/TOPOLOGY/TOKENS. DPO of Llama-3.1-8B, one pair a step: a shared prompt of an eighth of the
tokens, each response with it as long as TOKENS; bfloat16 computation, --train.remat full, live reference; lora: rank 16
on bfloat16 weights, full: float32 weights and AdamW. All devices share the sequence (--mesh.context). What was found
stands in docs/long_context.json; a cell that is there is not compiled again.
"""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_jax.commands.plan import compile_plan
from dpo_jax.config import (
    ON_COMMAND_LINE,
    DataConfig,
    DPOLossConfig,
    DPORun,
    LoraConfig,
    MeshConfig,
    PlanRun,
    TrainConfig,
)
from dpo_jax.files.folder import write_atomically
from dpo_jax.files.log import say
from dpo_jax.model.architecture import RopeScaling
from dpo_jax.plan.compiling import plans_folder
from dpo_jax.plan.hardware import GIB, Topology
from dpo_jax.plan.jobs import Job
from dpo_jax.plan.shapes import SHAPES

DOCS = Path(__file__).resolve().parent.parent / "docs"
SHAPE = replace(SHAPES["llama3_8b"], max_position=131_072, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
LENGTHS = tuple(2**n for n in range(11, 18))
COLUMNS = [(k, t) for k in ("lora", "full") for t in ("v5p:1x1x1", "v5p:2x2x2", "h100:1", "h100:8")]
MARK = "<!-- made by benchmarks/long_context.py -->\n"


def plan(kind: str, name: str, tokens: int) -> dict[str, Any]:
    """One cell."""
    topology, prompt = Topology.parse(name), tokens // 8
    run = DPORun(
        model=ON_COMMAND_LINE,
        out=ON_COMMAND_LINE,
        data=DataConfig(max_length=tokens, max_prompt_length=prompt),
        dpo=DPOLossConfig(reference="live"),
        train=TrainConfig(batch_size=1, dtype="bfloat16", remat="full"),
        lora=LoraConfig(rank=16 if kind == "lora" else 0),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1, context=topology.devices),
    )
    job = Job("dpo", "train step", run, SHAPE, name, prompt, tokens - prompt)
    options = PlanRun(topology=name, model_shape="llama3_8b", training=run)
    made = compile_plan(options, topology, job, plans_folder(None))
    step, worst = made.outcomes[0], made.worst
    found: dict[str, Any] = {"fits": made.fits, "peak": worst.peak, "limit": worst.limit}
    if step.estimate is not None:
        sent = sum(one["sent"] for one in step.figures["collectives"])
        found |= {"seconds": step.estimate.slowest, "sent": sent, "attention": step.figures["attention"]}
    return found


def cell(found: dict[str, Any] | None) -> str:
    """Of a table."""
    if found is None:
        return "·"
    size = "more" if found["peak"] is None else f"{found['peak'] / GIB:.1f}"
    return f"{size}{'' if found['fits'] else ', no room'}" + (f", {found['seconds']:.3g} s" if found["fits"] else "")


def tables(cells: dict[str, Any]) -> str:
    """The curve of each training."""
    lines = []
    for kind, title in (("lora", "DPO, LoRA of rank 16"), ("full", "DPO of all weights")):
        names = [t for k, t in COLUMNS if k == kind]
        if not any(key.startswith(f"{kind}/") for key in cells):
            continue
        limits = [f"{t} ({Topology.parse(t).hardware.memory / GIB:.1f})" for t in names]
        lines += [f"\n{title}:\n", "| tokens | " + " | ".join(limits) + " |", "|---|" + "---|" * len(names)]
        for n in LENGTHS:  # rows of which nothing is compiled yet are left out
            if not any(f"{kind}/{t}/{n}" in cells for t in names):
                continue
            lines.append(f"| {n:,} | " + " | ".join(cell(cells.get(f"{kind}/{t}/{n}")) for t in names) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fill in cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="pattern that names of cells must match")
    parser.add_argument("--show", action="store_true", help="only write the tables again")
    options = parser.parse_args()
    path, page = DOCS / "long_context.json", DOCS / "long_context.md"
    cells: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for kind, name in COLUMNS:
        for tokens in LENGTHS:
            key = f"{kind}/{name}/{tokens}"
            if options.show or key in cells or not re.search(options.only, key):
                continue
            cells[key] = plan(kind, name, tokens)
            say(f"{key}: {cell(cells[key])}")
            write_atomically(path, json.dumps(cells, indent=1, sort_keys=True) + "\n")
    text = page.read_text(encoding="utf-8")
    write_atomically(page, text[: text.index(MARK)] + MARK + tables(cells))


if __name__ == "__main__":
    main()
