"""Our own folder of parameters: `params/` (orbax), with config.json and the tokenizer files beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from dpo_jax.errors import InputError
from dpo_jax.model.llama import Llama, abstract_variables


def load_params(folder: Path, model: Llama, shardings: Mapping[str, Any] | Sharding, dtype: Any) -> Any:
    """The parameter tree, each leaf read straight into its shards in `dtype`. `InputError` where it does not fit."""
    wanted = abstract_variables(model, dtype)["params"]
    places = jax.tree.map(lambda _: shardings, wanted) if isinstance(shardings, Sharding) else shardings
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), wanted, places)
    path = (folder / "params").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path).item_metadata.tree
        except (OSError, ValueError, AttributeError, KeyError) as error:
            raise InputError(f"{path}: not a checkpoint that convert wrote, or damaged ({_line(error)})") from error
        _check(path, stored, wanted)
        try:
            return checkpointer.restore(path, target)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: damaged ({_line(error)}); convert the model again") from error


def save_params(folder: Path, params: Any) -> None:
    """Write `params/` into `folder`. Every process calls this."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "params").absolute(), params)


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
