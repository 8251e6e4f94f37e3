"""Time and peak memory of one GRPO iteration on SmolLM2-135M, in turns with an earlier version of this package.

    git worktree add ../before 46f5e52
    python benchmarks/grpo_iteration.py --before ../before --rounds 3

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
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from peers import Desk
from ppo_iteration import (
    answer_turns,
    compare,
    in_rounds,
    length_reward,
    prompt_data,
    show,
    write_figures,
    write_model,
)

CONTENDERS = ("grpo", "before")
LEARNING_RATE, BETA = 1e-6, 0.04
BATCHES = 4  # of prompts, before they begin again
TOLD = ("loss", "grad_norm", "kl", "entropy", "completions/mean_length")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, default=None, help="a checkout of an earlier version")
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
    from dpo_jax.files.sample_log import SampleLog
    from dpo_jax.sample import decode
    from dpo_jax.train.answered import Policy
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
    how: dict[str, Any] = {"piece": rows, "raw": False, "seed": config.seed, "vocabulary": config.vocabulary}
    rollouts = Prescribed(
        Policy(model, tokenizer, SampleConfig(options.new), mesh, **how),
        data,
        PromptLoader(data, batch_size=rows, group=options.group, seed=0, steps=10**6),
        length_reward(),
        SampleLog(options.folder / f"{options.worker}.jsonl", writes=True),
        reference=reference,
        config=config,
    )
    answer_turns(desk, ppo.jit_train_step(config, mesh), state, rollouts, mesh, TOLD)


# ---------------------------------------------------------------- the comparison


def main() -> None:
    options = arguments()
    if options.worker:
        return our_turns(options, Desk())
    if options.write:
        return write_model(options)
    contenders, turns = in_rounds(options, __file__, {})
    table = compare(contenders, turns, options.warmup)
    print(f"{options.group} responses to each prompt; their lengths: {np.sort(lengths(options)).tolist()}")
    options.minibatches = 1
    show(table, options)
    write_figures(options, table, ("prompts", "group", "prompt", "new"))
    return None


if __name__ == "__main__":
    main()
