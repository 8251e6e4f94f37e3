"""Time and peak memory of one PPO iteration on SmolLM2-135M, in turns with TRL's PPO trainer.

    python3 -m venv ../trl && ../trl/bin/pip install torch==2.13.0 && ../trl/bin/pip install 'trl==1.12.*'
    python benchmarks/ppo_iteration.py --peer_python ../trl/bin/python --rounds 7 --out ppo_iteration.json

(Install torch first, from wherever your machine gets its CPU build, so that trl does not replace it.)

An iteration: sample `--new` tokens behind each of `--prompts` prompts of `--prompt` tokens at temperature 1 (nothing
stops earlier); log-probabilities under the reference, values, scores, advantages; one epoch of `--minibatches` AdamW
updates (default: one gradient step on all rows). Float32, all weights trained, no gradient clipping, `--cores` cores.
The score is the length of the decoded text, the same for all and next to free. Weights and prompts are the same; what
is sampled is not, so the work is compared by what each reports of its first iteration, printed at the end.

Each contender is a process that holds its weights all the time. In each round each makes one iteration, in turns, while
the others sleep; the order is turned round from round to round. Reported are medians over the rounds, of times and of
the ratios to the last contender within a round; the first `--warmup` iterations, which compile, stand apart. Peak
memory is that of the whole process from its start (VmHWM). The chosen contenders must fit into memory together; on a
machine of 24 GB compare two at a time, such as `--contenders ours trl`.

    ours               what `dpo-jax ppo` runs, with its default value model: a trunk of its own, as TRL's
    ours-lean          the same with --ppo.value stopped: the values come from the policy's own trunk
    trl                TRL's PPOTrainer: fused AdamW, its default; no gradient checkpointing, which this trainer never
                       turns on (its config's switch is not read)
    trl-checkpointed   the same on models whose checkpointing was turned on by hand: less memory, more time

Where the work differs. TRL puts the output matrix over prompts too, in the reference and in the update, keeps the
sampler's logits of all steps to take the log-probabilities from, and computes whole softmaxes for the entropy; ours
takes the head at response tokens only, in chunks, and has the sampler's log-probabilities from sampling. Ours computes
some of the forward pass again in the backward one (remat `dots`; all of it with `--remat full`), makes no update whose
gradient is not finite, takes quantiles of ratio and KL, and writes each response to samples.jsonl. `ours-lean` has one
trunk less to run, to differentiate and to keep Adam's moments of. Advantages count as measuring in TRL and as update in
ours. Memory: run this with the Python of an environment without PyTorch, as `pip install dpo_jax` makes one: where it
is installed, transformers imports it with its tokenizers, for a quarter of a GiB.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from peers import Desk, Figures, Stopwatch, Worker, peak_gib, use_cores, versions

OURS, TRL = {"ours": "separate", "ours-lean": "stopped"}, ("trl", "trl-checkpointed")
CONTENDERS = (*OURS, *TRL)
LEARNING_RATE, KL_COEFFICIENT, CLIP, VALUE_COEFFICIENT, GAMMA, LAM = 1e-6, 0.05, 0.2, 0.1, 1.0, 0.95
UNUSED_TOKEN = 3  # of SmolLM2's tokenizer; TRL takes whatever equals its pad token for padding
ON_CPU: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}
"""Options of TRL's trainers: float32 on a CPU, each iteration told, nothing written."""
BATCHES = 4  # of prompts, before they begin again
TOLD = ("objective/kl", "objective/entropy", "objective/scores", "val/ratio", "loss/value_avg")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", type=Path, default=None, help="Python of an environment with TRL 1.12")
    parser.add_argument("--model", default="smollm2", help="whatever dpo-jax loads")
    parser.add_argument("--prompts", type=int, default=8, help="prompts, and responses, of an iteration")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a response")
    parser.add_argument("--minibatches", type=int, default=1, help="gradient steps of an iteration")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--remat", choices=("dots", "full"), default="dots", help="of ours, as --train.remat")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["ours", "ours-lean", "trl"])
    parser.add_argument("--out", type=Path, default=None, help="write the figures here, as JSON")
    parser.add_argument("--worker", choices=CONTENDERS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prompts % options.minibatches:
        parser.error(f"--minibatches {options.minibatches} must divide --prompts {options.prompts}")
    if options.warmup < 1 or options.rounds < 1:
        parser.error("--warmup and --rounds must be at least 1")
    if set(TRL) & set(options.contenders) and options.peer_python is None:
        parser.error("TRL needs --peer_python; the first lines of --help make its environment")
    return options


def prompt_ids(options: argparse.Namespace) -> np.ndarray:
    """Prompts [N, P]: random ids, none of them special."""
    vocabulary = json.loads((options.folder / "model" / "config.json").read_text())["vocab_size"]
    shape = (BATCHES * options.prompts, options.prompt)
    return np.random.default_rng(0).integers(100, vocabulary, shape).astype(np.int32)


def write_model(options: argparse.Namespace) -> None:
    """The model folder that all contenders read."""
    import dpo_jax

    model, variables = dpo_jax.load_pretrained(options.model)
    dpo_jax.save_pretrained(options.folder / "model", model, variables, dpo_jax.load_tokenizer(options.model))


# ---------------------------------------------------------------- ours


def prompt_data(ids: np.ndarray, tokenizer: Any) -> Any:
    """A `PromptDataset` of ids [N, P]."""
    from dpo_jax.data.sets.prompts import Prompt, PromptDataset
    from dpo_jax.data.tokens.ragged import Ragged

    return PromptDataset(
        ids=Ragged.of(list(ids), np.int32),
        prompts=tuple(Prompt((), text) for text in tokenizer.batch_decode(ids.tolist())),
        safety=np.zeros(len(ids), bool),
        row_numbers=np.arange(1, len(ids) + 1, dtype=np.int32),
        dropped=Counter(),
        rows_read=len(ids),
        source="random prompts",
    )


def length_reward() -> Any:
    """The score of a text is its length: next to free."""
    from dpo_jax.judge.rewards.scores import scored
    from dpo_jax.judge.rewards.shipped import OfText

    return partial(scored, [OfText("length", lambda text: len(text) / 100)], ["length"], whiten=True, finite=True)


def answer_turns(desk: Desk, step: Any, state: Any, rollouts: Any, mesh: Any, told: Sequence[str]) -> None:
    """One iteration for each request: a rollout and its update. `told`: metrics that are reported of it."""
    import jax

    from dpo_jax import mesh as meshes

    batches = iter(rollouts)
    desk.answer({"versions": versions("jax", "jaxlib", "numpy"), "peak_gib": peak_gib()})
    for _ in desk.requests():
        watch = Stopwatch()
        rollout, figures = rollouts.prepare(state, next(batches))
        state, metrics = step(state, meshes.put_batch(mesh, rollout))
        metrics = jax.device_get(metrics)
        jax.block_until_ready(state)
        read = watch.read()
        phases = {name: figures[f"seconds_{name}"] for name in ("sampling", "measuring", "scoring")}
        phases["update"] = read["seconds"] - sum(phases.values())
        tokens = int(rollout.response_lengths.sum())
        found = {name: float(metrics[name]) for name in told}
        desk.answer({**read, "phases": phases, "tokens": tokens, "told": found, "peak_gib": peak_gib()})


def our_turns(options: argparse.Namespace, desk: Desk) -> None:
    """The parts of `commands/ppo.py`, and one turn of `train/loop.py`'s loop for each request."""

    import jax
    import jax.numpy as jnp

    import dpo_jax
    from dpo_jax.align import ppo
    from dpo_jax.config import OptimizerConfig, PPOConfig, SampleConfig
    from dpo_jax.data.sets.prompts import PromptLoader
    from dpo_jax.files.sample_log import SampleLog
    from dpo_jax.train.answered import Policy
    from dpo_jax.train.rollouts import Rollouts

    mesh = dpo_jax.make_mesh(devices=jax.devices()[:1])
    model, variables = dpo_jax.load_pretrained(options.folder / "model", mesh=mesh, remat=options.remat)
    tokenizer, ids = dpo_jax.load_tokenizer(options.folder / "model"), prompt_ids(options)
    data = prompt_data(ids, tokenizer)
    config = PPOConfig(
        value=OURS[options.worker],  # pyright: ignore[reportArgumentType]
        epochs=1,
        minibatches=options.minibatches,
        clip=CLIP,
        value_clip=CLIP,
        kl_coefficient=KL_COEFFICIENT,
        value_coefficient=VALUE_COEFFICIENT,
        gamma=GAMMA,
        lam=LAM,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, clip_norm=None),
    )
    reference = {"params": jax.tree.map(jnp.copy, variables["params"])}
    state = ppo.init_state(model, variables, config)
    del variables
    how: dict[str, Any] = {"piece": options.prompts, "raw": False, "seed": config.seed, "vocabulary": config.vocabulary}
    rollouts = Rollouts(
        Policy(model, tokenizer, SampleConfig(options.new), mesh, **how),
        data,
        PromptLoader(data, batch_size=options.prompts, group=1, seed=0, steps=10**6),
        length_reward(),
        SampleLog(options.folder / f"{options.worker}.jsonl", writes=True),
        reference=reference,
        config=config,
    )
    answer_turns(desk, ppo.jit_train_step(config, mesh), state, rollouts, mesh, TOLD)


# ---------------------------------------------------------------- TRL


class NoMoreTurns(Exception):
    """Leaves TRL's loop."""


def trl_turns(options: argparse.Namespace, desk: Desk) -> None:
    """TRL's own `train`; a callback waits for each turn, and functions of its module are wrapped to be timed."""
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    import torch  # pyright: ignore[reportMissingImports]
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        PrinterCallback,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(options.cores)
    torch.manual_seed(0)
    folder = options.folder / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(UNUSED_TOKEN)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    values = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1)
    if options.worker == "trl-checkpointed":
        policy.gradient_checkpointing_enable()
        values.gradient_checkpointing_enable()

    class TextLengths(torch.nn.Module):
        """In the place of a reward model: the score stands at every position."""

        base_model_prefix, score = "backbone", staticmethod(lambda states: states)

        def __init__(self) -> None:
            super().__init__()
            self.scoring = 0.0

        def backbone(self, input_ids: Any, **_: Any) -> SimpleNamespace:
            watch = Stopwatch()
            texts = tokenizer.batch_decode(input_ids[:, options.prompt :].tolist(), skip_special_tokens=True)
            scores = torch.tensor([len(text) / 100 for text in texts])
            self.scoring += watch.read()["seconds"]
            return SimpleNamespace(hidden_states=(scores[:, None, None].expand(*input_ids.shape, 1),))

    judge = TextLengths()

    class Turns(TrainerCallback):
        """Between two iterations: tell the last, wait for the next."""

        def __init__(self) -> None:
            self._requests, self.tokens, self.sampled, self.measured = desk.requests(), 0, 0.0, None
            self.told: dict[str, float] = {}

        def begin(self) -> None:
            if next(self._requests, NoMoreTurns) is NoMoreTurns:
                raise NoMoreTurns
            self.watch, self.measured, judge.scoring = Stopwatch(), None, 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.told = {name: float(logs[name]) for name in TOLD}

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            read = self.watch.read()
            assert self.measured is not None, "the update calls `forward` with gradients"
            measuring = self.measured - self.sampled - judge.scoring
            phases = {"sampling": self.sampled, "measuring": measuring, "scoring": judge.scoring}
            phases["update"] = read["seconds"] - self.measured
            desk.answer({**read, "phases": phases, "tokens": self.tokens, "told": self.told, "peak_gib": peak_gib()})
            self.begin()

    turns = Turns()
    generation, forward = ppo_trainer.batch_generation, ppo_trainer.forward

    def timed_generation(*args: Any, **kwargs: Any) -> Any:
        found = generation(*args, **kwargs)
        turns.sampled = turns.watch.read()["seconds"]
        turns.tokens = int((found[0][:, options.prompt :] != UNUSED_TOKEN).sum())
        return found

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and turns.measured is None:
            turns.measured = turns.watch.read()["seconds"]
        return forward(*args, **kwargs)

    ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, timed_forward
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(options.folder / options.worker),
            per_device_train_batch_size=options.prompts,
            gradient_accumulation_steps=1,
            num_mini_batches=options.minibatches,
            num_ppo_epochs=1,
            total_episodes=10**6 * options.prompts,
            local_rollout_forward_batch_size=options.prompts,
            response_length=options.new,
            num_sample_generations=0,
            temperature=1.0,
            cliprange=CLIP,
            cliprange_value=CLIP,
            kl_coef=KL_COEFFICIENT,
            vf_coef=VALUE_COEFFICIENT,
            gamma=GAMMA,
            lam=LAM,
            learning_rate=LEARNING_RATE,
            **ON_CPU,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=judge,
        value_model=values,
        train_dataset=Dataset.from_dict({"input_ids": prompt_ids(options).tolist()}),
        callbacks=[turns],
    )
    trainer.remove_callback(PrinterCallback)
    found = versions("torch", "trl", "transformers", "accelerate")
    checkpointing = bool(trainer.model.is_gradient_checkpointing)
    desk.answer(
        {"versions": found, "threads": torch.get_num_threads(), "checkpointing": checkpointing, "peak_gib": peak_gib()}
    )
    with contextlib.suppress(NoMoreTurns):
        trainer.train()


# ---------------------------------------------------------------- the comparison


def in_rounds(
    options: argparse.Namespace, script: str, pythons: Mapping[str, Any]
) -> tuple[list[Worker], dict[str, list[Figures]]]:
    """The contenders of `script`, and what they answered round by round. `pythons`: of those that have their own."""
    use_cores(options.cores)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        arguments_of_all = [*sys.argv[1:], "--folder", folder]
        subprocess.run([sys.executable, script, *arguments_of_all, "--write"], check=True)
        contenders = [
            stack.enter_context(Worker(name, pythons.get(name, sys.executable), script, arguments_of_all))
            for name in options.contenders
        ]
        turns: dict[str, list[Figures]] = {name: [] for name in options.contenders}
        for turn in range(options.warmup + options.rounds):
            for contender in contenders if turn % 2 == 0 else reversed(contenders):
                turns[contender.name].append(contender.turn())
                seconds = turns[contender.name][-1]["seconds"]
                print(f"round {turn} {contender.name:17} {seconds:7.2f} s", file=sys.stderr)
    return contenders, turns


def compare(contenders: list[Worker], turns: dict[str, list[Figures]], warmup: int) -> dict[str, Figures]:
    """Medians over the timed rounds of each contender, and of its ratio to the last one within each round."""
    base = turns[contenders[-1].name][warmup:]
    table: dict[str, Figures] = {}
    for contender in contenders:
        made = turns[contender.name]
        timed = made[warmup:]

        def median(of: str, timed: list[Figures] = timed) -> float:
            return statistics.median(turn[of] for turn in timed)

        phases = {name: statistics.median(turn["phases"][name] for turn in timed) for name in timed[0]["phases"]}
        table[contender.name] = {
            "seconds": median("seconds"),
            "ratio": statistics.median(a["seconds"] / b["seconds"] for a, b in zip(timed, base, strict=True)),
            "first_seconds": [turn["seconds"] for turn in made[:warmup]],
            "phases": phases,
            "sampling_share": statistics.median(turn["phases"]["sampling"] / turn["seconds"] for turn in timed),
            "peak_gib": made[-1]["peak_gib"],
            "cpu_share": median("cpu_share"),
            "other_cores": max(turn["other_cores"] for turn in timed),
            "first_iteration": made[0]["told"],
            "tokens": sorted({turn["tokens"] for turn in made}),
            "when_loaded": contender.ready,
            "all_seconds": [turn["seconds"] for turn in made],
        }
    return table


def show(table: dict[str, Figures], options: argparse.Namespace) -> None:
    base = list(table)[-1]
    print(
        f"{options.prompts} prompts of {options.prompt} tokens, {options.new} new, one epoch of {options.minibatches}"
        f" gradient step(s); medians of {options.rounds} rounds on {options.cores} cores"
    )
    print(
        f"{'':17} {'s/iteration':>11} {'/ ' + base:>18} {'sampling':>9} {'measuring':>9} {'scoring':>8} {'update':>7}"
        f" {'sampling is':>11} {'peak GiB':>9} {'CPU share':>9}   first iterations"
    )
    for name, row in table.items():
        p = row["phases"]
        print(
            f"{name:17} {row['seconds']:11.2f} {row['ratio']:18.2f} {p['sampling']:9.2f} {p['measuring']:9.2f}"
            f" {p['scoring']:8.3f} {p['update']:7.2f} {row['sampling_share']:11.0%} {row['peak_gib']:9.2f}"
            f" {row['cpu_share']:9.2f}   {' '.join(f'{s:.1f}' for s in row['first_seconds'])}"
        )
    print("the first iteration, as each reports it:")
    for name, row in table.items():
        told = ", ".join(f"{key} {value:.4g}" for key, value in row["first_iteration"].items())
        print(f"  {name:17} {told}, sampled tokens {' or '.join(map(str, row['tokens']))}")
    busy = max(row["other_cores"] for row in table.values())
    if busy > 0.1:
        print(f"warning: something else took up to {busy:.2f} cores during a turn; discard this run")


def write_figures(options: argparse.Namespace, table: dict[str, Figures], own: Sequence[str]) -> None:
    """Where `--out` says: the table, and the settings behind it, `own` among them."""
    if options.out is not None:
        settings = {name: getattr(options, name) for name in ("model", *own, "rounds", "warmup", "cores")}
        options.out.write_text(json.dumps({"settings": settings, "figures": table}, indent=2) + "\n")


def main() -> None:
    options = arguments()
    if options.worker:
        return (trl_turns if options.worker in TRL else our_turns)(options, Desk())
    if options.write:
        return write_model(options)
    contenders, turns = in_rounds(options, __file__, dict.fromkeys(TRL, options.peer_python))
    table = compare(contenders, turns, options.warmup)
    show(table, options)
    write_figures(options, table, ("prompts", "prompt", "new", "minibatches"))
    return None


if __name__ == "__main__":
    main()
