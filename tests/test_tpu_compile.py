"""Training steps of Llama-2-7B, compiled for TPU slices that are not here (libtpu compiles without a TPU)."""

import importlib.util

import pytest
from plans import GIB, PARAMETERS, compiled, dpo_run, job

from dpo_jax.config import MeshConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install libtpu (in the test extra)"),
]


def test_llama_2_7b_trains_on_16_chips_of_v5e() -> None:
    """Full fine-tuning with a live bfloat16 reference; 16 pairs whose sequences have 1024 + 1024 tokens."""
    figures = compiled(job(dpo_run(pairs=16), "v5e:4x4", prompt=1024, response=1024))
    memory = figures["memory"]
    assert figures["attention"] == "splash"
    # Weights, two Adam moments, the reference: 4 + 8 + 2 bytes a parameter, and nothing large is on every device.
    assert memory["arguments"] == pytest.approx(PARAMETERS * 14 / 16 / GIB, rel=0.01)
    assert memory["outputs"] < 0.01
    assert memory["peak"] < 10.0
    assert memory["arguments"] + memory["temporaries"] < 15.75
    # Every layer's weights are gathered and its gradients scattered by all 16 chips, in each of the passes.
    gathered = sum(one["payload"] for one in figures["collectives"] if one["kind"] == "all-gather")
    scattered = sum(one["payload"] for one in figures["collectives"] if one["kind"] in ("reduce-scatter", "all-reduce"))
    assert gathered > 4 * 2 * PARAMETERS  # reference, forward, forward again, backward: 2 bytes a weight
    assert scattered > 2 * PARAMETERS
    assert figures["unknown_loops"] == 0


def test_splash_attention_is_split_over_heads() -> None:
    """Tensor parallelism, separate sequences and a cached reference, at two layers."""
    run = dpo_run(pairs=16, mesh=MeshConfig(fsdp=4, tensor=4), layout="separate", reference="cached")
    figures = compiled(job(run, "v5e:4x4", prompt=512, response=512, layers=2))
    assert figures["attention"] == "splash"
    assert figures["memory"]["peak"] < 3.0
    assert figures["mesh"] == {"data": 1, "fsdp": 4, "tensor": 4}


def test_a_refusal_is_an_answer() -> None:
    figures = compiled(job(dpo_run(pairs=512, remat="none"), "v5e:2x2", prompt=1024, response=1024, layers=2))
    refused = figures["refused"]
    assert refused["limit"] == pytest.approx(15.75 * GIB, rel=0.01)
    assert refused["wanted"] > refused["limit"]
    assert "RESOURCE_EXHAUSTED" in refused["said"]
