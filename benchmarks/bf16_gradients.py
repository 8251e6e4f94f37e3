"""How far gradients in bfloat16 lie from those in float32: of the head for given hidden states, and of whole steps.

    python benchmarks/bf16_gradients.py --tokens 4096 --width 256 --vocab 2048

Prints a JSON object a line, as soon as it is known, with errors |g_bf16 - g_f32| / |g_f32|: for each way to
log-probabilities ("way") of the output matrix and of the hidden states, the same bfloat16 states being given to both;
for each loss that reads a head ("head_of") of that head, the states given likewise; for each of these losses
("step_of") the worst of all parameters of a two-layer model, and all of them. Token frequencies fall as in text (Zipf),
so that some ids stand in the batch hundreds of times. Runs on whatever device JAX finds.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.align import dpo, ppo, reward, sampled_softmax, sft
from dpo_jax.config import DPOConfig, LoraConfig, PPOConfig, RewardConfig, SFTConfig
from dpo_jax.model import heads, logprobs
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.groups import response_logps
from dpo_jax.model.llama import Llama
from dpo_jax.model.variables import init_variables
from dpo_jax.types import PreferenceBatch, Rollout, TokenBatch

PREFERENCES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "robust": {"label_smoothing": 0.1},
    "hinge": {},
    "ipo": {},
    "ipo_sum": {},
    "sigmoid_norm": {},
    "simpo": {"beta": 2.0},
    "orpo": {},
    "kto": {},
    "dpop": {"dpop_lambda": 5.0},
    "exo_pair": {},
    "nca_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
}
"""The losses of `align/losses.py`, and options of theirs.

At DPOP's own λ of 50 a nat moves its loss by 5: the rounding of the output matrix alone (0.01 nat a response) moves the
weights of rows, and with them the head's gradient by 0.8 %; by 0.2 % where bfloat16 holds the matrix exactly.
"""
STEPS = ("sft", "sft sampled", "dpo with nll", "reward", "ppo", "rloo", "grpo")
LOSSES = (*STEPS, *PREFERENCES)
STEEP = ("ipo_sum", "discopop")
"""Whose weights of rows move with the rounding of the output matrix; see `loss_head_errors`."""
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


def head_errors(rows: int, length: int, width: int, vocab: int, *, chunks: int = 16) -> Iterator[tuple[str, Errors]]:
    """Errors of the gradients of output matrix and hidden states, one way to log-probabilities after the other."""
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
    for name, way in ways.items():
        slopes = jax.jit(jax.grad(lambda h, w, way=way: jnp.mean(way(h, w)), argnums=(0, 1)))
        rough, exact = slopes(hidden, matrix.astype(jnp.bfloat16)), slopes(hidden.astype(jnp.float32), matrix)
        yield name, {"hidden": errors(rough[0], exact[0])[""], "head": errors(rough[1], exact[1])[""]}


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


def triples(rng: np.random.Generator, rows: int, length: int, vocab: int) -> PreferenceBatch:
    """Half a prompt and half a response, `length` tokens together; with a third response, mismatched, for KTO."""
    half = length // 2
    lengths, third = rng.integers(half // 2, half + 1, (rows, 2)), np.random.default_rng(2)
    lengths = np.concatenate([lengths, third.integers(half // 2, half + 1, (rows, 1))], axis=1).astype(np.int32)
    return PreferenceBatch(
        prompts=draw_ids(rng, vocab, (rows, half)),
        prompt_lengths=np.full(rows, half, np.int32),
        responses=np.concatenate(
            [draw_ids(rng, vocab, (rows, 2, half)), draw_ids(third, vocab, (rows, 1, half))], axis=1
        ),
        response_lengths=lengths,
        weights=np.ones(rows, np.float32),
        rows=np.arange(rows, dtype=np.int32),
    )


def gradients(step: Callable[[Any, Any], Any], state: Any, batch: Any, *, jit: Callable[..., Any] = jax.jit) -> Any:
    """The gradients of one step, kept by an optimizer that does nothing else."""
    keeper = optax.trace(decay=0.0)
    watched = dataclasses.replace(state, tx=keeper, opt_state=keeper.init(state.trainable))
    return jit(step)(watched, batch)[0].opt_state.trace


def given_states(vocab: int, length: int, width: int, dtype: Any) -> Any:
    """A model of which the output matrix alone is trained: its hidden states are bfloat16 numbers, whatever `dtype`."""
    by_token, by_place = (jax.random.normal(jax.random.key(i), (n, width)) for i, n in enumerate((vocab, 2 * length)))

    def apply(variables: Any, *args: jax.Array, method: str | None = None, **_: Any) -> jax.Array:
        if method == "unembedding":
            return variables["params"]["lm_head"]["kernel"].astype(dtype)
        tokens, positions, _segments = args
        return (by_token[tokens] + by_place[positions]).astype(jnp.bfloat16).astype(dtype)

    return SimpleNamespace(apply=apply, config=SimpleNamespace(hidden_size=width))


def loss_head_errors(
    rows: int,
    length: int,
    width: int,
    vocab: int,
    *,
    chunks: int = 16,
    jit: Callable[..., Any] = jax.jit,
    often: Callable[..., Any] = jax.jit,
) -> Iterator[tuple[str, Errors]]:
    """Errors of the gradient of the head of each loss, the same bfloat16 hidden states being given.

    The residual of IPO, summed over a response, and the steep blend of DiscoPOP move with the rounding of the matrix
    (.43 to .51 % by the draw, and .73 %), so their matrix is one that bfloat16 holds exactly: what is left is how the
    sums are made.
    """
    exact, rough = (given_states(vocab, length, width, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    kernel = jax.random.normal(jax.random.key(2), (width, vocab)) / width**0.5
    held = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    others = tuple(loss for loss in LOSSES if loss not in STEEP)
    for matrix, losses in ((kernel, others), (held, STEEP)):
        variables = {"params": {"lm_head": {"kernel": matrix}}}
        yield from _errors(exact, rough, variables, (rows, length, vocab), 1, chunks, losses, jit, often)


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
    losses: Sequence[str] = LOSSES,
    jit: Callable[..., Any] = jax.jit,
    often: Callable[..., Any] = jax.jit,
) -> Iterator[tuple[str, Errors]]:
    """Errors of the gradient of every parameter of a two-layer model, one loss after the other.

    `jit` compiles what runs once or twice, `often` what runs for every preference loss.
    """
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
    rough = exact.clone(dtype=jnp.bfloat16)
    yield from _errors(exact, rough, variables, (rows, length, vocab), accumulate, chunks, losses, jit, often)


def _errors(
    exact: Any,
    rough: Any,
    variables: dict[str, Any],
    sizes: tuple[int, int, int],
    accumulate: int,
    chunks: int,
    losses: Sequence[str],
    jit: Callable[..., Any],
    often: Callable[..., Any],
) -> Iterator[tuple[str, Errors]]:
    """Of what is trained of `variables`, in batches of `sizes` = (rows, tokens of a row, vocabulary)."""
    rows, length, vocab = sizes
    rng = np.random.default_rng(1)
    windows, groups = token_batch(rng, *sizes), triples(rng, *sizes)
    budget = 4 * rows * vocab * max(1, length // 2 // chunks)
    learnt = jit(partial(dpo.reference_logps, exact.apply, config=DPOConfig()))(variables, groups)
    groups = dataclasses.replace(groups, reference_logps=learnt + rng.normal(0, 5, learnt.shape).astype(np.float32))
    batches = {"sft": windows, "dpo": groups, "reward": _pairs(groups)}
    batches["ppo"] = _rollout(jit(partial(response_logps, exact.apply, layout="separate")), variables, groups, rng)
    scored = {**variables, "heads": heads.init_heads(exact, jax.random.key(2), {heads.SCORE: 1})}

    def step(model: Any, name: str) -> Any:
        common: dict[str, Any] = {"accumulate": accumulate, "head_budget_bytes": budget}
        c: Any
        if name.startswith("sft"):
            sampled = {"loss": "sampled", "negatives": vocab // 4} if name == "sft sampled" else {}
            c = SFTConfig(**sampled, **common)
            return gradients(partial(sft.train_step, config=c), sft.init_state(model, variables, c), windows, jit=jit)
        if name == "dpo with nll":
            c = DPOConfig(nll_coefficient=1.0, **common)
            return gradients(partial(dpo.train_step, config=c), dpo.init_state(model, variables, c), groups, jit=jit)
        if name == "reward":
            c = RewardConfig(accumulate=accumulate)
            state = reward.init_state(model, scored, c)
            return gradients(partial(reward.train_step, config=c), state, batches["reward"], jit=jit)
        kind: Any = {"advantage": "gae" if name == "ppo" else name, "epochs": 1, "entropy_coefficient": 0.01}
        c = PPOConfig(**kind, **({} if name == "ppo" else {"group_size": 4}), **common)
        value = scored if name == "ppo" and "adapters" not in variables else None
        state = ppo.init_state(model, variables, c, value=value)
        return gradients(partial(ppo.train_step, config=c), state, batches["ppo"], jit=jit)

    for name in losses:
        if name in STEPS:
            yield name, errors(step(rough, name), step(exact, name))
    asked = [name for name in losses if name in PREFERENCES]
    both = (preference_gradients(model.apply, variables, groups, asked, budget, jit, often) for model in (rough, exact))
    for name, got, want in ((a, b, d) for (a, b), (_, d) in zip(*both, strict=True)):
        yield name, errors(got, want)


def preference_gradients(
    apply_fn: Callable[..., Any],
    variables: dict[str, Any],
    groups: PreferenceBatch,
    losses: Sequence[str],
    budget: int,
    jit: Callable[..., Any],
    often: Callable[..., Any],
) -> Iterator[tuple[str, Any]]:
    """The gradient of each preference loss, by the chain rule over the summed log-probabilities: one forward pass for
    all, and one program that goes back, which `often` compiles.

    As `dpo.train_step` has it for one micro-batch.
    """
    part = "adapters" if "adapters" in variables else "params"

    def pull(trained: Any) -> tuple[jax.Array, Any]:
        options = DPOConfig(head_budget_bytes=budget)
        return jax.vjp(lambda x: dpo.reference_logps(apply_fn, {**variables, part: x}, groups, config=options), trained)

    reference, lengths = groups.reference_logps, groups.response_lengths
    assert reference is not None
    (at, back), pulled = jit(pull)(variables[part]), often(lambda back, slope: back(slope)[0])
    for name in losses:
        c = DPOConfig(loss=name, **PREFERENCES[name])  # type: ignore[arg-type]
        given = () if c.objective.reference_free else (reference[:, 0], reference[:, 1])
        kl = jax.nn.relu(jnp.mean((at - reference)[:, 2]))
        told: dict[str, Any] = {"chosen_lengths": lengths[:, 0], "rejected_lengths": lengths[:, 1], "kl": kl}
        loss = lambda x, c=c, given=given, told=told: jnp.mean(  # noqa: E731
            dpo.preference_loss(x[:, 0], x[:, 1], *given, config=c, **told)
        )
        yield name, pulled(back, jax.grad(loss)(at))


def _pairs(groups: PreferenceBatch) -> PreferenceBatch:
    cut = {name: getattr(groups, name)[:, :2] for name in ("responses", "response_lengths", "reference_logps")}
    return dataclasses.replace(groups, **cut)


def _rollout(
    logps_of: Callable[..., jax.Array], variables: Any, groups: PreferenceBatch, rng: np.random.Generator
) -> Rollout:
    """The chosen responses as if a policy a little off this one had sampled them; values and scores out of the air."""
    chosen = {name: getattr(groups, name)[:, :1] for name in ("responses", "response_lengths", "reference_logps")}
    logps = np.asarray(logps_of(variables, dataclasses.replace(groups, **chosen)))[:, 0]
    off = [rng.normal(0, deviation, logps.shape).astype(np.float32) for deviation in (0.05, 0.1, 0.1)]
    rows = len(groups.weights)
    return Rollout(
        prompts=groups.prompts,
        prompt_lengths=groups.prompt_lengths,
        responses=groups.responses[:, 0],
        response_lengths=groups.response_lengths[:, 0],
        ended=np.ones(rows, bool),
        sampler_logps=logps + off[0],
        old_logps=logps + off[0],
        reference_logps=logps + off[1],
        values=off[2],
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

    def tell(**found: Any) -> None:
        print(json.dumps(found), flush=True)

    tell(device=jax.devices()[0].device_kind)
    for way, found in head_errors(*sizes, chunks=options.chunks):
        tell(way=way, **found)
    for loss, found in loss_head_errors(*sizes, chunks=options.chunks):
        tell(head_of=loss, **found)
    for kind, chosen in KINDS.items():
        for loss, found in step_errors(*sizes, chunks=options.chunks, **chosen):
            worst = max(found, key=found.__getitem__)
            tell(model=kind, step_of=loss, worst=worst, error=found[worst], all=found)


KINDS: dict[str, dict[str, Any]] = {"untied": {}, "tied": {"tied": True}, "lora": {"lora": 4}}

if __name__ == "__main__":
    main()
