"""Which model a run or an adapter folder stands on: kept beside it by a lasting name, and known again by its weights.

`base.json` in a run with LoRA and in each adapter folder holds

    model        the absolute path of what training began with, a hub id, or smollm2
    revision     of the hub id, as a commit
    fingerprint  of the weights beneath the adapters, in bfloat16: the same in whatever dtype they are loaded
    quantised    int8 or nf4, where the adapters learnt on weights kept so (QLoRA): then they are loaded on these

Adapters on other weights than their own give numbers that look sound, so a difference is refused.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dpo_jax.errors import InputError
from dpo_jax.headers import read_json
from dpo_jax.model.quantised import Kind, kind_of
from dpo_jax.weights.integrity.fingerprint import fingerprint
from dpo_jax.weights.integrity.folder import write_json

FILE = "base.json"
PLACE = "DPO_JAX_BASE"
"""Environment variable: where the base model lies now."""


@dataclass(frozen=True)
class Base:
    """See above; what an older folder does not say is None."""

    model: str
    revision: str | None = None
    fingerprint: str | None = None
    quantised: Kind | None = None


def weights_hash(params: Any) -> str:
    """The fingerprint that is kept of parameters."""
    return fingerprint(params, dtype=jnp.bfloat16)


def write(folder: Path, base: Base) -> None:
    """Keep it beside a run's checkpoints, or in an adapter folder."""
    write_json(folder / FILE, asdict(base))


def read(folder: Path, named: tuple[str, str | None] | None = None) -> Base | None:
    """What was kept in `folder`; None where nothing was. `named`: another file's model and revision, which count."""
    if not (folder / FILE).is_file():
        return None
    raw = read_json(folder / FILE)
    model, revision, fingerprint = (raw.get(name) for name in ("model", "revision", "fingerprint"))
    model, revision = named or (model, revision)
    kind = raw.get("quantised")
    if kind is not None and kind_of(kind) is None:
        raise InputError(f"{folder / FILE}: quantised is {kind!r}, and int8 and nf4 are known")
    if not isinstance(model, str) or not all(x is None or isinstance(x, str) for x in (revision, fingerprint)):
        raise InputError(f"{folder / FILE}: does not say which model lies beneath; write its place there as model")
    return Base(model, revision, fingerprint, kind)
