"""The DPO step on real pairs, SmolLM2-135M, float32, all weights: ours in turns with TRL's DPOTrainer.

    python benchmarks/dpo_rows.py --data hh.jsonl.gz --pairs 8 --rounds 3
    python benchmarks/dpo_rows.py --data hh.jsonl.gz --pairs 8 --reference cached --theirs ../venv-trl/bin/python

The first `--rows` usable rows of DATA, prompts cut to their last 256 tokens and pairs to 512, are written once, as
texts, in the order of the batches of one shuffled epoch of ours; both read that file, one batch a turn, so that each
turn is the same pairs for both. The other sleeps meanwhile. A first turn warms up, and ours compiles every shape
before. What counts is pairs a second over the timed turns, and the median of the ratios within a turn. TRL runs with
its defaults but for dtype, length and fused AdamW; on CPUs it has no padding-free batches. The losses of each turn are
compared.
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preference rows")
    parser.add_argument("--rows", type=int, default=64, help="of these, the first usable ones")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step")
    parser.add_argument("--reference", choices=("live", "cached"), default="live")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--theirs", default=sys.executable, help="the Python that has TRL")
    parser.add_argument("--options", default="", help="further options of ours, such as '--lora.rank 16'")
    parser.add_argument("--only", choices=("ours", "trl"), default=None)
    parser.add_argument("--worker", choices=("ours", "trl"), default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_rows(options: argparse.Namespace, folder: Path) -> None:
    """Texts in the order of an epoch's batches, and the model for TRL to load."""
    import numpy as np

    import dpo_jax
    from dpo_jax.config import DataConfig
    from dpo_jax.data.sets.dataset import load_preferences
    from dpo_jax.data.sets.group_windows import Packing, plan_windows

    tokenizer = dpo_jax.load_tokenizer("smollm2")
    config = DataConfig(max_length=LONGEST, max_prompt_length=PROMPT, template="raw")
    data = load_preferences(options.data, tokenizer, config, vocab_size=49152)
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
    model, variables = dpo_jax.load_pretrained("smollm2")
    dpo_jax.save_pretrained(folder / "model", model, variables, tokenizer)


def ours(options: argparse.Namespace, desk: Desk) -> None:
    import jax
    import numpy as np

    import dpo_jax
    from dpo_jax import cli, mesh as meshes
    from dpo_jax.align import dpo
    from dpo_jax.data.sets.dataset import load_preferences
    from dpo_jax.train.row_data import preference_loader

    words = f"""--model smollm2 --data {options.folder}/rows.jsonl --out O --data.template raw --data.no_shuffle
    --data.max_length {LONGEST} --data.max_prompt_length {PROMPT} --train.batch_size {options.pairs}
    --train.steps {options.rows // options.pairs} --dpo.reference {options.reference}
    --optimizer.learning_rate {RATE} --optimizer.schedule constant {options.options}"""
    run = cli.parse("dpo", words.split())
    mesh, config = meshes.make_mesh(devices=jax.devices()[:1]), run.step_config()
    how = {"mesh": mesh, "remat": run.train.remat, "lora": run.lora if run.lora.rank else None}
    model, variables = dpo_jax.load_pretrained(str(options.folder / "model"), **how)
    tokenizer = dpo_jax.load_tokenizer(str(options.folder / "model"))
    data = load_preferences(str(options.folder / "rows.jsonl"), tokenizer, run.data, vocab_size=model.config.vocab_size)
    state = dpo.init_state(model, variables, config)
    before = Stopwatch()
    if options.reference == "cached":
        base = jax.jit(lambda params, batch: dpo.reference_logps(model.apply, params, batch, config=config))
        many = list(preference_loader(run, mesh, data, epochs=1.0))
        found = np.zeros((len(data), 2), np.float32)
        for batch in many:
            found[np.asarray(batch.rows) - 1] = np.asarray(base(variables, meshes.put_batch(mesh, batch)))
        data = data.with_reference(found)
    del variables
    cached = before.read()
    step, batches = dpo.jit_train_step(config, mesh), list(preference_loader(run, mesh, data, epochs=1.0))
    shapes = {str(jax.tree.map(lambda x: x.shape, batch)): batch for batch in batches}
    compiled = {name: step.lower(state, meshes.put_batch(mesh, batch)).compile() for name, batch in shapes.items()}
    desk.answer({"caching": cached, "shapes": len(compiled), "versions": versions("jax", "dpo_jax")})
    for turn in desk.requests():
        batch = batches[turn % len(batches)]
        watch = Stopwatch()
        state, metrics = step(state, meshes.put_batch(mesh, batch))
        jax.block_until_ready(state)
        real = sum(int(one.real.sum()) for one in batch.windows)
        places = sum(one.real.size for one in batch.windows)
        told = {"loss": float(metrics["loss"]), "real": real, "places": places, "peak": peak_gib()}
        desk.answer(watch.read() | told)


def trl(options: argparse.Namespace, desk: Desk) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(options.cores)
    rows = [json.loads(line) for line in (options.folder / "rows.jsonl").read_text().splitlines()]
    before = Stopwatch()
    config = DPOConfig(
        output_dir=str(options.folder / "trl"), per_device_train_batch_size=options.pairs, learning_rate=RATE,
        beta=BETA, lr_scheduler_type="constant", max_length=LONGEST, gradient_checkpointing=False, bf16=False,
        use_cpu=True, report_to=[], optim="adamw_torch_fused", max_grad_norm=1.0,
        precompute_ref_log_probs=options.reference == "cached",
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.float32),
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
        {"ours": ours, "trl": trl}[options.worker](options, Desk())
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_rows(options, Path(folder))
        words = [*sys.argv[1:], "--folder", folder]
        workers = [
            stack.enter_context(Worker(name, options.theirs if name == "trl" else sys.executable, __file__, words))
            for name in ("ours", "trl")
            if options.only in (None, name)
        ]
        found: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
        for turn in range(options.rounds + 1):
            for worker in workers:
                got = worker.turn(turn)
                found[worker.name].append(got)
                print(turn, worker.name, json.dumps(got), file=sys.stderr, flush=True)
        table = {"pairs": options.pairs, "reference": options.reference, "rounds": options.rounds}
        for worker in workers:
            timed = found[worker.name][1:]
            table[worker.name] = {
                "pairs_per_second": options.pairs * len(timed) / sum(one["seconds"] for one in timed),
                "real_tokens_a_pair": sum(one["real"] for one in timed) / len(timed) / options.pairs,
                "places_a_real_token": sum(one["places"] for one in timed) / sum(one["real"] for one in timed),
                "peak_gib": timed[-1]["peak"],
                "cpu_share": median(one["cpu_share"] for one in timed),
                "other_cores": median(one["other_cores"] for one in timed),
            } | worker.ready
        if len(workers) == 2:
            turns = list(zip(found["ours"], found["trl"], strict=True))
            table["ratio"] = median(theirs["seconds"] / own["seconds"] for own, theirs in turns[1:])
            table["largest_loss_difference"] = max(abs(own["loss"] - theirs["loss"]) for own, theirs in turns)
        print(json.dumps(table))


if __name__ == "__main__":
    main()
