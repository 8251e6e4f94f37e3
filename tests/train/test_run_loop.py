"""The training loop with a toy step: exact resume, signals, the guard, evaluation. No model is involved."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from dpo_jax import state as states
from dpo_jax.config import OptimizerConfig
from dpo_jax.errors import InputError
from dpo_jax.files.log import CLOCK_KEYS, MetricLog, read_metrics
from dpo_jax.mesh import ShardedStep, make_mesh, replicated
from dpo_jax.train.loop import Outcome, Plan, fit
from dpo_jax.train.stopping import best_step, without_gain
from dpo_jax.weights.orbax.checkpoint import Checkpoints


@struct.dataclass
class Batch:
    x: np.ndarray
    rows: np.ndarray


class Loader:
    """Batches of 8 rows that depend on their position only."""

    def __init__(self, position: int = 0, poison: int | None = None, after=None):
        self.position, self.poison, self.after = position, poison, after

    def __iter__(self):
        while True:
            rng = np.random.default_rng(self.position)
            x = rng.standard_normal((8, 4)).astype(np.float32)
            if self.position + 1 == self.poison:
                x[3] = np.nan
            self.position += 1
            if self.after is not None:
                self.after(self.position)
            yield Batch(x, np.arange(8, dtype=np.int32) + 100 * self.position)

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}


def loss(variables, x):
    return jnp.square(x @ variables["params"]["kernel"] - 1.0).sum(axis=1)


def step(state, batch):
    def mean(trainable):
        rows = loss(trainable, batch.x)
        return rows.mean(), rows

    (value, rows), gradients = jax.value_and_grad(mean, has_aux=True)(state.trainable)
    bad = jnp.where(jnp.isfinite(rows), -1, batch.rows)
    metrics = {"loss": value, "tokens": jnp.float32(batch.x.size), "rows/nonfinite": bad}
    return state.apply_gradients(gradients), metrics


MESH = make_mesh()


def fresh_state():
    params = {"kernel": jax.device_put(jnp.ones((4, 2)), replicated(MESH))}
    return states.create(loss, {"params": params}, states.make_optimizer(OptimizerConfig(learning_rate=0.05)))


def run(folder: Path, *, steps: int = 12, poison: int | None = None, after=None, **plan) -> Outcome:
    """One command: a new run in `folder`, or its continuation."""
    plan = {"checkpoint_every": 4, **plan}
    checkpoints = Checkpoints(folder / "checkpoints", keep=2, best=plan.get("best"))
    restored = checkpoints.restore(fresh_state())
    state, start, position = (fresh_state(), 0, 0) if restored is None else (restored.state, restored.step, None)
    loader = Loader(restored.data["position"] if position is None else 0, poison, after)

    def evaluate(state):
        return {"norm": float(jnp.sum(state.trainable["params"]["kernel"] ** 2))}

    try:
        with MetricLog(folder, total=steps, start=start) as log:
            return fit(
                state,
                ShardedStep(step, MESH),
                loader,
                plan=Plan(steps, **plan),
                mesh=MESH,
                log=log,
                checkpoints=checkpoints,
                evaluate=evaluate,
            )
    finally:
        checkpoints.close()


def metrics(folder: Path) -> list[dict]:
    """The log without its wall-clock figures."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCK_KEYS} for row in rows]


def kernel(outcome: Outcome) -> np.ndarray:
    return np.array(outcome.state.trainable["params"]["kernel"])


def interrupt_at(position: int, number: int):
    def after(now: int) -> None:
        if now == position:
            os.kill(os.getpid(), number)

    return after


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """An uninterrupted run of 12 steps: its folder and its last weights."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = run(folder, eval_every=3)
    assert outcome.stopped_by is None
    return folder, kernel(outcome)


def test_the_log(whole: tuple[Path, np.ndarray]) -> None:
    rows = read_metrics(whole[0] / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "eval_norm" in row] == [3, 6, 9, 12]
    assert all(row["tokens_per_second"] > 0 and row["seconds_per_step"] > 0 for row in rows)
    assert not any(name.startswith("rows/") for row in rows for name in row)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert list((whole[0] / "tensorboard").glob("events*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [1, 5, 12])
def test_a_signal_saves_and_the_rerun_is_exact(tmp_path: Path, whole, at: int, number: int) -> None:
    before = signal.getsignal(number)
    outcome = run(tmp_path, eval_every=3, after=interrupt_at(at, number))
    assert outcome.stopped_by == number
    assert outcome.step == at
    assert signal.getsignal(number) == before
    assert len(metrics(tmp_path)) == at
    outcome = run(tmp_path, eval_every=3)
    assert outcome.stopped_by is None
    np.testing.assert_array_equal(kernel(outcome), whole[1])
    assert metrics(tmp_path) == metrics(whole[0])


_COMPILING = """
import ctypes, signal, sys, threading, time
from dpo_jax.train.loop import StopRequest
from dpo_jax.train.stopping import best_step, without_gain
with StopRequest() as stop:
    print("ready", flush=True)
    # A foreign call that runs no handler of Python's, as a compilation is.
    left = 20
    while left:
        left = ctypes.CDLL(None).sleep(left)
    print("never", flush=True)
"""


def test_ctrl_c_during_a_compilation_is_heard_at_once() -> None:
    """The first is acknowledged while the main thread is still inside; the second ends the process, with 130."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "XLA_FLAGS": ""}
    command = [sys.executable, "-c", _COMPILING]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        first = next(line for line in process.stderr if line.startswith("SIGINT"))  # others are of libraries
        assert first == "SIGINT: stopping after this step, which is saved; Ctrl-C again stops at once, unsaved\n"
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        assert process.stderr.read() == "dpo-jax: interrupted\n"
        assert process.stdout.read() == ""


class Killed(Exception):
    """Stands for SIGKILL: nothing is saved on the way out."""


@pytest.mark.parametrize("at", [2, 7, 11])
def test_a_crash_resumes_exactly_from_the_last_checkpoint(tmp_path: Path, whole, at: int) -> None:
    def crash(now: int) -> None:
        if now == at:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, eval_every=3, after=crash)
    outcome = run(tmp_path, eval_every=3)
    np.testing.assert_array_equal(kernel(outcome), whole[1])
    assert metrics(tmp_path) == metrics(whole[0])


def test_a_torn_last_line_is_repeated(tmp_path: Path, whole) -> None:
    run(tmp_path, eval_every=3, after=interrupt_at(5, signal.SIGTERM))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    run(tmp_path, eval_every=3)
    assert metrics(tmp_path) == metrics(whole[0])


def test_lost_metrics_are_refused(tmp_path: Path) -> None:
    run(tmp_path, after=interrupt_at(5, signal.SIGTERM))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(InputError, match="does not hold steps 1 to 5"):
        run(tmp_path)


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    first = run(tmp_path, steps=3)
    again = run(tmp_path, steps=3)
    assert again.stopped_by is None
    np.testing.assert_array_equal(kernel(first), kernel(again))


@pytest.mark.parametrize("poison", [6, 8])
def test_the_guard_names_step_and_rows_and_saves_nothing_bad(tmp_path: Path, poison: int) -> None:
    with pytest.raises(InputError, match=rf"step {poison}: loss is nan, from row {poison}03 of the data") as caught:
        run(tmp_path, poison=poison)
    assert "\n" not in str(caught.value)
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, poison))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    restored = checkpoints.restore(fresh_state())
    assert restored is not None
    assert restored.step == 4
    assert np.isfinite(np.array(restored.state.trainable["params"]["kernel"])).all()
    checkpoints.close()


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_an_undefined_figure_is_left_out_and_a_broken_one_stops_the_run(tmp_path: Path, weight: float) -> None:
    def odd(state, batch):
        state, metrics = step(state, batch)
        here = jnp.where(state.step == 2, weight, 5.0)
        value = jnp.where(state.step == 2, jnp.nan, 0.5)
        return state, metrics | {"rewards/accuracies": value, "weights/rewards/accuracies": here}

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    arguments = {"plan": Plan(4, checkpoint_every=2), "mesh": MESH, "checkpoints": checkpoints}
    with MetricLog(tmp_path, total=4) as log:
        if weight:
            with pytest.raises(InputError, match="step 2: rewards/accuracies is nan"):
                fit(fresh_state(), ShardedStep(odd, MESH), Loader(), log=log, **arguments)
        else:
            assert fit(fresh_state(), ShardedStep(odd, MESH), Loader(), log=log, **arguments).stopped_by is None
    checkpoints.close()
    found = [row.get("rewards/accuracies") for row in metrics(tmp_path)]
    assert found == ([0.5] if weight else [0.5, None, 0.5, 0.5])
    assert not any(name.startswith("weights/") for row in metrics(tmp_path) for name in row)


def test_weights_that_overflow_are_not_saved(tmp_path: Path) -> None:
    """The loss of step 4 is finite, and its update is not."""
    state = fresh_state()

    def overflow(state, batch):
        state, metrics = step(state, batch)
        scale = jnp.where(state.step == 4, jnp.inf, 1.0)
        return state.replace(trainable=jax.tree.map(lambda x: x * scale, state.trainable)), metrics

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    with (
        MetricLog(tmp_path, total=8) as log,
        pytest.raises(InputError, match="step 4: the update left a weight not finite, somewhere in rows 400"),
    ):
        fit(
            state,
            ShardedStep(overflow, MESH),
            Loader(),
            plan=Plan(8, checkpoint_every=2),
            mesh=MESH,
            log=log,
            checkpoints=checkpoints,
        )
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2"]


def test_the_best_is_kept(tmp_path: Path) -> None:
    run(tmp_path, eval_every=2, checkpoint_every=100, best="eval_norm")
    values = {row["step"]: row["eval_norm"] for row in metrics(tmp_path) if "eval_norm" in row}
    best = max(values, key=lambda s: values[s])
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
    assert kept == {10, 12, best}


def test_the_log_is_one_json_object_a_line(whole) -> None:
    for line in (whole[0] / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line), dict)


def test_it_ends_without_gain(tmp_path: Path) -> None:
    """The same step with and without an interruption, and a run that has ended stays there."""
    plan = {"eval_every": 1, "checkpoint_every": 100, "best": "eval_norm", "stop_after": 3}
    outcome = run(tmp_path / "a", steps=60, **plan)
    values = [row["eval_norm"] for row in metrics(tmp_path / "a") if row["step"]]
    best = 1 + values.index(max(values))
    assert outcome.ended_early
    assert outcome.step == len(values) == best + 3 < 60
    run(tmp_path / "b", steps=60, after=interrupt_at(best + 1, signal.SIGTERM), **plan)
    for _ in range(2):
        again = run(tmp_path / "b", steps=60, **plan)
        assert (again.step, again.ended_early, again.stopped_by) == (outcome.step, True, None)
        np.testing.assert_array_equal(kernel(again), kernel(outcome))
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")
    assert {int(p.name) for p in (tmp_path / "b" / "checkpoints").iterdir()} == {best, best + 2, best + 3}


def test_gain_and_the_best_step() -> None:
    rows = [{"step": i, "eval_loss": loss} for i, loss in enumerate((0.1, 3.0, 2.0, 2.0, 2.5))]
    assert without_gain(rows, "eval_loss") == 2  # equal is no gain, and what was before the first step no evaluation
    assert without_gain(rows, "eval_reward") == 0
    assert best_step(rows, "eval_loss", [1, 2, 3, 4]) == 3  # of equals the newest, which is the one that is kept
    assert best_step(rows, "eval_loss", [1, 4]) == 4
    assert best_step(rows, "eval_loss", []) == -1


def test_a_metric_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--checkpoint.best eval_reward: the evaluation gives eval_norm$"):
        run(tmp_path, eval_every=2, best="eval_reward")


def test_a_clock_that_runs_back(tmp_path: Path, whole, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any two looks at the wall clock it is an hour earlier; nothing is decided or measured by it."""
    hours = itertools.count()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(hours))
    outcome = run(tmp_path, eval_every=3)
    np.testing.assert_array_equal(kernel(outcome), whole[1])
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics(tmp_path) == metrics(whole[0])
    assert all(row["seconds_per_step"] > 0 and row.get("seconds_saving", 1) > 0 for row in rows)
    assert [row["step"] for row in rows if "seconds_saving" in row] == [5, 9]
