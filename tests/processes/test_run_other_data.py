"""A host whose copy of the data lacks a file, or holds other rows: all end with one line that names it, none writes."""

import re
import shutil
import socket
import time
from pathlib import Path

import pytest
import runs
import tiny

from dpo_jax.commands import prepare as command
from dpo_jax.config import DataConfig, PrepareRun
from dpo_jax.errors import BAD_INPUT

pytestmark = pytest.mark.multiprocess
TOGETHER = 20
"""Seconds in which the second process ends after the first one."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model; and what each host has of the data: shards of rows, and a prepared store."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", layers=1, hidden=16)
    host = folder / "host"
    (host / "rows").mkdir(parents=True)
    for i in range(3):
        tiny.preferences(host / "rows" / f"part-{i}.jsonl", rows=8, seed=i)
    source = DataConfig(files=str(host / "rows"))
    command.prepare(PrepareRun(data=source, to=str(host / "set"), tokenizer=str(folder / "model"), store_ids=True))
    return folder


@pytest.fixture
def hosts(inputs: Path, tmp_path: Path) -> list[Path]:
    """Two copies of it, in which the two processes work."""
    return [shutil.copytree(inputs / "host", tmp_path / f"host-{i}") for i in range(2)]


def ends(inputs: Path, hosts: list[Path], *words: str) -> list[str]:
    """The one line with which each process ends, exit code 2 and nothing left behind."""
    before = [sorted(map(str, host.rglob("*"))) for host in hosts]
    out = hosts[0].parent / "out"
    started = runs.start_together(
        ["dpo", "--model", str(inputs / "model"), "--out", str(out), "--train.batch_size", "4", *words],
        2,
        folders=hosts,
    )
    at: dict[int, float] = {}
    deadline = time.monotonic() + 300
    while len(at) < 2 and time.monotonic() < deadline:
        at |= {i: time.monotonic() for i, one in enumerate(started) if i not in at and one.poll() is not None}
        time.sleep(0.05)
    said = [told(process) for process in started]
    assert abs(at[0] - at[1]) < TOGETHER
    assert not out.exists()
    assert [sorted(map(str, host.rglob("*"))) for host in hosts] == before
    return said


def told(process: runs.Process) -> str:
    process.kill()  # nothing where it has ended
    error = process.communicate()[1]
    assert process.returncode == BAD_INPUT, error
    assert "Traceback" not in error
    (line,) = (line for line in error.splitlines() if line.startswith("dpo-jax: error: "))
    return line


HOST = re.escape(socket.gethostname())


@pytest.mark.parametrize("source", ["rows/part-*.jsonl", "rows/part-0.jsonl,rows/part-1.jsonl"])
def test_a_shard_is_missing(inputs: Path, hosts: list[Path], source: str) -> None:
    (hosts[1] / "rows" / "part-1.jsonl").unlink()
    said = ends(inputs, hosts, "--data", source)
    assert said[0] == said[1]
    assert re.search(
        rf"error: process 1 on {HOST} differs in rows/part-1\.jsonl: nothing there, [\d,]+ bytes in process 0", said[0]
    )


def test_a_shard_holds_other_rows(inputs: Path, hosts: list[Path]) -> None:
    path = hosts[1] / "rows" / "part-2.jsonl"
    text = path.read_text()
    path.write_text(text.replace("good", "evil"))
    assert text != path.read_text()
    said = ends(inputs, hosts, "--data", "rows/part-0.jsonl,rows/part-2.jsonl")
    assert said[0] == said[1]
    assert re.search(rf"process 1 on {HOST} differs in the rows of rows/part-2\.jsonl: 8 \(\w+\) there, 8 ", said[0])


@pytest.mark.parametrize("host", [0, 1])
def test_a_shard_of_a_store_is_missing(inputs: Path, hosts: list[Path], host: int) -> None:
    """That host finds it out alone; the other hears of it."""
    next((hosts[host] / "set").rglob("*train.array_record*")).unlink()
    said = ends(inputs, hosts, "--data", "tfds:set:train")
    whose = rf"process {host} on {HOST}"
    assert re.search(rf"error: {whose}: tfds:set:train: \S+train\.array_record\S+ is missing", said[host])
    other = rf"error: {whose} ended with an error: tfds:set:train: \S+train\.array_record\S+ is missing"
    assert re.search(other, said[1 - host])
    assert "the last checkpoint is intact" not in said[1 - host]


def test_the_ids_of_a_store_are_others(inputs: Path, hosts: list[Path], tmp_path: Path) -> None:
    """As of a store that was prepared from other rows."""
    tiny.preferences(tmp_path / "others.jsonl", rows=24, seed=9)
    shutil.rmtree(hosts[1] / "set")
    source = DataConfig(files=str(tmp_path / "others.jsonl"))
    command.prepare(PrepareRun(data=source, to=str(hosts[1] / "set"), tokenizer=str(inputs / "model"), store_ids=True))
    said = ends(inputs, hosts, "--data", "tfds:set:train")
    assert said[0] == said[1]
    assert f"process 1 on {socket.gethostname()} differs in the rows of tfds:set:train: 24 (" in said[0]
