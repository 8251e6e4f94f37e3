"""Whether all processes of a run have the same code, packages and options, before any of them computes.

Programs that differ wait for each other in different collective operations, or compute different numbers without a
word. Each process writes what it has into the store of jax's coordination service; process 0 compares and answers all.
"""

import hashlib
import importlib.metadata
import json
import platform
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import dpo_jax
from dpo_jax.config.names import option
from dpo_jax.errors import SharedError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
"""Whose versions decide what is computed, and what is written to the disk."""
OWN = ("distributed.process_id", "distributed.coordinator", "checkpoint.local")
"""Options that may differ between processes."""

_FOLDER = "dpo_jax/alike"


class Store(Protocol):
    """What is used of jax's client of the coordination service."""

    def key_value_set(self, key: str, value: str) -> None: ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...


def installed() -> dict[str, str]:
    """Code and packages of this process, by name."""
    root = Path(dpo_jax.__file__).parent
    code = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    found = {"the code of dpo_jax": f"{dpo_jax.__version__} ({code.hexdigest()[:12]})"}
    found["Python"] = platform.python_version()
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def options_of(flat: Mapping[str, Any]) -> dict[str, str]:
    """The options that must be the same everywhere, as they are typed; `flat`: {"train.steps": 3}."""
    return {option(name): str(value) for name, value in flat.items() if name not in OWN}


def check(store: Store, me: int, processes: int, what: str, facts: Mapping[str, str], *, within: float) -> None:
    """Compare `facts` of all processes; all of them call it. `what`: a name for this comparison, used once.

    Raises `SharedError`, the same in every process, that names the one that differs. `within`: seconds for all to come.
    """
    wait = round(within * 1000)
    store.key_value_set(f"{_FOLDER}/{what}/{me}", json.dumps({"host": socket.gethostname(), "facts": dict(facts)}))
    if me == 0:
        told = [json.loads(store.blocking_key_value_get(f"{_FOLDER}/{what}/{i}", wait)) for i in range(processes)]
        store.key_value_set(f"{_FOLDER}/{what}/answer", difference(told) or "")
    if answer := store.blocking_key_value_get(f"{_FOLDER}/{what}/answer", wait):
        raise SharedError(answer)


def difference(told: Sequence[Mapping[str, Any]]) -> str | None:
    """In one line which process has something else than most; None where all are alike. `told`: `host` and `facts`.

    Of two that differ, process 0 is right.
    """
    names = dict.fromkeys(name for one in told for name in one["facts"])
    for name in names:
        values = [one["facts"].get(name, "nothing") for one in told]
        if len(set(values)) == 1:
            continue
        ((usual, _),) = Counter(values).most_common(1)  # of equally many the first
        odd = [i for i, value in enumerate(values) if value != usual]
        like = values.index(usual)
        others = f"; so have {len(odd) - 1} more something else" if len(odd) > 1 else ""
        return (
            f"process {odd[0]} on {told[odd[0]]['host']} differs in {name}: {values[odd[0]]} there, {usual} in process"
            f" {like} on {told[like]['host']}{others}; start all with the same code, packages, options and data"
        )
    return None
