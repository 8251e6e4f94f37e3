"""The step on meshes and in two processes: the same losses. And what the compiled step holds, and how it grows."""

import dataclasses
import json
import math
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from pairs import TINY, make_batch, model_and_variables, quick_jit

from dpo_jax.align import dpo
from dpo_jax.config import DPOConfig, OptimizerConfig
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh, put_batch
from dpo_jax.model import llama, variables as model_variables

STEPS = 5
FULL = DPOConfig(reference="live", nll_coefficient=0.1, optimizer=OptimizerConfig(learning_rate=2e-3))
KTO = dataclasses.replace(FULL, loss="kto", nll_normalization="token", accumulate=2)
RELATIVES = dataclasses.replace(
    FULL, loss="bco_pair,aot,aot_unpaired", loss_weights="1,2,1", reference_sync_steps=2, accumulate=2
)


def losses(mesh, config: DPOConfig, lora: int = 0) -> list[float]:
    """The loss of each of five steps on `mesh`."""
    model, variables = model_and_variables(mesh=mesh, lora=lora, noise=0.3)
    state, step, out = dpo.init_state(model, variables, config), dpo.jit_train_step(config, mesh), []
    for i in range(STEPS):
        state, metrics = step(state, put_batch(mesh, make_batch(16, responses=3, seed=i)))
        out.append(metrics["loss"])
    return [float(x) for x in out]


@pytest.fixture(scope="module")
def on_one_device():
    return losses(make_mesh(devices=jax.devices()[:1]), FULL)


@pytest.mark.parametrize("sizes", [{"data": 8, "fsdp": 1}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_any_mesh_gives_the_losses_of_one_device(sizes, on_one_device):
    assert np.ptp(on_one_device) > 1e-2
    np.testing.assert_allclose(losses(make_mesh(**sizes), FULL), on_one_device, atol=1e-5)


def test_a_step_takes_a_state_that_is_made_anew():
    mesh = make_mesh(devices=jax.devices()[:1])
    step, batch = dpo.jit_train_step(FULL, mesh), put_batch(mesh, make_batch(8))
    found = [step(dpo.init_state(*model_and_variables(mesh=mesh), FULL), batch)[1]["loss"] for _ in range(2)]
    assert found[0] == found[1]


@pytest.mark.slow
def test_kto_with_adapters_and_accumulation_on_a_mesh():
    one = losses(make_mesh(devices=jax.devices()[:1]), KTO, lora=4)
    np.testing.assert_allclose(losses(make_mesh(data=2, fsdp=2, tensor=2), KTO, lora=4), one, atol=1e-5)


@pytest.mark.slow
def test_ranks_running_means_and_a_moving_reference_on_a_mesh():
    one = losses(make_mesh(devices=jax.devices()[:1]), RELATIVES, lora=4)
    np.testing.assert_allclose(losses(make_mesh(data=2, fsdp=2, tensor=2), RELATIVES, lora=4), one, atol=2e-5)


def test_micro_batches_that_do_not_divide_over_the_devices_are_refused():
    mesh = make_mesh(data=8, fsdp=1)
    model, variables = model_and_variables(mesh=mesh)
    config = DPOConfig(accumulate=2)
    step = dpo.jit_train_step(config, mesh)
    with pytest.raises(InputError, match="multiple of 16"):
        step(dpo.init_state(model, variables, config), put_batch(mesh, make_batch(8)))


def test_evaluation_on_a_mesh_gives_every_row():
    mesh, batch = make_mesh(data=2, fsdp=2, tensor=2), make_batch(8)
    rows = []
    for where in (mesh, make_mesh(devices=jax.devices()[:1])):
        model, variables = model_and_variables(mesh=where)
        state = dpo.init_state(model, variables, DPOConfig())
        rows.append(jax.device_get(dpo.jit_eval_step(DPOConfig(), where)(state, put_batch(where, batch))))
    for name in rows[0]:
        assert rows[0][name].shape == (8,)
        np.testing.assert_allclose(rows[0][name], rows[1][name], rtol=1e-5, atol=1e-5)


PROCESS = """
import json, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
sys.path.insert(0, sys.argv[3])
from dpo_jax.mesh import make_mesh
from test_dpo_devices import FULL, losses
assert jax.process_count() == 2 and len(jax.devices()) == 4
print("LOSSES", json.dumps(losses(make_mesh(data=2, fsdp=2), FULL)))
"""


@pytest.mark.multiprocess
def test_two_processes_give_the_losses_of_one_device(on_one_device):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": runs.xla_flags(2),
        "PYTHONPATH": os.pathsep.join(map(str, (here.parents[1], here.parent / "support"))),
    }
    command = [sys.executable, "-c", PROCESS, coordinator]
    both = [
        subprocess.Popen([*command, str(i), str(here)], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    for output in outputs:
        got = json.loads(re.search(r"LOSSES (.*)", output)[1])
        np.testing.assert_allclose(got, on_one_device, atol=1e-5)


# ---------------------------------------------------------------- the compiled step

WIDE = dataclasses.replace(TINY, vocab_size=389)
ROWS, PROMPT, RESPONSE = 6, 13, 11


def shapes_of(text: str) -> set[tuple[int, ...]]:
    """Every array shape that stands in an HLO text."""
    found = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", text)
    return {tuple(int(n) for n in dims.split(",")) for dims in found}


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_no_array_of_batch_time_vocabulary(layout):
    """Neither under that shape nor flattened: no array of the step, forwards or backwards, has so many elements."""
    model, variables = model_and_variables(WIDE)
    config = DPOConfig(layout=layout)
    state = dpo.init_state(model, variables, config)
    batch = make_batch(ROWS, prompt=PROMPT, response=RESPONSE, vocab=389)
    text = quick_jit(dpo.train_step, config=config).lower(state, batch).compile().as_text()
    shapes, positions = shapes_of(text), ROWS * 2 * RESPONSE
    assert (WIDE.hidden_size, 389) in shapes or (389, WIDE.hidden_size) in shapes
    with_vocabulary = [s for s in shapes if 389 in s]
    assert max(math.prod(s) for s in with_vocabulary) < positions * 389
    assert max(math.prod(s) for s in shapes) < positions * 389


def lowered(layers: int) -> str:
    """StableHLO of the step for a model of so many layers, from shapes alone."""
    model = llama.Llama(dataclasses.replace(TINY, num_layers=layers))
    state = dpo.init_state(model, model_variables.abstract_variables(model), DPOConfig())
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.asarray(x).dtype), make_batch())
    return jax.jit(partial(dpo.train_step, config=DPOConfig())).lower(state, batch).as_text()


def test_the_program_does_not_grow_with_depth():
    few, many = lowered(4), lowered(32)
    assert len(many.splitlines()) == len(few.splitlines())
    assert len(many) < 1.05 * len(few)
