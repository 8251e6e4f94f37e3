"""Parameters in orbax: folders that `convert` wrote, and the trained part of a run's checkpoint.

A folder of `convert` holds `params/`, with config.json and the tokenizer files beside it. A checkpoint of a run,
`<run>/checkpoints/<step>`, holds the training state in `state/`; the run's config.json names the model it began with.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dpo_jax.config import LoraConfig
from dpo_jax.errors import InputError, first_line, full_disk
from dpo_jax.headers import read_json
from dpo_jax.model.quantised import is_quantised
from dpo_jax.weights.integrity.digests import FILES, damage, write_digests
from dpo_jax.weights.integrity.fingerprint import quantised_as
from dpo_jax.weights.integrity.folder import new_folder
from dpo_jax.weights.orbax.checkpoint import expect_closed_loops

_VALUE = "value"
"""PPO's value model, or its head on the policy: learnt beside the model, and no part of it."""


def load_params(folder: Path, target: Any) -> Any:
    """The parameters in a folder of `convert`, each leaf read straight into its shards.

    target: a tree of `jax.ShapeDtypeStruct` with shardings. Raises `InputError` where the folder holds another tree.
    """
    path = (folder / "params").absolute()
    if (folder / FILES).exists():  # not there where an earlier version converted
        _check_files(folder)
    _check(path, _metadata(path), target)
    return _restore(path, target)


def load_trained(step: Path, target: Any) -> Any:
    """What a run's checkpoint has trained; `target` as for `load_params`.

    {"params": ...} or {"adapters": ...}, and {"heads": ...} beside it where `trained_heads` names some.
    """
    path = (step / "state").absolute()
    _check_files(step)
    stored = _metadata(path)
    if not isinstance(stored, dict) or "trainable" not in stored:
        raise InputError(f"{step}: is not a checkpoint of a training run")
    _check(path, _of_the_model(stored["trainable"]), target)
    return _restore(path, {"trainable": target})["trainable"]


def trained_heads(step: Path) -> dict[str, int]:
    """The heads that a run's checkpoint has trained: name -> n. Empty where it trains a language model."""
    stored = _metadata((step / "state").absolute())
    found = _of_the_model(stored.get("trainable", {})).get("heads", {}) if isinstance(stored, dict) else {}
    return {name: int(leaf["kernel"].shape[1]) for name, leaf in found.items()}


def _of_the_model(trained: Any) -> dict[str, Any]:
    """What a run has trained, without a value model."""
    kept = {name: tree for name, tree in trained.items() if name not in (_VALUE, "heads")}
    heads = {name: tree for name, tree in trained.get("heads", {}).items() if name != _VALUE}
    return kept | ({"heads": heads} if heads else {})


def origin(step: Path) -> tuple[str, LoraConfig]:
    """The model that a run began with, and its adapters, from the run's config.json."""
    path = step.parent.parent / "config.json"
    raw = read_json(path)
    model, lora = raw.get("model"), raw.get("lora")
    if not isinstance(model, str) or not isinstance(lora, dict):
        raise InputError(f"{path}: does not say which model the run began with (model, lora)")
    try:
        return model, LoraConfig(**{**lora, "targets": tuple(lora.get("targets", ()))})
    except TypeError as error:
        raise InputError(f"{path}: lora is not readable ({error})") from error


def stored_dtype(folder: Path) -> np.dtype:
    """Dtype of the parameters in a folder of `convert`."""
    return np.dtype(jax.tree.leaves(_metadata((folder / "params").absolute()))[0].dtype)


def write_folder(path: Path, params: Any, finish: Callable[[Path], None]) -> None:
    """Write `params/` and what `finish` adds as a new folder that appears whole or not at all. For one process."""
    if jax.process_count() > 1:
        raise InputError(f"{path}: conversion to orbax runs in one process; leave the --distributed options out")
    expect_closed_loops()
    with new_folder(path, replace=False) as scratch:
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save((scratch / "params").absolute(), params)
        except ValueError as error:  # how tensorstore reports a full disk
            reason = full_disk(error) or first_line(error)
            raise InputError(f"{path}: cannot be written ({reason}); free some space") from error
        write_digests(scratch)
        finish(scratch)


def _check_files(folder: Path) -> None:
    """Raise `InputError` where the files in the subfolders of `folder` are not those that were written."""
    if reason := damage(folder):
        raise InputError(f"{folder}: damaged ({reason}); use another checkpoint, or convert again")


def _metadata(path: Path) -> Any:
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.metadata(path).item_metadata.tree  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{path}: not a checkpoint of ours, or damaged ({first_line(error)})") from error


def _restore(path: Path, target: Any) -> Any:
    """The arrays of `target`; of what is quantised one matrix after the other stands whole."""
    if not any(map(is_quantised, jax.tree.leaves(target, is_leaf=is_quantised))):
        return _restored(path, target)
    leaves, shape = jax.tree_util.tree_flatten_with_path(target, is_leaf=is_quantised)
    found = []
    for at, leaf in leaves:
        alone: Any = _as_stored(leaf)
        for key in reversed(at):
            alone = {key.key: alone}
        whole = jax.tree.leaves(_restored(path, alone))[0]
        found.append(quantised_as(whole, leaf) if is_quantised(leaf) else whole)
    return jax.tree.unflatten(shape, found)


def _as_stored(leaf: Any) -> jax.ShapeDtypeStruct:
    """The array that a leaf of a target is read from."""
    return leaf.codes.update(shape=leaf.shape, dtype=np.float32) if is_quantised(leaf) else leaf


def _restored(path: Path, target: Any) -> Any:
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(path, args=arguments)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: damaged ({first_line(error)}); use another checkpoint, or convert again") from error


def _check(path: Path, stored: Any, wanted: Any) -> None:
    """Same paths, same shapes."""

    def flat(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantised)[0]
        return {jax.tree_util.keystr(p, simple=True, separator="/"): tuple(x.shape) for p, x in leaves}

    have, want = flat(stored), flat(wanted)
    for name in sorted(have.keys() | want.keys()):
        if name not in have:
            raise InputError(f"{path}: parameter {name} is missing; config.json is another model's")
        if name not in want:
            raise InputError(f"{path}: unknown parameter {name}; config.json is another model's")
        if have[name] != want[name]:
            raise InputError(f"{path}: parameter {name} has shape {have[name]}, and config.json asks for {want[name]}")
