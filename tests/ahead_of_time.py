"""Compiles the sharded DPO step of Llama-2-7B for accelerators that are not here, and prints its memory as JSON.

    python tests/ahead_of_time.py '{"platform": "tpu", "topology": "v5e:4x4", "pairs": 16, "prompt": 1024, ...}'

A script of its own because the tests run on eight CPU devices with other settings than these compilers want. Nothing
is allocated: weights, optimizer state and batch are shapes, dtypes and shardings only.
"""

import contextlib
import json
import os
import sys
import time
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"  # the process itself runs on the CPU
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu: do not ask the cloud's metadata server which machine this is
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dpo_jax import mesh as meshes
from dpo_jax.align import dpo
from dpo_jax.config import DPOConfig
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.model.variables import abstract_variables, shardings
from dpo_jax.types import PreferenceBatch

# XLA's GpuTargetConfigProto in text form; the figures are those of NVIDIA's data sheet and device query.
A100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 166912 shared_memory_per_core: 167936
  core_count: 108 fpus_per_core: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 2039000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: 85167000000
  cuda_compute_capability { major: 8 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA A100-SXM4-80GB"
"""

LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 32,
    "head_dim": 128,
    "max_position": 4096,
}


def abstract_params(model: Llama, mesh: jax.sharding.Mesh, dtype: jnp.dtype) -> dict:
    """{"params": ...}, and adapters where the model has them, as shapes with shardings."""
    return jax.tree.map(
        lambda x, where: x.update(sharding=where), abstract_variables(model, dtype), shardings(model, mesh)
    )


def abstract_batch(mesh: jax.sharding.Mesh, B: int, P: int, R: int, *, K: int = 2, cached: bool) -> PreferenceBatch:
    """A batch of B pairs of P prompt and R response tokens; with reference log-probabilities if `cached`."""

    def array(*shape: int, dtype: jnp.dtype = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.sharding(mesh, meshes.batch_axes(len(shape))))

    return PreferenceBatch(
        prompts=array(B, P),
        prompt_lengths=array(B),
        responses=array(B, K, R),
        response_lengths=array(B, K),
        weights=array(B, dtype=jnp.float32),
        rows=array(B),
        reference_logps=array(B, K, dtype=jnp.float32) if cached else None,
    )


@contextlib.contextmanager
def assumed_cudnn():
    """JAX asks the installed cuDNN for its version before it calls it; compiling needs no cuDNN otherwise."""
    checks = "jax._src.cudnn.fused_attention_stablehlo"
    with (
        mock.patch(f"{checks}.check_cudnn_version", return_value=90800),
        mock.patch(f"{checks}.check_compute_capability", lambda wanted: wanted <= "8.0"),
        mock.patch(f"{checks}.is_cuda_compute_capability_equal", lambda wanted: wanted == "8.0"),
    ):
        yield


def compile_step(
    platform: str,
    topology: str,
    pairs: int,
    prompt: int,
    response: int,
    layout: str = "shared",
    reference: str = "live",
    remat: str = "full",
    attention: str = "auto",
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    layers: int = 32,
) -> tuple[dict, str]:
    """Full fine-tuning: float32 weights and Adam moments, bfloat16 computation and (live) reference.

    Returns the memory of one device in GiB, the seconds that compiling took, and the compiled program.
    """
    if platform == "tpu":
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    else:
        devices = topologies.get_topology_desc(platform="cuda", topology=topology, target_config=A100).devices
    mesh = meshes.make_mesh(data, fsdp, tensor, devices=devices)
    config = DPOConfig(reference=reference, layout=layout)
    model = Llama(LlamaConfig(**{**LLAMA_2_7B, "num_layers": layers}), jnp.bfloat16, remat, attention)
    live = abstract_params(model, mesh, jnp.bfloat16) if reference == "live" else None
    state = dpo.init_state(model, abstract_params(model, mesh, jnp.float32), config, reference=live)
    batch = abstract_batch(mesh, pairs, prompt, response, cached=reference == "cached")

    started = time.time()
    with assumed_cudnn() if platform == "cuda" else contextlib.nullcontext():
        compiled = dpo.jit_train_step(config, mesh).lower(state, batch).compile()
    memory, gib = compiled.memory_analysis(), 2**30
    text = compiled.as_text()
    figures = {
        "seconds": time.time() - started,
        "arguments": memory.argument_size_in_bytes / gib,
        "temporaries": memory.temp_size_in_bytes / gib,
        "not_donated": (memory.output_size_in_bytes - memory.alias_size_in_bytes) / gib,
        "peak": memory.peak_memory_in_bytes / gib,
        "splash": "splash" in text,
        "cudnn": "__cudnn$fmha" in text,
    }
    return figures, text


if __name__ == "__main__":
    result, program = compile_step(**json.loads(sys.argv[1]))
    if len(sys.argv) > 2:
        with open(sys.argv[2], "w") as file:
            file.write(program)
    print(json.dumps(result))
