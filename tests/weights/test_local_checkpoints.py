"""Checkpoints on each host's own disk beside those that all share."""

import shutil
from pathlib import Path

import jax
import pytest
import runs
from test_checkpoint import alter, arrays, assert_same, make_state, shuffle, update

from dpo_jax.config import CheckpointConfig
from dpo_jax.errors import InputError
from dpo_jax.files.folder import RunFolder
from dpo_jax.mesh import make_mesh
from dpo_jax.weights.orbax.checkpoint import Checkpoints
from dpo_jax.weights.orbax.local import LocalCheckpoints, restore_newest


def fill(tmp_path: Path) -> list[list]:
    """Steps 1 to 6: 3 on the shared disk, the others on the own; the arrays after each."""
    state = make_state(make_mesh(fsdp=4, tensor=2), width=32)
    shared, local = Checkpoints(tmp_path / "shared", keep=2), LocalCheckpoints(tmp_path / "own", state, identity={})
    states = []
    for step in range(1, 7):
        state = update(state)
        (shared if step == 3 else local).save(state, data={"position": step})
        states.append(arrays(state))
    shared.close()
    local.close()
    return states


def newest(tmp_path: Path, said: list[str]) -> tuple[int, int, list]:
    """What is gone on with: step, position in the data, arrays."""
    state = make_state(make_mesh(fsdp=4, tensor=2), seed=3, width=32)
    shared = Checkpoints(tmp_path / "shared", keep=2, say=said.append)
    local = LocalCheckpoints(tmp_path / "own", state, identity={}, say=said.append)
    restored = restore_newest(state, shared, local)
    assert restored is not None
    shared.close()
    local.close()
    return restored.step, restored.data["position"], arrays(restored.state)


def test_the_newest_of_both_that_is_whole(tmp_path: Path) -> None:
    states, said = fill(tmp_path), list[str]()
    (own,) = (tmp_path / "own").iterdir()
    assert sorted(path.name for path in own.iterdir()) == ["5", "6"]
    step, position, found = newest(tmp_path, said)
    assert (step, position, said) == (6, 6, [])
    assert_same(found, states[5])

    alter(own / "6", "state/**/d/*", shuffle)
    step, position, found = newest(tmp_path, said)
    assert (step, position) == (5, 5)
    assert_same(found, states[4])
    assert len(said) == 1
    assert said[0].startswith("local checkpoint 6 is damaged (state/")

    shutil.rmtree(own)
    step, position, found = newest(tmp_path, said)
    assert (step, position, len(said)) == (3, 3, 1)
    assert_same(found, states[2])


def test_another_arrangement_finds_none_of_them(tmp_path: Path) -> None:
    states = fill(tmp_path)
    state = make_state(make_mesh(devices=jax.devices()[:2]), width=32)
    shared, local = Checkpoints(tmp_path / "shared", keep=2), LocalCheckpoints(tmp_path / "own", state, identity={})
    restored = restore_newest(state, shared, local)
    assert restored is not None
    assert restored.step == 3
    assert_same(arrays(restored.state), states[2])
    local.remove()
    assert not (tmp_path / "own").exists()
    shared.close()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("a file")
    with pytest.raises(InputError, match=r"own: .* choose another --checkpoint\.local"):
        LocalCheckpoints(tmp_path / "own", make_state(), identity={})


def test_no_other_run_has_its_name(tmp_path: Path) -> None:
    runs = [RunFolder(tmp_path / out, "dpo", {"train": {"steps": steps}}) for out, steps in (("a", 1), ("b", 1))]
    names = [run.run_name() for run in runs]
    assert names[0] != names[1]
    assert runs[0].run_name() == names[0]
    assert RunFolder(tmp_path / "a", "dpo", {"train": {"steps": 2}}).run_name() != names[0]
    assert RunFolder(tmp_path / "a", "dpo", {"train": {"steps": 1}, "out": "b"}).run_name() == names[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"local_every": 5}, "no effect without --checkpoint.local"), ({"local": "d", "every": 10}, "must be less than")],
)
def test_options_that_say_nothing(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        CheckpointConfig(**options)


_TOGETHER = """
import asyncio, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[4]))
from orbax.checkpoint._src.path import atomicity
from test_checkpoint import make_state, update
from dpo_jax.mesh import make_mesh
from dpo_jax.weights.orbax.checkpoint import Checkpoints
from dpo_jax.weights.orbax.local import LocalCheckpoints, restore_newest
from dpo_jax.weights.integrity.fingerprint import fingerprint
me, folder = jax.process_index(), Path(sys.argv[1])
mine = folder / f"disk{me}"
made = atomicity.AtomicRenameTemporaryPath.create

async def late(self, **options):  # a slow shared disk: nobody may write into a folder before process 0 has made it
    if "shared" in self.get().parts:
        await asyncio.sleep(0.5)
    return await made(self, **options)

atomicity.AtomicRenameTemporaryPath.create = late

def both(seed, width=32):
    state = make_state(make_mesh(fsdp=4), seed=seed, width=width)
    return state, Checkpoints(folder / "shared", keep=2), LocalCheckpoints(mine, state, identity={})

state, shared, local = both(0)
hashes = {}
for step in range(1, 7):
    state = update(state)
    (shared if step == 3 else local).save(state, data={"position": step})
    hashes[step] = fingerprint(state.trainable)
shared.close(), local.close()
(own,) = mine.iterdir()
assert sorted(int(path.name) for path in own.iterdir()) == [5, 6]

def gone_on():
    state, shared, local = both(1)
    restored = restore_newest(state, shared, local)
    shared.close(), local.close()
    assert fingerprint(restored.state.trainable) == hashes[restored.step]
    return restored.step

found = [gone_on()]
if me == 1:
    shutil.rmtree(own / "6")  # killed before it was written
found.append(gone_on())
if me == 1:
    shutil.rmtree(mine)  # another host came in its place
found.append(gone_on())
print(found)
"""


@pytest.mark.multiprocess
def test_what_all_hosts_hold(tmp_path: Path) -> None:
    assert runs.two_say(_TOGETHER, str(tmp_path)) == ["[6, 5, 3]"] * 2
