"""Several processes, one run: every process runs the same command, and process 0 writes the files and talks."""

import atexit
import contextlib
import itertools
import json
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state  # the only way to the coordination service's store; orbax goes it too
from jax.experimental import multihost_utils

from dpo_jax.config import DistributedConfig
from dpo_jax.errors import InputError, SharedError, broken_connection
from dpo_jax.processes import alike
from dpo_jax.processes.watch import Watch, line_of, say_when_aborted

_watch: Watch | None = None


def initialize(config: DistributedConfig, options: Mapping[str, Any] | None = None) -> None:
    """Join the other processes of this run, if the options ask for it; call it before anything else touches jax.

    On CPU the processes talk through gloo. From then on they watch each other (`processes/watch.py`), and SIGTERM
    is jax's: a notice of preemption, of which all of them hear (`loop.StopRequest`).
    Raises `InputError` where the cluster is not found or does not answer, or where one process has other code, packages
    or `options` (of the whole command, flat) than the others.
    """
    global _watch
    if not config.auto and config.coordinator is None:
        return
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    lost_after, start_within = config.settled.lost_after, config.settled.start_within
    # The watch speaks first; what jax does by itself stands behind it.
    within: dict[str, Any] = {"initialization_timeout": start_within, "heartbeat_timeout_seconds": lost_after + 100}
    try:
        if config.auto:
            jax.distributed.initialize(**within)
        else:
            jax.distributed.initialize(config.coordinator, config.processes, config.process_id, **within)
    except (ValueError, RuntimeError) as error:
        how = (
            "--distributed.auto finds only Cloud TPU slices, SLURM, Open MPI and Kubernetes; elsewhere give"
            " --distributed.coordinator HOST:PORT, --distributed.processes and --distributed.process_id"
            if config.auto
            else f"check that process 0 is up and that the others reach it at {config.coordinator}"
        )
        raise InputError(
            f"the processes of this run did not find each other within {start_within} s ({line_of(error)}); {how}"
        ) from error
    processes = global_state.num_processes
    if processes == 1:
        return
    client, me, address = global_state.client, global_state.process_id, global_state.coordinator_address
    assert client is not None
    assert address is not None
    _watch = Watch(client, me, processes, lost_after=lost_after, stuck_after=config.settled.stuck_after)
    atexit.register(_watch.close)  # runs before jax's own, which waits for the others
    if me:
        say_when_aborted(address, _watch)
    check_alike(alike.installed() | alike.options_of(options or {}), within=start_within)


def check_alike(facts: Mapping[str, str], *, within: float = 3600) -> None:
    """Raise `SharedError`, the same in every process, where one has other `facts`. All processes call it together."""
    if (client := global_state.client) is not None and global_state.num_processes > 1:
        me, processes = global_state.process_id, global_state.num_processes
        alike.check(client, me, processes, str(next(_comparisons)), facts, within=within)


_comparisons = itertools.count(1)


def sign() -> None:
    """Tell the other processes that this one gets on."""
    if _watch is not None:
        _watch.sign()


def expecting_signs() -> AbstractContextManager[Any]:
    """While this is entered, a run without any `sign` for `--distributed.stuck_after` seconds is ended."""
    return contextlib.nullcontext() if _watch is None else _watch.expecting()


def here() -> str:
    """This process and its host, for the front of a line that other processes do not say; nothing without others."""
    return "" if _watch is None else f"{_watch.own}: "


def leave(code: int, line: str) -> None:
    """After an error that has been printed: end this process, and so the others. Returns where it works alone."""
    if _watch is not None:
        _watch.leave(code, line)


def leave_after(error: Exception) -> None:
    """As `leave`, for an exception that nobody expected: print it, unless it came of another process's end."""
    if _watch is None:
        return
    if isinstance(error, RuntimeError | ValueError | OSError) and broken_connection(error):
        _watch.fail(_watch.lost_connection(error))
    traceback.print_exception(error)
    _watch.leave(1, f"{type(error).__name__}: {line_of(error)}")


def several() -> bool:
    """Whether other processes work on this run."""
    return global_state.num_processes > 1


def is_main() -> bool:
    """True in process 0, the one that writes files and prints."""
    return jax.process_index() == 0


def from_main(tree: Any) -> Any:
    """Process 0's `tree` of numpy arrays (same shapes and dtypes everywhere), in every process."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def flag_from_main(value: bool) -> bool:
    """Process 0's `value`, in every process."""
    return bool(from_main(np.asarray(value)))


def json_from_main(make: Callable[[], Any]) -> Any:
    """What `make` gives in process 0, where alone it is called, in every process; or the `InputError` that it raises.

    It gives what JSON holds.
    """
    if jax.process_count() == 1:
        return make()
    told = b""
    if is_main():
        try:
            told = json.dumps({"made": make()}).encode()
        except InputError as error:
            told = json.dumps({"error": str(error)}).encode()
    size = 1 << int(from_main(np.asarray(len(told).bit_length(), np.int32)))  # few sizes, few programs
    sent = np.frombuffer(told.ljust(size), np.uint8)
    answer = json.loads(np.asarray(from_main(sent), np.uint8).tobytes())
    if "error" in answer:
        raise SharedError(answer["error"])
    return answer["made"]


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
