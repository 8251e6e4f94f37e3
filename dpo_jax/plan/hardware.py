"""Devices that a plan can be made for: their memory, bandwidths and links, with sources. A JAX device is one chip.

Peaks of matrix products stand in `train/accounting.py`. Links are counted one way, all links of a device together; the
network is what joins slices (TPUs: the data centre's; GPUs: that between nodes), a device's share of it.

  TPUs   memory and bandwidth: Google Cloud's page of each generation ("TPU v4", "v5e", "v5p", "v6e"). Links: the
         same pages (v5e 400, v5p 4,800 Gbit/s = 600 GB/s, v6e 800 GB/s; the figures for v5e and v6e count both ways),
         for v4 Jouppi et al. 2023 (arXiv 2304.01433, table 4: 6 links of 50 GB/s). What a program may use of the
         memory is what libtpu's compiler says when it refuses one: a little less than there is. Network: the same
         pages ("data center network bandwidth": v5p 50 Gbit/s a chip, v5e 6.4 and v6e 25.6 Tbit/s for the 256 chips of
         a pod, so 25 and 100 Gbit/s a chip; for v4 none is published).
  GPUs   NVIDIA's data sheets: A100 80 GB SXM (2,039 GB/s; NVLink 600 GB/s both ways), H100 SXM (3.35 TB/s; NVLink
         900 GB/s both ways). Between nodes: DGX A100 has 8 cards of 200 Gbit/s, DGX H100 8 of 400 Gbit/s. Of the
         memory that CUDA reports, 8 % are kept for its context and NCCL's buffers.
         H200 SXM: 4.8 TB/s, all else as an H100.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from dpo_jax.errors import InputError
from dpo_jax.train.accounting import CHIPS

GIB = 2**30
GPUS_PER_NODE = 8
GBIT = 1e9 / 8
BF16_PASSES = 6  # of a TPU's matrix unit for one float32 product at highest precision


@dataclass(frozen=True)
class Hardware:
    """One kind of device.

    Attributes:
      kind: `jax.Device.device_kind`, as in `accounting.CHIPS`.
      platform: of the compiler.
      memory: bytes that a program may use.
      bandwidth: of the memory, bytes/s.
      links: bytes/s that a device can send to the others, one way.
      network: bytes/s that a device can send to other slices or nodes, while all do; None: not published.
      float32_peak: FLOP/s of float32 products; None: six bfloat16 passes.
      target: GPUs: XLA's description of the device, its GpuTargetConfigProto in text form.
    """

    kind: str
    platform: Literal["tpu", "cuda"]
    memory: float
    bandwidth: float
    links: float
    network: float | None = None
    float32_peak: float | None = None
    target: str | None = None

    def peak(self, dtype: str) -> float:
        """FLOP/s of dense matrix products in `dtype`."""
        bfloat16 = CHIPS[self.kind].peak
        return bfloat16 if dtype == "bfloat16" else self.float32_peak or bfloat16 / BF16_PASSES


def _target(
    name: str,
    *,
    capability: str,
    cores: int,
    units: int,
    clock: float,
    bandwidth: float,
    memory: int,
    cache: int,
    shared: int,
) -> str:
    """The figures are those of NVIDIA's data sheet and device query."""
    major, minor = capability.split(".")
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared - 1024} shared_memory_per_core: {shared}
  core_count: {cores} fpus_per_core: {units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


_A100 = _target(
    "NVIDIA A100-SXM4-80GB",
    capability="8.0",
    cores=108,
    units=64,
    clock=1.41,
    bandwidth=2039e9,
    memory=85_167_000_000,
    cache=40 * 2**20,
    shared=167_936,
)
# The same processor, another memory.
_HOPPER = {"capability": "9.0", "cores": 132, "units": 128, "clock": 1.98, "cache": 50 * 2**20, "shared": 233_472}
_H100 = _target("NVIDIA H100 80GB HBM3", bandwidth=3350e9, memory=84_930_000_000, **_HOPPER)
_H200 = _target("NVIDIA H200", bandwidth=4800e9, memory=150_000_000_000, **_HOPPER)

HARDWARE = {
    "v4": Hardware("TPU v4", "tpu", 30.75 * GIB, 1200e9, 300e9),
    "v5e": Hardware("TPU v5 lite", "tpu", 15.75 * GIB, 819e9, 200e9, 25 * GBIT),
    "v5p": Hardware("TPU v5", "tpu", 95.74 * GIB, 2765e9, 600e9, 50 * GBIT),
    "v6e": Hardware("TPU v6 lite", "tpu", 31.25 * GIB, 1638e9, 400e9, 100 * GBIT),
    "a100": Hardware("NVIDIA A100-SXM4-80GB", "cuda", 0.92 * 85_167_000_000, 2039e9, 300e9, 200 * GBIT, 19.5e12, _A100),
    "h100": Hardware("NVIDIA H100 80GB HBM3", "cuda", 0.92 * 84_930_000_000, 3350e9, 450e9, 400 * GBIT, 66.9e12, _H100),
    "h200": Hardware("NVIDIA H200", "cuda", 0.92 * 150_000_000_000, 4800e9, 450e9, 400 * GBIT, 66.9e12, _H200),
}


@dataclass(frozen=True)
class Topology:
    """So many devices of one kind, as `--topology` names them: v5e:4x4, v5p:4x4x4, a100:8, h100:2x8 (2 nodes of 8).

    Several slices are 2xv5e:4x4; a node of GPUs is a slice, h100:2x8 the same as 2xh100:8.

    Attributes:
      name: what stands before the colon.
      shape: chips along each axis of a TPU slice; GPUs of a node.
      slices: TPU slices, or nodes, that a network joins.
    """

    name: str
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Raises `InputError` for what is no topology."""
        found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", text.strip().lower())
        if found is None or found[2] not in HARDWARE:
            known = ", ".join(HARDWARE)
            raise InputError(
                f"--topology {text}: write KIND:SHAPE with one of {known}, such as v5e:4x4 or a100:8; several slices"
                " are 2xv5e:4x4"
            )
        name, slices, shape = found[2], int(found[1] or 1), tuple(map(int, found[3].split("x")))
        hardware = HARDWARE[name]
        if 0 in (slices, *shape):
            raise InputError(f"--topology {text}: no axis may be 0")
        if hardware.platform == "cuda":
            if len(shape) == 2 and slices == 1:
                slices, shape = shape[0], shape[1:]
            if len(shape) != 1 or shape[0] > GPUS_PER_NODE:
                raise InputError(f"--topology {text}: GPUs are {name}:GPUS of one node (at most 8) or {name}:NODESx8")
        elif len(shape) != (axes := 3 if name in ("v4", "v5p") else 2):
            raise InputError(f"--topology {text}: a slice of TPU {name} has {axes} axes, such as {_EXAMPLES[axes]}")
        if slices > 1 and hardware.network is None:
            raise InputError(f"--topology {text}: no bandwidth between slices of TPU {name} is published; plan for one")
        return cls(name, shape, slices)

    @property
    def hardware(self) -> Hardware:
        """The facts of one device."""
        return HARDWARE[self.name]

    @property
    def devices(self) -> int:
        """How many."""
        return math.prod(self.shape) * self.slices

    def __str__(self) -> str:
        if self.hardware.platform == "cuda":
            return f"{self.name}:{self.slices}x{self.shape[0]}" if self.slices > 1 else f"{self.name}:{self.shape[0]}"
        slices = f"{self.slices}x" if self.slices > 1 else ""
        return f"{slices}{self.name}:{'x'.join(map(str, self.shape))}"


_EXAMPLES = {2: "4x4", 3: "2x2x1"}
