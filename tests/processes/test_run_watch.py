"""Processes that watch each other: who counts as lost or stuck, and how a process leaves."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_jax.config import DistributedConfig
from dpo_jax.errors import BAD_INPUT, InputError
from dpo_jax.processes.watch import TRY_AGAIN, Judge, Watch

ROOT = Path(__file__).resolve().parents[2]


def note(
    beat: int, signs: int = 0, ended: str | None = None, host: str = "h", *, code: int = 1, passed_on: bool = False
) -> dict:
    return {"beat": beat, "signs": signs, "ended": ended, "host": host, "code": code, "passed_on": passed_on}


def judge() -> Judge:
    return Judge(0, 3, lost_after=10, stuck_after=100, now=0)


def test_a_process_without_beats_is_lost() -> None:
    court = judge()
    court.read({0: note(1), 1: note(1), 2: note(1, host="b")}, 1)
    for at in (3, 5, 7, 9):
        court.read({0: note(at), 1: note(at), 2: note(1, host="b")}, at)
    assert court.verdict(10, expecting=False) is None
    assert court.verdict(11.5, expecting=False) == "process 2 on b is lost: no sign of life for 10 s"
    assert "process 1 is lost" in (Judge(0, 2, lost_after=10, stuck_after=9, now=0).verdict(11, expecting=False) or "")


def test_a_process_that_stood_still_itself_blames_nobody() -> None:
    court = judge()
    for at in range(5):
        court.read({1: note(at), 2: note(at)}, at)
    court.read({1: note(4), 2: note(4)}, 60)
    assert court.verdict(60, expecting=True) is None
    court.read({1: note(5), 2: note(4)}, 64)
    assert "process 2" in (court.verdict(71, expecting=True) or "")


def test_one_that_finished_is_not_missed() -> None:
    court = judge()
    court.read({1: note(1, ended=""), 2: note(1)}, 1)
    for at in range(5, 36, 5):
        court.read({1: note(1, ended=""), 2: note(at)}, at)
    assert court.verdict(35, expecting=False) is None
    assert not court.alone(35, 5)
    assert court.alone(50, 5)


def test_an_error_elsewhere_ends_this_one_after_a_grace() -> None:
    court = judge()
    court.read({1: note(1, ended="row 3 is empty"), 2: note(1)}, 1)
    assert court.verdict(2, expecting=False) is None
    assert court.verdict(7, expecting=False) == "process 1 on h ended with an error: row 3 is empty"


def test_bad_input_elsewhere_is_bad_input_here() -> None:
    court = judge()
    court.read({1: note(1, ended="a bug"), 2: note(1)}, 1)
    assert court.code == TRY_AGAIN
    court.read({1: note(1, ended="a bug"), 2: note(2, ended="no space left", code=BAD_INPUT, passed_on=True)}, 2)
    assert court.code == BAD_INPUT


def test_what_is_said_of_a_third_is_passed_on_at_once() -> None:
    court = judge()
    court.read({1: note(1, ended="process 2 on b is lost", passed_on=True), 2: note(1, host="b")}, 1)
    assert court.verdict(1, expecting=False) == "process 2 on b is lost"


def test_no_progress_is_stuck_only_where_it_is_expected() -> None:
    court = judge()
    for at in range(0, 300, 5):
        court.read({0: note(at, 7), 1: note(at, 6), 2: note(at, 7)}, at)
        assert court.verdict(at, expecting=False) is None
    verdict = None
    for at in range(300, 405, 5):
        court.read({0: note(at, 7), 1: note(at, 6), 2: note(at, 7)}, at)
        verdict = court.verdict(at, expecting=True)
        assert (verdict is None) == (at <= 395)
    assert verdict is not None
    assert "no process has finished a step for 105 s" in verdict
    assert verdict.endswith("process 1")


class Store(dict):
    """The key-value store of one coordination service."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite
        self[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [(name, value) for name, value in self.items() if name.startswith(key)]


class Ended(Exception):
    pass


@pytest.mark.parametrize(("code", "other"), [(1, TRY_AGAIN), (BAD_INPUT, BAD_INPUT), (130, TRY_AGAIN)])
def test_watches_end_with_the_reason_of_the_first(capsys: pytest.CaptureFixture, code: int, other: int) -> None:
    store, codes = Store(), {0: [], 1: []}

    def end(me: int) -> object:
        def record(code: int) -> None:
            codes[me].append(code)
            raise Ended

        return record

    watches = [Watch(store, me, 2, lost_after=1, stuck_after=100, end=end(me)) for me in range(2)]
    for watch in watches:
        watch._closing.set()  # the threads rest; their work is done here, so that nothing depends on time
        for thread in watch._threads:
            thread.join()
    with contextlib.suppress(Ended):
        watches[1].leave(code, "no space left")
    assert json.loads(store["dpo_jax/watch/1"])["ended"] == "no space left"
    line = watches[0].lost_connection(RuntimeError("Gloo: connection\nreset"))
    assert line.endswith("ended with an error: no space left")
    with contextlib.suppress(Ended):
        watches[0].fail(line)
    assert codes == {0: [other], 1: [code]}
    said = capsys.readouterr().err
    assert said.startswith("dpo-jax: error: process 1 on ")
    assert ("start all processes again with the same command" in said) == (other == TRY_AGAIN)
    assert len(said.splitlines()) == 1


def test_the_thread_notices() -> None:
    codes: list[int] = []
    watch = Watch(Store(), 0, 2, lost_after=0.2, stuck_after=100, end=codes.append)
    deadline = time.monotonic() + 20
    while not codes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert codes == [TRY_AGAIN]
    watch._closing.set()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"coordinator": "h:1"}, "together"),
        ({"auto": True, "processes": 2}, "leave coordinator, processes and process_id out"),
        ({"lost_after": 10}, "lost_after has no effect with one process"),
        ({"auto": True, "stuck_after": 0}, "at least 1"),
        ({"coordinator": "h", "processes": 2, "process_id": 0}, "write HOST:PORT"),
        ({"coordinator": "h:1", "processes": 2, "process_id": 2}, "numbered 0 to 1"),
    ],
)
def test_half_given_options_are_refused(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        DistributedConfig(**options)


WORKER = """
import sys, time
import jax
import numpy as np
from dpo_jax.config import DistributedConfig
from dpo_jax.processes import distributed
from dpo_jax.train.loop import StopRequest
me, processes, port, lost_after = map(int, sys.argv[1:])
config = DistributedConfig(coordinator=f"127.0.0.1:{port}", processes=processes, process_id=me, lost_after=lost_after)
distributed.initialize(config)
mesh = jax.make_mesh((processes,), ("x",))
where = jax.NamedSharding(mesh, jax.P("x"))
total = jax.jit(lambda x: x.sum(), out_shardings=jax.NamedSharding(mesh, jax.P()))
try:
    with StopRequest() as stop, distributed.expecting_signs():
        for step in range(2000):
            x = jax.make_array_from_callback((processes,), where, lambda i: np.ones(1, np.float32))
            assert int(total(x)) == processes
            distributed.sign()
            print("STEP", step, flush=True)
            if stop.here():
                print("STOPPED", step, flush=True)
                break
            time.sleep(0.02)
except Exception as error:
    distributed.leave_after(error)
"""


def start(processes: int, lost_after: int = 100) -> list[subprocess.Popen]:
    """Processes that add up ones, again and again; returns when each has begun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(i), str(processes), str(port), str(lost_after)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    for worker in workers:
        assert worker.stdout is not None
        while "STEP" not in (line := worker.stdout.readline()):
            assert line, worker.communicate()[1]
    return workers


def told(worker: subprocess.Popen) -> str:
    """The one line of a process that ended because of another one."""
    error = worker.communicate(timeout=120)[1]
    assert worker.returncode == TRY_AGAIN, error
    assert "Traceback" not in error
    (line,) = (line for line in error.splitlines() if line.startswith("dpo-jax: error: "))
    assert line.endswith("start all processes again with the same command to go on from it")
    return line


@pytest.mark.multiprocess
def test_one_is_told_to_stop_and_all_stop_at_the_same_step() -> None:
    workers = start(2)
    workers[0].send_signal(signal.SIGTERM)
    said = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    steps = [re.findall(r"STOPPED \d+", out) for out, _ in said]
    assert len(steps[0]) == 1
    assert steps[0] == steps[1]


@pytest.mark.multiprocess
def test_one_freezes_and_the_first_goes() -> None:
    """The others end; the frozen one, when it wakes, finds nobody and ends too."""
    first, frozen = start(2, lost_after=5)
    frozen.send_signal(signal.SIGSTOP)
    assert re.search(r"process 1 on \S+ is lost: no sign of life for \d+ s", told(first))
    frozen.send_signal(signal.SIGCONT)
    assert re.search(r"process 0|connection", told(frozen))


@pytest.mark.multiprocess
@pytest.mark.parametrize("victim", [0, 3])
def test_one_of_four_is_killed(victim: int) -> None:
    workers = start(4)
    workers[victim].kill()
    for i, worker in enumerate(workers):
        if i != victim:
            assert re.search(r"process \d|connection", told(worker))
    workers[victim].communicate()
