"""Time and peak memory of one GRPO iteration on SmolLM2-135M, in turns with an earlier version and TRL's GRPOTrainer.

    git worktree add ../before 46f5e52
    python benchmarks/grpo_iteration.py --before ../before --contenders grpo before --rounds 3
    python benchmarks/grpo_iteration.py --peer_python ../trl/bin/python --contenders grpo trl

An iteration: 8 responses to each of 4 prompts of 256 tokens, sampled at temperature 1; log-probabilities under the
reference; scores; one AdamW update on all of them (beta .04, k3 in the loss). Float32, all weights trained, no gradient
clipping, `--cores` cores. The lengths of responses, up to 128 tokens, come from one skewed, seeded table that every
contender reads: a response goes on until its length is reached, whatever is drawn, and its last token becomes EOS. The
score is the length of the text, next to free.

Each contender is a process that holds its weights all the time; in each round each makes one iteration, in turns, and
the order is turned from round to round (as in ppo_iteration.py, whose table this prints). Peak memory is that of the
whole process from its start (VmHWM).

    grpo     what `dpo-jax grpo` runs
    before   the same of the version in --before
    trl      TRL's GRPOTrainer, without gradient checkpointing
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from peers import Desk, Figures, Stopwatch, Worker, peak_gib, use_cores, versions
from ppo_iteration import UNUSED_TOKEN, NoMoreTurns, compare, show, write_model

CONTENDERS = ("grpo", "before", "trl")
LEARNING_RATE, BETA = 1e-6, 0.04
BATCHES = 4  # of prompts, before they begin again
TOLD = ("loss", "grad_norm", "kl", "entropy", "completions/mean_length")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, default=None, help="a checkout of an earlier version")
    parser.add_argument("--peer_python", type=Path, default=None, help="Python of an environment with TRL 1.16")
    parser.add_argument("--model", default="smollm2", help="whatever dpo-jax loads")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of an iteration")
    parser.add_argument("--group", type=int, default=8, help="responses to each")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of the longest response")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["grpo", "before"])
    parser.add_argument("--out", type=Path, default=None, help="write the figures here, as JSON")
    parser.add_argument("--worker", choices=CONTENDERS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "before" in options.contenders and options.before is None:
        parser.error("before needs --before, a checkout of an earlier version")
    if "trl" in options.contenders and options.peer_python is None:
        parser.error("TRL needs --peer_python; the first lines of ppo_iteration.py --help make its environment")
    return options


def lengths(options: argparse.Namespace) -> np.ndarray:
    """Tokens of each response of an iteration, int32 [prompts x group]: skewed, the longest of all of them."""
    count = options.prompts * options.group
    found = np.random.default_rng(1).lognormal(np.log(options.new / 4), 0.8, count)
    found[np.argmax(found)] = options.new
    return np.clip(found.round(), 4, options.new).astype(np.int32)


def prompt_ids(options: argparse.Namespace) -> np.ndarray:
    """Prompts [N, P]: random ids, none of them special."""
    vocabulary = json.loads((options.folder / "model" / "config.json").read_text())["vocab_size"]
    shape = (BATCHES * options.prompts, options.prompt)
    return np.random.default_rng(0).integers(100, vocabulary, shape).astype(np.int32)


# ---------------------------------------------------------------- ours


def our_turns(options: argparse.Namespace, desk: Desk) -> None:
    """The parts of `commands/ppo.py`, and one turn of `train/loop.py`'s loop for each request."""
    if options.worker == "before":
        sys.path.insert(0, str(options.before.resolve()))
    from functools import partial

    import jax
    import jax.numpy as jnp

    import dpo_jax
    from dpo_jax import mesh as meshes
    from dpo_jax.align import ppo
    from dpo_jax.complete.sample_log import SampleLog
    from dpo_jax.config import OptimizerConfig, PPOConfig, SampleConfig
    from dpo_jax.data.sets.prompts import Prompt, PromptDataset, PromptLoader
    from dpo_jax.data.tokens.ragged import Ragged
    from dpo_jax.judge.reward_functions import OfText
    from dpo_jax.judge.scores import scored
    from dpo_jax.sample import decode
    from dpo_jax.train.rollouts import Rollouts

    home = options.before if options.worker == "before" else Path(__file__).resolve().parent.parent
    assert dpo_jax.__file__ is not None
    assert Path(dpo_jax.__file__).is_relative_to(home.resolve()), f"{dpo_jax.__file__} is not of {home}"
    table, plain = lengths(options), decode.settings
    decode.settings = lambda *args, **kwargs: plain(*args, **kwargs)._replace(limit=table)

    class Prescribed(Rollouts):
        """Responses that end with EOS, where the table says."""

        def _drawn(self, *args: Any, **kwargs: Any) -> Any:
            tokens, mask, logps = super()._drawn(*args, **kwargs)
            assert (mask.sum(axis=1) == table).all()
            tokens = np.array(tokens)
            tokens[np.arange(len(tokens)), table - 1] = tokenizer.eos_token_id
            return tokens, mask, logps

    mesh = dpo_jax.make_mesh(devices=jax.devices()[:1])
    model, variables = dpo_jax.load_pretrained(options.folder / "model", mesh=mesh)
    tokenizer, ids = dpo_jax.load_tokenizer(options.folder / "model"), prompt_ids(options)
    data = PromptDataset(
        ids=Ragged.of(list(ids), np.int32),
        prompts=tuple(Prompt((), text) for text in tokenizer.batch_decode(ids.tolist())),
        safety=np.zeros(len(ids), bool),
        row_numbers=np.arange(1, len(ids) + 1, dtype=np.int32),
        dropped=Counter(),
        rows_read=len(ids),
        source="random prompts",
    )
    config = PPOConfig(
        preset="grpo",
        group_size=options.group,
        kl_coefficient=BETA,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, clip_norm=None),
    )
    reference = {"params": jax.tree.map(jnp.copy, variables["params"])}
    state = ppo.init_state(model, variables, config)
    del variables
    rows = options.prompts * options.group
    rollouts = Prescribed(
        model,
        tokenizer,
        data,
        PromptLoader(data, batch_size=rows, group=options.group, seed=0, steps=10**6),
        partial(scored, [OfText("length", lambda text: len(text) / 100)], ["length"], whiten=True),
        SampleLog(options.folder / f"{options.worker}.jsonl", writes=True),
        reference=reference,
        config=config,
        sample=SampleConfig(options.new),
        mesh=mesh,
        piece=rows,
        raw=False,
    )
    step, batches = ppo.jit_train_step(config, mesh), iter(rollouts)
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
        told = {name: float(metrics[name]) for name in TOLD}
        desk.answer({**read, "phases": phases, "tokens": tokens, "told": told, "peak_gib": peak_gib()})


# ---------------------------------------------------------------- TRL


def trl_turns(options: argparse.Namespace, desk: Desk) -> None:
    """TRL's own `train`; a callback waits for each turn, and what draws is told where to end."""
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    import torch  # pyright: ignore[reportMissingImports]
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(options.cores)
    torch.manual_seed(0)
    folder, table = options.folder / "model", torch.tensor(lengths(options).astype(np.int64))
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(UNUSED_TOKEN)
    end = tokenizer.eos_token_id
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    class Ends(LogitsProcessor):
        """EOS where the table says, and nowhere before."""

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            written = input_ids.shape[1] - self.prompt
            scores[:, end] = -torch.inf
            ending = table <= written + 1
            scores[ending] = -torch.inf
            scores[ending, end] = 0.0
            return scores

    ends, drawn = Ends(), policy.generate

    class Turns(TrainerCallback):
        """Between two iterations: tell the last, wait for the next."""

        def __init__(self) -> None:
            self._requests, self.sampled, self.tokens = desk.requests(), 0.0, 0
            self.told: dict[str, float] = {}
            self.measured: float | None = None

        def begin(self) -> None:
            if next(self._requests, NoMoreTurns) is NoMoreTurns:
                raise NoMoreTurns
            self.watch, self.measured = Stopwatch(), None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.told = {name: float(logs[name]) for name in TOLD if name in logs}

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_log = True
            self.read = self.watch.read()

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            pass

    turns = Turns()

    def generate(*args: Any, **kwargs: Any) -> Any:
        inputs = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        ends.prompt = inputs.shape[1]
        start = turns.watch.read()["seconds"]
        found = drawn(*args, **kwargs, logits_processor=[ends])
        turns.sampled = turns.watch.read()["seconds"] - start
        turns.tokens = int((found[:, ends.prompt :] != UNUSED_TOKEN).sum())
        return found

    policy.generate = generate
    rows = options.prompts * options.group

    def score(completions: list[str], **_: Any) -> list[float]:
        return [len(text) / 100 for text in completions]

    class Told(GRPOTrainer):
        """Answers once a step is logged, which is its end."""

        def _prepare_inputs(self, inputs: Any) -> Any:
            found = super()._prepare_inputs(inputs)
            turns.measured = turns.watch.read()["seconds"]
            return found

        def log(self, *args: Any, **kwargs: Any) -> None:
            super().log(*args, **kwargs)
            assert turns.measured is not None
            phases = {"sampling": turns.sampled, "measuring": turns.measured - turns.sampled, "scoring": 0.0}
            phases["update"] = turns.read["seconds"] - turns.measured
            told = {**dict.fromkeys(TOLD, float("nan")), **turns.told}
            answer = {**turns.read, "phases": phases, "tokens": turns.tokens, "told": told, "peak_gib": peak_gib()}
            desk.answer(answer)
            turns.begin()

    texts = tokenizer.batch_decode(prompt_ids(options).tolist())
    trainer = Told(
        model=policy,
        reward_funcs=score,
        args=GRPOConfig(
            output_dir=str(options.folder / options.worker),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=1,
            num_generations=options.group,
            max_completion_length=options.new,
            temperature=1.0,
            beta=BETA,
            epsilon=0.2,
            loss_type="grpo",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            max_steps=10**6,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            shuffle_dataset=False,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        callbacks=[turns],
    )
    trainer.remove_callback(PrinterCallback)
    found = versions("torch", "trl", "transformers", "accelerate")
    desk.answer({"versions": found, "threads": torch.get_num_threads(), "peak_gib": peak_gib()})
    with contextlib.suppress(NoMoreTurns):
        trainer.train()


# ---------------------------------------------------------------- the comparison


def main() -> None:
    options = arguments()
    if options.worker:
        return (trl_turns if options.worker == "trl" else our_turns)(options, Desk())
    if options.write:
        return write_model(options)
    use_cores(options.cores)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        arguments_of_all = [*sys.argv[1:], "--folder", folder]
        subprocess.run([sys.executable, __file__, *arguments_of_all, "--write"], check=True)
        contenders = []
        for name in options.contenders:
            python = options.peer_python if name == "trl" else sys.executable
            contenders.append(stack.enter_context(Worker(name, python, __file__, arguments_of_all)))
        turns: dict[str, list[Figures]] = {name: [] for name in options.contenders}
        for turn in range(options.warmup + options.rounds):
            for contender in contenders if turn % 2 == 0 else reversed(contenders):
                turns[contender.name].append(contender.turn())
                seconds = turns[contender.name][-1]["seconds"]
                print(f"round {turn} {contender.name:17} {seconds:7.2f} s", file=sys.stderr)
    table = compare(contenders, turns, options.warmup)
    print(f"{options.group} responses to each prompt; their lengths: {np.sort(lengths(options)).tolist()}")
    options.minibatches = 1
    show(table, options)
    if options.out is not None:
        named = ("model", "prompts", "group", "prompt", "new", "rounds", "warmup", "cores")
        settings = {name: getattr(options, name) for name in named}
        options.out.write_text(json.dumps({"settings": settings, "figures": table}, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
