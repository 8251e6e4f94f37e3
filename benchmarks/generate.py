"""Tokens per second of generation, in turns with transformers and Tunix, and as a share of the memory's bound.

    python3 -m venv ../tunix && ../tunix/bin/pip install google-tunix==0.1.7
    python benchmarks/generate.py --peer_python ../tunix/bin/python --rounds 5 --out generate.json

Float32, `--prompt` random tokens, `--new` new ones (nothing stops earlier), on `--cores` cores, in three settings:

    batch 1      one prompt, greedy
    batch 8      eight prompts, greedy
    4 x 8        four prompts with eight samples each, at temperature 1; the prompt is computed once for them

In each round each contender takes its turn. Machines drift, so what counts is the median over rounds of the ratio
within a round. The bound: a step reads every weight once, so it takes at least weights / bandwidth; the bandwidth is
measured in the same rounds, as the fastest pass of PyTorch or of XLA over 512 MiB. Prefill counts as time, not as
tokens; compiling, in a turn before the first round, and preparing weights, once for all turns, count as neither. At the
greedy settings the tokens are compared, so that nobody wins by computing something else.

    ours           `dpo_jax.sample.generate`, one program
    ours-queue     `dpo_jax.sample.serve`, as `dpo-jax generate` uses it
    ours-bfloat16  `--sample.weights bfloat16`: rounded weights for all tokens after the prompt
    ours-int8      `--sample.weights int8`; both with the error of the log-probabilities of the tokens that they wrote,
                   against a fresh forward pass with the model's own weights (at the greedy settings)
    transformers   `LlamaForCausalLM.generate` with its default cache
    tunix          Tunix's `Sampler` in a process of its own, with `--peer_python` (0.1.7 runs on the same jax 0.10.2)

Tunix differs in this: its Llama never hands `rope_theta` on, so here its rotary function is given the model's own, or
it would write other tokens at the same speed; it puts the output matrix over the whole prompt; it makes one step more
than it has tokens to write; its cache is of exactly prompt + new places. It has no way to share a prompt among samples,
so at 4 x 8 it runs 32 plain rows, each prompt eight times, as transformers does. Its tokenizer here passes ids through.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peers import REST, Desk, Figures, Stopwatch, Worker, peak_gib, use_cores, versions

NARROW = ("bfloat16", "int8")
SETTINGS = {"batch 1": (1, 1), "batch 8": (8, 1), "4 x 8": (4, 8)}
Turn = Callable[[], list[list[int]]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", type=Path, default=None, help="Python of an environment with Tunix 0.1.7")
    parser.add_argument("--model", default="smollm2", help="whatever dpo-jax loads")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that warms up")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="write the figures here, as JSON")
    parser.add_argument("--worker", choices=("tunix",), default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def our_turns(model: Any, variables: Any, prompts: np.ndarray, samples: int, new: int) -> dict[str, Turn]:
    """The engine, and the queue."""
    import jax

    from dpo_jax.config import SampleConfig
    from dpo_jax.sample import generate, prepare, serve

    config = SampleConfig(new, temperature=0.0 if samples == 1 else 1.0)
    prepared = {}
    for name in (None, *NARROW):
        prepared[name] = prepare(model, variables, dataclasses.replace(config, weights=name))
    key = jax.random.key(0)
    requests = [(i, k) for i in range(len(prompts)) for k in range(samples)]

    def engine(weights: Any = None) -> list[list[int]]:
        made = dataclasses.replace(config, weights=weights)
        found = generate(model, prepared[weights], prompts, key, config=made, samples=samples)
        return np.asarray(found.tokens).tolist()

    def queue() -> list[list[int]]:
        served = serve(
            model,
            prepared[None],
            prompts.tolist(),
            key,
            config=config,
            requests=requests,
            rows=len(requests),
        )
        found = {done.request: done.tokens for some in served for done in some}
        return [found[request] for request in requests]

    narrow = {f"ours-{name}": functools.partial(engine, weights=name) for name in NARROW}
    return {"ours": engine, "ours-queue": queue, **narrow}


def narrow_errors(model: Any, variables: Any, prompts: np.ndarray, new: int) -> dict[str, dict[str, float]]:
    """Of each narrow type: mean and largest |error|, in nats, of the log-probabilities of the tokens it writes."""
    import jax
    import jax.numpy as jnp

    from dpo_jax.config import SampleConfig
    from dpo_jax.sample import generate

    @jax.jit
    def exact(variables: Any, texts: jax.Array) -> jax.Array:
        hidden = model.apply(variables, texts)[:, prompts.shape[1] - 1 : -1]
        logps = jax.nn.log_softmax(model.apply(variables, hidden, method="logits"))
        return jnp.take_along_axis(logps, texts[:, prompts.shape[1] :, None], axis=2)[..., 0]

    found = {}
    for name in (None, *NARROW):
        config = SampleConfig(new, temperature=0.0, weights=name)
        out = generate(model, variables, prompts, jax.random.key(0), config=config)
        want = exact(variables, np.concatenate([prompts, np.asarray(out.tokens)], axis=1))
        error = np.abs(np.asarray(out.logps) - np.asarray(want))
        found["ours" if name is None else f"ours-{name}"] = {"mean": float(error.mean()), "max": float(error.max())}
    return found


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


class IdsAsText:
    """What Tunix's sampler asks of a tokenizer; its prompts are texts."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # puts none in front

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return -2


def tunix_turns(options: argparse.Namespace, desk: Desk) -> None:
    """Tunix's Llama and sampler: {"prompts": [[id]], "samples": K} in, tokens out."""
    import jax.numpy as jnp
    from tunix.generate import sampler as sampling  # pyright: ignore[reportMissingImports]
    from tunix.models.llama3 import (
        model as llama,  # pyright: ignore[reportMissingImports]
        params,  # pyright: ignore[reportMissingImports]
    )

    folder = options.folder / "model"
    hf = json.loads((folder / "config.json").read_text())
    config = llama.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        norm_eps=hf["rms_norm_eps"],
        rope_theta=int(hf["rope_theta"]),
        weight_tying=hf["tie_word_embeddings"],
    )
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=config.rope_theta)
    transformer = params.create_model_from_safe_tensors(str(folder), config, dtype=jnp.float32)
    places = sampling.CacheConfig(
        cache_size=options.prompt + options.new,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    sampler = sampling.Sampler(transformer, IdsAsText(), places)
    desk.answer({"versions": versions("google-tunix", "jax", "flax"), "peak_gib": peak_gib()})
    for request in desk.requests():
        samples = request["samples"]
        texts = [" ".join(map(str, ids)) for ids in request["prompts"] for _ in range(samples)]
        draw = {"temperature": 1.0, "top_p": 1.0, "seed": 0} if samples > 1 else {}
        watch = Stopwatch()
        found = sampler(
            texts, max_generation_steps=options.new, max_prompt_length=options.prompt, eos_tokens=[-1], **draw
        )
        read = watch.read()
        desk.answer({"tokens": [np.asarray(row).tolist() for row in found.tokens], **read})


def timed(turn: Turn) -> Figures:
    """A turn in this process, after the threads of the one before went to sleep."""
    time.sleep(REST)
    watch = Stopwatch()
    tokens = turn()
    return {"tokens": tokens, **watch.read()}


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
    if options.worker:
        return tunix_turns(options, Desk())
    use_cores(options.cores)
    import jax
    import torch
    from transformers import AutoModelForCausalLM

    import dpo_jax

    torch.set_num_threads(options.cores)
    model, variables = dpo_jax.load_pretrained(options.model)
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(variables))
    report: dict[str, Any] = {"weights_bytes": weights, "prompt": options.prompt, "new": options.new, "settings": {}}
    report["versions"] = {"here": versions("jax", "torch", "transformers")}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        dpo_jax.save_pretrained(Path(folder) / "model", model, variables, None)
        peer = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
        peer.generation_config.repetition_penalty = 1.0
        tunix = None
        if options.peer_python is not None:
            words = [*sys.argv[1:], "--folder", folder]
            tunix = stack.enter_context(Worker("tunix", options.peer_python, __file__, words))
            report["versions"]["tunix"] = tunix.ready["versions"]
        measure, bandwidths, measured, errors = bandwidth_meter(), [], {}, {}
        random = np.random.default_rng(0)
        for name in options.settings:
            count, samples = SETTINGS[name]
            prompts = random.integers(3, model.config.vocab_size, (count, options.prompt)).astype(np.int32)
            turns = our_turns(model, variables, prompts, samples, options.new)
            turns["transformers"] = their_turn(peer, prompts, samples, options.new)
            takes = {who: functools.partial(timed, turn) for who, turn in turns.items()}
            if tunix is not None:
                takes["tunix"] = functools.partial(tunix.turn, {"prompts": prompts.tolist(), "samples": samples})
            first = {who: take() for who, take in takes.items()}  # compiles, and fills caches
            made: dict[str, list[Figures]] = {who: [] for who in takes}
            for turn in range(options.rounds):
                bandwidths.append(measure())
                for who in takes if turn % 2 == 0 else reversed(takes):
                    made[who].append(takes[who]())
            measured[name] = first, made
            if samples == 1:
                errors[name] = narrow_errors(model, variables, prompts, options.new)
    report |= {"bandwidth": bandwidths, "log_probability_errors": errors}
    for name, (first, made) in measured.items():
        report["settings"][name] = compare(name, first, made, max(bandwidths) / weights)
    show(report)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return None


def compare(name: str, first: dict[str, Figures], made: dict[str, list[Figures]], passes: float) -> dict[str, Any]:
    """Figures of one setting: of each contender its speeds, and the medians of its ratio to others within a round.

    `passes`: over all weights that the memory allows in a second.
    """
    count, samples = SETTINGS[name]
    bound, greedy = count * samples * passes, samples == 1
    tokens = {who: figures["tokens"] for who, figures in first.items()}
    if tokens["ours"] != tokens["ours-queue"]:
        print(f"{name}: the queue wrote other tokens than the engine in some rows (rounding)")
    speeds = {who: [sum(map(len, f["tokens"])) / f["seconds"] for f in mine] for who, mine in made.items()}
    found: dict[str, Any] = {"bound": bound, "contenders": {}}
    for who, mine in speeds.items():
        ratios = {
            f"to_{base}": statistics.median(a / b for a, b in zip(mine, speeds[base], strict=True))
            for base in ("transformers", "tunix")
            if base in speeds
        }
        found["contenders"][who] = {
            "tokens_per_second": mine,
            "median": statistics.median(mine),
            **ratios,
            "share": statistics.median(mine) / bound,
            "first_seconds": first[who]["seconds"],
            "other_cores": max(f["other_cores"] for f in made[who]),
            "equal_tokens": float(np.mean(np.equal(tokens[who], tokens["transformers"]))) if greedy else None,
        }
    return found


def show(report: dict[str, Any]) -> None:
    bandwidth = max(report["bandwidth"])
    for name, found in report["settings"].items():
        count, samples = SETTINGS[name]
        print(f"\n{name}: {count * samples} rows; bound {found['bound']:.0f} tokens/s at {bandwidth / 1e9:.0f} GB/s")
        against = [key for key in next(iter(found["contenders"].values())) if key.startswith("to_")]
        print(f"  {'':13} {'tokens/s':>8} {' '.join(f'{k[3:]:>15}' for k in against)} {'bound':>6} {'same tokens':>12}")
        for who, row in found["contenders"].items():
            ratios = " ".join(f"{row[key]:13.2f} x" for key in against)
            same = "" if row["equal_tokens"] is None else f"{row['equal_tokens']:.1%}"
            print(f"  {who:13} {row['median']:8.1f} {ratios} {row['share']:6.0%} {same:>12}")
    for name, rows in report["log_probability_errors"].items():
        words = "; ".join(f"{who} {row['mean']:.1e} (largest {row['max']:.1e})" for who, row in rows.items())
        print(f"\n{name}: error of the log-probabilities, nats a token: {words}")
    busy = max(row["other_cores"] for found in report["settings"].values() for row in found["contenders"].values())
    if busy > 0.1:
        print(f"warning: something else took up to {busy:.2f} cores during a turn; discard this run")


if __name__ == "__main__":
    main()
