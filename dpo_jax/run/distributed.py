"""Several processes, one run: every process runs the same command, and process 0 writes the files and talks."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax.config import DistributedConfig
from dpo_jax.errors import InputError


def initialize(config: DistributedConfig) -> None:
    """Join the other processes of this run, if the options ask for it; call it before anything else touches jax.

    On CPU the processes talk through gloo. Raises `InputError` where the cluster is not found or does not answer.
    """
    if not config.auto and config.coordinator is None:
        return
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if config.auto:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(config.coordinator, config.processes, config.process_id)
    except (ValueError, RuntimeError) as error:
        how = (
            "--distributed.auto finds only Cloud TPU pods, SLURM, Open MPI and Kubernetes; elsewhere give"
            " --distributed.coordinator HOST:PORT, --distributed.processes and --distributed.process_id"
            if config.auto
            else f"check that process 0 is up and that the others reach it at {config.coordinator}"
        )
        raise InputError(f"the processes of this run did not find each other ({_line(error)}); {how}") from error


def is_main() -> bool:
    """True in process 0, the one that writes files and prints."""
    return jax.process_index() == 0


def from_main(tree: Any) -> Any:
    """Process 0's `tree` of numpy arrays (same shapes and dtypes everywhere), in every process."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def flag_from_main(value: bool) -> bool:
    """Process 0's `value`, in every process."""
    return bool(from_main(np.asarray(value)))


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
