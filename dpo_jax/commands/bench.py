"""`dpo-jax bench`: what a training command does on the devices that are here, beside what the planner says of it."""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.table import Table

from dpo_jax.commands import dpo, reward
from dpo_jax.commands.plan import job_of
from dpo_jax.config import ON_COMMAND_LINE, BenchRun, DPORun, RewardRun, SFTRun
from dpo_jax.data.tokens.templates import RAW, today, writes_date
from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_json
from dpo_jax.files.log import say
from dpo_jax.mesh import make_mesh, put_batch
from dpo_jax.plan import programs, worker
from dpo_jax.plan.jobs import Job
from dpo_jax.plan.measured import made, measured, sampled, topology_here
from dpo_jax.plan.programs_sampled import sampler_calls
from dpo_jax.plan.shapes import parameters
from dpo_jax.sample import with_layout
from dpo_jax.train.row_data import preference_loader
from dpo_jax.train.sft_data import load_both
from dpo_jax.weights.opened import open_checkpoint
from dpo_jax.weights.orbax.checkpoint import Checkpoints

Figures = dict[str, Any]


def bench(options: BenchRun) -> Figures:
    """Compile and run the programs of `options.training`; print a table, write `options.out`, return what is in it.

    Raises `InputError` for options that make no step, sizes that do not divide over the devices, a program that does
    not fit into their memory, and data that cannot be read.
    """
    job = job_of(options, "")
    sizes = job.run.mesh
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, sizes.context)
    devices = list(mesh.devices.flat)
    result: Figures = {
        "command": job.word,
        "model": options.model_shape or job.run.model,
        "parameters": parameters(job.shape),
        "device": {"kind": devices[0].device_kind, "count": len(devices), "jax": jax.__version__},
        "mesh": dict(mesh.shape),
        "rows": job.run.train.batch_size,
        "prompt_tokens": job.prompt,
        "response_tokens": job.response,
        "programs": {},
    }
    console = Console(width=max(Console().width, 100))  # the table wants so much
    console.print(
        f"{job.word} of {result['model']} ({result['parameters'] / 1e9:.2f} B parameters) on {len(devices)} x"
        f" {devices[0].device_kind}: {result['rows']} rows of {job.prompt} + {job.response} tokens, random weights",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for section, name, figures in _sections(options, job, mesh):
        if section == "programs":
            result["programs"][name] = figures
        else:
            result[section] = figures
        if options.out is not None:
            write_json(Path(options.out), result)
    _show(result, console)
    return result


def _sections(options: BenchRun, job: Job, mesh: Mesh) -> Iterator[tuple[str, str, Figures]]:
    """Section, name and figures of everything that is measured, one after another."""
    for name in programs.names(job.run):
        say(f"measuring: {name}")
        figures, state = _program(dataclasses.replace(job, program=name), mesh, options.seconds)
        yield "programs", name, figures
        if name == "train step" and options.checkpoint:
            say("measuring: a checkpoint of the training state")
            yield "checkpoint", "", _checkpoint(state, options.folder)
        del state  # the next program wants its memory
    if job.run.data.files != ON_COMMAND_LINE and isinstance(job.run, DPORun | RewardRun | SFTRun):
        say("measuring: the loader")
        yield "loader", "", _loader(job.run, mesh, options.seconds)


def _program(job: Job, mesh: Mesh, budget: float) -> tuple[Figures, Any]:
    """Figures of a program, and the training state that it left (None for the others)."""
    program = worker.build(job, mesh, programs.Lengths(job.prompt, job.response))
    try:
        if program.step is None:
            return _sampler(job, mesh, budget), None
        dtype, here = job.run.train.dtype, topology_here(mesh)
        figures, held = measured(program, mesh, dtype, here, job.shape.vocab_size, budget=budget)
        return figures, held[0] if job.program == "train step" else None
    except jax.errors.JaxRuntimeError as failure:
        if "RESOURCE_EXHAUSTED" not in str(failure):
            raise
        said = str(failure).splitlines()[0][:200]
        raise InputError(
            f"{job.program} of {job.word} does not fit into the memory of {mesh.devices.flat[0].device_kind} ({said});"
            " lower --train.batch_size, raise --train.accumulate, or set --train.remat full"
        ) from failure


def _sampler(job: Job, mesh: Mesh, budget: float) -> Figures:
    """The sampler of an iteration, as `train/rollouts.py` calls it."""
    run: Any = job.run
    model = programs.make_model(run, job.shape)
    variables = made(programs.trained(run, model, mesh))
    lengths, group, _ = sampler_calls(run, programs.Lengths(job.prompt, job.response))
    rows = (run.rollout_batch_size or run.train.batch_size) // group
    config = dataclasses.replace(run.sample, max_new_tokens=lengths.response)
    # Here only the policy lies on the devices, in the run all that it holds; which layout fits is asked of that.
    first = dataclasses.replace(job, program=programs.names(run)[0])
    held = worker.build(first, mesh, programs.Lengths(job.prompt, job.response)).held
    config = with_layout(config, model, variables, mesh, held=held)
    return sampled(model, variables, (rows, lengths.prompt), mesh, config=config, samples=group, budget=budget)


def _checkpoint(state: Any, folder: str | None) -> Figures:
    """Seconds and MB/s of saving the whole state, until it is safe on the disk, and of restoring it."""
    try:
        path = Path(tempfile.mkdtemp(prefix="dpo-jax-bench-", dir=folder))
    except OSError as error:
        raise InputError(f"--folder {folder}: cannot be written ({error.strerror})") from error
    try:
        checkpoints = Checkpoints(path / "checkpoints", keep=1, say=say)
        start = time.perf_counter()
        checkpoints.save(state, data={})
        asked = time.perf_counter() - start
        checkpoints.wait()
        saved = time.perf_counter() - start
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        start = time.perf_counter()
        restored = checkpoints.restore(state)
        assert restored is not None, "it was just written"
        jax.block_until_ready(restored.state)
        read = time.perf_counter() - start
        checkpoints.close()
    finally:
        shutil.rmtree(path, ignore_errors=True)
    return {
        "megabytes": size / 1e6,
        "step_waits_seconds": asked,
        "save_seconds": saved,
        "save_mb_per_second": size / 1e6 / saved,
        "restore_seconds": read,
        "restore_mb_per_second": size / 1e6 / read,
    }


def _loader(run: DPORun | RewardRun | SFTRun, mesh: Mesh, budget: float) -> Figures:
    """Rows/s of the batches of `--data`, laid out on the devices, and the share of their tokens that are real."""
    opened = open_checkpoint(run.model)
    tokenizer, architecture = opened.tokenizer(), opened.architecture
    if run.data.date is None and run.data.template != RAW and writes_date(tokenizer, run.data.template):
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, date=today()))
    start = time.perf_counter()
    if isinstance(run, SFTRun):
        loader = load_both(run, tokenizer, architecture)[0].loader(steps=None, epochs=1.0, mesh=mesh)
    else:
        data, _ = (
            dpo.load_data(run, tokenizer, architecture.vocab_size)
            if isinstance(run, DPORun)
            else reward.load_data(run, tokenizer, architecture.vocab_size)
        )
        loader = preference_loader(run, mesh, data, epochs=1.0)
    read, rows, batches, real, laid = time.perf_counter() - start, 0, 0, 0, 0
    start = time.perf_counter()
    for batch in loader:
        jax.block_until_ready(put_batch(mesh, batch))
        rows += int(np.sum(np.asarray(batch.rows) >= 0))
        batches += 1
        real, laid = (total + one for total, one in zip((real, laid), _tokens(batch), strict=True))
        if time.perf_counter() - start > budget:
            break
    seconds = time.perf_counter() - start
    loader.close()
    return {
        "read_seconds": read,
        "batches": batches,
        "rows_per_second": rows / seconds,
        "tokens_per_second": real / seconds,
        "real_tokens_share": real / laid,
    }


def _tokens(batch: Any) -> tuple[int, int]:
    """Real tokens of a batch, and the places that it has for them."""
    if hasattr(batch, "segments"):
        return int((batch.segments > 0).sum()), batch.tokens.size
    if batch.windows is not None:
        return sum(int(one.real.sum()) for one in batch.windows), sum(one.real.size for one in batch.windows)
    real = int(batch.prompt_lengths.sum() + batch.response_lengths.sum())
    return real, batch.prompts.size + batch.responses.size


# ---------------------------------------------------------------- what is shown


def _show(result: Figures, console: Console) -> None:
    columns = {
        "compile\ns": lambda one: _number(one.get("compile_seconds"), ".1f"),
        "step, s\nmedian": lambda one: _number(one["seconds"], ".4g"),
        "\np95": lambda one: _number(one["p95"], ".4g"),
        "tokens/s": lambda one: _number(one["tokens_per_second"], ",.0f"),
        "MFU": lambda one: _number(one.get("mfu"), ".1%"),
        "GiB": lambda one: _number(one.get("peak_gib", one.get("peak_process_gib")), ".2f"),
        "plan\ns": lambda one: _plan(one.get("plan")),
    }
    table = Table("program", *columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for name, one in result["programs"].items():
        table.add_row(name, *(cell(one) for cell in columns.values()))
    console.print(table)
    for line in _lines(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _plan(plan: Figures | None) -> str:
    """If all overlaps, and if nothing does."""
    return "-" if plan is None else f"{plan['all_overlaps']:.3g}..{plan['nothing_overlaps']:.3g}"


def _lines(result: Figures) -> Iterator[str]:
    if (one := result["programs"].get("generate")) is not None:
        decoded = one.get("decoded_tokens_per_second")
        yield f"sampler: prefill {one['prefill_tokens_per_second']:,.0f} tokens/s" + (
            "" if decoded is None else f", decode {decoded:,.0f} tokens/s"
        )
    if (one := result.get("checkpoint")) is not None:
        yield (
            f"checkpoint: {one['megabytes']:,.0f} MB, written at {one['save_mb_per_second']:,.0f} MB/s (the step waits"
            f" {one['step_waits_seconds']:.2f} s), read at {one['restore_mb_per_second']:,.0f} MB/s"
        )
    if (one := result.get("loader")) is not None:
        yield (
            f"loader: {one['rows_per_second']:,.0f} rows/s, {one['tokens_per_second']:,.0f} real tokens/s, which are"
            f" {one['real_tokens_share']:.0%} of a batch"
        )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
