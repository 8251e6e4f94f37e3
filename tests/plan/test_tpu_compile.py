"""Training steps of Llama-2-7B, compiled for TPU slices that are not here (libtpu compiles without a TPU)."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from plans import GIB, PARAMETERS, compiled, dpo_run, job, job_of, quickly

from dpo_jax.config import (
    DataConfig,
    DistillRun,
    DPOLossConfig,
    DPORun,
    Layout,
    LoraConfig,
    MeshConfig,
    OnlineDPORun,
    PPOLossConfig,
    PPORun,
    RewardLossConfig,
    RewardRun,
    SampleConfig,
    SFTDataConfig,
    SFTRun,
    TrainConfig,
)
from dpo_jax.mesh import make_mesh
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.plan import compiling
from dpo_jax.plan.hardware import Topology
from dpo_jax.plan.programs import names
from dpo_jax.plan.shapes import parameters
from dpo_jax.plan.worker import devices_of

pytestmark = [
    pytest.mark.tpu_compile,
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
    # Every chip sends its share of the weights in four passes at least: reference, forward, forward again, backward.
    assert sum(one["sent"] for one in figures["collectives"]) > 4 * 2 * PARAMETERS * 15 / 16


def test_splash_attention_is_split_over_heads() -> None:
    """Tensor parallelism, separate sequences and a cached reference, at two layers."""
    run = dpo_run(pairs=16, mesh=MeshConfig(fsdp=4, tensor=4), layout="separate", reference="cached")
    figures = compiled(job(run, "v5e:4x4", prompt=512, response=512, layers=2))
    assert figures["attention"] == "splash"
    assert figures["memory"]["peak"] < 3.0
    assert figures["mesh"] == {"data": 1, "fsdp": 4, "context": 1, "tensor": 4}


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_splash_attention_with_a_window_on_every_other_layer(layout: Layout) -> None:
    """As Gemma 2 has it: windows by layer, capped scores; rows of 896 tokens (512 apart) cross the window."""
    model = dataclasses.replace(SMALL, sliding_window=256, global_layers=(1,), attention_cap=50.0)
    figures = compiled(job_of(dpo_run(pairs=4, layout=layout), "v5e:2x2", model, prompt=128, response=384))
    assert figures["attention"] == "splash"
    assert figures["memory"]["peak"] < 1


def test_half_as_much_crosses_between_slices_in_bfloat16() -> None:
    """A chip sends its quarter of the gradients once, whatever is packed into one transfer; little else crosses."""
    gradients = 4 * parameters(SMALL) / 4
    for dtype, share in (("float32", 1), ("bfloat16", 1 / 2)):
        run = dpo_run(pairs=16, mesh=MeshConfig(data=2, fsdp=4), accumulate=2, crossing_dtype=dtype)
        figures = compiled(job_of(run, "2xv5e:2x2", SMALL, prompt=128, response=128))
        crosses = sum(one["crosses"] for one in figures["collectives"])
        assert share * gradients < crosses < share * gradients + 2**16


def test_offload_leaves_the_inputs_of_layers_on_the_host() -> None:
    """Two layers, 512 tokens a chip, 512 channels in bfloat16."""
    run = dpo_run(pairs=4, layout="shared", remat="offload")
    figures = compiled(job_of(run, "v5e:2x2", SMALL, prompt=256, response=128))
    assert figures["memory"]["host"] == pytest.approx(2 * 512 * 512 * 2 / GIB, rel=0.01)


def test_a_step_for_v5p_sends_and_waits_less_with_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are scattered on the SparseCores, where libtpu by itself sums the whole of them on every chip."""
    run = SFTRun(
        model="m",
        out="o",
        data=SFTDataConfig("d", kind="text", max_length=256),
        train=TrainConfig(batch_size=8, dtype="bfloat16", remat="full"),
    )
    one = job_of(run, "v5p:2x2x2", SMALL, prompt=0, response=256)
    keys, sent, waits = [], [], []
    for own in ("", "--xla_tpu_enable_sparse_core_collective_offload_all_gather=false"):
        monkeypatch.setenv("LIBTPU_INIT_ARGS", own)
        with quickly():
            collectives = compiling.figures_of(one, tmp_path)["collectives"]
        keys.append(one.key)
        sent.append(sum(kind["sent"] for kind in collectives))
        waits.append(sum(kind["waits"] for kind in collectives))
    assert keys[0] != keys[1]
    assert sent[0] < 0.75 * sent[1]
    assert waits[0] < 0.75 * waits[1]


def test_a_mesh_may_cut_an_axis_of_the_torus() -> None:
    """jax lays no axis of 8 along a torus of 4 x 4 x 4 unless it is told that it may."""
    devices = devices_of(Topology.parse("v5p:4x4x4"))
    mesh = make_mesh(fsdp=8, tensor=8, devices=devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "context": 1, "tensor": 8}
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}


def test_a_refusal_is_an_answer(tmp_path: Path) -> None:
    """Of the process that `dpo-jax plan` starts."""
    one = job(dpo_run(pairs=512, remat="none"), "v5e:2x2", prompt=1024, response=1024, layers=2)
    with quickly():
        figures = compiling.figures_of(one, tmp_path)
    refused = figures["refused"]
    assert refused["limit"] == pytest.approx(15.75 * GIB, rel=0.01)
    assert refused["wanted"] > refused["limit"]
    assert "RESOURCE_EXHAUSTED" in refused["said"]


def test_online_dpo_and_distillation_are_compiled() -> None:
    """All programs of both; a teacher of four layers lies beside its student of two."""
    options: Any = {"data": DataConfig("d", max_length=512), "train": TrainConfig(batch_size=8, dtype="bfloat16")}
    options |= {"sample": SampleConfig(max_new_tokens=256), "model": "m", "out": "o"}
    online, distill = OnlineDPORun(reward="vader", **options), DistillRun(teacher="t", **options)
    for run, teacher in ((online, None), (distill, dataclasses.replace(SMALL, num_layers=4))):
        for name in names(run):
            one = job_of(run, "v5e:2x2", SMALL, prompt=256, response=256)
            figures = compiled(dataclasses.replace(one, program=name, teacher=teacher))
            assert 0 < figures["memory"]["arguments"] <= figures["held"] / GIB * 1.01, name
            assert figures["flops"] <= figures["computed"]


SMALL = LlamaConfig(
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=128,
)
GIVEN: dict[str, Any] = {
    "model": "m",
    "out": "o",
    "train": TrainConfig(batch_size=16, accumulate=2, dtype="bfloat16", remat="full"),
}
DATA = DataConfig("d", max_length=256, max_prompt_length=128)
PPO = PPORun(
    **GIVEN,
    data=DATA,
    reward="a model",
    ppo=PPOLossConfig(epochs=1, minibatches=2),
    sample=SampleConfig(max_new_tokens=128),
)
PROGRAMS = {
    "sft": (SFTRun(**GIVEN, data=SFTDataConfig("d", max_length=256, packing=True)), "train step"),
    "reward": (
        RewardRun(**GIVEN, data=DATA, reward=RewardLossConfig(margin="column", multi_class=("safety=safe,unsafe",))),
        "train step",
    ),
    "dpo_lora": (DPORun(**GIVEN, data=DATA, dpo=DPOLossConfig(loss="kto"), lora=LoraConfig(rank=8)), "train step"),
    "ppo": (PPO, "train step"),
    "ppo_measure": (PPO, "measure"),
    "ppo_generate": (PPO, "generate"),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_of_every_command_compile(kind: str) -> None:
    run, program = PROGRAMS[kind]
    one = job_of(run, "v5e:2x2", SMALL, prompt=0 if kind == "sft" else 128, response=256 if kind == "sft" else 128)
    figures = compiled(dataclasses.replace(one, program=program))
    memory = figures["memory"]
    # A newer compiler keeps all of the smallest program's temporaries off the HBM.
    assert 0 < memory["arguments"] <= memory["arguments"] + memory["temporaries"] < 1
    assert figures["flops"] <= figures["computed"]
    assert sum(one["sent"] for one in figures["collectives"]) > 0
    if program == "generate":
        assert figures["unknown_loops"] >= 1
    if isinstance(run, PPORun):
        # Policy, value model and their optimizer in float32, the reference and a reward model in bfloat16.
        state = (12 * 2 + 2 * 2) * parameters(SMALL) / 4 / GIB
        copy = 2 * parameters(SMALL) / GIB if program == "generate" else 0  # laid out for sampling, in bfloat16
        assert figures["held"] / GIB == pytest.approx(state + copy, rel=0.2)
        assert figures["held"] / GIB >= 0.99 * memory["arguments"]
