"""Checkpoints of a whole run, by orbax: asynchronous, atomic, restorable on another mesh.

What is in one: the step, the trained weights and the optimizer state; what a loss remembers of the steps before
(`TrainState.carried`: a mean of rewards; a reference that moves, in float32); the position in the data; the identity of
the run (which model, data and options: a checkpoint of anything else is refused); a hash of the arrays.
What is not: frozen weights. Under LoRA they are the base model and with a live reference that stays the reference
model, both of which are loaded again from where they came; their hash is part of the identity.

Layout of `<folder>/<step>/`: `state/` (step, trainable, opt_state, carried), `meta/` (JSON), and `files.json`, size and
checksum of every file (`weights/integrity/digests.py`), written before the checkpoint gets its final name.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dpo_jax.errors import InputError, broken_connection, full_disk
from dpo_jax.state import TrainState
from dpo_jax.weights.integrity.digests import damage, write_digests
from dpo_jax.weights.integrity.fingerprint import fingerprint
from dpo_jax.weights.integrity.folder import steps_in
from dpo_jax.weights.orbax.step_names import StepNames
from dpo_jax.weights.orbax.together import agreed, agreed_reason, steps_from_main, wait_for_others

T = TypeVar("T")
Identity = Mapping[str, str | int | float | bool | None]

DELETED = ".deleted"
"""Where a checkpoint that is not kept goes by a rename, before its files go one by one: a kill leaves no half of it."""

FOLDERS_LATER = False
"""Whether orbax makes folders in the background. It tells the writers by keys that all processes and managers share,
numbered by how many saves a process has begun: one that has saved a local checkpoint more or less than the others would
write before process 0 has made a folder, or wait for good."""

# A smaller value of these is better; of every other metric, a larger one.
_SMALLER_IS_BETTER = ("loss", "perplexity", "kl")


def smaller_is_better(metric: str) -> bool:
    """Whether a smaller value of it is better."""
    return any(word in metric for word in _SMALLER_IS_BETTER)


def saved(state: TrainState) -> dict[str, Any]:
    """The part of a state that a checkpoint holds."""
    kept = {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}
    return {**kept, "carried": state.carried} if state.carried else kept


@dataclass(frozen=True)
class Restored:
    """A restored checkpoint: the state, and where the data stood (what the loader's `get_state` gave)."""

    state: TrainState
    step: int
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Every process makes one and calls its methods together with the others.

    Args:
      folder: where they go, one subfolder a step.
      keep: how many of the newest to keep.
      best: also keep the best by this metric (of those that were saved with it).
      identity: flat facts that a checkpoint must share with this run, by the name that the error message shows.
      say: where notes in words go (a damaged checkpoint that is passed over).
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        best: str | None = None,
        identity: Identity | None = None,
        say: Callable[[str], None] = print,
    ):
        self.folder = Path(folder).absolute()
        self._best = best
        self._identity = dict(identity or {})
        self._say = say if self._writes_alone else (lambda text: None)
        self._damaged: list[int] = []
        self._remove_deleted()
        self._set_aside_damaged()
        self._manager = self._open(keep)
        expect_closed_loops()

    @property
    def _writes_alone(self) -> bool:
        """Whether this process is the one that writes what is not arrays, renames and talks."""
        return jax.process_index() == 0

    def _open(self, keep: int) -> ocp.CheckpointManager:
        newest = policies.LatestN(n=keep)
        policy: Any = newest
        if self._best is not None:
            best = policies.BestN(
                get_metric_fn=self._metric,
                reverse=smaller_is_better(self._best),
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            policy = policies.AnyPreservationPolicy([newest, best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=None if self._best is None else self._metric,
            cleanup_tmp_directories=True,
            todelete_subdir=DELETED,
            step_name_format=StepNames(),
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=self._write_digests,
                barrier_sync_fn=wait_for_others,
                create_directories_asynchronously=FOLDERS_LATER,
            ),
        )
        try:
            return ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _metric(self, metrics: Mapping[str, float]) -> float:
        assert self._best is not None
        return metrics[self._best]

    def steps(self) -> list[int]:
        """The steps of the completed checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, *, data: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Start saving; the arrays are written while training goes on. At a step that is saved already, do nothing.

        Args:
          state: its arrays may be donated right after this call.
          data: the position in the data, JSON-able.
          metrics: figures of this step; the `best` metric is looked up here (a checkpoint without it cannot be best).

        Raises `InputError` when this or the previous checkpoint could not be written (a full disk).
        """
        step = int(jax.device_get(state.step))
        tree = saved(state)
        meta = {
            "format": 1,
            "step": step,
            "identity": self._identity,
            "data": dict(data),
            "arrays": _describe(tree),
            "hash": fingerprint(tree),
        }
        chosen = None
        if self._best is not None and metrics is not None and self._best in metrics:
            chosen = {self._best: float(metrics[self._best])}
        self.wait()
        self._check_space(tree)
        try:
            if step not in self._manager.all_steps():
                self._manager.save(step, args=self._arguments(tree, meta), metrics=chosen, force=True)
        except _WRITE_ERRORS as error:
            if broken_connection(error):
                raise
            raise self._cannot_write(error) from error

    def _arguments(self, tree: Any, meta: Mapping[str, Any]) -> ocp.args.Composite:
        return ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta))

    def _check_space(self, tree: Any) -> None:
        """Refuse to begin what cannot be finished. Each process looks, for what it will write."""
        needed, free = sum(map(self._written, jax.tree.leaves(tree))), shutil.disk_usage(self.folder).free
        if needed > free:
            raise self._cannot_write(f"it takes {needed:,} bytes, and {free:,} are free")

    def _written(self, x: jax.Array) -> int:
        """Bytes of an array that this process writes."""
        return sum(shard.data.nbytes for shard in x.addressable_shards if shard.replica_id == 0)

    def wait(self) -> None:
        """Return once the last checkpoint is complete on the disk. Raises `InputError` when it could not be written."""
        try:
            self._manager.wait_until_finished()
        except _WRITE_ERRORS as error:
            if broken_connection(error):
                raise
            raise self._cannot_write(error) from error
        self._remove_deleted()

    def _remove_deleted(self) -> None:
        if self._writes_alone:
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    def close(self) -> None:
        """Wait, and release the threads."""
        self.wait()
        self._manager.close()

    def restore(self, state: TrainState, *, only: int | None = None) -> Restored | None:
        """The newest intact checkpoint, laid out over devices as `state` is; None where there is none.
        `only`: that of this step, and no other.

        `state` says what is expected (shapes, dtypes, shardings) and gives the frozen weights; its other arrays are
        freed, as if it had been donated. A damaged checkpoint is passed over, in words, for the one before it.
        Raises `InputError` when the newest belongs to another run, or when every one is damaged.
        """
        for step in reversed(self.held()) if only is None else [only]:
            if restored := self.attempt(step, state):
                return restored
        if agreed(bool(self._damaged)):
            if only is not None:
                raise InputError(
                    f"{self.folder}: checkpoint {only} was damaged and is set aside; run the command again to take the"
                    " best of the others"
                )
            raise InputError(
                f"{self.folder}: every checkpoint was damaged and is set aside; run the command again to start from the"
                " beginning, or choose another --out"
            )
        return None

    def held(self) -> list[int]:
        """The steps of the checkpoints, oldest first: those that process 0 sees, in every process."""
        return steps_from_main(self.steps())

    def attempt(self, step: int, state: TrainState) -> Restored | None:
        """The checkpoint of this step; None, in every process, where any of them finds it damaged: it is set aside."""
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved(state))
        if reason := self._damage(step):
            return self._pass_over(step, reason)
        # Orbax's manager would wait for all processes in the middle of this, where one of them may have failed already.
        meta, reason = self._reading(lambda: self._meta(step))
        if reason := agreed_reason(reason):
            return self._pass_over(step, reason)
        assert meta is not None
        self._check_identity(step, meta, _describe(target))
        jax.tree.map(lambda x: x.delete(), saved(state))  # two copies of a large state would not fit
        tree, reason = self._reading(lambda: self._arrays(step, target))
        if reason := agreed_reason(reason):
            return self._pass_over(step, reason)
        changed = fingerprint(tree) != meta["hash"]
        if reason := agreed_reason("its arrays are not those that were saved" if changed else None):
            return self._pass_over(step, reason)
        return Restored(state.replace(**tree), step, meta["data"])  # type: ignore[attr-defined]

    def _reading(self, read: Callable[[], T]) -> tuple[T | None, str | None]:
        """What `read` gives, or why this process cannot read it."""
        try:
            return read(), None
        except (InputError, MemoryError, jax.errors.JaxRuntimeError):  # too little memory is no damage
            raise
        except _Damaged as error:
            return None, str(error)
        except Exception as error:  # bad files of a checkpoint without checksums: anything, from these libraries
            if broken_connection(error):
                raise
            return None, f"{type(error).__name__}: {error}"

    def _damage(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint, the same in every process."""
        return damage(self.folder / str(step))

    def _arrays(self, step: int, target: Any) -> Any:
        """The arrays of a checkpoint, laid out as `target` says. No process waits for another."""
        return ocp.StandardCheckpointHandler().restore(
            epath.Path(self.folder / str(step) / "state"), args=ocp.args.StandardRestore(target)
        )

    def _meta(self, step: int) -> dict[str, Any]:
        """What `save` wrote as `meta`, its parts of the kinds that they must be."""
        meta: Any = ocp.JsonCheckpointHandler().restore(epath.Path(self.folder / str(step) / "meta"))
        kinds = {"step": int, "identity": dict, "data": dict, "arrays": dict, "hash": str}
        if not isinstance(meta, dict) or any(not isinstance(meta.get(name), kind) for name, kind in kinds.items()):
            raise _Damaged("its metadata are not those of a checkpoint")
        if meta["step"] != step:
            raise _Damaged(f"its metadata are of step {meta['step']}")
        return meta

    def _check_identity(self, step: int, meta: Mapping[str, Any], expected: Mapping[str, list[Any]]) -> None:
        pairs = ("run", meta["identity"], self._identity), ("model or optimizer", meta["arrays"], expected)
        for what, there, here in pairs:
            for name in sorted(there.keys() | here.keys()):
                if there.get(name) != here.get(name):
                    raise InputError(
                        f"{self.folder / str(step)}: belongs to another {what}: {name} is {there.get(name)} there and"
                        f" {here.get(name)} here; choose another --out"
                    )

    def _set_aside_damaged(self) -> None:
        """Set aside checkpoints whose files are not all there, or that orbax could not list. Arrays are read later."""
        for step in steps_from_main(steps_in(self.folder)):
            if reason := damage(self.folder / str(step), lambda name: not name.startswith("state/")):
                self._set_aside(step, reason)
        agreed(True)  # the others wait for process 0

    def _pass_over(self, step: int, reason: str) -> None:
        self._set_aside(step, reason)
        agreed(True)
        self._manager.reload()

    def _set_aside(self, step: int, reason: str) -> None:
        """Say that a checkpoint is damaged, and rename it: its step will be saved again."""
        self._damaged.append(step)
        if not self._writes_alone:
            return
        path = self.folder / str(step)
        kept = _free_name(self.folder / f"damaged-{step}")
        try:
            path.rename(kept)
        except OSError as error:
            raise InputError(
                f"{path}: is damaged and cannot be renamed ({error.strerror or error}); remove it"
            ) from error
        self._say(f"checkpoint {step} is damaged ({' '.join(reason.split())[:200]}): set aside as {kept}")

    def _write_digests(self) -> None:
        """Record the files of the checkpoint that is about to get its final name. In the background, of process 0."""
        if not self._writes_alone:
            return
        for unfinished in self.folder.glob("*orbax-checkpoint-tmp*"):
            # What stands in subfolders is complete by now; orbax still writes to its own notes beside them.
            write_digests(unfinished)

    def _cannot_write(self, error: BaseException | str) -> InputError:
        return cannot_write(self.folder, error, "choose another --out")


def cannot_write(folder: Path, error: BaseException | str, instead: str) -> InputError:
    """The one line for a checkpoint that could not be written, in `folder`; `instead`: what helps beside space."""
    text = " ".join(str(error).split())
    reason = (full_disk(error) if isinstance(error, BaseException) else None) or text[:200]
    return InputError(
        f"{folder}: a checkpoint cannot be written ({reason});"
        f" free space or {instead}; the checkpoints before it are intact"
    )


def expect_closed_loops() -> None:
    """Let "Event loop is closed" pass in silence where Python tells of exceptions that nobody can catch.

    Orbax gives up at the first array that cannot be written and closes the event loop in which it writes the others;
    the storage library then finds it closed, once for each of them, in threads of its own. The failure itself is raised
    by `Checkpoints.wait`.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    if getattr(before, "__qualname__", "") != hook.__qualname__:  # once is enough
        sys.unraisablehook = hook


class _Damaged(Exception):
    """A checkpoint that reads, and is not what was saved."""


# Tensorstore reports a failed write as a ValueError.
_WRITE_ERRORS = (OSError, ValueError)


def _describe(tree: Any) -> dict[str, list[Any]]:
    """{path of the leaf: [dtype, shape]}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): [str(np.dtype(x.dtype)), list(x.shape)] for path, x in leaves}


def _free_name(path: Path) -> Path:
    """`path`, or with a number behind it where that name is taken."""
    candidate, i = path, 1
    while candidate.exists():
        i += 1
        candidate = path.with_name(f"{path.name}-{i}")
    return candidate
