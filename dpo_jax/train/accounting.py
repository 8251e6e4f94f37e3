"""What a run costs: how well its devices are used, and what electricity and carbon dioxide that may have been.

MFU, model FLOPs utilisation: the FLOPs that the mathematics needs (`flops.py` says which are counted) / time / what the
devices could do in that time, taken as their peak of dense bfloat16 matrix products, whatever the dtype of the run.

The energy is an estimate, not a measurement, by the convention of Llama 2 (Touvron et al. 2023, table 2): every device
drawing its full rated power for the time of the steps, x PUE (what a data centre draws for each watt of its computers),
x the carbon intensity of its electricity. With PUE 1.1 and 0.385 kg CO2 a kWh (LLaMA, Touvron et al. 2023, section 6)
that gives the paper's 31.22 t for 184,320 hours of A100s at 400 W.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_jax.config import EnergyConfig
from dpo_jax.errors import InputError
from dpo_jax.files.log import Row
from dpo_jax.report.html import Section, Table


@dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
      peak: FLOP/s of dense bfloat16 matrix products.
      watts: rated power of the board (TDP) or, for TPU v4, the highest that was measured; None where its maker does
        not publish it.
    """

    peak: float
    watts: float | None


# By `jax.Device.device_kind`; a JAX device is one TPU chip or one GPU.
# TPU peaks: Google Cloud's pages of each generation. TPU v4's power: Jouppi et al. 2023 (arXiv 2304.01433, table 4),
# 192 W at most; of later generations Google has published none.
# NVIDIA: data sheets, whose figures "with sparsity" are halved: A100 (2022), H100 (2023), H200 (2024), HGX B200 (2025).
CHIPS = {
    "TPU v4": Chip(275e12, 192),
    "TPU v5 lite": Chip(197e12, None),
    "TPU v5e": Chip(197e12, None),
    "TPU v5": Chip(459e12, None),
    "TPU v5p": Chip(459e12, None),
    "TPU v6 lite": Chip(918e12, None),
    "TPU v6e": Chip(918e12, None),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 400),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 400),
    "NVIDIA A100-PCIE-40GB": Chip(312e12, 250),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 300),
    "NVIDIA H100 80GB HBM3": Chip(989.4e12, 700),
    "NVIDIA H100 PCIe": Chip(756e12, 350),
    "NVIDIA H100 NVL": Chip(835e12, 400),
    "NVIDIA H200": Chip(989.4e12, 700),
    "NVIDIA H200 NVL": Chip(835.5e12, 600),
    "NVIDIA B200": Chip(2250e12, 1000),
}


@dataclass(frozen=True)
class Meter:
    """Turns the FLOPs of a step and its time into figures.

    Attributes:
      flops_of: batch (host arrays, global) -> FLOPs.
      devices: how many.
      peak: FLOP/s of one, or None where it is not known.
    """

    flops_of: Callable[[Any], float]
    devices: int
    peak: float | None

    def rates(self, flops: float, seconds: float) -> Row:
        """`tflops_per_device`, and `mfu` (a share of 1) where the peak is known."""
        per_device = flops / seconds / self.devices
        row: Row = {"tflops_per_device": per_device / 1e12}
        return row if self.peak is None else {**row, "mfu": per_device / self.peak}


def peak_flops(devices: Sequence[Any], given: float | None) -> float | None:
    """Peak FLOP/s of one of `devices` (of a mesh: all of one kind); `given` goes before the table."""
    chip = CHIPS.get(devices[0].device_kind)
    return given if given is not None else None if chip is None else chip.peak


def describe_peak(devices: Sequence[Any], given: float | None) -> str:
    """Against what `mfu` is reckoned, in words."""
    peak, kind = peak_flops(devices, given), devices[0].device_kind
    if peak is None:
        return f"no mfu is logged: the peak of {kind} is not known here; give it with --train.peak_flops"
    where = "--train.peak_flops" if given is not None else kind
    return f"mfu against {peak / 1e12:.4g} TFLOP/s a device ({where}, dense bfloat16)"


@dataclass(frozen=True)
class Electricity:
    """Assumptions of the estimate.

    Attributes:
      watts: of a device; None where it is not known, and then nothing is estimated.
      pue: watts of the data centre for each watt of a device.
      carbon_intensity: kg CO2 a kWh.
      kind: of the devices.
    """

    watts: float | None
    pue: float
    carbon_intensity: float
    kind: str

    @classmethod
    def of(cls, devices: Sequence[Any], config: EnergyConfig) -> "Electricity":
        """From the options and the table. Raises `InputError` for options that have nothing to act on."""
        kind = devices[0].device_kind
        chip = CHIPS.get(kind)
        watts = config.device_watts if config.device_watts is not None else None if chip is None else chip.watts
        for name in ("pue", "carbon_intensity"):
            if watts is None and getattr(config, name) is not None:
                raise InputError(
                    f"--energy.{name} has no effect: the power of {kind} is not known; give --energy.device_watts"
                )
        told = config.settled
        return cls(watts=watts, kind=kind, pue=told.pue, carbon_intensity=told.carbon_intensity)

    def kilowatt_hours(self, device_hours: float) -> float | None:
        """Energy of so many hours of one device, or None."""
        return None if self.watts is None else device_hours * self.watts / 1000 * self.pue

    def describe(self, device_hours: float) -> str:
        """The estimate and all it rests on, in one line."""
        energy = self.kilowatt_hours(device_hours)
        if energy is None:
            return f"no energy estimate: the power of {self.kind} is not known here; give it with --energy.device_watts"
        return (
            f"energy, if every device drew its full {self.watts:g} W: {device_hours:.4g} device-hours x "
            f"{self.watts:g} W x PUE {self.pue:g} = {energy:.4g} kWh; x {self.carbon_intensity:g} kg/kWh = "
            f"{energy * self.carbon_intensity:.4g} kg CO2"
        )


@dataclass(frozen=True)
class Bill:
    """What the steps of a run took, from its log.

    Attributes:
      device_hours: time of the steps x devices, without loading, evaluation and checkpoints.
      flops: model FLOPs, or None where they were not counted.
      mfu: median over the steps, or None.
    """

    device_hours: float
    flops: float | None
    mfu: float | None

    @classmethod
    def of(cls, rows: Sequence[Row], devices: int) -> "Bill":
        """From the rows of metrics.jsonl; `devices` is how many the run has now."""
        seconds = sum(row.get("seconds_per_step", 0.0) for row in rows)  # none in step 0, an evaluation
        counted = [
            row["tflops_per_device"] * 1e12 * row["seconds_per_step"] for row in rows if "tflops_per_device" in row
        ]
        mfu = [row["mfu"] for row in rows if "mfu" in row]
        return cls(
            device_hours=seconds * devices / 3600,
            flops=sum(counted) * devices if counted else None,
            mfu=float(np.median(mfu)) if mfu else None,
        )

    def describe(self) -> str:
        """One line."""
        parts = [f"{self.device_hours:.4g} device-hours of training steps"]
        if self.flops is not None:
            parts.append(f"{self.flops:.3g} model FLOPs")
        if self.mfu is not None:
            parts.append(f"median mfu {self.mfu:.1%}")
        return ", ".join(parts)


def cost_lines(rows: Sequence[Row], devices: int, electricity: Electricity) -> tuple[str, str]:
    """What a run took, and the estimate of its energy, one line each."""
    bill = Bill.of(rows, devices)
    return bill.describe(), electricity.describe(bill.device_hours)


def cost_section(devices: Sequence[Any], took: str, energy: str) -> Section:
    """The two lines of `cost_lines` for the report."""
    cells = [("devices", f"{len(devices)} x {devices[0].device_kind}"), ("took", took), ("electricity", energy)]
    return Section("Cost", "An estimate from rated power, not a measurement.", table=Table(("what", ""), cells))
