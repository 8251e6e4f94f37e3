"""What one accelerator does with this package: kernels, bfloat16, training steps, sampling; beside each step its plan.

    bash benchmarks/accelerator.sh OUT_FOLDER                    what fits into 8 minutes, most wanted first
    python benchmarks/accelerator.py --sections attention dpo    some of it
    python benchmarks/accelerator.py --toy                       the same programs at toy size, on a CPU

Nothing is downloaded: weights are random, rows are full and their tokens random. Each section is a process of its own
with a time budget; what it has measured is in OUT_FOLDER/accelerator.json after each case, so that what is stopped
keeps the rest. Models of 1B have the shape of Llama-3.2-1B, of 7B that of Llama-2-7B, with as many layers as the case
says where all 32 and their optimizer do not fit.

    ceilings   what matrix products and copies reach here
    attention  cuDNN's flash attention beside plain XLA: error against float32, time
    numerics   log-probabilities in bfloat16 against float32
    dpo, sft, reward, ppo   steps as the command runs them (`plan/programs.py`), built from its options
    windows    an epoch of DPO on rows of unequal lengths, in each layout: what padding costs
    packed_sft an epoch of SFT on texts of unequal lengths: packed, packed and masked by segments, one a window
    large      the DPO step at 7B shape: all weights of some layers, LoRA of all
    sample     tokens a second, beside the bound that reading the weights sets
    grpo       GRPO's update and measurement with prompts shared and not; rollouts by layout of the weights and kernel

MFU is against the dense bfloat16 peak of the data sheet (`train/accounting.py`), causal attention counted half, nothing
for what is computed again. `plan` is the planner's estimate for the same compiled program: seconds if all overlaps, and
if nothing does.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

SECTIONS = {
    "ceilings": 40,
    "attention": 70,
    "numerics": 90,
    "dpo": 150,
    "large": 90,
    "sample": 100,
    "sft": 60,
    "reward": 50,
    "ppo": 100,
    "grpo": 160,
    "packed_sft": 120,
    "windows": 240,
}
"""Seconds that each may take, the most wanted first: a section that is late is stopped."""

LORA = "--train.layout separate --dpo.reference live --lora.rank 16"
TRAINING = {
    # name: (command, shape, layers, prompt, response, options)
    "dpo": {
        "1B live separate": ("dpo", "1b", None, 512, 512, "--train.layout separate --dpo.reference live"),
        "1B live shared": ("dpo", "1b", None, 512, 512, "--train.layout shared --dpo.reference live"),
        "1B cached separate": ("dpo", "1b", None, 512, 512, "--train.layout separate"),
        "1B cached shared": ("dpo", "1b", None, 512, 512, "--train.layout shared"),
        "1B cached separate, remat full": (
            "dpo", "1b", None, 512, 512, "--train.layout separate --train.remat full",
        ),
        "1B LoRA live separate": ("dpo", "1b", None, 512, 512, LORA),
    },
    "large": {
        "7B LoRA live separate": (
            "dpo", "7b", None, 512, 512, f"{LORA} --train.batch_size 8 --train.remat full",
        ),
        "7B, 8 layers, cached separate": ("dpo", "7b", 8, 512, 512, "--train.layout separate --train.batch_size 8"),
    },
    "sft": {
        "1B windows of 2048": ("sft", "1b", None, 0, 2048, ""),
        "1B packed windows of 2048": ("sft", "1b", None, 0, 2048, "--data.packing"),
    },
    "reward": {"1B separate": ("reward", "1b", None, 512, 512, "--train.layout separate")},
    "ppo": {
        "1B shared value": (
            "ppo", "1b", None, 256, 128, "--ppo.value shared --ppo.epochs 1 --train.batch_size 64 --reward length",
        ),
    },
}  # fmt: skip
WINDOWS = {
    f"1B {name}, {layout}": f"--train.layout {layout} {options}"
    for name, options in {
        "cached": "",
        "live": "--dpo.reference live",
        "LoRA live": "--dpo.reference live --lora.rank 16",
    }.items()
    for layout in ("windows", "shared", "separate")
    if name != "LoRA live" or layout != "shared"
}
PACKED = {  # name: (whether windows are packed, whether attention sees each sequence apart)
    "1B packed": (True, True),
    "1B packed, by segments": (True, False),
    "1B one text a window": (False, False),
}
COMMON = """--model M --data D --out O --train.dtype bfloat16 --train.steps 100 --train.batch_size 16
--optimizer.learning_rate 1e-6"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("accelerator"), help="folder for accelerator.json")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--cases", nargs="+", default=[""], help="of training steps only those with one of these words")
    parser.add_argument("--toy", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--seconds", type=float, default=470, help="for all sections together")
    parser.add_argument("--section", choices=list(SECTIONS), default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section is not None:
        work(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for name in options.sections:
        left = options.seconds - (time.monotonic() - started)
        if left < 15:
            print(f"{name}: left out, {left:.0f} s are left", flush=True)
            continue
        command = [sys.executable, __file__, "--section", name, "--out", str(options.out), *["--toy"] * options.toy]
        command += ["--cases", *options.cases]
        try:
            code = subprocess.run(command, timeout=min(left, SECTIONS[name]), check=False).returncode
            if code:
                print(f"{name}: ended with exit code {code}", flush=True)
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {min(left, SECTIONS[name]):.0f} s", flush=True)
    print(f"all: {time.monotonic() - started:.0f} s", flush=True)


def work(options: argparse.Namespace) -> None:
    """One section, in this process."""
    # More of the memory than jax takes by itself: the larger cases want it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    if options.section == "numerics":  # which counts no seconds, and would spend minutes on trying float32 kernels
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    import jax

    device = jax.devices()[0]
    simple = {"ceilings": ceilings, "attention": attention, "numerics": numerics, "sample": sample, "grpo": grpo}
    trained: dict[str, Any] = {"windows": (WINDOWS, windows), "packed_sft": (PACKED, packed_sft)}
    if options.section in simple:
        cases = simple[options.section](options.toy)
    else:
        table, run = trained.get(options.section) or (TRAINING[options.section], steps)
        cases = run({k: v for k, v in table.items() if any(word in k for word in options.cases)}, options.toy)
    file = options.out / "accelerator.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found["device"] = {"kind": device.device_kind, "jax": jax.__version__, "memory": memory_limit(device)}
    rows = found.setdefault(options.section, {})
    for name, figures in cases:
        rows[name] = figures
        print(f"{options.section}: {name}: {json.dumps(figures)}", flush=True)
        new = file.with_suffix(".new")
        new.write_text(json.dumps(found, indent=1) + "\n")
        new.replace(file)


def memory_limit(device: Any) -> int | None:
    return (device.memory_stats() or {}).get("bytes_limit")


# ---------------------------------------------------------------- the device itself


def ceilings(toy: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    import jax
    import jax.numpy as jnp

    from dpo_jax.plan.measured import seconds_of

    n, again = (256, 2) if toy else (8192, 10)
    for dtype in ("bfloat16", "float32"):
        a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.dtype(dtype)) for i in (0, 1))

        @jax.jit
        def product(a: Any, b: Any) -> Any:
            precision = "highest" if a.dtype == jnp.float32 else None
            return jax.lax.fori_loop(0, again, lambda _, x: jnp.matmul(x, b, precision=precision) / n, a)

        got = seconds_of(lambda product=product, a=a, b=b: product(a, b))
        yield f"matrix products, {dtype}", got | {"tflops": 2 * n**3 * again / got["fastest"] / 1e12}
    x = jax.random.normal(jax.random.key(2), (2**20 if toy else 2**30,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    got = seconds_of(lambda: copy(x))
    yield "read and write", got | {"gb_per_second": 2 * x.nbytes / got["fastest"] / 1e9}


# ---------------------------------------------------------------- kernels and dtypes


def error(x: Any, reference: Any) -> float:
    """Norm of the difference over the norm of the reference."""
    import jax.numpy as jnp

    x, reference = x.astype(jnp.float32), reference.astype(jnp.float32)
    return float(jnp.linalg.norm((x - reference).ravel()) / jnp.linalg.norm(reference.ravel()))


def attention_gradients(kernel: str) -> Callable[..., Any]:
    """q, k, v, mask, weight -> gradients of the weighted sum of the attention's output, and that output."""
    import jax
    import jax.numpy as jnp

    from dpo_jax.model.attention import attend

    def total(q: Any, k: Any, v: Any, mask: Any, weight: Any) -> Any:
        out = attend(q, k, v, mask=mask, kernel=kernel)
        return jnp.sum(weight * out.astype(jnp.float32)), out

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))


def attention(toy: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Forward and gradients of one layer's attention; rows of different lengths, padding left out of the comparison."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dpo_jax import mesh as meshes
    from dpo_jax.model.attention import AttentionMask
    from dpo_jax.plan.measured import seconds_of

    sizes = [(2, 64, 4, 2, 16)] if toy else [(8, 1024, 32, 8, 64), (4, 2048, 32, 32, 128), (2, 4096, 32, 8, 128)]
    for B, T, H, G, C in sizes:
        keys = jax.random.split(jax.random.key(T), 4)
        q = jax.random.normal(keys[0], (B, T, H, C), jnp.bfloat16)
        k, v = (jax.random.normal(key, (B, T, G, C), jnp.bfloat16) for key in keys[1:3])
        lengths = jnp.linspace(T // 2, T, B).astype(jnp.int32)
        real = jnp.arange(T) < lengths[:, None]
        weight = jax.random.normal(keys[3], (B, T, H, C), jnp.float32) * real[..., None, None]
        mask = AttentionMask(segments=real.astype(jnp.int32), packed=False)

        # On the host: a GPU takes a minute to try float32 kernels of these sizes.
        host = jax.local_devices(backend="cpu")[0]
        whole = [x.astype(jnp.float32) for x in (q, k, v)]
        reference = attention_gradients("xla")(*jax.device_put((*whole, mask, weight), host))
        exact, out = jax.tree.map(np.asarray, reference)
        for kernel in {"gpu": ("xla", "cudnn"), "tpu": ("xla", "splash")}.get(meshes.platform(), ("xla",)):
            run = partial(attention_gradients(kernel), q, k, v, mask, weight)
            gradients, got = run()
            figures: dict[str, Any] = {"error": error(got * real[..., None, None], out * real[..., None, None])}
            figures |= {f"error d{name}": error(a, b) for name, a, b in zip("qkv", gradients, exact, strict=True)}
            timed = seconds_of(run, budget=1.0)
            flops = 3.5 * 2 * B * T * T * H * C  # causal counted half; the backward pass is 2.5 forward passes
            yield (
                f"{kernel}, {B} x {T}, {H}/{G} heads of {C}",
                figures | timed | {"tflops": flops / timed["fastest"] / 1e12},
            )


def numerics(toy: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Log-probabilities of responses under a random model of 1B shape, with and without a kernel, against float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dpo_jax.model.groups import response_logps
    from dpo_jax.model.llama import Llama
    from dpo_jax.model.variables import init_variables
    from dpo_jax.plan.measured import with_tokens
    from dpo_jax.plan.programs import Lengths, full_pairs

    shape = shape_of("1b", None, toy)
    batch = with_tokens(full_pairs(2, 2, Lengths(24, 40) if toy else Lengths(512, 512)), shape.vocab_size)
    variables = init_variables(Llama(shape), jax.random.key(0))

    def logps(**options: Any) -> Any:
        layout = options.pop("layout", "separate")
        model = Llama(shape, **options)
        run = jax.jit(lambda v: response_logps(model.apply, v, batch, layout=layout, head_budget_bytes=2**28))
        return np.asarray(run(variables))

    exact = logps()
    gpu = jax.default_backend() == "gpu"
    ways: dict[str, dict[str, Any]] = {"float32, prompt shared": {"layout": "shared"}}
    ways["bfloat16, xla"] = {"dtype": jnp.bfloat16, "attention": "xla"}
    ways |= {"bfloat16, cudnn": {"dtype": jnp.bfloat16, "attention": "cudnn"}} if gpu else {}
    ways["bfloat16, prompt shared, xla"] = {"dtype": jnp.bfloat16, "attention": "xla", "layout": "shared"}
    for name, options in ways.items():
        off = np.abs(logps(**options) - exact)
        sums = np.abs((logps(**dict(options)) - exact).sum(-1))
        yield (
            name,
            {"token_mean": float(off.mean()), "token_largest": float(off.max()), "sum_largest": float(sums.max())},
        )


# ---------------------------------------------------------------- models and data


def shape_of(name: str, layers: int | None, toy: bool) -> Any:
    """The shape of 1B or 7B; `layers`: only so many."""
    from dpo_jax.plan.shapes import SHAPES

    if toy:
        small = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
        return dataclasses.replace(SHAPES["smollm2_135m"], **small, head_dim=16, vocab_size=512)
    shape = SHAPES[{"1b": "llama3_1b", "7b": "llama2_7b"}[name]]
    return shape if layers is None else dataclasses.replace(shape, num_layers=layers)


# ---------------------------------------------------------------- training steps


def steps(
    cases: dict[str, tuple[Any, ...]], toy: bool, leave_out: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """All programs of each case but the one to leave out."""
    import jax

    from dpo_jax import cli, mesh as meshes
    from dpo_jax.plan import programs, worker
    from dpo_jax.plan.hardware import Topology
    from dpo_jax.plan.jobs import Job
    from dpo_jax.plan.measured import measured, topology_here

    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    here = topology_here(mesh) or Topology.parse("h100:1")  # at toy size, on a CPU
    for name, (word, shape_name, layers, prompt, response, options) in cases.items():
        words = f"{COMMON} {options}".split()
        if word in ("ppo", "grpo"):
            words += ["--sample.max_new_tokens", str(response), "--data.template", "raw"]
        words += [] if word in ("ppo", "grpo", "sft") else ["--data.max_prompt_length", str(prompt)]
        words += ["--data.max_length", str(prompt + response)]
        run = cli.parse(word, words)
        shape = shape_of(shape_name, layers, toy)
        lengths = programs.Lengths(24 if prompt else 0, 40) if toy else programs.Lengths(prompt, response)
        for program_name in programs.names(run):
            if program_name == leave_out:
                continue
            job = Job(word, program_name, run, shape, "h100:1", lengths.prompt, lengths.response)
            program = worker.build(job, mesh, lengths)
            label = name if program_name == "train step" else f"{name}: {program_name}"
            try:
                if program.step is None:
                    figures = sampler_step(job, mesh)
                else:
                    figures, _ = measured(program, mesh, run.train.dtype, here, shape.vocab_size)
            except jax.errors.JaxRuntimeError as failure:
                if "RESOURCE_EXHAUSTED" not in str(failure):
                    raise
                figures = {"refused": str(failure).splitlines()[0][:300]}
            yield label, figures | {"options": " ".join(words[6:])}


# ---------------------------------------------------------------- rows of unequal lengths


def ragged(rows: int, longest: int, vocab: int) -> Any:
    """Pairs of random tokens whose lengths are spread as those of Anthropic's HH pairs are, the same in every run.

    Log-normal: half of the prompts beyond `longest` / 8 tokens, half of the responses beyond `longest` / 16; prompts
    and responses are at most `longest` / 2.
    """
    import numpy as np

    from dpo_jax.data.sets.dataset import PreferenceDataset
    from dpo_jax.data.tokens.ragged import Ragged

    random = np.random.default_rng(0)

    def texts(n: int, middle: float, spread: float) -> Any:
        lengths = np.clip(np.exp(random.normal(np.log(middle), spread, n)).astype(int), 4, longest // 2)
        return Ragged.of([random.integers(3, vocab, length) for length in lengths], np.int32)

    told: dict[str, Any] = {"formats": None, "extras": {}, "dropped": {}, "unused_columns": (), "terminators": ()}
    data = PreferenceDataset(
        prompts=texts(rows, longest / 8, 0.8),
        responses=texts(2 * rows, longest / 16, 0.9),
        row_numbers=np.arange(1, rows + 1, dtype=np.int32),
        rows_read=rows,
        source="random",
        **told,
    )
    return data.with_reference(np.full((rows, 2), -100.0, np.float32))


def windows(cases: dict[str, str], toy: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """An epoch of 8 steps of 16 pairs, as the loader of the command makes them; every shape compiled before."""
    import jax

    from dpo_jax import cli, mesh as meshes
    from dpo_jax.align import dpo
    from dpo_jax.plan import programs
    from dpo_jax.plan.measured import made
    from dpo_jax.train.flops import ModelFlops, dpo_flops, preference_work
    from dpo_jax.train.row_data import preference_loader

    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    shape = shape_of("1b", None, toy)
    size, longest = (4, 128) if toy else (16, 1024)
    data = ragged(8 * size, longest, shape.vocab_size)
    for name, options in cases.items():
        words = f"{COMMON} --train.batch_size {size} --data.max_length {longest} {options}"
        run = cli.parse("dpo", (words + " --data.buckets 1" * toy).split())
        batches = list(preference_loader(run, mesh, data, epochs=1.0))
        config, model = run.step_config(), programs.make_model(run, shape)
        live = config.reference == "live" and not run.lora.rank
        reference = programs.frozen_copy(run, shape, mesh) if live else None
        state = made(dpo.init_state(model, programs.trained(run, model, mesh), config, reference=reference))
        step, flops = dpo.jit_train_step(config, mesh), dpo_flops(ModelFlops.of(shape, run.lora), config.objective)
        made_of = sum(preference_work(batch, 0, 2).tokens for batch in batches)
        held = [state]
        del state
        figures = epoch(step, held, batches, mesh, sum(map(flops, batches)), toy)
        yield (
            name,
            figures
            | {
                "pairs_per_second": len(data) / figures["seconds"],
                "tokens_per_second": made_of / figures["seconds"],
                "real_tokens": made_of,
                "places": sum(places(batch, run.train.layout) for batch in batches),
                "options": options,
            },
        )


def epoch(step: Any, held: list[Any], batches: list[Any], mesh: Any, flops: float, toy: bool) -> dict[str, Any]:
    """Figures of all `batches`, one after another, as a run takes them; every shape compiled before.

    `held`: the state, which is used up.
    """
    import jax

    from dpo_jax import mesh as meshes
    from dpo_jax.train.accounting import peak_flops

    state = held.pop()
    placed = [meshes.put_batch(mesh, batch) for batch in batches]
    kinds = {str(jax.tree.map(lambda x: x.shape, batch)): batch for batch in placed}
    start = time.perf_counter()
    for batch in kinds.values():
        state, _ = jax.block_until_ready(step(state, batch))
    warming, times = time.perf_counter() - start, []
    for _ in range(1 if toy else 3):
        start = time.perf_counter()
        for batch in placed:
            state, metrics = step(state, batch)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - start)
    seconds, peak = sorted(times)[len(times) // 2], peak_flops(list(mesh.devices.flat), None)
    return {
        "seconds": seconds,
        "seconds_a_step": seconds / len(batches),
        "shapes": len(kinds),
        "warming_up_seconds": warming,
        "mfu": None if peak is None else flops / seconds / peak,
        "loss": float(metrics["loss"]),
        "in_use_gib": (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0) / 2**30,
        "peak_gib_so_far": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
    }


def packed_sft(cases: dict[str, tuple[bool, bool]], toy: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """An epoch of windows of 2048 tokens, 8 a step; half of the texts have more than 290 tokens, none over 2048."""
    import jax
    import numpy as np

    from dpo_jax import cli, mesh as meshes
    from dpo_jax.align import sft
    from dpo_jax.data.sets.loader import TokenLoader
    from dpo_jax.data.sets.sequences import SequenceDataset
    from dpo_jax.data.tokens.ragged import Ragged
    from dpo_jax.plan import programs
    from dpo_jax.plan.measured import made
    from dpo_jax.train.flops import ModelFlops, sft_flops

    mesh, shape = meshes.make_mesh(devices=jax.devices()[:1]), shape_of("1b", None, toy)
    longest, rows = (64, 32) if toy else (2048, 256)
    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(np.log(longest / 7), 0.9, rows)).astype(int), 8, longest)
    texts = [random.integers(3, shape.vocab_size, length) for length in lengths]
    told: dict[str, Any] = {"dropped": {}, "unused_columns": (), "terminators": (), "extras": {}}
    data = SequenceDataset(
        tokens=Ragged.of(texts, np.int32),
        targets=Ragged.of([np.arange(len(text)) > 0 for text in texts], bool),
        row_numbers=np.arange(1, rows + 1, dtype=np.int32),
        rows_read=rows,
        source="random",
        **{name: value for name, value in told.items() if name in SequenceDataset.__dataclass_fields__},
    )
    run = cli.parse("sft", f"{COMMON} --train.batch_size 8 --data.max_length {longest} --data.packing".split())
    for name, (packed, apart) in cases.items():
        how: dict[str, Any] = {"window": longest if packed else None, "views": 1 if apart else None, "workers": 0}
        batches = list(TokenLoader(data, batch_size=8, seed=0, buckets=1 if toy else 4, epochs=1.0, **how))
        config, model = run.step_config(packed=packed), programs.make_model(run, shape)
        held = [made(sft.init_state(model, programs.trained(run, model, mesh), config))]
        flops = sft_flops(ModelFlops.of(shape, run.lora))
        figures = epoch(sft.jit_train_step(config, mesh), held, batches, mesh, sum(map(flops, batches)), toy)
        real = int(lengths.sum())
        yield (
            name,
            figures
            | {
                "tokens_per_second": real / figures["seconds"],
                "real_tokens": real,
                "places": sum(batch.tokens.size for batch in batches),
            },
        )


def places(batch: Any, layout: str) -> int:
    """How many places go through the layers."""
    if batch.windows is not None:
        return sum(one.real.size for one in batch.windows)
    return batch.prompts.size * (batch.responses.shape[1] if layout == "separate" else 1) + batch.responses.size


# ---------------------------------------------------------------- sampling


def sampler_step(job: Any, mesh: Any) -> dict[str, Any]:
    """The sampler of a PPO iteration, as `rollouts.py` calls it: one response to each prompt."""
    from dpo_jax.config import SampleConfig
    from dpo_jax.plan import programs
    from dpo_jax.plan.measured import made, sampled

    model = programs.make_model(job.run, job.shape)
    variables = made(programs.trained(job.run, model, mesh))
    rows = job.run.rollout_batch_size or job.run.train.batch_size
    config = SampleConfig(max_new_tokens=job.response)
    return sampled(model, variables, (rows, job.prompt), mesh, config=config)


def grpo(toy: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """8 prompts of 256 tokens, 8 responses of 128 to each: what learns from them, and what writes them.

    The policy's weights are float32, as they are trained. Prompts go through the kernel that the case names, further
    tokens through plain XLA.
    """
    import jax
    import jax.numpy as jnp

    from dpo_jax import mesh as meshes
    from dpo_jax.config import SampleConfig
    from dpo_jax.model.llama import Llama
    from dpo_jax.model.variables import init_variables
    from dpo_jax.plan.measured import sampled

    options = "--ppo.group_size 8 --train.batch_size 64 --reward length --train.layout"
    cases = {f"1B {layout}": ("grpo", "1b", None, 256, 128, f"{options} {layout}") for layout in ("shared", "separate")}
    yield from steps(cases, toy, leave_out="generate")
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    flash = {"gpu": "cudnn", "tpu": "splash"}.get(meshes.platform(), "xla")
    shape = shape_of("1b", None, toy)
    variables = init_variables(Llama(shape), jax.random.key(0), mesh=mesh)
    prompt, new, long = (16, 8, 64) if toy else (256, 128, 2048)
    for kernel, layout, prompts, samples, written in (
        (flash, "gathered", (8, prompt), 8, new),
        (flash, "training", (8, prompt), 8, new),
        ("xla", "gathered", (8, prompt), 8, new),
        (flash, "gathered", (16, long), 1, 8),
        ("xla", "gathered", (16, long), 1, 8),
    ):
        model = Llama(shape, dtype=jnp.bfloat16, attention="xla" if kernel == "xla" else "auto")
        config = SampleConfig(max_new_tokens=written, layout=layout)
        got = sampled(model, variables, prompts, mesh, config=config, samples=samples, budget=2.0)
        yield f"1B sampler, prefill {kernel}, weights {layout}, {prompts[0]} x {samples}, {prompts[1]} + {written}", got


def sample(toy: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """bfloat16 weights, prompts of 256 tokens, 128 new ones."""
    import jax
    import jax.numpy as jnp

    from dpo_jax import mesh as meshes
    from dpo_jax.config import SampleConfig
    from dpo_jax.model.llama import Llama
    from dpo_jax.model.variables import init_variables
    from dpo_jax.plan.measured import sampled

    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    prompt, new = (16, 8) if toy else (256, 128)
    for name in ("1b", "7b"):
        model = Llama(shape_of(name, None, toy), dtype=jnp.bfloat16)
        variables = init_variables(model, jax.random.key(0), mesh=mesh, dtype=jnp.bfloat16)
        read = sum(x.nbytes for x in jax.tree.leaves(variables))
        for rows, options in ((1, {}), (1, {"weights": "int8"}), (32, {}), (128, {})):
            if toy and rows > 1:
                continue
            config = SampleConfig(max_new_tokens=new, **options)
            got = sampled(model, variables, (rows, prompt), mesh, config=config)
            label = f"{name.upper()}, {rows} rows" + "".join(f", {key} {value}" for key, value in options.items())
            each = got.get("seconds_a_token")  # None where it drowns in the noise, at toy size
            bound = {} if each is None else {"gb_per_second": read / each / 1e9}
            yield label, got | {"weight_gb": read / 1e9} | bound


if __name__ == "__main__":
    main()
