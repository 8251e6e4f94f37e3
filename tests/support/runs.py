"""What tests of whole training runs share."""

import dataclasses
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dpo_jax import mesh
from dpo_jax.files.log import CLOCK_KEYS, read_metrics


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
