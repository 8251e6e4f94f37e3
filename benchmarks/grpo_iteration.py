"""Time and peak memory of one GRPO iteration on SmolLM2-135M, in turns with an earlier version, or with TRL's trainer.

    git worktree add ../before 46f5e52
    python benchmarks/grpo_iteration.py --before ../before --rounds 3
    python benchmarks/grpo_iteration.py --contenders grpo trl --peer_python ../trl/bin/python --rounds 3

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
    trl      TRL's GRPOTrainer: all responses sampled at once by transformers' sampler with a cache, and learnt from a
             prompt's at a time (all at once take 21 GiB and more); no gradient checkpointing, fused AdamW. A rollout's
             measuring and scoring count as measuring.
"""

import argparse
import contextlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peers import Desk, Stopwatch, peak_gib, versions
from ppo_iteration import (
    ON_CPU,
    NoMoreTurns,
    answer_turns,
    compare,
    in_rounds,
    length_reward,
    prompt_data,
    show,
    write_figures,
    write_model,
)

CONTENDERS = ("grpo", "before", "trl")
LEARNING_RATE, BETA = 1e-6, 0.04
BATCHES = 4  # of prompts, before they begin again
TOLD = ("loss", "grad_norm", "kl", "entropy", "completions/mean_length")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, default=None, help="a checkout of an earlier version")
    parser.add_argument("--peer_python", default=sys.executable, help="the Python that has TRL")
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

    import jax
    import jax.numpy as jnp

    import dpo_jax
    from dpo_jax.align import ppo
    from dpo_jax.config import OptimizerConfig, PPOConfig, SampleConfig
    from dpo_jax.data.sets.prompts import PromptLoader
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
    data = prompt_data(ids, tokenizer)
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
    loader = PromptLoader(data, batch_size=rows, group=options.group, seed=0, steps=10**6)
    log, sample = options.folder / f"{options.worker}.jsonl", SampleConfig(options.new)
    how: dict[str, Any] = {"piece": rows, "raw": False}
    beside: dict[str, Any] = {"reference": reference, "config": config}
    if options.worker == "before":  # as it stood at 46f5e52
        from dpo_jax.complete.sample_log import SampleLog  # pyright: ignore[reportMissingImports]
        from dpo_jax.judge.reward_functions import OfText  # pyright: ignore[reportMissingImports]
        from dpo_jax.judge.scores import scored  # pyright: ignore[reportMissingImports]

        judge = partial(scored, [OfText("length", lambda text: len(text) / 100)], ["length"], whiten=True)
        given: Any = (model, tokenizer, data, loader, judge, SampleLog(log, writes=True))
        rollouts = Prescribed(*given, **beside, sample=sample, mesh=mesh, **how)
    else:
        from dpo_jax.files.sample_log import SampleLog
        from dpo_jax.train.answered import Policy

        policy = Policy(model, tokenizer, sample, mesh, **how, seed=config.seed, vocabulary=config.vocabulary)
        rollouts = Prescribed(policy, data, loader, length_reward(), SampleLog(log, writes=True), **beside)
    answer_turns(desk, ppo.jit_train_step(config, mesh), state, rollouts, mesh, TOLD)


# ---------------------------------------------------------------- TRL


def trl_turns(options: argparse.Namespace, desk: Desk) -> None:
    """TRL's own `train`; a callback waits for each turn. A logits processor gives the table's lengths."""
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    import torch  # pyright: ignore[reportMissingImports]
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(options.cores)
    torch.manual_seed(0)
    table, ids = torch.tensor(lengths(options)), prompt_ids(options).tolist()
    tokenizer = AutoTokenizer.from_pretrained(options.folder / "model")

    class Prescribed(LogitsProcessor):
        """EOS where the table says, and nowhere else."""

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            ends = table - 1 == input_ids.shape[1] - options.prompt
            eos = torch.where(ends, torch.inf, -torch.inf)
            scores[:, tokenizer.eos_token_id] = torch.where(eos > 0, scores.amax(dim=1), eos)
            others = torch.arange(scores.shape[1]) != tokenizer.eos_token_id
            return scores.masked_fill(ends[:, None] & others[None], -torch.inf)

    class Trainer(GRPOTrainer):
        """Prompts are their numbers, and get their ids here. The sampler's and the whole rollout's seconds are kept."""

        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            return [ids[int(number)] for number in prompts], None, {}

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            begun = turns.watch.read()["seconds"]
            found = super()._generate_single_turn(*args, **kwargs)
            turns.sampling = turns.watch.read()["seconds"] - begun
            got = [len(one) for one in found[0]]
            assert got == table.tolist(), got
            return found

        def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
            found = super()._generate_and_score_completions(*args, **kwargs)
            turns.rollout = turns.watch.read()["seconds"]
            return found

    class Turns(TrainerCallback):
        """Between two iterations: tell the last, wait for the next."""

        def __init__(self) -> None:
            self._requests, self.sampling, self.rollout = desk.requests(), 0.0, 0.0

        def begin(self) -> None:
            if next(self._requests, NoMoreTurns) is NoMoreTurns:
                raise NoMoreTurns
            self.watch = Stopwatch()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._read = self.watch.read()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            phases = {"sampling": self.sampling, "measuring": self.rollout - self.sampling, "scoring": 0.0}
            phases["update"] = self._read["seconds"] - self.rollout
            told = {name: float(logs[name]) for name in TOLD if name in logs}
            answer = {"phases": phases, "tokens": int(table.sum()), "told": told, "peak_gib": peak_gib()}
            desk.answer({**self._read, **answer})
            self.begin()

    turns = Turns()
    model = AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.float32)
    plain = model.generate
    model.generate = lambda *args, **kwargs: plain(*args, logits_processor=[Prescribed()], **kwargs)
    trainer = Trainer(
        model=model,
        reward_funcs=lambda completions, **_: [len(text) / 100 for text in completions],
        args=GRPOConfig(
            output_dir=str(options.folder / options.worker),
            per_device_train_batch_size=options.group,
            gradient_accumulation_steps=options.prompts,
            num_generations=options.group,
            max_completion_length=options.new,
            shuffle_dataset=False,
            beta=BETA,
            loss_type="grpo",
            learning_rate=LEARNING_RATE,
            max_grad_norm=0.0,
            optim="adamw_torch_fused",
            gradient_checkpointing=False,
            max_steps=10**6,
            **ON_CPU,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [str(number) for number in range(len(ids))]}),
        callbacks=[turns],
    )
    trainer.remove_callback(PrinterCallback)
    desk.answer({"versions": versions("torch", "trl", "transformers", "accelerate"), "peak_gib": peak_gib()})
    with contextlib.suppress(NoMoreTurns):
        trainer.train()


# ---------------------------------------------------------------- the comparison


def main() -> None:
    options = arguments()
    if options.worker:
        return (trl_turns if options.worker == "trl" else our_turns)(options, Desk())
    if options.write:
        return write_model(options)
    contenders, turns = in_rounds(options, __file__, {"trl": options.peer_python})
    table = compare(contenders, turns, options.warmup)
    print(f"{options.group} responses to each prompt; their lengths: {np.sort(lengths(options)).tolist()}")
    options.minibatches = 1
    show(table, options)
    write_figures(options, table, ("prompts", "group", "prompt", "new"))
    return None


if __name__ == "__main__":
    main()
