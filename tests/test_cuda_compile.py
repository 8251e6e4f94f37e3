"""The DPO step of Llama-2-7B, compiled for 8 x A100 without a GPU.

Needs the wheels jax-cuda12-plugin and jax-cuda12-pjrt of jaxlib's version (180 MB, installed with `--no-deps`: neither
CUDA nor cuDNN is used for compiling).
"""

import importlib.util

import pytest
from test_tpu_compile import GIB, PARAMETERS, compile_step

pytestmark = [
    pytest.mark.cuda_compile,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None,
        reason="pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt, in the version of jaxlib",
    ),
]


def test_llama_2_7b_trains_on_8_a100():
    """Full fine-tuning with a live bfloat16 reference; 16 pairs whose sequences have 512 + 512 tokens."""
    memory = compile_step(platform="cuda", topology="1x1x8", pairs=16, prompt=512, response=512)
    assert memory["arguments"] == pytest.approx(PARAMETERS * 14 / 8 / GIB, rel=0.01)
    assert memory["not_donated"] < 0.01
    assert memory["peak"] < 18.0


def test_separate_sequences_use_cudnn_attention():
    memory = compile_step(
        platform="cuda", topology="1x1x8", pairs=16, prompt=512, response=512, layers=2, layout="separate"
    )
    assert memory["cudnn"]
    assert memory["peak"] < 3.0
