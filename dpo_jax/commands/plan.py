"""`dpo-jax plan`: what a training command needs on devices that are not here, before they are paid for."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from dpo_jax.config import BenchRun, PlanRun, RewardRun, SFTRun, TrainingRun
from dpo_jax.config.command_line.config_text import config_text
from dpo_jax.config.command_line.words import COMMANDS
from dpo_jax.errors import DoesNotFit, InputError
from dpo_jax.files.folder import write_atomically, write_json
from dpo_jax.files.log import ProgressBar, say
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.plan import compiling
from dpo_jax.plan.hardware import Topology
from dpo_jax.plan.jobs import Job
from dpo_jax.plan.outcome import Outcome, Planned, as_result
from dpo_jax.plan.programs import Lengths, lengths_of, names
from dpo_jax.plan.search import Candidate, Frontier, candidates
from dpo_jax.plan.shapes import shape_of, teacher_of
from dpo_jax.plan.tables import show, show_search

_PADDING = 1024
"""Rows by which the matrices of one vocabulary may differ in size."""


def plan(options: PlanRun) -> dict[str, Any]:
    """Compile what `options.training` would run; print what it needs, write `options.out`, and return what is in it.

    With `options.search` the same for the best of many ways to run it.

    Raises `InputError` for options that make no step, and `DoesNotFit` after the report where a program does not fit.
    """
    topology, job = first_job(options)
    folder, console = compiling.plans_folder(options.cache), Console()
    result: dict[str, Any] = {}
    if options.search:
        tried, left = search(options, topology, job, folder)
        show_search(tried, console)
        if left:
            console.print(f"{left} more candidates may be better: --search_limit {len(tried) + left} goes on from here")
        result["search"] = [as_row(candidate, made) for candidate, made in tried]
        made = tried[0][1]
        if not isinstance(made, Planned):
            raise InputError(f"--search: none of {len(tried)} candidates could be compiled; the first: {made}")
    else:
        made = compile_plan(options, topology, job, folder)
    result = as_result(options, made) | result
    if options.out is not None:
        write_json(Path(options.out), result)
    show(options, made, console)
    if not made.fits:
        raise DoesNotFit(f"{made.worst.name} {made.worst.describe()}")
    if options.write_config is not None:
        write_atomically(Path(options.write_config), config_text(made.job.run, _docstring(options, made)))
        say(f"written: {options.write_config}")
    return result


def _docstring(options: PlanRun, made: Planned) -> str:
    """Of a CONFIG.py that a search found."""
    job, name = made.job, options.model_shape or made.job.run.model
    return (
        f"{job.word} of {name} on {made.topology}: the best that `dpo-jax plan --search` found.\n\n"
        f"{job.prompt} + {job.response} tokens a row: {made.worst.describe()} a device, estimated"
        f" {made.seconds:.3g} s a step."
    )


def word_of(run: TrainingRun) -> str:
    """The command whose options these are."""
    return next(word for word, command in COMMANDS.items() if command.options is type(run))


def first_job(options: PlanRun) -> tuple[Topology, Job]:
    """The devices, and the training step as a job. Raises `InputError` for options that make none."""
    topology = Topology.parse(options.topology)
    return topology, job_of(options, str(topology))


def job_of(options: PlanRun | BenchRun, topology: str) -> Job:
    """The training step of the command that `options` are about. Raises `InputError` for options that make none."""
    run = options.training
    if run is None:
        raise InputError(f"{type(options).__name__}.training: the options of a training command are missing")
    shape, _ = shape_of(run, options.model_shape)
    teacher = teacher_of(run, options.teacher_shape if isinstance(options, PlanRun) else None)
    lengths = lengths_of(run, options.prompt_tokens, options.response_tokens)
    _check(run, shape, lengths, options)
    if teacher is not None:
        _check_teacher(shape, teacher, lengths)
    return Job(word_of(run), names(run)[0], run, shape, topology, lengths.prompt, lengths.response, teacher)


def _check(run: TrainingRun, shape: LlamaConfig, lengths: Lengths, options: PlanRun | BenchRun) -> None:
    if isinstance(run, SFTRun) and options.prompt_tokens is not None:
        raise InputError("--prompt_tokens has no effect: a window of text has no prompt; give --response_tokens")
    if shape.num_labels and not isinstance(run, RewardRun):
        raise InputError(f"--model {run.model}: is a reward model, and {word_of(run)} trains a language model")
    if lengths.response < 1:
        raise InputError(f"--prompt_tokens {lengths.prompt} leaves no response in --data.max_length; lower it")
    if (total := lengths.prompt + lengths.response) > shape.max_position:
        raise InputError(f"rows of {total} tokens exceed the model's context of {shape.max_position}; lower lengths")


def _check_teacher(shape: LlamaConfig, teacher: LlamaConfig, lengths: Lengths) -> None:
    if abs(shape.vocab_size - teacher.vocab_size) > _PADDING:
        raise InputError(
            f"the teacher has another vocabulary than the model ({teacher.vocab_size} and {shape.vocab_size} ids), and"
            " distributions over tokens are compared; take a teacher with the same tokenizer"
        )
    if (total := lengths.prompt + lengths.response) > teacher.max_position:
        raise InputError(
            f"rows of {total} tokens exceed the teacher's context of {teacher.max_position}; lower lengths"
        )


def compile_plan(options: PlanRun, topology: Topology, job: Job, folder: Path, *, quiet: bool = False) -> Planned:
    """Compile the programs of a job's command, one after another; none after one that does not fit."""
    outcomes: list[Outcome] = []
    for name in names(job.run):
        one = dataclasses.replace(job, program=name)
        if not quiet and compiling.stored(one, folder) is None:
            say(f"compiling {name} of {job.word} for {topology} (about a minute or two)")
        figures = compiling.figures_of(one, folder)
        outcomes.append(Outcome.of(name, figures, options, topology))
        if not outcomes[-1].fits:
            break
    return Planned(topology, job, tuple(outcomes))


# ---------------------------------------------------------------- search


def search(options: PlanRun, topology: Topology, job: Job, folder: Path) -> tuple[list[tuple[Candidate, Any]], int]:
    """Compile candidates, the most promising first.

    Returns what came out, the best first (a `Planned`, or why there is none), and how many candidates are left that
    might be better.
    """
    lengths = Lengths(job.prompt, job.response)
    frontier = Frontier(candidates(job.run, job.shape, topology, lengths))
    limit = options.settled.search_limit
    tried: list[tuple[Candidate, Planned | str]] = []
    with ProgressBar("compiled", limit) as bar:
        for candidate in frontier:
            if len(tried) == limit:
                frontier.return_to(candidate)
                break
            bar.update(len(tried), candidate.describe())
            one = dataclasses.replace(job, run=candidate.options(job.run))
            try:
                made: Planned | str = compile_plan(options, topology, one, folder, quiet=True)
            except (InputError, compiling.CompilerFailed) as error:
                made = " ".join(str(error).split())[:200]
            else:
                frontier.learn(candidate, made.fits)
            tried.append((candidate, made))
        bar.update(len(tried))
    return sorted(tried, key=lambda one: _rank(one[1])), frontier.left


def _rank(made: Planned | str) -> tuple[int, float]:
    """Those that fit by their time, then those that do not by their size, then those that failed."""
    if isinstance(made, str):
        return 2, 0.0
    if made.fits and made.seconds is not None:
        return 0, made.seconds
    return 1, made.worst.peak or math.inf


def as_row(candidate: Candidate, made: Planned | str) -> dict[str, Any]:
    """A candidate in plan.json."""
    row = {"mesh": dataclasses.asdict(candidate.mesh), "remat": candidate.remat, "accumulate": candidate.accumulate}
    if isinstance(made, str):
        return row | {"error": made}
    sizes = {"fits": made.fits, "peak_bytes": made.worst.peak, "limit_bytes": made.worst.limit}
    return row | sizes | {"seconds_a_step": made.seconds}
