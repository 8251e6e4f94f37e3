"""How long a program takes on its devices, from what it computes and moves: a roofline with four roofs.

    compute   computed FLOPs / devices / (share of the peak that matrix products reach x peak)
    memory    bytes to and from memory / (share x bandwidth)
    links     Σ bytes that a device sends inside its slice / (share x bandwidth of its links)
    network   Σ bytes that a device sends to other slices or nodes / (share x its bandwidth between them)

Hardware overlaps the four as far as the program allows. Collectives that the program waits for (`hlo.py`) overlap with
nothing; if all else does, the step takes the longest of the four without them, and them (`fastest`); if nothing does,
the sum of the four (`slowest`). Rankings and prices use the sum.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_jax.config import AssumeConfig
from dpo_jax.plan.hardware import Topology


@dataclass(frozen=True)
class Estimate:
    """Seconds of one run of a program, and what follows.

    Attributes:
      compute, memory, links, network: seconds under each roof.
      waits: of `links`, seconds of collectives that the program waits for.
      tokens: real tokens, all devices.
      flops: model FLOPs of a device.
      peak: FLOP/s of a device in bfloat16, against which MFU is reckoned.
      intensity: computed FLOPs a byte of memory traffic.
      ridge: the intensity from which on a device is bound by its matrix units.
    """

    compute: float
    memory: float
    links: float
    network: float
    waits: float
    tokens: float
    flops: float
    peak: float
    intensity: float
    ridge: float

    @property
    def fastest(self) -> float:
        """All overlaps that can."""
        return max(self.compute, self.memory, self.links - self.waits, self.network) + self.waits

    @property
    def slowest(self) -> float:
        """Nothing overlaps."""
        return self.compute + self.memory + self.links + self.network

    @property
    def bound(self) -> str:
        """Which roof is lowest."""
        roofs = {"compute": self.compute, "memory": self.memory, "links": self.links, "network": self.network}
        return max(roofs, key=roofs.__getitem__)

    @property
    def tokens_per_second(self) -> float:
        """All devices, where nothing overlaps."""
        return self.tokens / self.slowest

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, where nothing overlaps."""
        return self.flops / self.peak / self.slowest

    def as_json(self) -> dict[str, float | str]:
        """For plan.json."""
        return {
            "compute_seconds": self.compute,
            "memory_seconds": self.memory,
            "links_seconds": self.links,
            "network_seconds": self.network,
            "links_seconds_waited_for": self.waits,
            "seconds_if_all_overlaps": self.fastest,
            "seconds_if_nothing_overlaps": self.slowest,
            "bound_by": self.bound,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "flops_per_byte": self.intensity,
            "ridge_flops_per_byte": self.ridge,
        }


def crossing(figures: Mapping[str, Any]) -> float:
    """Bytes that a device sends to other slices or nodes in one run of a program."""
    return sum(one["crosses"] for one in figures["collectives"])


def estimate(figures: Mapping[str, Any], topology: Topology, dtype: str, assume: AssumeConfig) -> Estimate:
    """The estimate for a program's figures (`worker.compile_job`); `dtype`: what it computes in."""
    hardware, devices = topology.hardware, topology.devices
    computed, moved = figures["computed"] / devices, figures["moved"]
    links = sum(one["sent"] for one in figures["collectives"]) / hardware.links
    network = crossing(figures) / hardware.network if hardware.network else 0.0
    return Estimate(
        compute=computed / (assume.matrix * hardware.peak(dtype)),
        memory=moved / (assume.memory * hardware.bandwidth),
        links=links / assume.links,
        network=network / assume.links,
        waits=sum(one["waits"] for one in figures["collectives"]) / hardware.links / assume.links,
        tokens=figures["tokens"],
        flops=figures["flops"] / devices,
        peak=hardware.peak("bfloat16"),
        intensity=computed / moved if moved else float("inf"),
        ridge=hardware.peak(dtype) / hardware.bandwidth,
    )


def assumptions(topology: Topology, dtype: str, assume: AssumeConfig) -> list[str]:
    """What an estimate rests on, in words."""
    hardware = topology.hardware
    network = hardware.network if topology.slices > 1 else None
    return [
        f"matrix products reach {assume.matrix:.0%} of {hardware.peak(dtype) / 1e12:.4g} TFLOP/s a device ({dtype})",
        f"memory reaches {assume.memory:.0%} of {hardware.bandwidth / 1e9:.4g} GB/s a device",
        f"collectives reach {assume.links:.0%} of {hardware.links / 1e9:.4g} GB/s that a device sends"
        + ("" if network is None else f", and as much of {network / 1e9:.4g} GB/s to other slices"),
        "time is between the longest of these (all overlaps that can: not the collectives that the program waits for) "
        "and their sum (nothing does); rates, MFU and prices take the sum",
        "every prompt and response is as long as it may be, every row real; loading, evaluation, checkpoints and "
        "waiting for data are left out",
    ]
