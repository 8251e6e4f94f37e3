"""How far gradients in bfloat16 lie from those in float32: of the head for given hidden states, and of whole steps.

    python benchmarks/bf16_gradients.py --tokens 4096 --width 256 --vocab 2048

Prints one JSON object: "heads" has |g_bf16 - g_f32| / |g_f32| of the output matrix and of the hidden states, the same
bfloat16 states being given to both, for each way to log-probabilities; "steps" has it for every parameter of a
two-layer model, for each loss that reads a head. Token frequencies fall as in text (Zipf), so that some ids stand in
the batch hundreds of times. Runs on whatever device JAX finds.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.align import dpo, ppo, reward, sampled_softmax, sft
from dpo_jax.config import DPOConfig, LoraConfig, PPOConfig, RewardConfig, SFTConfig
from dpo_jax.model import heads, logprobs
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.model.variables import init_variables
from dpo_jax.types import PreferenceBatch, Rollout, TokenBatch

DPO_LOSSES: dict[str, dict[str, Any]] = {
    "dpo sigmoid": {},
    "dpo ipo": {"loss": "ipo"},
    "dpo simpo": {"loss": "simpo"},
    "dpo orpo": {"loss": "orpo"},
    "dpo with nll": {"nll_coefficient": 1.0},
}
Errors = dict[str, float]


def draw_ids(rng: np.random.Generator, vocab: int, shape: tuple[int, ...]) -> np.ndarray:
    """Ids whose frequencies fall as 1 / rank."""
    chances = 1 / np.arange(1, vocab + 1)
    return rng.choice(vocab, shape, p=chances / chances.sum()).astype(np.int32)


def errors(got: Any, want: Any) -> Errors:
    """Relative error of each leaf of a tree, by its path."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
    found = {}
    for (path, a), b in pairs:
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return found


# ---------------------------------------------------------------- the head alone


def head_errors(rows: int, length: int, width: int, vocab: int, *, chunks: int = 16) -> dict[str, Errors]:
    """Errors of the gradients of output matrix and hidden states, by the way to log-probabilities."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(rows, length, width)), jnp.bfloat16)
    matrix = jnp.asarray(rng.normal(size=(width, vocab)) / width**0.5, jnp.float32)
    targets = jnp.asarray(draw_ids(rng, vocab, (rows, length)))
    drawn = sampled_softmax.draw(jax.random.key(0), vocab, vocab // 4, "log_uniform")
    budget = 4 * rows * vocab * (length // chunks)
    ways: dict[str, Callable[[jax.Array, jax.Array], Any]] = {
        "exact": lambda h, w: logprobs.token_logps(h, w, targets, budget_bytes=budget),
        "with greedy choice": lambda h, w: logprobs.token_scores(h, w, targets, budget_bytes=budget).logps,
        "with entropy": lambda h, w: sum(logprobs.token_logps_and_entropy(h, w, targets, budget_bytes=budget)),
        "sampled": lambda h, w: sampled_softmax.sampled_logps(h, w, targets, drawn, budget_bytes=budget // 4),
    }
    found = {}
    for name, way in ways.items():
        slopes = jax.jit(jax.grad(lambda h, w, way=way: jnp.mean(way(h, w)), argnums=(0, 1)))
        rough, exact = slopes(hidden, matrix.astype(jnp.bfloat16)), slopes(hidden.astype(jnp.float32), matrix)
        found[name] = {"hidden": errors(rough[0], exact[0])[""], "head": errors(rough[1], exact[1])[""]}
    return found


# ---------------------------------------------------------------- whole steps


def token_batch(rng: np.random.Generator, rows: int, length: int, vocab: int) -> TokenBatch:
    """Windows of one sequence each; a third of its tokens are not predicted."""
    targets = rng.random((rows, length)) < 2 / 3
    targets[:, 0] = False
    return TokenBatch(
        tokens=draw_ids(rng, vocab, (rows, length)),
        segments=np.ones((rows, length), np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        targets=targets,
        rows=np.arange(rows, dtype=np.int32)[:, None],
    )


def pairs(rng: np.random.Generator, rows: int, length: int, vocab: int) -> PreferenceBatch:
    """Pairs of half a prompt and half a response, `length` tokens together; references a little off the policy."""
    half = length // 2
    lengths = rng.integers(half // 2, half + 1, (rows, 2)).astype(np.int32)
    return PreferenceBatch(
        prompts=draw_ids(rng, vocab, (rows, half)),
        prompt_lengths=np.full(rows, half, np.int32),
        responses=draw_ids(rng, vocab, (rows, 2, half)),
        response_lengths=lengths,
        weights=np.ones(rows, np.float32),
        rows=np.arange(rows, dtype=np.int32),
    )


def gradients(step: Callable[[Any, Any], Any], state: Any, batch: Any, *, jit: Callable[..., Any] = jax.jit) -> Any:
    """The gradients of one step, kept by an optimizer that does nothing else."""
    keeper = optax.trace(decay=0.0)
    watched = dataclasses.replace(state, tx=keeper, opt_state=keeper.init(state.trainable))
    return jit(step)(watched, batch)[0].opt_state.trace


def step_errors(
    rows: int,
    length: int,
    width: int,
    vocab: int,
    *,
    tied: bool = False,
    lora: int = 0,
    accumulate: int = 2,
    chunks: int = 16,
    losses: Sequence[str] | None = None,
    jit: Callable[..., Any] = jax.jit,
) -> dict[str, Errors]:
    """Errors of the gradient of every parameter of a two-layer model, by loss (of `losses`, or of all)."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=width // 4,
        tie_embeddings=tied,
        attention_bias=True,
        mlp_bias=True,
    )
    exact = Llama(config, remat="none", lora=LoraConfig(rank=lora))
    variables = init_variables(exact, jax.random.key(0))
    if lora:  # a second factor of 0 would give the first no gradient
        noise = 0.02 * jax.random.normal(jax.random.key(1), (lora, 2 * width))
        variables["adapters"] = jax.tree_util.tree_map_with_path(
            lambda path, x: noise[:, : x.shape[2]] + x if path[-1].key == "lora_b" else x, variables["adapters"]
        )
    rng = np.random.default_rng(1)
    windows, groups = token_batch(rng, rows, length, vocab), pairs(rng, rows, length, vocab)
    small = 4 * rows * vocab * max(1, length // 2 // chunks)
    sampled = {"loss": "sampled", "negatives": vocab // 4}
    scored = heads.init_heads(exact, jax.random.key(2), {heads.SCORE: 1})
    learnt = dpo.reference_logps(exact.apply, variables, groups, config=DPOConfig())
    groups = dataclasses.replace(groups, reference_logps=learnt + rng.normal(0, 5, learnt.shape).astype(np.float32))
    rollout = _rollout(groups, rng)

    def steps(model: Llama) -> dict[str, tuple[Any, Any, Any]]:
        made: dict[str, tuple[Any, Any, Any]] = {}
        for name, options in {"sft": {}, "sft sampled": sampled}.items():
            c = SFTConfig(**options, accumulate=accumulate, head_budget_bytes=small)
            made[name] = partial(sft.train_step, config=c), sft.init_state(model, variables, c), windows
        for name, options in DPO_LOSSES.items():
            c = DPOConfig(**options, accumulate=accumulate, head_budget_bytes=small)
            made[name] = partial(dpo.train_step, config=c), dpo.init_state(model, variables, c), groups
        c = RewardConfig(accumulate=accumulate)
        state = reward.init_state(model, {**variables, "heads": scored}, c)
        made["reward"] = partial(reward.train_step, config=c), state, groups
        c = PPOConfig(epochs=1, minibatches=1, accumulate=accumulate, entropy_coefficient=0.01, head_budget_bytes=small)
        value = None if lora else {**variables, "heads": scored}
        made["ppo"] = partial(ppo.train_step, config=c), ppo.init_state(model, variables, c, value=value), rollout
        return made

    rough = steps(exact.clone(dtype=jnp.bfloat16))
    return {
        name: errors(gradients(*rough[name], jit=jit), gradients(step, state, batch, jit=jit))
        for name, (step, state, batch) in steps(exact).items()
        if losses is None or name in losses
    }


def _rollout(groups: PreferenceBatch, rng: np.random.Generator) -> Rollout:
    """The chosen responses as if they had been sampled, with values and scores out of the air."""
    shape = groups.responses[:, 0].shape
    logps = np.full(shape, -np.log(shape[1]), np.float32)
    rows = len(groups.weights)
    return Rollout(
        prompts=groups.prompts,
        prompt_lengths=groups.prompt_lengths,
        responses=groups.responses[:, 0],
        response_lengths=groups.response_lengths[:, 0],
        ended=np.ones(rows, bool),
        logps=logps,
        reference_logps=logps + rng.normal(0, 0.1, shape).astype(np.float32),
        values=rng.normal(0, 0.1, shape).astype(np.float32),
        scores=rng.normal(0, 1, rows).astype(np.float32),
        kl_coefficient=np.full(rows, 0.05, np.float32),
        weights=groups.weights,
        rows=groups.rows,
    )


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--chunks", type=int, default=16, help="pieces in which the head is computed")
    options = parser.parse_args()
    sizes = (options.tokens // options.length, options.length, options.width, options.vocab)
    steps = {name: step_errors(*sizes, chunks=options.chunks, **kind) for name, kind in KINDS.items()}
    found = {
        "device": jax.devices()[0].device_kind,
        "heads": head_errors(*sizes, chunks=options.chunks),
        "worst": {kind: {loss: max(e.values()) for loss, e in by_loss.items()} for kind, by_loss in steps.items()},
        "steps": steps,
    }
    print(json.dumps(found, indent=2))


KINDS: dict[str, dict[str, Any]] = {"untied": {}, "tied": {"tied": True}, "lora": {"lora": 4}}

if __name__ == "__main__":
    main()
