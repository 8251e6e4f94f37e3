"""The DPO step of Llama-2-7B, compiled for 8 x A100 without a GPU.

Needs the wheels jax-cuda12-plugin and jax-cuda12-pjrt of jaxlib's version (180 MB, installed with `--no-deps`: neither
CUDA nor cuDNN is used for compiling).
"""

import dataclasses
import importlib.util

import pytest
from plans import GIB, PARAMETERS, compiled, dpo_run, job, job_of, shape

from dpo_jax.config import Layout, MeshConfig, SFTDataConfig, SFTRun, TrainConfig

pytestmark = [
    pytest.mark.cuda_compile,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None,
        reason="pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt, in the version of jaxlib",
    ),
]


def test_llama_2_7b_trains_on_8_a100() -> None:
    """Full fine-tuning with a live bfloat16 reference; 16 pairs whose sequences have 512 + 512 tokens."""
    figures = compiled(job(dpo_run(pairs=16), "a100:8", prompt=512, response=512))
    memory = figures["memory"]
    assert memory["arguments"] == pytest.approx(PARAMETERS * 14 / 8 / GIB, rel=0.01)
    assert memory["outputs"] < 0.01
    assert memory["peak"] < 18.0


def test_windows_are_the_default_layout() -> None:
    assert dpo_run(pairs=16).step_config().layout == "windows"


@pytest.mark.parametrize(
    ("topology", "layout"),
    [("a100:8", "windows"), ("h100:8", "windows"), ("a100:8", "shared"), ("h100:8", "shared"), ("h100:8", "separate")],
)
def test_every_layout_uses_cudnn_attention(topology: str, layout: Layout) -> None:
    run = dpo_run(pairs=16, layout=layout)
    figures = compiled(job(run, topology, prompt=512, response=512, layers=2))
    assert figures["attention"] == "cudnn"
    assert figures["memory"]["peak"] < 3.0
    assert any(one["kind"] == "all-gather" and one["devices"] == 8 for one in figures["collectives"])


def test_a_window_and_sequences_over_devices_use_cudnn() -> None:
    """Each device has whole sequences of some heads: what the batch is split over does not matter to the kernel."""
    model = dataclasses.replace(shape(2), sliding_window=256, global_layers=(1,))
    run = dpo_run(pairs=1, mesh=MeshConfig(data=1, fsdp=1, context=8), layout="shared")
    figures = compiled(job_of(run, "h100:8", model, prompt=512, response=512))
    assert figures["attention"] == "cudnn"
    exchanged = sum(one["sent"] for one in figures["collectives"] if one["kind"] == "all-to-all")
    gathered = sum(one["sent"] for one in figures["collectives"] if one["kind"] == "all-gather")
    assert 0 < exchanged < gathered  # weights are gathered, as along fsdp


def test_packed_windows_of_text_use_cudnn_attention() -> None:
    """Not plain XLA's, which masks by segments."""
    data = SFTDataConfig(files="d", packing=True, max_length=1024)
    run = SFTRun(model="m", data=data, out="o", train=TrainConfig(batch_size=16, dtype="bfloat16", remat="full"))
    figures = compiled(job(run, "h100:8", prompt=0, response=1024, layers=2))
    assert figures["attention"] == "cudnn"


def test_offload_leaves_the_inputs_of_layers_on_the_host() -> None:
    """Two layers, 1,536 tokens a device, 4,096 channels in bfloat16."""
    figures = compiled(
        job(dpo_run(pairs=8, layout="shared", remat="offload"), "h100:8", prompt=512, response=512, layers=2)
    )
    assert figures["memory"]["host"] == pytest.approx(2 * 1536 * 4096 * 2 / GIB, rel=0.01)
