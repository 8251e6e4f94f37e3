"""Which model a run or an adapter folder stands on: kept beside it by a lasting name, and known again by its weights.

`base.json` in a run with LoRA and in each adapter folder holds

    model        the absolute path of what training began with, a hub id, or smollm2
    revision     of the hub id, as a commit
    fingerprint  of the weights beneath the adapters, in bfloat16: the same in whatever dtype they are loaded

Adapters on other weights than their own give numbers that look sound, so a difference is refused.
"""

import json
import logging
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dpo_jax.errors import InputError
from dpo_jax.headers import read_json
from dpo_jax.weights import orbax_params, peft
from dpo_jax.weights.fingerprint import fingerprint
from dpo_jax.weights.source import Source, resolve, to_train

FILE = "base.json"
PLACE = "DPO_JAX_BASE"
"""Environment variable: where the base model lies now."""

_log = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Base:
    """See above; what an older folder does not say is None."""

    model: str
    revision: str | None = None
    fingerprint: str | None = None


def lasting(source: str | Path) -> Base:
    """`source` under a name that means the same from every folder, and tomorrow."""
    path = Path(source).expanduser()
    if path.exists():
        return Base(str(path.absolute()))
    place = resolve(source).path
    commit = next((part for part in place.parts if _COMMIT.fullmatch(part)), None)
    return Base(str(source), commit)


def weights_hash(params: Any) -> str:
    """The fingerprint that is kept of parameters."""
    return fingerprint(params, dtype=jnp.bfloat16)


def write(folder: Path, base: Base) -> None:
    """Keep it beside a run's checkpoints, or in an adapter folder."""
    (folder / FILE).write_text(json.dumps(asdict(base), indent=2) + "\n", encoding="utf-8")


def base_of(place: Source) -> Base:
    """What an adapter folder, or a checkpoint of a run, says that it stands on."""
    folder = place.path if place.kind == "peft" else place.path.parent.parent
    if (folder / FILE).is_file():
        raw = read_json(folder / FILE)
        model, revision, fingerprint = (raw.get(name) for name in ("model", "revision", "fingerprint"))
        if place.kind == "peft":  # where people, and PEFT, write a new place
            model, revision = peft.base_of(folder)
        if not isinstance(model, str) or not all(x is None or isinstance(x, str) for x in (revision, fingerprint)):
            raise InputError(f"{folder / FILE}: does not say which model lies beneath; write its place there as model")
        return Base(model, revision, fingerprint)
    if place.kind == "peft":
        return Base(*peft.base_of(place.path))
    return Base(orbax_params.origin(place.path)[0])


def beneath(place: Source) -> Source:
    """The model beneath an adapter folder, or that a run's checkpoint began with, found.

    Raises `InputError`, with the way to name its new place, where it is not there.
    """
    base = base_of(place)
    if moved := os.environ.get(PLACE):
        return resolve(moved)
    found = Path(base.model).expanduser()
    if base.fingerprint is None and found.exists() and not found.is_absolute():
        # As PEFT resolves it; what other tools wrote says nothing by which the weights could be known again.
        _log.info("%s: its base model %s is taken to be %s", place.path, base.model, found.absolute())
    try:
        return resolve(to_train(base.model), base.revision)
    except InputError as problem:
        raise _not_that(place, base, f"is not there ({problem})") from problem


def check(place: Source, params: Any) -> None:
    """Raise `InputError` where the weights that were found beneath `place` are not those that it was trained on."""
    base = base_of(place)
    if base.fingerprint is not None and (found := weights_hash(params)) != base.fingerprint:
        moved = os.environ.get(PLACE)
        name = base.model if moved is None else f"{moved} ({PLACE})"
        differs = f"has other weights than it was trained on (fingerprint {found[:12]}, not {base.fingerprint[:12]})"
        raise _not_that(place, Base(name), differs)


def _not_that(place: Source, base: Base, what: str) -> InputError:
    text = f"{place.path}: its base model {base.model} {what}; name the right one's place in the variable {PLACE}"
    merged = place.path.parent / "model"
    if place.kind == "peft" and merged.is_dir():
        text += f", or use {merged}, which holds both"
    return InputError(text)
