"""Tokens per second of generation, in turns with transformers' `generate`, and as a share of the memory's bound.

    python benchmarks/generate.py --rounds 5

Float32, `--prompt` random tokens, `--new` new ones (nothing stops earlier), in three settings:

    batch 1      one prompt, greedy
    batch 8      eight prompts, greedy
    4 x 8        four prompts with eight samples each, at temperature 1; the prompt is computed once for them

In each round each contender takes its turn. Machines drift, so what counts is the median over rounds of the ratio
within a round. The bound: a step reads every weight once, so it takes at least weights / bandwidth; the bandwidth is
measured in the same rounds, as the fastest pass of PyTorch or of XLA over 512 MiB. Prefill counts as time, not as
tokens. At the greedy settings the tokens are compared, so that nobody wins by computing something else.

    ours           `dpo_jax.sample.generate`, one program
    ours-queue     `dpo_jax.sample.serve`, as `dpo-jax generate` uses it
    transformers   `LlamaForCausalLM.generate` with its default cache
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = {"batch 1": (1, 1), "batch 8": (8, 1), "4 x 8": (4, 8)}
Turn = Callable[[], list[list[int]]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="whatever dpo-jax loads")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that warms up")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=None, help="write the figures here, as JSON")
    return parser.parse_args()


def our_turns(model: Any, variables: Any, prompts: np.ndarray, samples: int, new: int) -> dict[str, Turn]:
    """The engine, and the queue."""
    import jax

    from dpo_jax.config import SampleConfig
    from dpo_jax.sample import generate, serve

    config = SampleConfig(new, temperature=0.0 if samples == 1 else 1.0)
    requests = [(i, k) for i in range(len(prompts)) for k in range(samples)]

    def engine() -> list[list[int]]:
        found = generate(model, variables, prompts, jax.random.key(0), config=config, samples=samples)
        return np.asarray(found.tokens).tolist()

    def queue() -> list[list[int]]:
        served = serve(
            model,
            variables,
            prompts.tolist(),
            jax.random.key(0),
            config=config,
            requests=requests,
            rows=len(requests),
        )
        found = {done.request: done.tokens for some in served for done in some}
        return [found[request] for request in requests]

    return {"ours": engine, "ours-queue": queue}


def their_turn(model: Any, prompts: np.ndarray, samples: int, new: int) -> Turn:
    """transformers; all prompts are of one length, so nothing is padded."""
    import torch

    ids = torch.tensor(prompts)
    options: dict[str, Any] = {"do_sample": samples > 1, "num_return_sequences": samples}
    if samples > 1:
        options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def turn() -> list[list[int]]:
        torch.manual_seed(0)
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
        return out[:, ids.shape[1] :].tolist()

    return turn


def bandwidth_meter() -> Callable[[], float]:
    """A function that measures bytes/s of reading memory, the better of PyTorch and XLA."""
    import jax
    import jax.numpy as jnp
    import torch

    rows, columns = 2**14, 2**13
    table, vector = torch.ones(rows, columns), torch.ones(columns)
    array = jnp.asarray(table.numpy())
    multiply = jax.jit(lambda a, v: a @ v)
    ones = jnp.ones(columns)
    passes = {
        "torch": lambda: torch.mv(table, vector),
        "xla": lambda: multiply(array, ones).block_until_ready(),
    }

    def measure() -> float:
        best = 0.0
        for one in passes.values():
            for _ in range(3):
                start = time.perf_counter()
                one()
                best = max(best, 4 * rows * columns / (time.perf_counter() - start))
        return best

    return measure


def main() -> None:
    options = arguments()
    import jax
    import torch
    from transformers import AutoModelForCausalLM

    import dpo_jax

    model, variables = dpo_jax.load_pretrained(options.model)
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(variables))
    with tempfile.TemporaryDirectory() as folder:
        dpo_jax.save_pretrained(Path(folder) / "model", model, variables, None)
        peer = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
        peer.generation_config.repetition_penalty = 1.0
    measure = bandwidth_meter()
    random = np.random.default_rng(0)
    report: dict[str, Any] = {"weights_bytes": weights, "prompt": options.prompt, "new": options.new, "settings": {}}
    bandwidths = []
    for name in options.settings:
        count, samples = SETTINGS[name]
        prompts = random.integers(3, model.config.vocab_size, (count, options.prompt)).astype(np.int32)
        turns = our_turns(model, variables, prompts, samples, options.new)
        turns["transformers"] = their_turn(peer, prompts, samples, options.new)
        tokens = {who: turn() for who, turn in turns.items()}  # compiles, and fills caches
        same = None
        if samples == 1:
            same = float(np.mean(np.asarray(tokens["ours"]) == np.asarray(tokens["transformers"])))
        if tokens["ours"] != tokens["ours-queue"]:
            print(f"{name}: the queue wrote other tokens than the engine in some rows (rounding)")
        speeds: dict[str, list[float]] = {who: [] for who in turns}
        for _ in range(options.rounds):
            bandwidths.append(measure())
            for who, turn in turns.items():
                start = time.perf_counter()
                written = sum(map(len, turn()))
                speeds[who].append(written / (time.perf_counter() - start))
        bound = count * samples * max(bandwidths) / weights
        theirs = speeds["transformers"]
        print(f"\n{name}: {count * samples} rows; bound {bound:.0f} tokens/s at {max(bandwidths) / 1e9:.0f} GB/s")
        if same is not None:
            print(f"  greedy tokens equal to transformers': {same:.1%}")
        found: dict[str, Any] = {"bound": bound, "equal_tokens": same}
        for who, mine in speeds.items():
            median = statistics.median(mine)
            ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            print(
                f"  {who:13s} {median:8.1f} tokens/s   {ratio:5.2f} x transformers   {median / bound:4.0%} of the bound"
            )
            found[who] = {"tokens_per_second": mine, "median": median, "ratio": ratio, "share": median / bound}
        report["settings"][name] = found
    report["bandwidth"] = bandwidths
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
