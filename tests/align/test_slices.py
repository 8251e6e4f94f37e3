"""Two slices, `data` between them: what crosses, counted in the compiled step; and the figures of one mesh."""

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import runs
from pairs import TINY, make_batch, model_and_variables
from test_context import rollout, trained
from windows import make_sequences, packed

from dpo_jax import mesh as meshes
from dpo_jax.align import dpo, ppo, reward, sft
from dpo_jax.config import (
    DPOConfig,
    DPORun,
    MeshConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    TrainConfig,
)
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh, put_batch
from dpo_jax.plan import hlo
from dpo_jax.train.session import Training
from dpo_jax.weights.huggingface.heads import as_reward_model

SLICES = [0] * 4 + [1] * 4
SMALL = 1024
"""Bytes: counts, losses and figures of rows cross too, and PPO's rows, which are dealt anew."""
PAIRS = make_batch(16, prompt=16, response=16)
CASES: dict[str, tuple[Any, Any, Any, int]] = {
    "dpo": (dpo, DPOConfig(reference="live", accumulate=2), PAIRS, 0),
    "dpo, adapters": (dpo, DPOConfig(accumulate=2), PAIRS, 4),
    "sft": (sft, SFTConfig(accumulate=2), packed(make_sequences(40), 16, 24), 0),
    "reward": (reward, RewardConfig(accumulate=2), PAIRS, 0),
    # PPO's updates are scaled by the rate beside plain gradient descent, too.
    "ppo": (ppo, PPOConfig(epochs=1, minibatches=1, optimizer=OptimizerConfig(learning_rate=1.0)), rollout(), 0),
}
QUICK = ("dpo", "dpo, adapters")


def prepared(case: tuple[Any, Any, Any, int], mesh: Any) -> tuple[Any, Any, Any]:
    """(step, state, batch) on the mesh."""
    module, config, batch, lora = case
    model, variables = model_and_variables(TINY, mesh=mesh, lora=lora)
    if module is reward:
        model, variables = as_reward_model(model, variables)
    state = module.init_state(model, variables, config)
    return module.jit_train_step(config, mesh), state, put_batch(mesh, batch)


def compiled(step: Any, state: Any, batch: Any) -> tuple[Any, hlo.Traffic, float]:
    """The compiled step, what it moves, and the bytes of a device's piece of the gradients."""
    made = step.lower(state, batch).compile(compiler_options={"xla_backend_optimization_level": 0})
    return made, hlo.read_traffic(made.as_text(), slices=SLICES), meshes.device_bytes(state.trainable)


def crossing(case: tuple[Any, Any, Any, int], mesh: Any) -> tuple[hlo.Traffic, float]:
    """What the compiled step moves, and the bytes of a device's piece of the gradients."""
    return compiled(*prepared(case, mesh))[1:]


def narrow(case: tuple[Any, Any, Any, int]) -> tuple[Any, Any, Any, int]:
    """The same, crossing in bfloat16."""
    module, config, batch, lora = case
    return module, dataclasses.replace(config, crossing_dtype="bfloat16"), batch, lora


EVERY = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]


@pytest.mark.parametrize("name", EVERY)
def test_only_gradients_cross_and_once(name: str) -> None:
    """A device sends its own piece once, 2 b (S - 1) / S bytes with S = 2, however many micro-batches there are."""
    found, piece = crossing(CASES[name], make_mesh(data=2, fsdp=4))
    assert found.unknown_loops == 2  # those of `apply_update`, which run once or never
    assert found.collectives["all-reduce", 2, 2].payload == found.collectives["all-reduce", 2, 2].crosses == piece
    assert piece < found.crosses < piece + SMALL


@pytest.mark.parametrize("name", EVERY)
def test_half_as_much_crosses_in_bfloat16(name: str) -> None:
    """A device sends half of its rounded piece to the copy that sums it, and half of the rounded sum back."""
    found, piece = crossing(narrow(CASES[name]), make_mesh(data=2, fsdp=4))
    far = {kind: one for (kind, _, slices), one in found.collectives.items() if slices > 1}
    assert far["collective-permute"].crosses == piece / 2
    assert piece / 2 < found.crosses < piece / 2 + SMALL


def test_before_they_crossed_once_a_micro_batch() -> None:
    """The same step where the compiler alone decides."""
    one, _ = crossing(CASES["dpo"], make_mesh(data=2, fsdp=4))
    with mock.patch.object(meshes, "sum_over_copies", lambda function, rows, dtype: function(rows)):
        before, piece = crossing(CASES["dpo"], make_mesh(data=2, fsdp=4))
    assert before.crosses > 4 * piece > 2 * one.crosses
    counts = [sum(c.count for (_, _, s), c in t.collectives.items() if s > 1) for t in (before, one)]
    assert counts[0] > 10 * counts[1]


@pytest.mark.parametrize("sizes", [(2, 4, 1), (4, 1, 2), (8, 1, 1)])
@pytest.mark.parametrize(
    ("shape", "axes"), [((16, 5), ("embed", None)), ((3, 8), (None, "vocab")), ((7, 3), (None, None))]
)
def test_what_crosses_is_rounded_twice_and_summed_in_float32(
    sizes: tuple[int, int, int], shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> None:
    """Every copy has the same sum, itself a bfloat16; where no axis divides it crosses in float32."""
    parts = np.random.default_rng(0).normal(size=(sizes[0], *shape)).astype(np.float32)

    def add(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        return meshes.constrain(jnp.sum(rows, axis=0), axes), rows

    with jax.set_mesh(make_mesh(*sizes)):
        total, rows = jax.jit(lambda x: meshes.sum_over_copies(add, x, "bfloat16"))(parts)
    np.testing.assert_array_equal(rows, parts)
    exact, found = parts.astype(np.float64).sum(0), np.asarray(total)
    for held in total.addressable_shards:
        np.testing.assert_array_equal(held.data, found[held.index])
    if any(axes):
        np.testing.assert_array_equal(found, found.astype(ml_dtypes.bfloat16).astype(np.float32))
        bound = 2.0**-8 * (np.abs(parts).sum(0) + 1.01 * np.abs(exact)) + 1e-6
        assert (np.abs(found - exact) < bound).all()
        assert (found != exact.astype(np.float32)).any()
    else:
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_gradients_of_one_mesh(name: str) -> None:
    """In bfloat16 each gradient is off by the rounding of one part and of the sum, by 2^-8 of each at most."""
    module, config, batch, lora = CASES[name]
    one = trained(module, config, batch, make_mesh(fsdp=8), lora=lora)
    two = trained(module, config, batch, make_mesh(data=2, fsdp=4), lora=lora)
    assert one[0] == pytest.approx(two[0], rel=2e-6)
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(two[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(a).max(), 1e-6) + 1e-6)
    module, config, batch, lora = narrow(CASES[name])
    rough = trained(module, config, batch, make_mesh(data=2, fsdp=4), lora=lora)
    assert one[0] == pytest.approx(rough[0], rel=2e-6)
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(rough[1]), strict=True):
        if not a.any():  # what is below a new value head has no gradient yet
            assert name == "ppo"
            assert not b.any()
            continue
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert 1e-4 < error < 2**-8


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({}, "no effect with --mesh.data 1"),
        ({"data": 2, "context": 2}, "no effect with --mesh.context 2"),
    ],
)
def test_where_nothing_crosses_its_dtype_is_refused(sizes: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        DPORun(model="m", data="d", out="o", train=TrainConfig(crossing_dtype="bfloat16"), mesh=MeshConfig(**sizes))
    with pytest.raises(InputError, match="no effect"):  # --mesh.data -1 is known when the devices are
        crossing(narrow(CASES["dpo"]), make_mesh(sizes.get("data", 1), context=sizes.get("context", 1)))


def test_that_nothing_crosses_is_known_before_anything_is_read(tmp_path: Path) -> None:
    """`--mesh.data -1` is one copy where the other sizes take all devices."""
    every = jax.device_count()
    sizes, told = MeshConfig(data=-1, fsdp=every), TrainConfig(batch_size=every, crossing_dtype="bfloat16")
    run = DPORun(model="none", data="none", out=str(tmp_path / "out"), train=told, mesh=sizes)
    with pytest.raises(InputError, match="with one copy of the model"):
        Training.begin(run, "dpo")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- two processes, each a slice

STEPS = 3
_PROCESS = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[4]))
sys.path.insert(0, str(Path(sys.argv[3]).with_name("align")))
import test_slices
test_slices.say(Path(sys.argv[1]))
"""


def some_steps(dtype: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What crosses in a DPO step, the metrics of a few, and the weights behind them, on all devices there are."""
    module, config, batch, lora = CASES["dpo"]
    optimizer = OptimizerConfig(learning_rate=1e-2)
    config = dataclasses.replace(config, crossing_dtype=dtype, optimizer=optimizer)
    mesh = make_mesh(data=2, fsdp=4)
    step, state, batch = prepared((module, config, batch, lora), mesh)
    step, found, piece = compiled(step, state, batch)
    far = {f"{kind} {n}": c.count for (kind, n, slices), c in found.collectives.items() if slices > 1}
    told = {"crosses": found.crosses, "piece": piece, "far": far, "slices": meshes.slices_of(mesh), "metrics": []}
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        told["metrics"].append({name: np.asarray(x).tolist() for name, x in metrics.items()})
    whole = jax.jit(lambda x: x, out_shardings=meshes.replicated(mesh))(state.trainable)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(whole))
    return told, {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def say(folder: Path) -> None:
    """One of the two processes."""
    every = {}
    for dtype in GRADIENTS:
        every[dtype], weights = some_steps(dtype)
        np.savez(folder / f"{dtype}-{jax.process_index()}.npz", **weights)  # pyright: ignore[reportArgumentType]
    print(json.dumps(every))


GRADIENTS = {"float32": (1, 1e-5), "bfloat16": (1 / 2, 2e-4)}
"""What crosses -> bytes beside those of float32, and how far weights may lie apart in the mean, a single one by ten
times as much: sums inside a process are in another order than among devices of one, which AdamW makes much of where a
gradient is nearly 0; in bfloat16 a sum that is rounded otherwise moves an update of 1e-2 by 2^-8."""


@pytest.mark.multiprocess
def test_two_processes_are_two_slices(tmp_path: Path) -> None:
    """Four devices each, `fsdp` inside: once a step a device sends its gradients to the other process; and the metrics
    and weights are those of one process."""
    lines = runs.two_say(_PROCESS, str(tmp_path), devices=4)
    for dtype, (share, apart) in GRADIENTS.items():
        one, weights = some_steps(dtype)
        for i, line in enumerate(lines):
            told = json.loads(line)[dtype]
            assert (told["slices"], one["slices"]) == (SLICES, [0] * 8)
            assert share * one["piece"] < told["crosses"] < share * one["piece"] + SMALL
            assert told["far"] == one["far"]
            for ours, theirs in zip(told["metrics"], one["metrics"], strict=True):
                assert ours.keys() == theirs.keys()
                for name in ours:
                    np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=apart, err_msg=name)
            with np.load(tmp_path / f"{dtype}-{i}.npz") as found:
                assert set(found) == set(weights)
                for name in found:
                    np.testing.assert_allclose(found[name], weights[name], atol=10 * apart, err_msg=name)
                    assert np.abs(found[name] - weights[name]).mean() < apart, name
