"""Model FLOPs against XLA's own count, MFU, and the estimate of electricity."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.config import DPOConfig, EnergyConfig, LoraConfig, TrainConfig
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.model.variables import abstract_variables
from dpo_jax.train.accounting import CHIPS, Bill, Electricity, Meter, cost_lines, describe_peak, peak_flops
from dpo_jax.train.flops import ModelFlops, Work, dpo_flops, preference_work, sft_flops, token_work
from dpo_jax.types import PreferenceBatch, TokenBatch

SHAPE = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=704,
    num_layers=1,  # so that the scan over layers is no loop, whose length XLA's count would leave out
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
)
LLAMA2_7B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
)


@dataclass(frozen=True)
class Device:
    device_kind: str


# ---------------------------------------------------------------- FLOPs


def compiled_flops(lora: LoraConfig, *, backward: bool, batch: int = 2, length: int = 64) -> float:
    """XLA's count for one pass over [batch, length] tokens; the XLA attention kernel computes all length² pairs."""
    model = Llama(SHAPE, lora=lora, remat="none", attention="xla")
    variables = abstract_variables(model)
    trained, frozen = (
        ({"adapters": variables["adapters"]}, {"params": variables["params"]}) if lora.rank else (variables, {})
    )

    def loss(trained: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        hidden = model.apply({**trained, **frozen}, tokens)
        logits: Any = model.apply({**trained, **frozen}, hidden, method="logits")
        return jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    function = jax.grad(loss) if backward else loss
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    cost = jax.jit(function).lower(trained, frozen, tokens).compile().cost_analysis()
    assert cost is not None
    return cost["flops"]


@pytest.mark.parametrize(("rank", "backward"), [(0, False), (0, True), (16, True)])
def test_the_count_is_xlas(rank: int, backward: bool) -> None:
    lora = LoraConfig(rank=rank)
    model = ModelFlops.of(SHAPE, lora)
    work = Work(tokens=128, predicted=128, attended=128 * 64)  # without the causal half, as that kernel computes
    counted = model.training(work) if backward else model.forward(work)
    if rank:  # one layer, and nothing trained below it: its inputs need no gradient
        counted -= 2 * 128 * SHAPE.hidden_size * (256 + 2 * 128)
    assert compiled_flops(lora, backward=backward) == pytest.approx(counted, rel=0.04)


def test_llama2_7b_by_hand() -> None:
    model = ModelFlops.of(LLAMA2_7B)
    assert model.layers + model.head == 6_738_415_616 - 32_000 * 4096 - 65 * 4096  # all but embedding and norms
    window = 4096
    a_token = model.training(Work(1, 1, (window + 1) / 2))
    assert a_token == pytest.approx(6 * 6.607e9 + 12 * 32 * 4096 * window / 2, rel=1e-3)
    assert "6 a token for each of 6607.1 M matrix weights" in model.describe()


def test_frozen_matrices_have_no_gradient() -> None:
    full = ModelFlops.of(LLAMA2_7B)
    lora = ModelFlops.of(LLAMA2_7B, LoraConfig(rank=16, targets=("q_proj", "down_proj")))
    assert lora.adapters == 32 * 16 * (4096 + 4096 + 11_008 + 4096)
    work = Work(1000, 10, 5000)
    dense = 2 * (full.layers * 1000 + full.head * 10)
    attention = full.attention * 5000
    assert full.training(work) == 3 * (dense + attention)
    assert lora.training(work) == 2 * dense + 3 * (attention + 2 * lora.adapters * 1000)
    assert lora.forward(work, adapted=False) == full.forward(work) == dense + attention
    assert ModelFlops.of(LLAMA2_7B, LoraConfig()) == full
    assert "4 a token for each of 6607.1 M frozen" in lora.describe()


def test_a_sampled_vocabulary_is_the_columns_that_are_used() -> None:
    full, sampled = ModelFlops.of(SHAPE), ModelFlops.of(SHAPE, outputs=17)
    work = Work(10, 4, 0)
    assert full.training(work) - sampled.training(work) == 6 * 4 * SHAPE.hidden_size * (512 - 17)


def test_windows_count_real_tokens_and_what_they_see() -> None:
    arrays: dict[str, Any] = {
        "tokens": np.zeros((2, 6), np.int32),
        "segments": np.array([[1, 1, 1, 2, 2, 0], [0] * 6]),
        "positions": np.array([[0, 1, 2, 0, 1, 77], [9] * 6]),
        "targets": np.array([[0, 1, 1, 0, 0, 1], [1] * 6], bool),
        "rows": np.zeros((2, 2), np.int32),
    }
    assert token_work(TokenBatch(**arrays)) == Work(tokens=5, predicted=2, attended=1 + 2 + 3 + 1 + 2)


def pairs(**changes: Any) -> PreferenceBatch:
    arrays: dict[str, Any] = {
        "prompts": np.zeros((2, 8), np.int32),
        "prompt_lengths": np.array([3, 5]),
        "responses": np.zeros((2, 3, 4), np.int32),
        "response_lengths": np.array([[2, 4, 1], [1, 1, 1]]),
        "weights": np.array([1.0, 0.0], np.float32),
        "rows": np.zeros(2, np.int32),
        **changes,
    }
    return PreferenceBatch(**arrays)


def test_pairs_count_the_prompt_once() -> None:
    work = preference_work(pairs(), 0, 2)
    assert work == Work(tokens=3 + 2 + 4, predicted=6, attended=(1 + 2 + 3) + (4 + 5) + (4 + 5 + 6 + 7))
    model = ModelFlops.of(SHAPE)
    cached = dpo_flops(model, DPOConfig(reference="cached").objective)(pairs())
    assert cached == model.training(work)
    assert dpo_flops(model, DPOConfig(reference="live").objective)(pairs()) == cached + model.forward(work)
    assert dpo_flops(model, DPOConfig(reference="live", loss="simpo").objective)(pairs()) == cached
    mismatched = model.forward(preference_work(pairs(), 2, 3))
    assert dpo_flops(model, DPOConfig(loss="kto").objective)(pairs()) == cached + mismatched


# ---------------------------------------------------------------- rates


def test_rates() -> None:
    meter = Meter(lambda batch: 8e12, devices=4, peak=10e12)
    assert meter.rates(meter.flops_of(None), 2.0) == {"tflops_per_device": 1.0, "mfu": pytest.approx(0.1)}
    assert Meter(lambda batch: 0.0, devices=1, peak=None).rates(1e12, 1.0) == {"tflops_per_device": 1.0}


def test_published_utilisation_is_met() -> None:
    """MaxText's Llama2-7B: 492 TFLOP/s on an H100 is "about 50 %" of its dense bfloat16 peak."""
    peak = peak_flops([Device("NVIDIA H100 80GB HBM3")], None)
    assert peak is not None
    assert 492e12 / peak == pytest.approx(0.5, abs=0.01)


def test_peaks() -> None:
    assert peak_flops([Device("TPU v5 lite")], None) == 197e12
    assert peak_flops([Device("TPU v5 lite")], 1e12) == 1e12
    assert peak_flops([Device("cpu")], None) is None
    assert "give it with --train.peak_flops" in describe_peak([Device("cpu")], None)
    assert "197 TFLOP/s a device (TPU v5 lite, dense bfloat16)" in describe_peak([Device("TPU v5 lite")], None)
    assert all(chip.peak > 1e14 and (chip.watts or 1) > 0 for chip in CHIPS.values())
    with pytest.raises(InputError, match=r"--train\.peak_flops .+ must be positive"):
        TrainConfig(peak_flops=0.0)


# ---------------------------------------------------------------- electricity


@pytest.mark.parametrize(
    ("hours", "watts", "tonnes"), [(184_320, 400, 31.22), (368_640, 400, 62.44), (1_038_336, 350, 153.90)]
)
def test_the_table_of_llama2(hours: float, watts: float, tonnes: float) -> None:
    """Touvron et al. 2023, table 2: 7B, 13B and 34B."""
    made = Electricity.of([Device("NVIDIA A100-SXM4-80GB")], EnergyConfig(device_watts=watts))
    energy = made.kilowatt_hours(hours)
    assert energy is not None
    assert energy * made.carbon_intensity / 1000 == pytest.approx(tonnes, abs=0.01)


def test_the_assumptions_are_printed() -> None:
    a100 = [Device("NVIDIA A100-SXM4-80GB")] * 8
    text = Electricity.of(a100, EnergyConfig()).describe(2.0)
    assert text.endswith("2 device-hours x 400 W x PUE 1.1 = 0.88 kWh; x 0.385 kg/kWh = 0.3388 kg CO2")
    text = Electricity.of(a100, EnergyConfig(pue=1.5, carbon_intensity=0.0)).describe(2.0)
    assert "PUE 1.5 = 1.2 kWh; x 0 kg/kWh = 0 kg CO2" in text
    assert "no energy estimate" in Electricity.of([Device("TPU v6 lite")], EnergyConfig()).describe(2.0)


def test_options_without_effect_are_refused() -> None:
    for name, value in (("pue", 1.2), ("carbon_intensity", 0.1)):
        with pytest.raises(InputError, match=rf"--energy\.{name} has no effect: the power of cpu is not known"):
            Electricity.of([Device("cpu")], EnergyConfig(**{name: value}))
    for bad in ({"pue": 0.9}, {"device_watts": -1.0}, {"carbon_intensity": math.nan}):
        with pytest.raises(InputError, match="--energy"):
            EnergyConfig(**bad)


def test_the_bill_of_a_run() -> None:
    rows: list[Any] = [
        {"step": 1, "seconds_per_step": 10.0, "tflops_per_device": 1.0, "mfu": 0.1},
        {"step": 2, "seconds_per_step": 2.0, "tflops_per_device": 5.0, "mfu": 0.5},
        {"step": 3, "seconds_per_step": 2.0, "tflops_per_device": 5.0, "mfu": 0.5},
    ]
    bill = Bill.of(rows, 4)
    assert bill.device_hours == pytest.approx(14 * 4 / 3600)
    assert bill.flops == pytest.approx(30e12 * 4)
    assert bill.mfu == 0.5
    took, energy = cost_lines(rows, 4, Electricity.of([Device("NVIDIA H100 80GB HBM3")] * 4, EnergyConfig()))
    assert "1.2e+14 model FLOPs, median mfu 50.0%" in took
    assert "700 W" in energy
    assert Bill.of([{"step": 1, "seconds_per_step": 36.0}], 1) == Bill(0.01, None, None)


def test_sft_flops_are_those_of_the_windows() -> None:
    model = ModelFlops.of(SHAPE)
    arrays: dict[str, Any] = {
        "tokens": np.zeros((1, 4), np.int32),
        "segments": np.ones((1, 4), np.int32),
        "positions": np.arange(4)[None],
        "targets": np.arange(4)[None] > 0,
        "rows": np.zeros((1, 1), np.int32),
    }
    assert sft_flops(model)(TokenBatch(**arrays)) == model.training(Work(4, 3, 10))
