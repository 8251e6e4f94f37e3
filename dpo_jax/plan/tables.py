"""A plan, and a search, as tables on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dpo_jax.config import DistillRun, PlanRun, SFTRun
from dpo_jax.plan.estimate import Estimate, assumptions, crossing
from dpo_jax.plan.hardware import GIB, Topology
from dpo_jax.plan.outcome import Outcome, Planned
from dpo_jax.plan.search import Candidate
from dpo_jax.plan.shapes import parameters


def show(options: PlanRun, made: Planned, console: Console) -> None:
    """Print a plan."""
    job, topology, train = made.job, made.topology, made.job.run.train
    mesh = " x ".join(f"{name} {size}" for name, size in made.outcomes[0].figures["mesh"].items())
    name = options.model_shape or job.run.model
    _say(
        console,
        f"{job.word} of {name} ({parameters(job.shape) / 1e9:.2f} B parameters) on {topology.devices} x"
        f" {topology.hardware.kind} ({topology}), {mesh}",
    )
    rows = f"{train.batch_size} rows" + (f" in {train.accumulate} micro-batches" if train.accumulate > 1 else "")
    tokens = f"{job.response} tokens" if not job.prompt else f"{job.prompt} + {job.response} tokens"
    run = job.run
    without = isinstance(run, SFTRun | DistillRun)
    layout = "" if without else f", layout {train.settled.layout}"
    _say(console, f"{rows} of {tokens}, {train.dtype}, remat {train.remat}{layout}")
    _memory_table(made, console)
    for outcome in made.outcomes:
        if outcome.estimate is None:
            _say(console, f"{outcome.name}: {outcome.figures['refused']['said']}")
        else:
            _show_movement(outcome, topology, console)
    for outcome in made.outcomes:
        if outcome.estimate is not None:
            _show_estimate(outcome, outcome.estimate, console)
    if made.seconds is not None:
        _show_price(options, made, made.seconds, console)
    _say(console, "\n  ".join(["assumed:", *assumptions(topology, train.dtype, options.assume)]))


def _memory_table(made: Planned, console: Console) -> None:
    table = Table("program", "arguments", "temporaries", "peak", "of", "fits", "compiled in", title="GiB of one device")
    for outcome in made.outcomes:
        memory = outcome.figures.get("memory")
        parts = ["-", "-"] if memory is None else [_gib(memory["arguments"]), _gib(memory["temporaries"])]
        peak = "-" if outcome.peak is None else _gib(outcome.peak)
        fits = "yes" if outcome.fits else "no"
        table.add_row(outcome.name, *parts, peak, _gib(outcome.limit), fits, f"{outcome.figures['seconds']:.0f} s")
    console.print(table)
    for outcome in made.outcomes:
        if host := outcome.figures.get("memory", {}).get("host"):
            _say(console, f"{outcome.name}: {_gib(host)} GiB more of each device wait in its host's memory")


def _show_movement(outcome: Outcome, topology: Topology, console: Console) -> None:
    collectives: Sequence[Mapping[str, Any]] = outcome.figures["collectives"]
    if not collectives:
        _say(console, f"{outcome.name}: no collectives")
        return
    columns = ("collective", "devices", "times", "GB carried", "GB a device sends", "waited for")
    table = Table(*columns, title=outcome.name)
    if topology.slices > 1:
        table.add_column("GB to other slices")
    for one in collectives:
        sizes = [f"{one[name] / 1e9:.3f}" for name in ("payload", "sent", "waits", "crosses")[: len(table.columns) - 3]]
        table.add_row(one["kind"], str(one["devices"]), f"{one['count']:.0f}", *sizes)
    console.print(table)
    if (network := topology.hardware.network) is not None and topology.slices > 1:
        crosses = crossing(outcome.figures)
        _say(
            console,
            f"{outcome.name}: a device sends {crosses / 1e9:.3f} GB to other slices, {crosses / network:.3g} s at the"
            f" published {network / 1e9:.4g} GB/s of a device",
        )


def _show_estimate(outcome: Outcome, made: Estimate, console: Console) -> None:
    figures = outcome.figures
    _say(
        console,
        f"{outcome.name}: {figures['flops']:.3g} model FLOPs ({figures['computed']:.3g} computed),"
        f" {made.intensity:.0f} FLOPs a byte of memory traffic (compute-bound from {made.ridge:.0f}),"
        f" attention {figures['attention']}",
    )
    _say(
        console,
        f"  compute {made.compute:.3g} s, memory {made.memory:.3g} s, links {made.links:.3g} s"
        f" ({made.waits:.3g} s of it hidden by nothing),"
        f" network {made.network:.3g} s: between"
        f" {made.fastest:.3g} and {made.slowest:.3g} s, bound by {made.bound};"
        f" {made.tokens_per_second:,.0f} tokens/s, MFU {made.mfu:.0%}",
    )


def _show_price(options: PlanRun, made: Planned, seconds: float, console: Console) -> None:
    price = options.price_per_device_hour
    if price is None:
        return
    step = seconds / 3600 * made.topology.devices * price
    tokens = made.outcomes[0].figures["tokens"]
    steps = made.job.run.train.steps
    whole = "" if steps is None else f", {steps} steps ${steps * step:,.2f}"
    _say(console, f"price: ${step:.4f} a step, ${step / tokens * 1e6:.2f} a million tokens{whole}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def show_search(tried: Sequence[tuple[Candidate, Planned | str]], console: Console) -> None:
    """The candidates of a search that were compiled: those that fit by estimated tokens a second, then the others."""
    table = Table("data\nx fsdp\nx tensor", "remat", "micro-\nbatches", "GiB", "of", "s/step", "tokens/s", "MFU")
    for column in table.columns:
        column.no_wrap = True
    for candidate, made in tried:
        mesh = f"{candidate.mesh.data} x {candidate.mesh.fsdp} x {candidate.mesh.tensor}"
        head = (mesh, candidate.remat, str(candidate.accumulate))
        if isinstance(made, str):
            table.add_row(*head, made)
            continue
        worst, step = made.worst, made.outcomes[0].estimate
        sizes = ("-" if worst.peak is None else _gib(worst.peak), _gib(worst.limit))
        if made.fits and made.seconds is not None and step is not None:
            rate = step.tokens / made.seconds
            table.add_row(*head, *sizes, f"{made.seconds:.3g}", f"{rate:,.0f}", f"{step.mfu:.0%}", style="bold")
        else:
            table.add_row(*head, *sizes, "no room")
    console.print(table)
