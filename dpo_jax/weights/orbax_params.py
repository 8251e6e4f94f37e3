"""Our own folder of parameters: `params/` (orbax), with config.json and the tokenizer files beside it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from dpo_jax.errors import InputError
from dpo_jax.model.llama import Llama, abstract_variables
from dpo_jax.weights.folder import new_folder


def load_params(folder: Path, model: Llama, shardings: Mapping[str, Any] | Sharding, dtype: Any) -> Any:
    """The parameter tree, each leaf read straight into its shards in `dtype`. `InputError` where it does not fit."""
    wanted = abstract_variables(model, dtype)["params"]
    places = jax.tree.map(lambda _: shardings, wanted) if isinstance(shardings, Sharding) else shardings
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), wanted, places)
    path = (folder / "params").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        _check(path, _metadata(checkpointer, path), wanted)
        try:
            return checkpointer.restore(path, target)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: damaged ({_line(error)}); convert the model again") from error


def stored_dtype(folder: Path) -> np.dtype:
    """Dtype of the stored parameters."""
    with ocp.StandardCheckpointer() as checkpointer:
        return np.dtype(jax.tree.leaves(_metadata(checkpointer, (folder / "params").absolute()))[0].dtype)


def write_folder(path: Path, params: Any, finish: Callable[[Path], None]) -> None:
    """Write `params/` and what `finish` adds as a new folder that appears whole or not at all. For one process."""
    if jax.process_count() > 1:
        raise InputError(f"{path}: conversion to orbax runs in one process; leave the --distributed options out")
    with new_folder(path, replace=False) as scratch:
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save((scratch / "params").absolute(), params)
        except ValueError as error:  # how tensorstore reports a full disk
            raise InputError(f"{path}: cannot be written ({_line(error)}); free some space") from error
        finish(scratch)


def _metadata(checkpointer: ocp.StandardCheckpointer, path: Path) -> Any:
    try:
        return checkpointer.metadata(path).item_metadata.tree  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{path}: not a checkpoint that convert wrote, or damaged ({_line(error)})") from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check(path: Path, stored: Any, wanted: Any) -> None:
    """Same paths, same shapes."""

    def flat(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(p, simple=True, separator="/"): tuple(x.shape) for p, x in leaves}

    have, want = flat(stored), flat(wanted)
    for name in sorted(have.keys() | want.keys()):
        if name not in have:
            raise InputError(f"{path}: parameter {name} is missing; config.json is another model's")
        if name not in want:
            raise InputError(f"{path}: unknown parameter {name}; config.json is another model's")
        if have[name] != want[name]:
            raise InputError(f"{path}: parameter {name} has shape {have[name]}, and config.json asks for {want[name]}")
