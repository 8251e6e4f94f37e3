"""The one training loop. It knows nothing of the algorithm: a state, a step, batches in; log rows and checkpoints out.

While the devices compute step n, the host logs step n - 1 and prepares the batch of step n + 1; only evaluation and
checkpoints wait for the devices.

Where a run resumes: at the newest intact checkpoint, with the state, the position in the data and the log as they were
there. Every batch is a function of the seed and the position and every step a function of state and batch, so the
steps after it come out bit for bit as they would have without the interruption.
"""

import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpo_jax.align.figures import defined
from dpo_jax.errors import InputError
from dpo_jax.files.log import MetricLog, Row, say, show_cursor
from dpo_jax.mesh import put_batch
from dpo_jax.processes import distributed
from dpo_jax.processes.distributed import leave
from dpo_jax.state import TrainState
from dpo_jax.train.accounting import Meter
from dpo_jax.train.stopping import without_gain
from dpo_jax.weights.orbax.checkpoint import Checkpoints
from dpo_jax.weights.orbax.local import LocalCheckpoints

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
PER_ROW = "rows/"
"""Metrics under this prefix are int32 [B] or [B, S]: numbers of rows that are to blame, -1 elsewhere, for the guard."""


class Loader(Protocol):
    """Batches in order, and where in that order it stands.

    A batch has `rows`, those of the data set that it holds: int32 [B] or [B, S], -1 for fillers.
    """

    @property
    def steps_per_epoch(self) -> float: ...

    def __iter__(self) -> Iterator[Any]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: Mapping[str, Any]) -> None: ...

    def summary(self) -> str: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """When what happens, in steps."""

    steps: int
    checkpoint_every: int
    local_every: int = 0
    """Between checkpoints on each host's own disk, where there are any."""
    steps_per_epoch: float | None = None
    eval_every: int | None = None
    eval_first: bool = False
    best: str | None = None
    """Metric of the evaluation whose best checkpoint is kept: there is one after every evaluation."""
    stop_after: int | None = None
    """End after so many evaluations in which `best` has not become better."""
    sample_every: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What the loop hands back: the last state, its step, the signal that asked to stop, if one did, and whether it
    ended since `Plan.stop_after` evaluations brought no gain.
    """

    state: TrainState
    step: int
    stopped_by: int | None = None
    ended_early: bool = False


def fit(
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, jax.Array]]],
    loader: Loader,
    *,
    plan: Plan,
    mesh: Mesh,
    log: MetricLog,
    checkpoints: Checkpoints,
    local: LocalCheckpoints | None = None,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    meter: Meter | None = None,
    prepare: Callable[[TrainState, Any], tuple[Any, Row]] | None = None,
    sample: Callable[[TrainState], None] | None = None,
) -> Outcome:
    """Train from `state.step` to `plan.steps`.

    Args:
      state: donated.
      step: a jitted step, `mesh.ShardedStep`.
      loader: stands at the batch after `state.step`.
      local: checkpoints on each host's own disk, at the steps of `plan.local_every` that make no other.
      evaluate: figures of a state; logged as `eval_...` in the row of its step (before the first one: of step 0).
      meter: gives the figures of the devices' use for the row of each step.
      prepare: makes the step's batch of the loader's one and of the state before the step (PPO's rollout), and figures
        for the row of that step. With it the host waits for every step before it goes on to the next.
      sample: lets the policy of a state write, before the first step too, and keeps what it wrote.

    Returns:
      An `Outcome`. SIGTERM and SIGINT save at the next step boundary and end the loop early. `seconds_saving` in the
      row of a step is how long training stood still for the save in front of it, since the row of the step that was
      saved is on the disk before its checkpoint is.

    Raises:
      InputError: a figure or a weight is not finite (the step and the rows are named; nothing of it is saved), or the
        disk is full.
    """
    done = int(jax.device_get(state.step))
    stopping = False
    ended = _ended(plan, log)
    pending: _Pending | None = None
    with StopRequest() as stop:
        if evaluate is not None and plan.eval_first and done == 0:
            log.write({"step": 0, **_evaluated(0, evaluate(state), plan.best)})
        if sample is not None and done == 0:
            sample(state)
        mark = time.perf_counter()
        saving_took: Row = {}
        for batch in itertools.islice(iter(loader), 0 if ended else plan.steps - done):
            figures, saving_took = saving_took, {}
            if prepare is not None:
                batch, made = prepare(state, batch)
                figures |= made
            on_device = put_batch(mesh, batch)
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, on_device)
            del on_device
            done += 1
            epoch = None if plan.steps_per_epoch is None else done / plan.steps_per_epoch
            rates = None if meter is None else partial(meter.rates, meter.flops_of(batch))
            waiting = _Pending(done, epoch, metrics, np.asarray(batch.rows), rates, figures)
            previous, pending = pending, waiting
            if previous is not None:
                row = previous.fetch(mark)
                mark = time.perf_counter()
                log.write(row)
            stopping = stop.here()
            last = done == plan.steps
            evaluating = evaluate is not None and (last or (plan.eval_every and done % plan.eval_every == 0))
            sampling = sample is not None and (last or (plan.sample_every and done % plan.sample_every == 0))
            saving = last or stopping or done % plan.checkpoint_every == 0 or (evaluating and plan.best is not None)
            nearby = local is not None and not saving and done % plan.local_every == 0
            if not (evaluating or sampling or saving or nearby or prepare is not None):
                continue
            row = pending.fetch(mark)
            if evaluating:
                assert evaluate is not None
                row |= _evaluated(done, evaluate(state), plan.best)
            log.write(row)
            ended = _ended(plan, log)
            if sample is not None and (sampling or ended):
                sample(state)
            if saving or nearby:
                began = time.perf_counter()
                _refuse_nonfinite(state, pending)
                log.sync()
                where = local if nearby and local is not None else checkpoints
                where.save(state, data=loader.get_state(), metrics=row)
                saving_took = {"seconds_saving": time.perf_counter() - began}
            pending = None
            mark = time.perf_counter()
            if stopping or ended:
                break
        checkpoints.wait()
    if not (stopping or ended) and done != plan.steps:
        raise RuntimeError(f"the loader ended at step {done} of {plan.steps}")
    return Outcome(state, done, stop.number if stopping else None, ended)


@dataclass(frozen=True)
class _Pending:
    """A step whose figures are still being computed."""

    step: int
    epoch: float | None
    metrics: Mapping[str, jax.Array]
    rows: np.ndarray
    rates: Callable[[float], Row] | None
    figures: Row

    def fetch(self, mark: float) -> Row:
        """Wait for this step; its row of the log.

        `mark` is when the step before was fetched. Figures that this batch leaves undefined are left out
        (`align/figures.py`). Raises `InputError` when one of the others is not finite.
        """
        values = jax.device_get(dict(self.metrics))
        seconds = time.perf_counter() - mark
        row: Row = {"step": self.step} if self.epoch is None else {"step": self.step, "epoch": self.epoch}
        row |= defined({name: float(value) for name, value in values.items() if not name.startswith(PER_ROW)})
        row |= self.figures
        bad = [f"{name} is {value}" for name, value in row.items() if not math.isfinite(value)]
        if bad:
            per_row = [np.asarray(value) for name, value in values.items() if name.startswith(PER_ROW)]
            raise InputError(_not_finite(self.step, bad[0], self.blame(per_row)))
        row["seconds_per_step"] = seconds
        if "tokens" in row:
            row["tokens_per_second"] = row["tokens"] / seconds
        if self.rates is not None:
            row |= self.rates(seconds)
        return row

    def blame(self, per_row: list[np.ndarray]) -> str:
        """The rows to name: those that a per-row figure gives, or else all of the batch."""
        guilty = {int(row) for rows in per_row for row in rows.ravel() if row >= 0}
        among = sorted(guilty or {int(row) for row in self.rows.ravel() if row >= 0})
        numbers = f"row{'s' * (len(among) > 1)} {', '.join(map(str, among))} of the data"
        return f"from {numbers}" if guilty else f"somewhere in {numbers}"


def _ended(plan: Plan, log: MetricLog) -> bool:
    """Whether the evaluations in the log end the run: a run that goes on reads the same there."""
    if plan.stop_after is None or plan.best is None:
        return False
    return distributed.flag_from_main(without_gain(log.rows, plan.best) >= plan.stop_after)


def _evaluated(step: int, figures: Mapping[str, float], best: str | None) -> Row:
    row: Row = {f"eval_{name}": value for name, value in figures.items()}
    if best is not None and best not in row:
        raise InputError(f"--checkpoint.best {best}: the evaluation gives {', '.join(sorted(row))}")
    bad = [f"{name} is {value}" for name, value in row.items() if not math.isfinite(value)]
    if bad:
        raise InputError(_not_finite(step, bad[0], "from the evaluation data"))
    return row


def _not_finite(step: int, what: str, where: str) -> str:
    return (
        f"step {step}: {what}, {where}; the last checkpoint is intact: look at those rows, or lower"
        " --optimizer.learning_rate, and start again with another --out"
    )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def _refuse_nonfinite(state: TrainState, pending: _Pending) -> None:
    """Stop before a state with a NaN or infinity in it is saved over a good one."""
    if not bool(jax.device_get(_all_finite((state.trainable, state.opt_state)))):
        raise InputError(_not_finite(pending.step, "the update left a weight not finite", pending.blame([])))


class StopRequest:
    """Turns SIGTERM and SIGINT into a request that the loop reads; a second SIGINT ends the process at once.

    A thread hears of the signals too, at once: while the main thread compiles or waits for devices, Python's handlers
    do not run. It says that the first was heard, and ends the process at the second, which an exception raised
    somewhere inside the compiler would do with a crash.

    With several processes the signal may reach them at different steps, or only one of them, and they must stop at the
    same step. There jax listens for SIGTERM itself, from the moment the processes have found each other, and lets them
    agree on a step that none has begun yet (its preemption sync point); SIGINT is passed on to it as SIGTERM.
    """

    def __init__(self) -> None:
        self._asked = False
        self.number: int = signal.SIGTERM  # that of which other processes have heard
        self._before: dict[int, Any] = {}
        self._together = jax.process_count() > 1
        self._pipe: tuple[int, int] | None = None
        self._ears: threading.Thread | None = None

    def __enter__(self) -> Self:
        for number in (signal.SIGINT,) if self._together else (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:
                break  # not in the main thread, where alone handlers can be set: whoever runs the thread handles them
        if self._before:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._ears = threading.Thread(target=self._listen, daemon=True)
            self._ears.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None and self._ears is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._pipe[1])  # the thread reads the end of it
            self._ears.join()
            os.close(self._pipe[0])

    def _listen(self) -> None:
        """What the thread does: read the number of every signal that has a handler in Python."""
        assert self._pipe is not None
        interrupts = 0
        while number := os.read(self._pipe[0], 1):
            if number[0] not in self._before:
                continue
            interrupts += number[0] == signal.SIGINT
            if interrupts < 2:
                again = "; Ctrl-C again stops at once, unsaved" if interrupts else ""
                say(f"{signal.Signals(number[0]).name}: stopping after this step, which is saved{again}")
            else:
                end_now(INTERRUPTED, "interrupted")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked, self.number = True, number
        if self._together:
            signal.raise_signal(signal.SIGTERM)

    def here(self) -> bool:
        """Whether to stop after this step. With several processes all of them call this once a step."""
        return multihost_utils.reached_preemption_sync_point(next(_steps)) if self._together else self._asked


def end_now(code: int, line: str) -> None:
    """End this process from any thread, and with it the others of the run."""
    show_cursor()
    say(f"dpo-jax: {line}")
    leave(code, line)
    os._exit(code)


_steps = itertools.count(1)
"""Steps of all the loops that this process has run, by which jax's preemption sync point is agreed on."""
