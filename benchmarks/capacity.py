"""docs/capacity.md: the smallest slice or node on which each kind of training fits, compiled with the planner.

    python benchmarks/capacity.py                      fill in all that is missing: hours, one compiler at a time
    python benchmarks/capacity.py --only 7b/dpo        only cells whose name matches this pattern
    python benchmarks/capacity.py --most 4             stop after four that had to be compiled
    python benchmarks/capacity.py --show               write the table again from what is there

Cells are called MODEL/TRAINING/DEVICE, config/NAME and written/MODEL/TOPOLOGY.
What was found stands in docs/capacity.json, cell by cell, so that the table can be filled in several sittings; a cell
that is there is not compiled again (delete it from the file to do so).

The same training everywhere: 256 rows a step of 1024 + 1024 tokens (pairs; windows of 2048 tokens for SFT; prompts and
responses for PPO), one row a device at a time, --train.remat full, bfloat16 computation with float32 weights and AdamW,
live reference for DPO, a separate value model and one reward model for PPO; LoRA of rank 16 on bfloat16 weights. fsdp
over all devices; for 70B eight of them share each layer (--mesh.tensor 8).

Beside that the plan of every CONFIG.py that names its devices ("What it needs there: ..."), and of DPO as it was once
written by hand, without this package, with the peak memory that it had.
"""

import argparse
import ast
import json
import re
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.commands.plan import compile_plan, first_job
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
from dpo_jax.files.folder import write_atomically
from dpo_jax.files.log import say
from dpo_jax.plan.compiling import plans_folder, stored
from dpo_jax.plan.hardware import GIB, Topology
from dpo_jax.plan.rough import gradient_bytes, state_bytes
from dpo_jax.plan.shapes import SHAPES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MODELS = ("llama2_7b", "llama2_13b", "llama2_70b")
TRAININGS = {"sft": "SFT", "rm": "reward model", "dpo": "DPO", "dpo_lora": "DPO, LoRA", "ppo": "PPO"}
FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
SIZES = {"v4": CUBES, "v5e": FLAT, "v5p": CUBES, "v6e": FLAT, "a100": ("1", "2", "4", "8", "2x8", "4x8", "8x8", "16x8")}
ROWS, PROMPT, RESPONSE = 256, 1024, 1024
NEEDS = re.compile(r"--topology (?P<topology>\S+) --model_shape (?P<shape>\w+)\.$", re.M)
"""What the docstring of a CONFIG.py says of its devices."""


class Written(NamedTuple):
    """DPO of all weights, written by hand: float32 weights and AdamW, bfloat16 reference, full rematerialisation."""

    pairs: int
    tokens: int
    fsdp: int
    tensor: int
    peak: float
    """GiB of one device; above its memory: refused."""


WRITTEN = {
    "llama2_7b/v5p:2x2x1": Written(16, 2048, 4, 1, 39),
    "llama2_7b/v5e:4x4": Written(16, 2048, 16, 1, 10),
    "llama2_7b/v5e:2x4": Written(8, 1024, 8, 1, 16.6),
    "llama2_70b/v5p:4x4x4": Written(32, 2048, 16, 4, 32),
    "llama2_7b/a100:8": Written(16, 1024, 8, 1, 18),
}


def training(kind: str, model: str, devices: int) -> TrainingRun:
    """The options of one cell on so many devices."""
    tensor = min(8, devices) if model == "llama2_70b" else 1
    parts = devices // tensor
    open_ended: dict[str, Any] = {"model": ON_COMMAND_LINE, "out": ON_COMMAND_LINE}
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
        least = state_bytes(run, SHAPES[model]) + gradient_bytes(run, SHAPES[model])
        if least / topology.devices > topology.hardware.memory:
            why = "weights, optimizer and gradients alone are larger"
            tried.append({"topology": str(topology), "fits": False, "why": why})
            continue
        found = planned(run, str(topology), model, budget)
        if found is None:
            return None
        tried.append({name: found[name] for name in ("topology", "fits", "peak", "limit")})
        if found["fits"]:
            return {**found, "tried": tried}
    return {"fits": False, "tried": tried}


def needs(path: Path) -> tuple[str, str] | None:
    """(topology, model shape) of a CONFIG.py that names them."""
    found = NEEDS.search(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    return found and (found["topology"], found["shape"])


CONFIGS = {path.stem: named for path in sorted((ROOT / "configs").glob("*.py")) if (named := needs(path))}


def plan_config(name: str, budget: Budget) -> dict[str, Any] | None:
    """The plan of a CONFIG.py on its devices."""
    topology, shape = CONFIGS[name]
    return planned(runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["config"], topology, shape, budget)


def plan_written(name: str, budget: Budget) -> dict[str, Any] | None:
    """Our plan of what was written by hand."""
    shape, _, topology = name.partition("/")
    one = WRITTEN[name]
    run = DPORun(
        model=ON_COMMAND_LINE,
        out=ON_COMMAND_LINE,
        dpo=DPOLossConfig(reference="live"),
        data=DataConfig(max_length=one.tokens, max_prompt_length=one.tokens // 2),
        train=TrainConfig(batch_size=one.pairs, dtype="bfloat16", remat="full"),
        mesh=MeshConfig(fsdp=one.fsdp, tensor=one.tensor),
    )
    return planned(run, topology, shape, budget)


def planned(run: TrainingRun, name: str, shape: str, budget: Budget) -> dict[str, Any] | None:
    """All programs of a run on these devices; None: budget spent."""
    topology, folder = Topology.parse(name), plans_folder(None)
    options = PlanRun(topology=name, model_shape=shape, training=run)
    _, job = first_job(options)
    if stored(job, folder) is None and not budget.spend():
        return None
    made = compile_plan(options, topology, job, folder)
    step = made.outcomes[0].estimate
    found: dict[str, Any] = {"topology": name, "fits": made.fits, "peak": made.worst.peak, "limit": made.worst.limit}
    found["programs"] = {outcome.name: outcome.peak for outcome in made.outcomes}
    found["computed"] = {outcome.name: outcome.figures["computed"] for outcome in made.outcomes}
    say(f"{job.word} of {shape} on {name}: {made.worst.name} {made.worst.describe()}")
    if made.seconds is not None and step is not None:
        found |= {"seconds": made.seconds, "tokens_per_second": step.tokens / made.seconds, "mfu": step.mfu}
    return found


def table(cells: dict[str, Any]) -> str:
    """docs/capacity.md."""
    return "\n".join([*_smallest(cells), *_configs(cells), *_written(cells)]) + "\n"


def _smallest(cells: dict[str, Any]) -> list[str]:
    lines = [
        "# What fits where",
        "",
        "The smallest slice or node of each kind on which a training fits, with the peak memory of one device in GiB",
        "as XLA reports it, and the estimated tokens a second of all devices together where nothing overlaps (see",
        "`dpo-jax plan`). Compiled, not run. Made by `python benchmarks/capacity.py`, whose first lines say what is",
        "trained; a dot stands where nothing was compiled yet. A cell stays what it was when it was compiled until its",
        "key in `capacity.json` is deleted: those of this table were compiled with shared prompts padded to a batch's",
        "longest, PPO's with a prompt laid out for each response and with the sampler of that time. Tokens a second on",
        "TPUs are too few, by up to half: a TPU's asynchronous collectives were counted several times then.",
        "",
        "| model | training | " + " | ".join(SIZES) + " |",
        "|---|---|" + "---|" * len(SIZES),
    ]
    for model in MODELS:
        for kind, name in TRAININGS.items():
            row = [_cell(cells.get(f"{model}/{kind}/{device}")) for device in SIZES]
            lines.append(f"| {model} | {name} | " + " | ".join(row) + " |")
    return lines


def _configs(cells: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## The configs",
        "",
        "Each on the devices that it names, with its own batch and lengths: GiB of one device, and what is computed,",
        "in PFLOP of all devices together (what the backward pass makes again counts), for every program of the",
        "command. In brackets: commit 04ba7b3, before rows were packed, responses of PPO shared prompts, and weights",
        "were laid out for sampling.",
        "",
        "| config | devices | program | peak, GiB | of | PFLOP | tokens a second | MFU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (topology, _) in CONFIGS.items():
        found, before = cells.get(f"config/{name}"), cells.get(f"before/{name}")
        if found is None:
            peaks = "" if before is None else f" ({', '.join(map(_gib, before['programs'].values()))})"
            lines.append(f"| `{name}` | {topology} | · | ·{peaks} | · | · | · | · |")
            continue
        rate, mfu = (f"{found['tokens_per_second']:,.0f}", f"{found['mfu']:.0%}") if "seconds" in found else ("", "")
        for i, (program, peak) in enumerate(found["programs"].items()):
            gib, computed = _gib(peak), f"{found['computed'][program] / 1e15:.3g}"
            if before is not None:
                gib += f" ({_gib(before['programs'][program])})"
                computed += f" ({before['computed'][program] / 1e15:.3g})"
            whole = (rate, mfu) if i == 0 else ("", "")
            start = f"`{name}` | {topology}" if i == 0 else " |"
            lines.append(f"| {start} | {program} | {gib} | {_gib(found['limit'])} | {computed} | {' | '.join(whole)} |")
    return lines


def _written(cells: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Beside a step written by hand",
        "",
        "DPO of all weights with a live bfloat16 reference. The other figures are those of a step written by hand for",
        "these devices with the same attention kernels, compiled in the same way; refused: the compiler would not have",
        "it.",
        "",
        "| model | devices | pairs | tokens | by hand, GiB | ours, GiB | of |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in WRITTEN.items():
        model, _, topology = name.partition("/")
        found, limit = cells.get(f"written/{name}"), Topology.parse(topology).hardware.memory / GIB
        hand = f"{one.peak}" + (", refused" if one.peak > limit else "")
        ours = "·" if found is None else _gib(found["programs"]["train step"]) + ("" if found["fits"] else ", refused")
        lines.append(f"| {model} | {topology} | {one.pairs} | {one.tokens} | {hand} | {ours} | {limit:.1f} |")
    return lines


def _gib(size: float | None) -> str:
    return "more" if size is None else f"{size / GIB:.1f}"


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
    wanted: dict[str, Callable[[Budget], dict[str, Any] | None]] = {
        f"{m}/{k}/{d}": partial(fill, m, k, d) for m in MODELS for k in TRAININGS for d in SIZES
    }
    wanted |= {f"config/{name}": partial(plan_config, name) for name in CONFIGS}
    wanted |= {f"written/{name}": partial(plan_written, name) for name in WRITTEN}
    for name, make in wanted.items():
        if options.show or name in cells or not re.search(options.only, name):
            continue
        found = make(budget)
        if found is None:
            break
        cells[name] = found
        write_atomically(path, json.dumps(cells, indent=1, sort_keys=True) + "\n")
    write_atomically(DOCS / "capacity.md", table(cells))
    say(f"{sum(name in cells for name in wanted)} of {len(wanted)} cells: {DOCS / 'capacity.md'}")


if __name__ == "__main__":
    main()
