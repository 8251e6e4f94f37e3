"""The planner without its compilers: HLO text, the roofline, refusals, the pruning of a search, the command."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import plans
import pytest
import tiny

from dpo_jax import cli, config
from dpo_jax.commands import plan as planning
from dpo_jax.config import (
    AssumeConfig,
    DataConfig,
    DistillConfig,
    DistillRun,
    GRPORun,
    MeshConfig,
    OnlineConfig,
    OnlineDPORun,
    PlanRun,
    PPOLossConfig,
    SampleConfig,
    TrainConfig,
)
from dpo_jax.config.command_line.config_text import config_text
from dpo_jax.config.command_line.shipped import load
from dpo_jax.errors import InputError
from dpo_jax.files.folder import as_json
from dpo_jax.mesh import make_mesh, sharding
from dpo_jax.model.llama import Llama
from dpo_jax.model.variables import abstract_variables
from dpo_jax.plan import compiling, hlo, jobs, programs, programs_sampled, worker
from dpo_jax.plan.estimate import assumptions, estimate
from dpo_jax.plan.hardware import HARDWARE, Topology
from dpo_jax.plan.jobs import Job
from dpo_jax.plan.search import Candidate, Frontier, candidates
from dpo_jax.plan.shapes import SHAPES, parameters

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
ZEPHYR = str(ROOT / "configs" / "zephyr_ddpo.py")
GB, GIB = 1e9, 2**30


# ---------------------------------------------------------------- what a program moves


def compiled_scan(layers: int) -> Any:
    """A scanned stack of weights [layers, 64, 64], split over 8 devices, and its gradient."""
    mesh = make_mesh()

    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
        return jnp.sum(y**2)

    def shaped(axes: tuple[str | None, ...], *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding(mesh, axes))

    weights = shaped(("layers", "embed", "mlp"), layers, 64, 64)
    step = jax.jit(jax.grad(loss), out_shardings=weights.sharding)
    with jax.set_mesh(mesh):
        return step.lower(weights, shaped(("batch", None), 32, 64)).compile()


def test_collectives_in_a_loop_count_as_often_as_it_runs() -> None:
    few, many = (hlo.read_traffic(compiled_scan(n).as_text(), slices=[0] * 8) for n in (3, 6))
    assert few.unknown_loops == many.unknown_loops == 0
    gathered = {n: traffic.collectives["all-gather", 8, 1] for n, traffic in ((3, few), (6, many))}
    assert gathered[6].count == 2 * gathered[3].count >= 6
    assert gathered[6].payload == 2 * gathered[3].payload
    assert gathered[3].payload / gathered[3].count == 64 * 64 * 4  # a whole matrix each time
    assert gathered[3].sent == pytest.approx(gathered[3].payload * 7 / 8)
    assert few.sent < many.sent


def test_memory_traffic_agrees_with_xla_where_there_is_no_loop() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        y = jnp.tanh(x @ w)
        return jax.lax.dynamic_update_slice(y @ w.T, x[:8] * 2, (0, 0))

    shapes = (jax.ShapeDtypeStruct((256, 512), jnp.float32), jax.ShapeDtypeStruct((512, 512), jnp.float32))
    compiled = jax.jit(f).lower(*shapes).compile()
    cost: Any = compiled.cost_analysis()
    found = hlo.read_traffic(compiled.as_text(), slices=[0])
    assert found.memory == pytest.approx(cost["bytes accessed"], rel=0.1)
    assert not found.collectives


LOOP = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %s = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=GROUPS, use_global_device_ids=true, to_apply=%add
  %one = s32[] constant(STEP)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %s)
}

%cond (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%j, %n), direction=DIRECTION
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %zero = s32[] constant(1)
  %start = s32[]{:T(128)} copy(%zero)
  %init = (s32[], f32[8]{0}) tuple(%start, %a)
  %w = (s32[], /*index=1*/f32[8]{0}) while(%init), condition=%cond, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%w), index=1
}
"""


def loop(groups: str = "{}", direction: str = "LT", step: int = 1) -> str:
    return LOOP.replace("GROUPS", groups).replace("DIRECTION", direction).replace("STEP", str(step))


def test_a_counter_may_go_in_larger_steps() -> None:
    """From 1 to 5: 1, 2, 3, 4; 1, 3; 1, 4; and once."""
    counts = [
        hlo.read_traffic(loop(step=n), slices=[0] * 8).collectives["all-reduce", 8, 1].count for n in (1, 2, 3, 4)
    ]
    assert counts == [4, 2, 2, 1]


@pytest.mark.parametrize(
    ("groups", "n"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[8]", 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", 2),
        ("{}", 8),
    ],
)
def test_groups_however_they_are_written(groups: str, n: int) -> None:
    found = hlo.read_traffic(loop(groups), slices=[0] * 8)
    assert found.collectives.keys() == {("all-reduce", n, 1)}
    one = found.collectives["all-reduce", n, 1]
    assert (one.count, one.payload) == (4, 4 * 32)  # the counter goes from 1 to 5
    assert one.sent == pytest.approx(2 * 4 * 32 * (n - 1) / n)


def test_a_loop_of_unknown_length() -> None:
    found = hlo.read_traffic(loop(direction="NE"), slices=[0] * 8, unknown_trips=100)
    assert found.unknown_loops == 1
    assert found.collectives["all-reduce", 8, 1].count == 100


def test_a_fused_slice_of_a_sum_is_a_reduce_scatter() -> None:
    text = """
%fused (i: f32[64]) -> f32[8] {
  %i = f32[64]{0} parameter(0)
  %r = f32[64]{0} all-reduce(%i), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %k = s32[] constant(0)
  ROOT %d = f32[8]{0:T(256)S(1)} dynamic-slice(%r, %k), dynamic_slice_sizes={8}
}

ENTRY %main (a: f32[64]) -> f32[8] {
  %a = f32[64]{0} parameter(0)
  ROOT %f = f32[8]{0:T(256)S(1)} fusion(%a), kind=kCustom, calls=%fused
}
"""
    found = hlo.read_traffic(text, slices=[0] * 8)
    assert found.collectives.keys() == {("reduce-scatter", 8, 1)}
    assert found.sent == 64 * 4 * 7 / 8
    assert found.memory == 64 * 4  # what is kept stays in on-chip memory


CHAIN = """
%start (s: f32[8]) -> (f32[8], f32[64]) {
  %s = f32[8]{0} parameter(0)
  %g1 = f32[64]{0} all-gather(%s), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="0"}
  ROOT %c1 = (f32[8]{0}, f32[64]{0}) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}

%beside (i: f32[8], o: f32[64], x: f32[16]) -> (f32[16], f32[8], f32[64], f32[64]) {
  %i = f32[8]{0} parameter(0)
  %o = f32[64]{0} parameter(1)
  %x = f32[16]{0} parameter(2)
  %g2 = f32[64]{0} all-gather(%i), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="0"}
  %y = f32[16]{0} add(%x, %x)
  ROOT %t = (f32[16]{0}, f32[8]{0}, f32[64]{0}, f32[64]{0}) tuple(%y, %i, %o, %g2)
}

%done (j: f32[8], q: f32[64]) -> f32[64] {
  %j = f32[8]{0} parameter(0)
  %q = f32[64]{0} parameter(1)
  %g3 = f32[64]{0} all-gather(%j), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="0"}
  ROOT %c3 = f32[64]{0} custom-call(%j, %q, %g3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[8], b: f32[16]) -> f32[64] {
  %a = f32[8]{0} parameter(0)
  %b = f32[16]{0} parameter(1)
  %f1 = (f32[8]{0}, f32[64]{0}) fusion(%a), kind=kCustom, calls=%start
  %a1 = f32[8]{0} get-tuple-element(%f1), index=0
  %o1 = f32[64]{0} get-tuple-element(%f1), index=1
  %f2 = (f32[16]{0}, f32[8]{0}, f32[64]{0}, f32[64]{0}) fusion(%a1, %o1, %b), kind=kCustom, calls=%beside
  %a2 = f32[8]{0} get-tuple-element(%f2), index=1
  %o2 = f32[64]{0} get-tuple-element(%f2), index=2
  ROOT %f3 = f32[64]{0} fusion(%a2, %o2), kind=kCustom, calls=%done
}
"""


def test_an_asynchronous_collective_of_a_tpu_counts_once() -> None:
    """It stands in each fusion from its start to its end; what they hand on is not read, nor written."""
    found = hlo.read_traffic(CHAIN, slices=[0] * 8)
    one = found.collectives["all-gather", 8, 1]
    assert (one.count, one.payload, one.sent, one.waits) == (1, 256, 224, 0)
    # The start reads its part, and writes it where it goes on, and the whole; between them b is read, and y written.
    assert found.memory == 4 * (8 + 8 + 64 + 16 + 16)


@pytest.mark.parametrize(
    ("between", "attributes", "waits"),
    [
        ("  %y = f32[8]{0} fusion(%a), kind=kLoop, calls=%twice", "", 0),
        ("  %y = f32[8]{0} copy(%a)", "", 224),
        ("  %y = f32[8]{0} fusion(%a), kind=kLoop, calls=%twice", ', backend_config={"is_sync":true}', 224),
    ],
)
def test_what_nothing_hides_is_waited_for(between: str, attributes: str, waits: float) -> None:
    text = f"""
%twice (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %d = f32[8]{{0}} add(%x, %x)
}}

ENTRY %main (a: f32[8]) -> f32[64] {{
  %a = f32[8]{{0}} parameter(0)
  %s = (f32[8]{{0}}, f32[64]{{0}}) all-gather-start(%a), replica_groups={{{{0,1,2,3,4,5,6,7}}}}{attributes}
{between}
  ROOT %g = f32[64]{{0}} all-gather-done(%s)
}}
"""
    one = hlo.read_traffic(text, slices=[0] * 8).collectives["all-gather", 8, 1]
    assert (one.sent, one.waits) == (224, waits)


@pytest.mark.parametrize(
    ("between", "waits"),
    [("fusion(%a), kind=kLoop, calls=%twice", 0), ('custom-call(), target="PrepareAsyncCallStart"', 224)],
)
def test_a_collective_on_sparse_cores(between: str, waits: float) -> None:
    """The call begins and ends as an asynchronous collective does; what readies another call computes nothing."""
    text = f"""
%twice (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %d = f32[8]{{0}} add(%x, %x)
}}

%offloaded (p: f32[8]) -> f32[64] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %w = f32[64]{{0}} all-gather(%p), replica_groups={{{{0,1,2,3,4,5,6,7}}}}
}}, execution_thread="sparsecore"

ENTRY %main (a: f32[8]) -> f32[64] {{
  %a = f32[8]{{0}} parameter(0)
  %s = ((f32[8]{{0}}), f32[64]{{0}}) call-start(%a), async_execution_thread="sparsecore", to_apply=%offloaded
  %y = f32[8]{{0}} {between}
  ROOT %g = f32[64]{{0}} call-done(%s)
}}
"""
    found = hlo.read_traffic(text, slices=[0] * 8)
    one = found.collectives["all-gather", 8, 1]
    assert (one.count, one.sent, one.waits) == (1, 224, waits)
    assert found.memory == 4 * (8 + 64) + (4 * 16 if waits == 0 else 0)


# ---------------------------------------------------------------- refusals, hardware, the roofline


def test_refusals() -> None:
    first = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.62G of 15.75G hbm. Exceeded by 893.1M."
    found = worker.parse_refusal(f"{first}\nTotal hbm usage >= 17G")
    assert found == {"said": first, "wanted": 16.62 * GIB, "limit": 15.75 * GIB}
    second = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (120.00G)"
    found = worker.parse_refusal(f"{second} exceeds available HBM (30.75G).")
    assert (found["wanted"], found["limit"]) == (120 * GIB, 30.75 * GIB)
    assert worker.parse_refusal("RESOURCE_EXHAUSTED: something else")["wanted"] is None


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("v5e:4x4", 16),
        ("v4:2x2x1", 4),
        ("v5p:4x4x4", 64),
        ("V6E:2x4", 8),
        ("a100:8", 8),
        ("h100:1", 1),
        ("a100:2x8", 16),
    ],
)
def test_topologies(text: str, devices: int) -> None:
    found = Topology.parse(text)
    assert (found.devices, str(found)) == (devices, text.lower())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v5e", "write KIND:SHAPE with one of v4, v5e"),
        ("tpu:4", "write KIND:SHAPE"),
        ("v5e:16", "a slice of TPU v5e has 2 axes, such as 4x4"),
        ("v5p:4x4", "has 3 axes"),
        ("a100:16", "GPUS of one node (at most 8)"),
        ("v5e:0x4", "no axis may be 0"),
    ],
)
def test_what_is_no_topology(text: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected.replace("(", r"\(").replace(")", r"\)")):
        Topology.parse(text)


def test_gpus_are_described_to_xla() -> None:
    for name in ("a100", "h100"):
        assert f'device_description_str: "{HARDWARE[name].kind}"' in str(HARDWARE[name].target)


FIGURES: dict[str, Any] = {
    "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
    "flops": 3e15,
    "computed": 4e15,
    "tokens": 32_768.0,
    "held": 0.0,
    "repeats": 1,
    "seconds": 60.0,
    "memory": {"arguments": 5 * GIB, "temporaries": 4 * GIB, "outputs": 0, "code": 0, "peak": 9 * GIB},
    "moved": 100 * GB,
    "collectives": [
        {
            "kind": "all-gather",
            "devices": 16,
            "slices": 1,
            "count": 96.0,
            "payload": 40 * GB,
            "sent": 37.5 * GB,
            "crosses": 0,
            "waits": 7.5 * GB,
        }
    ],
    "unknown_loops": 0,
    "attention": "splash",
}


def test_roofline() -> None:
    v5e = Topology.parse("v5e:4x4")
    made = estimate(FIGURES, v5e, "bfloat16", AssumeConfig(matrix=0.5, memory=0.8, links=0.5))
    assert made.compute == pytest.approx(4e15 / 16 / 197e12 / 0.5)
    assert made.memory == pytest.approx(100e9 / 819e9 / 0.8)
    assert made.links == pytest.approx(37.5e9 / 200e9 / 0.5)
    assert made.waits == pytest.approx(7.5e9 / 200e9 / 0.5)
    assert made.fastest == made.compute + made.waits
    assert made.slowest == pytest.approx(made.compute + made.memory + made.links)
    assert made.bound == "compute"
    assert made.mfu == pytest.approx(3e15 / 16 / 197e12 / made.slowest)
    assert made.intensity == pytest.approx(4e15 / 16 / 100e9)
    assert made.ridge == pytest.approx(197e12 / 819e9)
    whole = AssumeConfig(matrix=1, memory=1, links=1)
    # Six passes make a float32 product on a TPU; a GPU has units for it.
    assert estimate(FIGURES, v5e, "float32", whole).compute == pytest.approx(4e15 / 16 / 197e12 * 6)
    two_nodes = Topology.parse("a100:2x8")
    assert estimate(FIGURES, two_nodes, "float32", whole).compute == pytest.approx(4e15 / 16 / 19.5e12)
    far = {**FIGURES, "collectives": [{**FIGURES["collectives"][0], "slices": 2, "sent": 35e9, "crosses": 2.5e9}]}
    apart = estimate(far, two_nodes, "bfloat16", whole)
    assert (apart.links, apart.network) == pytest.approx((35e9 / 300e9, 2.5e9 / 25e9))
    assert apart.slowest == pytest.approx(apart.compute + apart.memory + apart.links + apart.network)
    said = " ".join(assumptions(v5e, "bfloat16", AssumeConfig()))
    assert all(word in said for word in ("60% of 197 TFLOP/s", "80% of 819 GB/s", "50% of 200 GB/s", "sum"))


# ---------------------------------------------------------------- shapes, jobs, computed FLOPs


def test_shapes_have_the_published_numbers_of_parameters() -> None:
    published = {
        "llama2_7b": 6_738_415_616,
        "llama2_13b": 13_015_864_320,
        "llama2_70b": 68_976_648_192,
        "llama3_1b": 1_235_814_400,
        "llama3_8b": 8_030_261_248,
        "llama3_70b": 70_553_706_496,
        "mistral_7b": 7_241_732_096,
        "smollm2_135m": 134_515_008,
    }
    assert {name: parameters(shape) for name, shape in SHAPES.items()} == published
    tied = dataclasses.replace(SHAPES["smollm2_135m"], attention_bias=True, mlp_bias=True)
    leaves = jax.tree.leaves(abstract_variables(Llama(tied))["params"])
    assert parameters(tied) == sum(math.prod(leaf.shape) for leaf in leaves)


def loaded(path: Path) -> Any:
    """What a CONFIG.py calls `config`."""
    return load(str(path))


TRAINED = [path for path in CONFIGS if type(loaded(path)).__name__ in ("SFTRun", "RewardRun", "DPORun", "PPORun")]


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_runs_go_through_json_and_through_text(path: Path, tmp_path: Path) -> None:
    run = loaded(path)
    job = plans.job(run, "v5e:4x4", prompt=8, response=8)
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
    elsewhere = dataclasses.replace(run, out="another", data=dataclasses.replace(run.data, files="another"))
    assert dataclasses.replace(job, run=elsewhere).key == job.key
    smaller = dataclasses.replace(run, train=dataclasses.replace(run.train, remat="none", dtype="float32"))
    assert dataclasses.replace(job, run=smaller).key != job.key
    (tmp_path / "c.py").write_text(config_text(smaller, "A test."))
    assert loaded(tmp_path / "c.py") == smaller


def test_episodes_are_planned_whole() -> None:
    """The step reads all turns of an episode; the sampler writes one behind the others, each row by itself."""
    sizes = {"data": DataConfig("d", max_length=256), "train": TrainConfig(batch_size=8)}
    run = GRPORun(model="m", out="o", environment="e.py:E", environment_turns=4, **sizes)
    run = dataclasses.replace(run, sample=SampleConfig(max_new_tokens=16), ppo=PPOLossConfig("grpo", group_size=4))
    lengths, mesh = programs.lengths_of(run, None, None), make_mesh(devices=jax.devices()[:1])
    assert lengths == programs.Lengths(run.longest_prompt, 64)
    shape = dataclasses.replace(SHAPES["smollm2_135m"], num_layers=1)
    step, measure, sampler = (
        programs_sampled.build_ppo(run, shape, mesh, lengths, name) for name in programs.names(run)
    )
    for program in (step, measure):
        assert program.arguments[-1].responses.shape == program.arguments[-1].own.shape == (8, 64)
    assert programs_sampled.sampler_calls(run, lengths) == (programs.Lengths(lengths.prompt + 48, 16), 1, 4)
    assert (sampler.repeats, sampler.trips) == (4, 15)
    plain = dataclasses.replace(run, environment=None, environment_turns=None, reward="vader")
    assert programs_sampled.sampler_calls(plain, lengths) == (lengths, 4, 1)


SMALL = dataclasses.replace(
    SHAPES["smollm2_135m"],
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
)


@pytest.mark.parametrize("opponent", ["policy", "reference"])
def test_online_dpo_is_planned_whole(opponent: str) -> None:
    """The step on pairs, the reference on all responses, the sampler: laid out as a run has them, and they lower."""
    options: Any = {"data": DataConfig("d", max_length=40), "train": TrainConfig(batch_size=8, remat="none")}
    k = 4 if opponent == "policy" else 2
    online = OnlineConfig(samples=k, opponent=opponent, exploration=None if k == 4 else 1e-5)
    sizes: Any = {"sample": SampleConfig(max_new_tokens=16), "rollout_batch_size": 8 * k // 2}
    run = OnlineDPORun(model="m", out="o", reward="vader", online=online, **sizes, **options)
    mesh, lengths = make_mesh(devices=jax.devices()[:2]), programs.lengths_of(run, None, None)
    assert lengths == programs.Lengths(24, 16)
    made = {name: programs_sampled.build_online(run, SMALL, mesh, lengths, name, None) for name in programs.names(run)}
    pairs, groups = made["train step"].arguments[-1], made["measure"].arguments[-1]
    assert pairs.prompts.shape == (8, 24)
    assert (pairs.responses.shape, pairs.reference_logps.shape) == ((8, 2, 16), (8, 2))
    assert (pairs.logp_weights is None) == (opponent == "policy")
    assert groups.responses.shape == (4, k, 16)
    assert [program.repeats for program in made.values()] == [1, 2, 2 if opponent == "policy" else 4]
    # Weights, two moments and the reference in float32, split over two devices.
    assert made["measure"].held == pytest.approx(parameters(SMALL) * 16 / 2, rel=0.05)
    again = dataclasses.replace(run, train=dataclasses.replace(run.train, layout="separate"))
    apart = programs_sampled.build_online(again, SMALL, mesh, lengths, "train step", None)
    assert apart.flops == made["train step"].flops < made["train step"].computed < apart.computed
    for name in ("train step", "measure"):  # (on CPUs the sampler copies weights, and is not compiled ahead)
        assert "func" in made[name].lower().as_text()
    mixed = dataclasses.replace(run, online=OnlineConfig(opponent="mixture"))
    with pytest.raises(InputError, match="mixture cannot be planned"):
        programs_sampled.build_online(mixed, SMALL, mesh, lengths, "generate", None)


def test_distillation_is_planned_with_its_teacher() -> None:
    """Student and teacher on the devices at once; without steps on the student's own responses nothing is sampled."""
    options: Any = {"data": DataConfig("d", max_length=40), "train": TrainConfig(batch_size=8, remat="none")}
    run = DistillRun(model="m", teacher="t", out="o", sample=SampleConfig(max_new_tokens=16), **options)
    mesh, lengths = make_mesh(devices=jax.devices()[:2]), programs.lengths_of(run, None, None)
    teacher = dataclasses.replace(SMALL, num_layers=5)
    step, sampler = (
        programs_sampled.build_distill(run, SMALL, teacher, mesh, lengths, name, None) for name in programs.names(run)
    )
    assert step.arguments[-1].responses.shape == (8, 1, 16)
    assert step.held == pytest.approx((parameters(SMALL) * 12 + parameters(teacher) * 2) / 2, rel=0.05)
    assert (sampler.repeats, sampler.trips) == (1, 15)
    assert sampler.held > step.held, "it reads a copy of the weights of its own"
    assert "func" in step.lower().as_text()
    given = dataclasses.replace(run, distill=DistillConfig(on_policy=0))
    assert programs.names(given) == ("train step",)
    job = Job("distill", "train step", run, SMALL, "v5e:2x2", 24, 16, teacher)
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_what_is_computed_agrees_with_xla() -> None:
    """A whole DPO step with a live reference, of one layer: XLA counts a loop once, and here each runs once."""
    shape = dataclasses.replace(
        SHAPES["llama2_7b"],
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_layers=1,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
    )
    run = plans.dpo_run(pairs=4, mesh=MeshConfig(fsdp=1), remat="none", layout="separate", dtype="float32")
    lengths = programs.Lengths(32, 32)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    program = programs.build_dpo(programs.with_schedule(run), shape, mesh, lengths)
    cost: Any = program.lower().compile().cost_analysis()
    # The logits of R tokens are made in two chunks, a loop that XLA counts once.
    head = 2.0 * 256 * 512 * (4 * 2 * 32)
    counted = cost["flops"] + (1 + 4) / 2 * head
    assert program.computed == pytest.approx(counted, rel=0.04)
    assert program.flops < program.computed
    assert program.tokens == 4 * 3 * 32


def test_results_belong_to_the_code_that_made_them() -> None:
    root = ROOT / "dpo_jax"
    counted = {path for pattern in jobs._SOURCES for path in root.glob(pattern)}
    needed = ["mesh.py", "model/attention.py", "align/dpo.py", "sample/engine.py", "plan/hlo.py"]
    assert {root / name for name in needed} <= counted
    assert all(any(root.glob(pattern)) for pattern in jobs._SOURCES)


# ---------------------------------------------------------------- search


def candidate(tensor: int, remat: Any, accumulate: int) -> Candidate:
    return Candidate(MeshConfig(fsdp=8 // tensor, tensor=tensor), remat, accumulate, 0.0, 0.0)


def test_search_compiles_no_more_than_it_must() -> None:
    order = [candidate(1, "none", 1), candidate(1, "dots", 1), candidate(1, "none", 2), candidate(1, "full", 1)]
    order += [candidate(1, "none", 4), candidate(1, "full", 4), candidate(2, "none", 2), candidate(2, "none", 1)]
    fits = {("full", 1, 1), ("none", 4, 1), ("none", 1, 2), ("none", 2, 2)}
    frontier, compiled = Frontier(order), []
    for one in frontier:
        compiled.append(one)
        frontier.learn(one, (one.remat, one.accumulate, one.mesh.tensor) in fits)
    # full in 4 pieces takes longer than full in one, which fits. What none in 2 pieces on one mesh needs says nothing
    # of another mesh, nor of one piece.
    assert compiled == [*order[:5], *order[6:]]
    assert frontier.left == 0


def test_candidates_divide_and_have_room() -> None:
    run, lengths = plans.dpo_run(pairs=16), programs.Lengths(512, 512)
    found = candidates(run, SHAPES["llama2_7b"], Topology.parse("v5e:4x4"), lengths)
    assert len({(one.mesh, one.remat, one.accumulate) for one in found}) == len(found) > 20
    for one in found:
        sizes = dataclasses.astuple(one.mesh)
        assert math.prod(sizes) == 16
        assert 16 % (sizes[0] * sizes[1] * one.accumulate) == 0
    # 14 bytes a parameter are 5.5 GiB on each of 16 chips; on 4 they are too many.
    assert {one.mesh.data for one in found} == {1, 2}
    crossing = dataclasses.replace(run.train, crossing_dtype="bfloat16")
    narrow = dataclasses.replace(run, train=crossing, mesh=MeshConfig(data=2, fsdp=8))
    again = candidates(narrow, SHAPES["llama2_7b"], Topology.parse("v5e:4x4"), lengths)
    assert len(again) == len(found), "where nothing crosses, too"
    told = {(one.mesh.data, one.options(narrow).train.crossing_dtype) for one in again}
    assert told == {(1, None), (2, "bfloat16")}
    room = Topology.parse("v5e:4x4").hardware.memory
    first = [one for one in found if one.bytes <= room]
    assert found[: len(first)] == sorted(first, key=lambda one: one.seconds), "what seems to have room comes first"
    assert found[len(first) :] == sorted(found[len(first) :], key=lambda one: one.bytes)
    assert {one.remat for one in first[:6]} <= {"dots", "full"}
    assert "none" in {one.remat for one in found[-3:]}
    with pytest.raises(InputError, match="has room for the state"):
        Frontier(candidates(run, SHAPES["llama2_70b"], Topology.parse("v5e:4x4"), lengths))


# ---------------------------------------------------------------- the command


def words(*more: Any) -> list[str]:
    return ["plan", ZEPHYR, "--topology", "v5e:4x4", "--model_shape", "llama2_7b", *map(str, more)]


def error(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line of a refusal."""
    assert cli.main([str(a) for a in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("dpo-jax: error: ")


def test_words_go_to_the_plan_and_to_its_command() -> None:
    options = cli.parse("plan", words("--mesh.tensor", 4, "--out", "p.json", "--train.remat=full", "--search")[1:])
    assert isinstance(options, PlanRun)
    assert (options.topology, options.out, options.search) == ("v5e:4x4", "p.json", True)
    run = options.training
    assert run is not None
    assert (run.mesh.tensor, run.train.remat, run.out) == (4, "full", config.ON_COMMAND_LINE)


def test_mistakes_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert error(capsys, "plan", "--topology", "v5e:4x4").startswith("missing CONFIG.py: dpo-jax plan CONFIG.py")
    assert error(capsys, "plan", ZEPHYR).startswith("missing --topology")
    assert "did you mean --topology?" in error(capsys, "plan", ZEPHYR, "--topolgy", "v5e:4x4")
    assert "--write_config has no effect without --search" in error(capsys, *words("--write_config", "c.py"))
    assert "no model is named: give --model_shape" in error(capsys, "plan", ZEPHYR, "--topology", "v5e:4x4")
    assert "--model_shape x: is none of llama2_7b" in error(capsys, *words("--model_shape", "x"))
    assert "does not have the options" not in error(capsys, *words("--data.max_length", 9000))
    frontier = str(ROOT / "configs" / "smollm2_gatt.py")
    assert "rejection cannot be planned; a plan is about sft" in error(capsys, "plan", "rejection")
    assert "dpo --online cannot be planned; a bench is about sft" in error(capsys, "bench", "dpo", "--online")
    assert "distill cannot be planned" in error(capsys, "bench", "distill")
    distill = ("plan", "distill", "--topology", "v5e:4x4", "--model_shape", "llama2_7b", "--sample.max_new_tokens", 64)
    assert "no teacher is named: give --teacher_shape" in error(capsys, *distill)
    assert "--teacher_shape x: is none of llama2_7b" in error(capsys, *distill, "--teacher_shape", "x")
    assert "another vocabulary than the model (128256 and 32000 ids)" in error(
        capsys, *distill, "--teacher_shape", "llama3_8b"
    )
    assert "--teacher_shape llama2_7b has no effect" in error(capsys, *words("--teacher_shape", "llama2_7b"))
    assert "GattRun cannot be planned" in error(capsys, "plan", frontier, "--topology", "v5e:4x4")


def test_a_shape_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.folder(tmp_path / "m")
    for path in (tmp_path / "m").glob("*.safetensors"):
        path.unlink()
    shape = json.loads((tmp_path / "m" / "config.json").read_text())["hidden_size"]
    options = cli.parse("plan", ["plan", ZEPHYR, "--topology", "v5e:2x2", "--model", str(tmp_path / "m")][1:])
    options = dataclasses.replace(options, prompt_tokens=8, response_tokens=8)
    assert planning.first_job(options)[1].shape.hidden_size == shape


def answer(figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Let every compile give `figures`; returns the list of jobs that were asked for."""
    asked: list[Job] = []

    def compile_one(job: Job) -> dict[str, Any]:
        asked.append(job)
        return figures

    monkeypatch.setattr(compiling, "_compile", compile_one)
    return asked


def test_a_plan_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = answer(FIGURES, monkeypatch)
    more = ("--out", tmp_path / "p.json", "--cache", tmp_path / "c", "--price_per_device_hour", 1.2)
    assert cli.main(words(*more)) == 0
    assert cli.main(words(*more)) == 0
    assert len(asked) == 1, "what was compiled is kept"
    assert (asked[0].prompt, asked[0].response, asked[0].word) == (512, 512, "dpo")
    result = json.loads((tmp_path / "p.json").read_text())
    (program,) = result["programs"]
    assert (result["fits"], result["devices"], result["peak_bytes"]) == (True, 16, 9 * GIB)
    assert result["dollars_a_step"] == pytest.approx(result["seconds_a_step"] / 3600 * 16 * 1.2)
    assert result["seconds_a_step"] == program["estimate"]["seconds_if_nothing_overlaps"]
    assert result["options"] == as_json(asked[0].run)
    text = capsys.readouterr().out
    assert all(word in text for word in ("TPU v5 lite", "9.00", "15.75", "all-gather", "MFU", "assumed", "$"))


def test_a_plan_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {"said": "RESOURCE_EXHAUSTED: no", "wanted": 16.62 * GIB, "limit": 15.75 * GIB}
    known = {name: FIGURES[name] for name in ("mesh", "flops", "computed", "tokens", "held", "repeats", "seconds")}
    answer({**known, "refused": refused}, monkeypatch)
    assert cli.main(words("--cache", tmp_path, "--out", tmp_path / "p.json")) == 3
    assert capsys.readouterr().err.splitlines()[-1] == "dpo-jax: train step does not fit: 16.62 of 15.75 GiB"
    assert json.loads((tmp_path / "p.json").read_text())["fits"] is False


def test_search_writes_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_one(job: Job) -> dict[str, Any]:
        """Only with everything recomputed it fits; tensor parallelism computes slower."""
        peak = {"none": 30, "dots": 20, "full": 10, "offload": 5}[job.run.train.remat]
        figures = {**FIGURES, "memory": {**FIGURES["memory"], "peak": peak * GIB}}
        return figures | {"mesh": dataclasses.asdict(job.run.mesh), "computed": 4e15 * job.run.mesh.tensor}

    monkeypatch.setattr(compiling, "_compile", compile_one)
    best = tmp_path / "best.py"
    more = ("--search", "--cache", tmp_path / "c", "--out", tmp_path / "p.json", "--search_limit", 60)
    assert cli.main(words(*more, "--write_config", best)) == 0
    run = loaded(best)
    assert (run.train.remat, run.mesh.tensor, run.model) == ("full", 1, config.ON_COMMAND_LINE)
    assert run == dataclasses.replace(loaded(Path(ZEPHYR)), train=run.train, mesh=run.mesh)
    rows = json.loads((tmp_path / "p.json").read_text())["search"]
    assert [row["fits"] for row in rows] == sorted((row["fits"] for row in rows), reverse=True)
    assert "tokens/s" in capsys.readouterr().out
    assert cli.main(words("--search", "--cache", tmp_path / "c", "--search_limit", 1)) == 3
    assert "more candidates may be better" in capsys.readouterr().out
