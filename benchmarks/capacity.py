"""docs/capacity.md: the smallest slice or node on which each kind of training fits, compiled with the planner.

    python benchmarks/capacity.py                      fill in all that is missing: hours, one compiler at a time
    python benchmarks/capacity.py --only 7b/dpo        only cells whose name MODEL/TRAINING/DEVICE matches this pattern
    python benchmarks/capacity.py --most 4             stop after four compilations
    python benchmarks/capacity.py --show               write the table again from what is there

What was found stands in docs/capacity.json, cell by cell, so that the table can be filled in several sittings; a cell
that is there is not compiled again (delete it from the file to do so).

The same training everywhere: 256 rows a step of 1024 + 1024 tokens (pairs; windows of 2048 tokens for SFT; prompts and
responses for PPO), one row a device at a time, --train.remat full, bfloat16 computation with float32 weights and AdamW,
live reference for DPO, a separate value model and one reward model for PPO; LoRA of rank 16 on bfloat16 weights. fsdp
over all devices; for 70B eight of them share each layer (--mesh.tensor 8).
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

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
    RewardRun,
    SampleConfig,
    SFTDataConfig,
    SFTRun,
    TrainConfig,
    TrainingRun,
)
from dpo_jax.run.folder import write_atomically
from dpo_jax.run.log import say
from dpo_jax.run.plan import compile_plan, first_job
from dpo_jax.run.planner.compiling import plans_folder, stored
from dpo_jax.run.planner.hardware import GIB, Topology
from dpo_jax.run.planner.search import state_bytes
from dpo_jax.run.planner.shapes import SHAPES

DOCS = Path(__file__).resolve().parent.parent / "docs"
MODELS = ("llama2_7b", "llama2_13b", "llama2_70b")
TRAININGS = {"sft": "SFT", "rm": "reward model", "dpo": "DPO", "dpo_lora": "DPO, LoRA", "ppo": "PPO"}
FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
SIZES = {"v4": CUBES, "v5e": FLAT, "v5p": CUBES, "v6e": FLAT, "a100": ("1", "2", "4", "8", "2x8", "4x8", "8x8", "16x8")}
ROWS, PROMPT, RESPONSE = 256, 1024, 1024


def training(kind: str, model: str, devices: int) -> TrainingRun:
    """The options of one cell on so many devices."""
    tensor = min(8, devices) if model == "llama2_70b" else 1
    parts = devices // tensor
    open_ended: dict[str, Any] = {"model": ON_COMMAND_LINE, "source": ON_COMMAND_LINE, "out": ON_COMMAND_LINE}
    shared: dict[str, Any] = {
        **open_ended,
        "train": TrainConfig(batch_size=ROWS, accumulate=ROWS // parts, dtype="bfloat16", remat="full"),
        "mesh": MeshConfig(data=1, fsdp=parts, tensor=tensor),
    }
    data = DataConfig(max_length=PROMPT + RESPONSE, max_prompt_length=PROMPT)
    if kind == "sft":
        return SFTRun(**shared, data=SFTDataConfig(max_length=PROMPT + RESPONSE, packing=True))
    if kind == "rm":
        return RewardRun(**shared, data=data)
    if kind == "ppo":
        train = TrainConfig(batch_size=ROWS, accumulate=max(1, 64 // parts), dtype="bfloat16", remat="full")
        ppo = PPOLossConfig(epochs=1, minibatches=ROWS // max(64, parts))
        sample = SampleConfig(max_new_tokens=RESPONSE)
        return PPORun(**{**shared, "train": train}, data=data, ppo=ppo, sample=sample, reward=ON_COMMAND_LINE)
    lora = LoraConfig(rank=16) if kind == "dpo_lora" else LoraConfig()
    return DPORun(**shared, data=data, dpo=DPOLossConfig(reference="live"), lora=lora)


class Budget:
    """How many compilations are left."""

    def __init__(self, most: int | None):
        self.left = most

    def spend(self) -> bool:
        """Whether there is one more; takes it."""
        if self.left == 0:
            return False
        self.left = None if self.left is None else self.left - 1
        return True


def fill(model: str, kind: str, device: str, budget: Budget) -> dict[str, Any] | None:
    """The smallest size on which a cell fits, from the first that its state does not rule out; None: budget spent."""
    tried: list[dict[str, Any]] = []
    for size in SIZES[device]:
        topology = Topology.parse(f"{device}:{size}")
        run = training(kind, model, topology.devices)
        if state_bytes(run, SHAPES[model]) / topology.devices > topology.hardware.memory:
            tried.append({"topology": str(topology), "fits": False, "why": "weights and optimizer alone are larger"})
            continue
        options = PlanRun(topology=str(topology), model_shape=model, training=run)
        _, job = first_job(options)
        folder = plans_folder(None)
        if stored(job, folder) is None and not budget.spend():
            return None
        made = compile_plan(options, topology, job, folder)
        worst = made.worst
        tried.append({"topology": str(topology), "fits": made.fits, "peak": worst.peak, "limit": worst.limit})
        say(f"{model} {kind} {topology}: {worst.name} {worst.describe()}")
        if made.fits:
            step = made.outcomes[0].estimate
            assert step is not None
            assert made.seconds is not None
            rate = step.tokens / made.seconds
            return {**tried[-1], "seconds": made.seconds, "tokens_per_second": rate, "mfu": step.mfu, "tried": tried}
    return {"fits": False, "tried": tried}


def table(cells: dict[str, Any]) -> str:
    """docs/capacity.md."""
    lines = [
        "# What fits where",
        "",
        "The smallest slice or node of each kind on which a training fits, with the peak memory of one device in GiB",
        "as XLA reports it, and the estimated tokens a second of all devices together where nothing overlaps (see",
        "`dpo-jax plan`). Compiled, not run. Made by `python benchmarks/capacity.py`, whose first lines say what is",
        "trained; a dot stands where nothing was compiled yet.",
        "",
        "| model | training | " + " | ".join(SIZES) + " |",
        "|---|---|" + "---|" * len(SIZES),
    ]
    for model in MODELS:
        for kind, name in TRAININGS.items():
            row = [_cell(cells.get(f"{model}/{kind}/{device}")) for device in SIZES]
            lines.append(f"| {model} | {name} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "·"
    if not found["fits"]:
        return f"not on {found['tried'][-1]['topology']}"
    size = found["topology"].partition(":")[2]
    return f"{size}: {found['peak'] / GIB:.1f} of {found['limit'] / GIB:.1f}, {found['tokens_per_second']:,.0f}/s"


def main() -> None:
    """Fill in cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="pattern that names of cells must match")
    parser.add_argument("--most", type=int, default=None, help="compilations before it stops")
    parser.add_argument("--show", action="store_true", help="only write the table again")
    options = parser.parse_args()
    path = DOCS / "capacity.json"
    cells: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    budget = Budget(0 if options.show else options.most)
    wanted = [(m, k, d) for m in MODELS for k in TRAININGS for d in SIZES]
    for model, kind, device in wanted:
        name = f"{model}/{kind}/{device}"
        if options.show or name in cells or not re.search(options.only, name):
            continue
        found = fill(model, kind, device, budget)
        if found is None:
            break
        cells[name] = found
        write_atomically(path, json.dumps(cells, indent=1, sort_keys=True) + "\n")
    write_atomically(DOCS / "capacity.md", table(cells))
    say(f"{len(cells)} of {len(wanted)} cells: {DOCS / 'capacity.md'}")


if __name__ == "__main__":
    main()
