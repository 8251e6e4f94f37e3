"""What tests of whole training runs share."""

import contextlib
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from dpo_jax import mesh
from dpo_jax.run.log import CLOCK_KEYS, read_metrics


@contextlib.contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """Runs of the same shapes share their compiled steps, as runs on one machine may; `folder` keeps them."""
    settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def small_mesh(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    """As many of the eight devices as the sizes ask for: most runs of tests need one, which compiles faster."""
    sizes = (data, fsdp, tensor)
    return mesh.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)] if min(sizes) > 0 else None)


def metrics(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run folder without the wall-clock figures."""
    return [{k: v for k, v in row.items() if k not in CLOCK_KEYS} for row in read_metrics(out / "metrics.jsonl")]


def start_together(words: Sequence[str], count: int) -> list[subprocess.Popen[str]]:
    """So many processes of `dpo-jax`, one device each, that train together over loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dpo_jax", *words, "--distributed.coordinator", f"127.0.0.1:{port}"]
    command += ["--distributed.processes", str(count), "--distributed.process_id"]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen([*command, str(i)], env=environment, stderr=subprocess.PIPE, text=True) for i in range(count)
    ]
