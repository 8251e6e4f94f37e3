"""What tests of whole training runs share."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import started
from safetensors.numpy import load_file

from dpo_jax import cli, mesh
from dpo_jax.errors import Stopped
from dpo_jax.files.log import CLOCK_KEYS, read_metrics
from dpo_jax.files.sample_log import SampleLog

Process = subprocess.Popen[str] | started.Started


def small_mesh(data: int, fsdp: int, tensor: int, context: int = 1) -> jax.sharding.Mesh:
    """As many of the eight devices as the sizes ask for: most runs of tests need one, which compiles faster."""
    sizes = (data, fsdp, tensor, context)
    return mesh.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)] if min(sizes) > 0 else None)


def changed(config: Any, **changes: Any) -> Any:
    """The options with others; `files` is what --data names, and the section `data` keeps it where it is another."""
    data = changes.pop("data", config.data)
    files = changes.pop("files", config.data.files)
    return dataclasses.replace(config, data=dataclasses.replace(data, files=files), **changes)


def metrics(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run folder without the wall-clock figures."""
    return [{k: v for k, v in row.items() if k not in CLOCK_KEYS} for row in read_metrics(out / "metrics.jsonl")]


def stopped_and_gone_on(args: Sequence[str], out: Path, whole: Path, step: int) -> None:
    """Run `dpo-jax` with these words, stopped once the texts of `step` are written and before anything else of it is
    saved, and again: `out` holds the same bits as the run `whole`, which nobody stopped."""
    original = SampleLog.append

    def then_stop(self: SampleLog, at: int, rows: Any) -> None:
        original(self, at, rows)
        if at == step:
            raise Stopped(15)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleLog, "append", then_stop)
        assert cli.main(list(args)) == 143
    assert cli.main(list(args)) == 0
    assert metrics(out) == metrics(whole)
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    paths = sorted(whole.glob("*/*.safetensors"))
    assert paths, "weights are compared"
    for path in paths:
        left, right = load_file(out / path.relative_to(whole)), load_file(path)
        assert left.keys() == right.keys()
        for key in right:
            np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def killed_everywhere(log: Path, moment: str, words: Sequence[str], cache: Path) -> list[str]:
    """`dpo-jax` with these words on one device, killed in each of its stages (`killed_everywhere.py`) and begun again;
    the names of its stages, sorted."""
    environment = {**one_device(), "DPO_JAX_CACHE": str(cache), "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    driver = str(Path(__file__).with_name("killed_everywhere.py"))
    command = [sys.executable, driver, str(log), moment, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return sorted(line.partition(" -> ")[0] for line in log.read_text().splitlines())


def stages_below(out: Path) -> list[str]:
    """The names of all stages that are recorded in a folder and in those within it, sorted."""
    return sorted(name for path in out.rglob("stages.json") for name in json.loads(path.read_text()))


def xla_flags(devices: int) -> str:
    """Those of a process with so many CPU devices that compiles as this one does."""
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])


def one_device() -> dict[str, str]:
    """The environment of a process that compiles as this one does, for one device."""
    less = str(int(jax.config.read("jax_disable_most_optimizations")))
    own = {"XLA_FLAGS": xla_flags(1), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": less}
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def start_together(
    words: Sequence[str],
    count: int,
    *,
    program: Sequence[str] = (),
    devices: int = 1,
    folders: Sequence[Path | None] | None = None,
) -> list[Process]:
    """So many processes of `dpo-jax` that train together over loopback (of one: alone).

    `program`: what Python is given before the words, where it is not `dpo-jax`. `devices`: of each process. `folders`:
    in which each works.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.processes", str(count)]
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "XLA_FLAGS": xla_flags(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
    }

    def start(i: int) -> Process:
        told = [*words, *([*several, "--distributed.process_id", str(i)] if count > 1 else [])]
        folder = None if folders is None else folders[i]
        if not program:
            return started.start(told, environment, folder=folder)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *program, *told], cwd=folder, env=environment, **pipes)

    return [start(i) for i in range(count)]


def two_say(script: str, *words: str, devices: int = 2) -> list[str]:
    """The last line that each of two processes of so many devices prints.

    Python's `script` gets `words`, a free port, the folder of the tests of weights, and the process's number.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(devices),
        "PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests / "support"))),
    }
    command = [sys.executable, "-c", script, *words, str(port), str(tests / "weights")]
    processes = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    return [output.splitlines()[-1] for output, _ in outputs]
