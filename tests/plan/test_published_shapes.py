"""`dpo-jax plan` for a published model of every family: its config.json alone gives its size, to the parameter.

The figures follow from the published sizes (Qwen2.5-7B: 7,615,616,512), counted by hand, not by this code:
embedding, a second one unless they are tied, and of each layer q, k, v, o, three matrices of the MLP, biases and norms.
"""

import importlib.util
from pathlib import Path

import jax
import pytest
from plans import GIB, compiled
from published import PUBLISHED, planned

from dpo_jax.commands import plan
from dpo_jax.mesh import device_bytes, make_mesh
from dpo_jax.model.families import FAMILIES
from dpo_jax.plan import programs, worker
from dpo_jax.plan.rough import state_bytes
from dpo_jax.plan.shapes import parameters
from dpo_jax.train.flops import ModelFlops

PLACED = ("gemma-2-9b", "Qwen3-8B")  # caps and windows by layer; norms of heads


def test_every_family_has_one() -> None:
    assert {family for family, *_ in PUBLISHED.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_planned_from_its_config(name: str, tmp_path: Path) -> None:
    _, job = plan.first_job(planned(tmp_path, name))
    count = PUBLISHED[name][3]
    assert parameters(job.shape) == count
    lora = ModelFlops.of(job.shape, job.run.lora).adapters
    assert state_bytes(job.run, job.shape) == 2 * count + 12 * lora


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACED)
def test_the_weights_of_a_published_model_have_their_places(name: str, tmp_path: Path) -> None:
    """What 8 devices hold of a training step, worked out by the planner before it compiles anything."""
    _, job = plan.first_job(planned(tmp_path, name))
    program = worker.build(job, make_mesh(fsdp=8, devices=jax.devices()[:8]), programs.Lengths(256, 256))
    lora = ModelFlops.of(job.shape, job.run.lora).adapters
    held, split = device_bytes(program.arguments[0]), 2 * PUBLISHED[name][3] / 8
    assert split < held < 1.01 * split + 12 * lora  # an adapter's A is split, its B lies on every device


@pytest.mark.tpu_compile
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install libtpu (in the test extra)")
@pytest.mark.parametrize("name", PLACED)
def test_the_step_of_a_published_model_compiles(name: str, tmp_path: Path) -> None:
    """For 8 chips of v5e, with pairs longer than the window: a row of docs/models.md."""
    _, job = plan.first_job(planned(tmp_path, name))
    figures = compiled(job)
    assert figures["attention"] == "splash"
    assert 2 * PUBLISHED[name][3] / 8 / GIB < figures["memory"]["peak"] < 12
