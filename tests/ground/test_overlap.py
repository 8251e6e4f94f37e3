"""Options of the compiler that a training step gets, by the devices it is compiled for."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dpo_jax import overlap
from dpo_jax.mesh import ShardedStep, make_mesh, replicated

A_FLAG = {"xla_dump_hlo_module_re": ""}  # that any XLA knows, and that changes nothing


@pytest.fixture
def cpus_have_options(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The options of CPUs in this test: a flag that the compiler knows."""
    options = dict(A_FLAG)
    monkeypatch.setattr(overlap, "OPTIONS", {"cpu": options})
    return options


def test_cpus_get_none() -> None:
    assert overlap.compiler_options(replicated(make_mesh())) == {}


def test_devices_that_have_some_get_them(cpus_have_options: dict[str, str]) -> None:
    assert overlap.compiler_options(replicated(make_mesh())) == A_FLAG
    assert overlap.compiler_options(replicated(make_mesh(devices=jax.devices()[:1]))) == {}, (
        "one device has no collectives"
    )


def test_who_names_one_of_them_has_the_say(cpus_have_options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    cpus_have_options["xla_dump_hlo_pass_re"] = ""
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_of_no_concern=1 --xla_dump_hlo_module_re=step")
    assert overlap.compiler_options(replicated(make_mesh())) == {}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_of_no_concern=1")
    assert overlap.compiler_options(replicated(make_mesh())) == cpus_have_options


@pytest.mark.parametrize("more", [{}, {"xla_of_a_newer_compiler": "true"}])
def test_a_step_runs_with_them_and_where_the_compiler_is_too_old(
    more: dict[str, str], cpus_have_options: dict[str, str]
) -> None:
    cpus_have_options |= more
    mesh = make_mesh()
    assert overlap.compiler_options(replicated(mesh)) == ({} if more else A_FLAG)

    def step(state: jax.Array, batch: jax.Array) -> Any:
        return state + batch, {"loss": jnp.sum(batch)}

    state, batch = (jax.device_put(jnp.ones(8), jax.NamedSharding(mesh, jax.P("fsdp"))) for _ in range(2))
    new, metrics = ShardedStep(step, mesh)(state, batch)
    assert float(jnp.sum(new)) == 16
    assert float(metrics["loss"]) == 8
