"""Checkpoints: round trip, how many are kept, damage, another mesh, another run."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from dpo_jax import state as states
from dpo_jax.config import OptimizerConfig
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh, replicated, sharding
from dpo_jax.state import TrainState
from dpo_jax.weights.orbax.checkpoint import Checkpoints
from dpo_jax.weights.source import resolve


def apply(variables, x):
    return x @ variables["params"]["mlp"]["kernel"]


def make_state(mesh=None, seed: int = 0, width: int = 8, frozen=None, **optimizer) -> TrainState:
    mesh = mesh or make_mesh()
    kernel = jax.random.normal(jax.random.key(seed), (width, width))
    params = {
        "mlp": {"kernel": jax.device_put(kernel, sharding(mesh, ("embed", "mlp")))},
        "norm": {"scale": jax.device_put(jnp.ones(width), replicated(mesh))},
    }
    made = states.make_optimizer(OptimizerConfig(learning_rate=0.1, **optimizer))
    return states.create(apply, {"params": params}, made, frozen=frozen)


@jax.jit
def update(state: TrainState) -> TrainState:
    gradients = jax.tree.map(lambda x: jnp.sin(x + state.step), state.trainable)
    return state.apply_gradients(gradients)


def arrays(state: TrainState) -> list[np.ndarray]:
    return [np.array(x) for x in jax.tree.leaves((state.step, state.trainable, state.opt_state))]


def assert_same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def fill(folder: Path, steps: int, *, keep: int = 10, **options) -> list[list[np.ndarray]]:
    """Checkpoints of steps 1 to `steps` in `folder`; the arrays at each step, from step 0."""
    state, history = make_state(), []
    history.append(arrays(state))
    checkpoints = Checkpoints(folder, keep=keep, **options)
    for step in range(1, steps + 1):
        state = update(state)
        history.append(arrays(state))
        checkpoints.save(state, data={"position": step}, metrics={"eval_loss": abs(step - 2.0), "eval_accuracy": step})
    checkpoints.close()
    return history


def test_round_trip(tmp_path: Path) -> None:
    history = fill(tmp_path, 2)
    checkpoints = Checkpoints(tmp_path, keep=10)
    restored = checkpoints.restore(make_state(seed=5))
    assert restored is not None
    assert (restored.step, restored.data) == (2, {"position": 2})
    assert_same(arrays(restored.state), history[2])
    assert_same(arrays(update(restored.state)), arrays(update(restored.state)))
    checkpoints.close()


def test_nothing_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    state = make_state()
    assert checkpoints.restore(state) is None
    assert arrays(state)  # and the state is still whole
    checkpoints.close()


def test_training_goes_on_while_it_saves(tmp_path: Path) -> None:
    """The arrays are those at the call, though the next step is given their buffers at once."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    state = make_state(width=512)
    donating = jax.jit(lambda s: update(s), donate_argnums=0)
    at_call = arrays(state)
    checkpoints.save(state, data={})
    for _ in range(3):
        state = donating(state)
    jax.block_until_ready(state.trainable)
    checkpoints.wait()
    restored = checkpoints.restore(make_state(width=512, seed=1))
    assert restored is not None
    assert_same(arrays(restored.state), at_call)
    checkpoints.close()


def test_keeps_the_newest(tmp_path: Path) -> None:
    fill(tmp_path, 5, keep=2)
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.steps() == [4, 5]
    checkpoints.close()


@pytest.mark.parametrize(("metric", "kept"), [("eval_loss", [2, 5]), ("eval_accuracy", [5])])
def test_keeps_the_best(tmp_path: Path, metric: str, kept: list[int]) -> None:
    fill(tmp_path, 5, keep=1, best=metric)
    checkpoints = Checkpoints(tmp_path, keep=1, best=metric)
    assert checkpoints.steps() == kept
    checkpoints.close()


def test_the_best_survives_a_restart(tmp_path: Path) -> None:
    fill(tmp_path, 3, keep=1, best="eval_loss")
    checkpoints = Checkpoints(tmp_path, keep=1, best="eval_loss")
    restored = checkpoints.restore(make_state())
    assert restored is not None
    assert restored.step == 3
    checkpoints.save(update(restored.state), data={}, metrics={"eval_loss": 9.0})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4]
    checkpoints.close()


@pytest.mark.parametrize(("shape", "sizes"), [("fsdp", (1, 8, 1)), ("both", (2, 2, 2)), ("tensor", (1, 1, 8))])
def test_restores_onto_another_mesh(tmp_path: Path, shape: str, sizes: tuple[int, int, int]) -> None:
    history = fill(tmp_path, 1)
    target = make_state(make_mesh(*sizes), seed=3)
    layout = jax.tree.map(lambda x: x.sharding, (target.trainable, target.opt_state))
    checkpoints = Checkpoints(tmp_path, keep=1)
    restored = checkpoints.restore(target)
    assert restored is not None
    assert_same(arrays(restored.state), history[1])
    assert jax.tree.map(lambda x: x.sharding, (restored.state.trainable, restored.state.opt_state)) == layout
    checkpoints.close()


@pytest.mark.parametrize(
    "optimizer", [{"mu_dtype": "bfloat16"}, {"name": "adafactor"}, {"name": "adamw_8bit"}, {"name": "rmsprop"}], ids=str
)
def test_smaller_moments_go_on_with_the_same_bits(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    """On the mesh that saved them, and from there onto another one."""
    make = partial(make_state, width=64, **optimizer)
    state = update(update(make(make_mesh(fsdp=4, tensor=2))))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, data={})
    checkpoints.wait()
    for mesh in (make_mesh(fsdp=4, tensor=2), make_mesh(fsdp=1, tensor=8)):
        target = make(mesh, seed=3)
        restored = checkpoints.restore(target)
        assert restored is not None
        assert_same(arrays(restored.state), arrays(state))
        layout = jax.tree.map(lambda x: x.sharding, target.opt_state)
        assert jax.tree.map(lambda x: x.sharding, restored.state.opt_state) == layout
        if dict(mesh.shape)["tensor"] == 2:
            assert_same(arrays(update(restored.state)), arrays(update(state)))
    checkpoints.close()


def largest_file(step: Path) -> Path:
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(step: Path) -> None:
    data = next(p for p in sorted((step / "state").rglob("d/*")) if p.is_file())
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def remove(step: Path) -> None:
    largest_file(step).unlink()


def flip(step: Path) -> None:
    """Same size, other contents, in every data file."""
    for data in (step / "state").rglob("d/*"):
        content = bytearray(data.read_bytes())
        for i in range(len(content) // 4, len(content), 5):
            content[i] ^= 0xFF
        data.write_bytes(bytes(content))


def spoil_meta(step: Path) -> None:
    (step / "meta" / "metadata").write_text("{")


def lose_the_list(step: Path) -> None:
    (step / "files.json").unlink()


def alter(step: Path, name: str, change) -> None:
    """Change the bytes of the files that match `name`; their sizes stay."""
    paths = [path for path in sorted(step.glob(name)) if path.is_file()]
    assert paths
    for path in paths:
        content = path.read_bytes()
        changed = bytes(change(bytearray(content)))
        assert len(changed) == len(content)
        assert changed != content
        path.write_bytes(changed)


def zero(content: bytearray) -> bytearray:
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(len(content[middle : middle + 64]))
    return content


def shuffle(content: bytearray) -> bytearray:
    return content[1::2] + content[::2]


def bit(content: bytearray) -> bytearray:
    content[len(content) // 3] ^= 4
    return content


def other_step(content: bytearray) -> bytearray:
    return content.replace(b'"step": 3', b'"step": 2')


def a_list(content: bytearray) -> bytearray:
    return bytearray(b"[]".ljust(len(content)))


SAME_SIZE = {
    "arrays_zeroed": ("state/**/d/*", zero),
    "arrays_shuffled": ("state/**/d/*", shuffle),
    "arrays_bit": ("state/**/d/*", bit),
    "manifest": ("state/manifest.ocdbt", zero),
    "tree": ("state/_METADATA", bit),
    "meta_zeroed": ("meta/metadata", zero),
    "meta_bit": ("meta/metadata", bit),
    "meta_step": ("meta/metadata", other_step),
    "meta_list": ("meta/metadata", a_list),
    "metrics": ("metrics/metrics", zero),
    "sums": ("files.json", bit),
    "all": ("*/**/*", shuffle),
}


def same_size(name: str):
    return pytest.param(lambda step: alter(step, *SAME_SIZE[name]), id=name)


DAMAGES = [truncate, remove, flip, spoil_meta, lose_the_list, *map(same_size, SAME_SIZE)]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[np.ndarray]]]:
    """A folder with checkpoints of steps 1 to 3, to be copied, and the arrays at each step."""
    folder = tmp_path_factory.mktemp("three")
    return folder, fill(folder, 3, best="eval_loss")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back(tmp_path: Path, three, damage) -> None:
    shutil.copytree(three[0], tmp_path, dirs_exist_ok=True)
    history = three[1]
    damage(tmp_path / "3")
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=10, best="eval_loss", say=said.append)
    restored = checkpoints.restore(make_state())
    assert restored is not None
    assert restored.step == 2
    assert_same(arrays(restored.state), history[2])
    assert len(said) == 1
    assert "checkpoint 3 is damaged" in said[0]
    # Step 3 can be saved again.
    checkpoints.save(update(restored.state), data={})
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=10, say=said.append)
    assert again.steps() == [1, 2, 3]
    assert len(said) == 1
    again.close()


def test_two_damaged_in_a_row(tmp_path: Path, three) -> None:
    shutil.copytree(three[0], tmp_path, dirs_exist_ok=True)
    history = three[1]
    alter(tmp_path / "3", "state/**/d/*", shuffle)
    alter(tmp_path / "2", "state/**/d/*", zero)
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=10, say=said.append)
    restored = checkpoints.restore(make_state())
    assert restored is not None
    assert_same(arrays(restored.state), history[1])
    assert [line.split(" (")[0] for line in said] == ["checkpoint 3 is damaged", "checkpoint 2 is damaged"]
    checkpoints.close()


def without_sums(step: Path) -> None:
    """As it was written before there were checksums: sizes only."""
    sizes = {name: size for name, (size, _) in json.loads((step / "files.json").read_text()).items()}
    (step / "files.json").write_text(json.dumps(sizes))


def no_identity(content: bytearray) -> bytearray:
    return content.replace(b'"identity"', b'"identita"')


@pytest.mark.parametrize(
    ("name", "change"),
    [("state/**/d/*", shuffle), ("state/_METADATA", a_list), ("meta/metadata", a_list), ("meta/metadata", no_identity)],
)
def test_checkpoints_without_checksums(tmp_path: Path, three, name: str, change) -> None:
    """They restore, and where they do not read, the one before does."""
    shutil.copytree(three[0], tmp_path, dirs_exist_ok=True)
    history = three[1]
    without_sums(tmp_path / "2")
    without_sums(tmp_path / "3")
    alter(tmp_path / "3", name, change)
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=10, say=said.append)
    restored = checkpoints.restore(make_state())
    assert restored is not None
    assert_same(arrays(restored.state), history[2])
    assert [line.split(" (")[0] for line in said] == ["checkpoint 3 is damaged"]
    checkpoints.close()


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    digits = "\N{ARABIC-INDIC DIGIT SEVEN}"
    others = [".DS_Store", digits, f"1{digits}", "\N{SUPERSCRIPT TWO}", "007", "-3", "5.5", "notes"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "9").write_text("a file")
    checkpoints = Checkpoints(tmp_path, keep=2, say=pytest.fail)
    restored = checkpoints.restore(make_state())
    assert restored is not None
    assert restored.step == 2
    checkpoints.save(update(restored.state), data={})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {*others, "9", "2", "3"}
    assert resolve(tmp_path / "3").kind == "checkpoint"


def test_all_damaged(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    truncate(tmp_path / "1")
    truncate(tmp_path / "2")
    checkpoints = Checkpoints(tmp_path, keep=10, say=lambda text: None)
    with pytest.raises(InputError, match="every checkpoint was damaged"):
        checkpoints.restore(make_state())
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=10, say=lambda text: None)
    assert again.restore(make_state()) is None  # from the beginning, as the message said
    again.close()


def test_another_run_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, 1, identity={"data": "aaa", "model": "x"})
    checkpoints = Checkpoints(tmp_path, keep=1, identity={"data": "bbb", "model": "x"})
    with pytest.raises(InputError, match="data is aaa there and bbb here") as caught:
        checkpoints.restore(make_state())
    assert "\n" not in str(caught.value)
    checkpoints.close()


def test_another_model_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(InputError, match=r"belongs to another model.*\[8, 8\].*\[16, 16\]"):
        checkpoints.restore(make_state(width=16))
    assert checkpoints.steps() == [1]
    checkpoints.close()


def test_frozen_weights_are_not_written(tmp_path: Path) -> None:
    frozen = {"reference": {"kernel": jax.device_put(jnp.ones((64, 64)), replicated(make_mesh()))}}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(make_state(frozen=frozen), data={})
    checkpoints.wait()
    meta = json.loads((tmp_path / "0" / "meta" / "metadata").read_text())
    assert not any("reference" in name for name in meta["arrays"])
    restored = checkpoints.restore(make_state(frozen=frozen))
    assert restored is not None
    assert restored.state.frozen["reference"]["kernel"].shape == (64, 64)
    checkpoints.close()


def test_leftovers_of_a_killed_save_are_cleared(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    leftover = tmp_path / "2.orbax-checkpoint-tmp"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    checkpoints = Checkpoints(tmp_path, keep=2)
    restored = checkpoints.restore(make_state())
    assert restored is not None
    assert restored.step == 1
    checkpoints.save(update(restored.state), data={})
    checkpoints.close()
    assert not leftover.exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["1", "2"]


def test_killed_while_it_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a checkpoint that was not to be kept is no damaged one."""
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        fill(tmp_path, 3, keep=2)
    (tmp_path / ".deleted" / "1" / "files.json").unlink()
    checkpoints = Checkpoints(tmp_path, keep=2, say=pytest.fail)
    assert checkpoints.steps() == [2, 3]
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_what_cannot_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, keep=1)
    state = update(update(make_state()))
    needed = sum(x.nbytes for x in arrays(state))
    free = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(10**9, 10**9, needed - 1))
    with pytest.raises(
        InputError, match=rf"it takes {needed:,} bytes, and {needed - 1:,} are free.*before it are intact"
    ):
        checkpoints.save(state, data={})
    monkeypatch.undo()
    checkpoints.save(state, data={})
    checkpoints.wait()
    assert checkpoints.steps() == [2]
    checkpoints.close()


_SIXTEEN = """
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[2])
from test_checkpoint import arrays, make_state
from dpo_jax.mesh import make_mesh
from dpo_jax.weights.orbax.checkpoint import Checkpoints
mesh = make_mesh(data=2, fsdp=4, tensor=2)
restored = Checkpoints(Path(sys.argv[1]), keep=9).restore(make_state(mesh, seed=7, width=32))
kernel = restored.state.trainable["params"]["mlp"]["kernel"]
assert len(kernel.sharding.device_set) == 16 and kernel.addressable_shards[0].data.shape == (8, 16)
assert (restored.step, restored.data) == (2, {"position": 2})
np.savez(sys.argv[1] + "/sixteen.npz", *arrays(restored.state))
"""


@pytest.mark.multiprocess
def test_from_eight_devices_to_two_to_sixteen(tmp_path: Path) -> None:
    state = update(make_state(make_mesh(fsdp=4, tensor=2), width=32))
    assert len(jax.devices()) == 8
    checkpoints = Checkpoints(tmp_path, keep=9)
    checkpoints.save(state, data={"position": 1})
    checkpoints.close()

    two = Checkpoints(tmp_path, keep=9)
    restored = two.restore(make_state(make_mesh(devices=jax.devices()[:2]), seed=5, width=32))
    assert restored is not None
    assert_same(arrays(restored.state), arrays(state))
    after = update(restored.state)
    two.save(after, data={"position": 2})
    two.close()

    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=16",
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[2], Path(__file__).parents[1] / "support"))),
    }
    command = [sys.executable, "-c", _SIXTEEN, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sixteen = np.load(tmp_path / "sixteen.npz")
    assert_same([sixteen[name] for name in sixteen.files], arrays(after))


_TOGETHER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[4]))
from test_checkpoint import alter, bit, make_state, shuffle, update
from dpo_jax.mesh import make_mesh
from dpo_jax.weights.orbax.checkpoint import Checkpoints
from jax.experimental import multihost_utils
folder, state = Path(sys.argv[1]), make_state(make_mesh(fsdp=4))
checkpoints = Checkpoints(folder, keep=9)
for step in range(1, 6):
    state = update(state)
    checkpoints.save(state, data={"position": step})
checkpoints.close()

def one_disk_fails(self, step, target, read=Checkpoints._arrays):
    if (step, jax.process_index()) == (5, 1):
        raise OSError("Input/output error")
    return read(self, step, target)

Checkpoints._arrays = one_disk_fails
if jax.process_index() == 0:
    alter(folder / "4", "state/**/d/*", shuffle)
    alter(folder / "3", "meta/metadata", bit)
multihost_utils.sync_global_devices("damaged")
said = []
checkpoints = Checkpoints(folder, keep=9, say=said.append)
restored = checkpoints.restore(make_state(make_mesh(fsdp=4), seed=1))
assert (restored.step, checkpoints.steps()) == (2, [1, 2]), checkpoints.steps()
assert jax.process_index() or any("5 is damaged (process 1 cannot read it)" in line for line in said), said
checkpoints.save(update(restored.state), data={"position": 3})
checkpoints.close()
print(len(said), sorted(path.name for path in folder.iterdir()))
"""


@pytest.mark.multiprocess
def test_processes_agree_on_what_is_damaged(tmp_path: Path) -> None:
    first, second = runs.two_say(_TOGETHER, str(tmp_path))
    assert [first[:1], second[:1]] == ["3", "0"]
    assert first.endswith("['1', '2', '3', 'damaged-3', 'damaged-4', 'damaged-5']")
