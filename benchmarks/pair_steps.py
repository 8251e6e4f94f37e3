"""A step on real pairs, SmolLM2-135M, float32, all weights: ours in turns with TRL's trainer, or with its own bound.

    python benchmarks/pair_steps.py --data hh.jsonl.gz --pairs 8 --rounds 3
    python benchmarks/pair_steps.py --data hh.jsonl.gz --pairs 8 --reference cached --theirs ../venv-trl/bin/python
    python benchmarks/pair_steps.py --data hh.jsonl.gz --pairs 8 --trainer reward
    python benchmarks/pair_steps.py --data hh.jsonl.gz --pairs 8 --contenders ours bound
    python benchmarks/pair_steps.py --data hh.jsonl.gz --pairs 8 --contenders ours lora

The first `--rows` usable rows of DATA, prompts cut to their last 256 tokens and pairs to 512, are written once, as
texts, in the order of the batches of one shuffled epoch of ours; both read that file, one batch a turn, so that each
turn is the same pairs for both. The other sleeps meanwhile. A first turn warms up, and ours compiles every shape
before. What counts is pairs a second over the timed turns, and the median of the ratios within a turn. TRL runs with
its defaults but for dtype, length and fused AdamW; on CPUs it has no padding-free batches. The losses of each turn are
compared.

    ours    `dpo-jax dpo`, or with --trainer reward `dpo-jax reward`, with --options
    trl     DPOTrainer, or RewardTrainer; both reward trainers begin from one head
    lora    ours with adapters of rank 16
    other   ours with --other in place of --options
    bound   what `ours` cannot pass: model FLOPs of its real tokens (`dpo_jax/train/flops.py`; a prompt once, attention
            causal) and those of the head computed again, at the rate of this backend's products of these shapes
            (forward, by the inputs, by the weights; each the fastest of three), and the optimizer's update alone
    lora_bound  what `lora` cannot pass
"""

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from peers import Desk, Stopwatch, Worker, peak_gib, use_cores, versions

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LONGEST, PROMPT, RATE, BETA = 512, 256, 1e-6, 0.1
CONTENDERS = ("ours", "trl", "lora", "other", "bound", "lora_bound")
BOUNDS = {"bound": "ours", "lora_bound": "lora"}
LORA = "--lora.rank 16"
MEDIANS = ("cpu_share", "other_cores", "gflops_a_second", "update")
TRIES = 3
"""Of a product: the fastest counts."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preference rows")
    parser.add_argument("--rows", type=int, default=64, help="of these, the first usable ones")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step")
    parser.add_argument("--trainer", choices=("dpo", "reward"), default="dpo")
    parser.add_argument("--reference", choices=("live", "cached"), default="live")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--theirs", default=sys.executable, help="the Python that has TRL")
    parser.add_argument("--options", default="", help="further options of ours, such as '--lora.rank 16'")
    parser.add_argument("--other", default="", help="those of the contender `other`")
    parser.add_argument("--model", default="smollm2", help="whatever dpo-jax loads")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["ours", "trl"])
    parser.add_argument("--worker", choices=CONTENDERS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_rows(options: argparse.Namespace, folder: Path) -> None:
    """Texts in the order of an epoch's batches, and the model for TRL to load."""
    import numpy as np

    import dpo_jax
    from dpo_jax.align import reward
    from dpo_jax.config import DataConfig, RewardConfig
    from dpo_jax.data.sets.dataset import load_preferences
    from dpo_jax.data.sets.group_packing import Packing
    from dpo_jax.data.sets.group_windows import plan_windows
    from dpo_jax.weights.huggingface.heads import as_reward_model, padded_apart

    tokenizer = dpo_jax.load_tokenizer(options.model)
    model, variables = dpo_jax.load_pretrained(options.model)
    config = DataConfig(max_length=LONGEST, max_prompt_length=PROMPT, template="raw")
    data = load_preferences(options.data, tokenizer, config, vocab_size=model.config.vocab_size)
    kept: list[int] = []
    rows: list[dict[str, str]] = []
    for i in range(len(data)):
        texts = [
            tokenizer.decode(x) for x in (data.prompts[i], data.responses[2 * i][:-1], data.responses[2 * i + 1][:-1])
        ]
        whole = [tokenizer.encode(text, add_special_tokens=False) for text in (texts[0], texts[0] + texts[1])]
        if whole[1] == [*data.prompts[i].tolist(), *data.responses[2 * i][:-1].tolist()] and min(map(len, texts)):
            kept.append(i)
            rows.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
        if len(rows) == options.rows:
            break
    lengths = data.prompt_lengths[kept], data.response_lengths[kept]
    plan = plan_windows(*lengths, batch_size=options.pairs, packing=Packing(1), shuffle=True, seed=0)
    order = np.concatenate([one.indices for one in plan.epoch(0, 0, shuffle=True)])
    (folder / "rows.jsonl").write_text("".join(json.dumps(rows[i]) + "\n" for i in order))
    if options.trainer == "reward":  # a head for both, and a pad token that ends no text
        model, variables = as_reward_model(model, variables)
        variables["heads"] = reward.with_heads(model, variables, RewardConfig())
        padded, tokenizer = padded_apart(model.config, tokenizer)
        model = model.clone(config=padded)
    dpo_jax.save_pretrained(folder / "model", model, variables, tokenizer)


def told_options(options: argparse.Namespace) -> str:
    """What the worker adds to the options that all of ours share."""
    with_lora = f"{options.options} {LORA}"
    return {"lora": with_lora, "lora_bound": with_lora, "other": options.other}.get(options.worker, options.options)


def parsed(options: argparse.Namespace) -> Any:
    """The run that the command line would make."""
    from dpo_jax import cli

    words = f"""--model {options.folder}/model --data {options.folder}/rows.jsonl --out O --data.template raw
    --data.no_shuffle --data.max_length {LONGEST} --data.max_prompt_length {PROMPT} --train.batch_size {options.pairs}
    --train.steps {options.rows // options.pairs} --optimizer.learning_rate {RATE} --optimizer.schedule constant"""
    if options.trainer == "dpo":
        words += f" --dpo.reference {options.reference}"
    return cli.parse(options.trainer, f"{words} {told_options(options)}".split())


def ours(options: argparse.Namespace, desk: Desk) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import dpo_jax
    from dpo_jax import mesh as meshes
    from dpo_jax.align import dpo, reward
    from dpo_jax.data.sets.comparison_sets import load_comparisons
    from dpo_jax.data.sets.dataset import load_preferences
    from dpo_jax.train import flops
    from dpo_jax.train.row_data import preference_loader

    run = parsed(options)
    mesh, config = meshes.make_mesh(devices=jax.devices()[:1]), run.step_config()
    lora = run.lora if run.lora.rank else None
    kept = jnp.float32 if lora is None else run.train.settled.frozen_dtype
    how = {"mesh": mesh, "remat": run.train.remat, "lora": lora, "dtype": kept, "compute_dtype": run.train.dtype}
    model, variables = dpo_jax.load_pretrained(str(options.folder / "model"), **how)
    tokenizer, rows = dpo_jax.load_tokenizer(str(options.folder / "model")), str(options.folder / "rows.jsonl")
    cached: dict[str, float] = {}
    if options.trainer == "reward":
        data = load_comparisons(rows, tokenizer, run.data, run.reward, vocab_size=model.config.vocab_size)
        state, step = reward.init_state(model, variables, config), reward.jit_train_step(config, mesh)
        work = flops.reward_flops(flops.ModelFlops.of(model.config, lora, outputs=1))
    else:
        data = load_preferences(rows, tokenizer, run.data, vocab_size=model.config.vocab_size)
        state, step = dpo.init_state(model, variables, config), dpo.jit_train_step(config, mesh)
        work = flops.dpo_flops(flops.ModelFlops.of(model.config, lora), config.objective)
        before = Stopwatch()
        if options.reference == "cached":
            base = jax.jit(lambda params, batch: dpo.reference_logps(model.apply, params, batch, config=config))
            found = np.zeros((len(data), 2), np.float32)
            for batch in preference_loader(run, mesh, data, epochs=1.0):
                found[np.asarray(batch.rows) - 1] = np.asarray(base(variables, meshes.put_batch(mesh, batch)))
            data = data.with_reference(found)
        cached = before.read()
    del variables
    batches = list(preference_loader(run, mesh, data, epochs=1.0))
    shapes = {str(jax.tree.map(lambda x: x.shape, batch)): batch for batch in batches}
    compiled = {name: step.lower(state, meshes.put_batch(mesh, batch)).compile() for name, batch in shapes.items()}
    desk.answer({"caching": cached, "shapes": len(compiled), "versions": versions("jax", "dpo_jax")})
    for turn in desk.requests():
        batch = batches[turn % len(batches)]
        watch = Stopwatch()
        state, metrics = step(state, meshes.put_batch(mesh, batch))
        jax.block_until_ready(state)
        read = watch.read()
        told = {"loss": float(metrics["loss"]), "peak": peak_gib(), "flops": work(batch)}
        told |= {"real": int(batch.prompt_lengths.sum() + batch.response_lengths.sum())}
        told |= {"predicted": int(batch.response_lengths.sum()), "places": places(batch, run.train.settled.layout)}
        desk.answer(read | told)


def places(batch: Any, layout: str) -> int:
    """Tokens that a batch of preference groups puts through the layers, padding included."""
    if layout == "windows":
        return sum(one.real.size for one in batch.windows)
    responses, (rows, prompt) = batch.responses.size, batch.prompts.shape
    return responses + rows * prompt * (1 if layout == "shared" else batch.responses.shape[1])


def bound(options: argparse.Namespace, desk: Desk) -> None:
    """Answers a turn with the seconds that it cannot pass; the request is that turn's figures."""
    import time

    import jax
    import jax.numpy as jnp
    import numpy as np

    import dpo_jax
    from dpo_jax.align import dpo, reward

    run = parsed(options)
    config = run.step_config()
    model, variables = dpo_jax.load_pretrained(str(options.folder / "model"), lora=run.lora if run.lora.rank else None)
    objective = reward if options.trainer == "reward" else dpo
    state = objective.init_state(model, variables, config)  # pyright: ignore[reportArgumentType]
    del variables
    shape, predicts = model.config, options.trainer == "dpo"
    query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    width, inner = shape.hidden_size, shape.intermediate_size
    matrices = [
        (width, query),
        (width, kv),
        (width, kv),
        (query, width),
        (width, inner),
        (width, inner),
        (inner, width),
    ]
    update = jax.jit(lambda state, gradients: state.apply_gradients(gradients), donate_argnums=0)
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-4), state.trainable)
    products = {
        "forward": jax.jit(lambda x, w: x @ w),
        "by inputs": jax.jit(lambda y, w: y @ w.T),
        "by weights": jax.jit(lambda x, y: x.T @ y),
    }

    def seconds(kind: str, rows: int, a: int, b: int) -> float:
        """Of one product, the fastest of `TRIES`."""
        drawn = np.random.default_rng(0)
        x, y, w = (jnp.asarray(drawn.standard_normal(s, np.float32)) for s in ((rows, a), (rows, b), (a, b)))
        given = {"forward": (x, w), "by inputs": (y, w), "by weights": (x, y)}[kind]
        jax.block_until_ready(products[kind](*given))
        found = []
        for _ in range(TRIES):
            begun = time.perf_counter()
            jax.block_until_ready(products[kind](*given))
            found.append(time.perf_counter() - begun)
        return min(found)

    state = update(state, gradients)
    desk.answer({"versions": versions("jax", "dpo_jax")})
    for turn in desk.requests():
        rows = [(turn["real"], *pair) for pair in matrices] * shape.num_layers
        rows += [(turn["predicted"], width, shape.vocab_size)] if predicts else []
        timed = {
            (kind, *one): seconds(kind, *one)
            for kind in products
            for one in set(rows)
            if kind != "by weights" or not run.lora.rank
        }
        done = sum(2.0 * n * a * b * rows.count((n, a, b)) for _, n, a, b in timed)
        taken = sum(seconds * rows.count(tuple(one)) for (_, *one), seconds in timed.items())
        rate = done / taken
        again = 2.0 * turn["predicted"] * width * shape.vocab_size if predicts else 0.0
        updates = []
        for _ in range(TRIES):
            begun = time.perf_counter()
            state = jax.block_until_ready(update(state, gradients))
            updates.append(time.perf_counter() - begun)
        least = (turn["flops"] + again) / rate + min(updates)
        desk.answer({"seconds": least, "gflops_a_second": rate / 1e9, "update": min(updates), "peak": peak_gib()})


def trl(options: argparse.Namespace, desk: Desk) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    torch.set_num_threads(options.cores)
    rows = [json.loads(line) for line in (options.folder / "rows.jsonl").read_text().splitlines()]
    before = Stopwatch()
    how: dict[str, Any] = {
        "output_dir": str(options.folder / "trl"),
        "per_device_train_batch_size": options.pairs,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_length": LONGEST,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
    }
    if options.trainer == "reward":
        kind, make, config = AutoModelForSequenceClassification, RewardTrainer, RewardConfig(**how)
    else:
        cached = options.reference == "cached"
        kind, make = AutoModelForCausalLM, DPOTrainer
        config = DPOConfig(**how, beta=BETA, precompute_ref_log_probs=cached)
    trainer = make(
        model=kind.from_pretrained(options.folder / "model", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.folder / "model"),
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    batches = list(trainer.get_train_dataloader())
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # which `train` would set
    desk.answer({"caching": before.read(), "versions": versions("torch", "transformers", "trl")})
    for turn in desk.requests():
        inputs = batches[turn % len(batches)]
        watch = Stopwatch()
        loss = trainer.training_step(trainer.model, dict(inputs))
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        mask = inputs["attention_mask"]
        told = {"loss": float(loss), "real": int(mask.sum()), "places": mask.numel(), "peak": peak_gib()}
        desk.answer(watch.read() | told)


def main() -> None:
    options = arguments()
    use_cores(options.cores)
    if options.worker:
        (bound if options.worker in BOUNDS else trl if options.worker == "trl" else ours)(options, Desk())
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_rows(options, Path(folder))
        words = [*sys.argv[1:], "--folder", folder]
        workers = [
            stack.enter_context(Worker(name, options.theirs if name == "trl" else sys.executable, __file__, words))
            for name in options.contenders
        ]
        found: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
        for turn in range(options.rounds + 1):
            for worker in workers:
                got = worker.turn(found[BOUNDS[worker.name]][-1] if worker.name in BOUNDS else turn)
                found[worker.name].append(got)
                print(turn, worker.name, json.dumps(got), file=sys.stderr, flush=True)
    print(json.dumps(table_of(options, workers, found)))


def table_of(
    options: argparse.Namespace, workers: list[Worker], found: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Figures of each, and ratios to the first within a turn; the first turn is left out of all but the losses."""
    table: dict[str, Any] = {name: getattr(options, name) for name in ("trainer", "pairs", "reference", "rounds")}
    for worker in workers:
        timed = found[worker.name][1:]
        table[worker.name] = {
            "pairs_per_second": options.pairs * len(timed) / sum(one["seconds"] for one in timed),
            "peak_gib": timed[-1]["peak"],
            **{name: median(one[name] for one in timed) for name in MEDIANS if name in timed[0]},
            **worker.ready,
        }
        if "real" in timed[0]:
            real = sum(one["real"] for one in timed)
            table[worker.name]["real_tokens_a_pair"] = real / len(timed) / options.pairs
            table[worker.name]["places_a_real_token"] = sum(one["places"] for one in timed) / real
    first, *others = (worker.name for worker in workers)
    for name in others:
        turns = list(zip(found[first], found[name], strict=True))
        table[f"{name} / {first}, seconds"] = median(b["seconds"] / a["seconds"] for a, b in turns[1:])
        if "loss" in turns[0][1]:
            table[f"{name}, largest difference of losses"] = max(abs(a["loss"] - b["loss"]) for a, b in turns)
    if "lora_bound" in found:
        turns = list(zip(found["lora"], found["lora_bound"], strict=True))
        table["lora_bound / lora, seconds"] = median(b["seconds"] / a["seconds"] for a, b in turns[1:])
    return table


if __name__ == "__main__":
    main()
