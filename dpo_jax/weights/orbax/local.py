"""Checkpoints on each host's own disk (or in its memory, /dev/shm), made more often than those that all hosts share.

Each process keeps what its devices hold, by orbax, and nobody waits for another while it writes. A step counts when
every process still has it whole; after the loss of a host, whose disk is gone with it, the run goes on from the newest
step on the shared disk.

Orbax has two managers of this kind, and neither fits here. `experimental.emergency.CheckpointManager` wants a whole
copy of the state in each of several slices (its replica axis), for it restores by sending one slice's copy to the
others; it refuses a state that is split over all hosts, checks no hashes, and holds no position in the data by host.
`multi_tier_checkpointing` talks to a replicator service that only GKE clusters with its driver run. What they write
with is used here as they use it: orbax's manager without a primary host (`primary_host=None`).

Layout: `<DIR>/<run>/process-<I>-of-<N>-<layout>/<step>/`, as in `checkpoint.py`; `layout` stands for which part of each
array the process holds, so that processes that are arranged otherwise find nothing to misread.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dpo_jax.errors import InputError
from dpo_jax.state import TrainState
from dpo_jax.weights.integrity.digests import damage_seen_here, everywhere
from dpo_jax.weights.integrity.folder import steps_in
from dpo_jax.weights.orbax.checkpoint import (
    DELETED,
    FOLDERS_LATER,
    Checkpoints,
    Identity,
    Restored,
    cannot_write,
    saved,
)
from dpo_jax.weights.orbax.step_names import StepNames
from dpo_jax.weights.orbax.together import agreed_reason, steps_of_all

_KEPT = 2
"""While a host writes one, another may still have only the one before."""


class LocalCheckpoints(Checkpoints):
    """The local checkpoints of one run. Every process makes one and calls its methods together with the others.

    Args:
      folder: of this run on this host; made where it is not there.
      state: as it will be saved: which part of it this process holds.
      identity, say: as in `Checkpoints`.
    """

    def __init__(self, folder: Path, state: TrainState, *, identity: Identity, say: Callable[[str], None] = print):
        me, processes = jax.process_index(), jax.process_count()
        self._run = Path(folder).absolute()
        own = f"process-{me}-of-{processes}-{_layout(saved(state))}"
        only_me = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={me})
        self._handlers: dict[str, Any] = {
            "state": ocp.PyTreeCheckpointHandler(
                multiprocessing_options=only_me,
                type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                    (
                        jax.Array,
                        ocp.type_handlers.ArrayHandler(primary_host=None, replica_id=None, use_replica_parallel=False),
                    ),
                ),
            ),
            "meta": ocp.JsonCheckpointHandler(multiprocessing_options=only_me),
        }
        self._only_me = only_me
        try:
            for old in self._run.glob(f"process-{me}-of-*"):
                if old.name != own:
                    shutil.rmtree(old, ignore_errors=True)
            (self._run / own).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_write(error) from error
        super().__init__(self._run / own, keep=_KEPT, identity=identity, say=say)

    @property
    def _writes_alone(self) -> bool:
        return True  # in a folder of its own

    def _open(self, keep: int) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.LatestN(n=keep),
            create=False,
            cleanup_tmp_directories=True,
            todelete_subdir=DELETED,
            step_name_format=StepNames(),
            multiprocessing_options=self._only_me,
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=self._write_digests, create_directories_asynchronously=FOLDERS_LATER
            ),
        )
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=self._handlers)

    def save(self, state: TrainState, *, data: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """As `Checkpoints.save`; begun once every process has its last one whole."""
        self.wait()
        everywhere(False)
        super().save(state, data=data, metrics=metrics)

    def _arguments(self, tree: Any, meta: Mapping[str, Any]) -> ocp.args.Composite:
        return ocp.args.Composite(state=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(dict(meta)))

    def _written(self, x: jax.Array) -> int:
        return sum({_where(shard): shard.data.nbytes for shard in x.addressable_shards}.values())

    def held(self) -> list[int]:
        """The steps that every process holds, oldest first."""
        return steps_of_all(self.steps(), 2 * _KEPT)

    def _damage(self, step: int) -> str | None:
        return agreed_reason(damage_seen_here(self.folder / str(step)))

    def _arrays(self, step: int, target: Any) -> Any:
        how = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
        return self._handlers["state"].restore(epath.Path(self.folder / str(step) / "state"), args=how)

    def _set_aside_damaged(self) -> None:
        for step in steps_in(self.folder):
            if reason := damage_seen_here(self.folder / str(step)):
                self._set_aside(step, reason)

    def _set_aside(self, step: int, reason: str) -> None:
        """Say that one of them cannot be gone on with, and remove it: the shared ones are what is kept."""
        shutil.rmtree(self.folder / str(step), ignore_errors=True)
        self._say(f"local checkpoint {step} is damaged ({' '.join(reason.split())[:200]}): removed")

    def _cannot_write(self, error: BaseException | str) -> InputError:
        return cannot_write(self._run, error, "choose another --checkpoint.local")

    def remove(self) -> None:
        """The run has ended: what is here is of no use any more."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._run.is_dir() and not any(self._run.iterdir()):
            self._run.rmdir()


def restore_newest(state: TrainState, shared: Checkpoints, local: LocalCheckpoints) -> Restored | None:
    """The newest whole checkpoint of both kinds, as `Checkpoints.restore` gives it; of one step the local one."""
    kinds: dict[int, Checkpoints] = {**dict.fromkeys(shared.held(), shared), **dict.fromkeys(local.held(), local)}
    for step in sorted(kinds, reverse=True):
        if restored := kinds[step].attempt(step, state):
            return restored
    return shared.restore(state)


def _layout(tree: Any) -> str:
    """Which part of each array this process holds, as a few letters."""
    parts = [
        [jax.tree_util.keystr(path), sorted({_where(shard) for shard in x.addressable_shards})]
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def _where(shard: Any) -> str:
    return str([(part.start, part.stop) for part in shard.index])
