"""Beam search: the M likeliest continuations so far, side by side, token by token.

A beam that draws a stop token, or reaches the limit, is finished and counts

    score = (sum of log-probabilities) / length ** penalty,    length with the stop token,

and the best M finished ones are kept. A prompt is done when it has M and its best running beam, at its present length,
does not score above the worst of them: what `transformers` does by default (early_stopping=False), token for token.

B prompts, M beams, C candidates = (1 + stop tokens, at least 2) M, N new tokens, S cache slots, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.config import SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.model import cache as caches, llama
from dpo_jax.sample import decode, filters
from dpo_jax.sample.engine import Generation
from dpo_jax.sample.program import Program, Weights, make_weights

OUT = -1e9
"""Added to the score of what may not be chosen; worse than any real one."""


class _Beams(NamedTuple):
    """M beams a prompt, running or finished.

    Attributes:
      scores: float32 [B, M]     running: sum of log-probabilities; finished: with the length penalty.
      tokens: int32 [B, M, N]
      logps:  float32 [B, M, N]  the model's log-probability of each token.
      length: int32 [B, M]       tokens, the stop token included.
      done:   bool [B, M]        finished, and not an empty place.
    """

    scores: jax.Array
    tokens: jax.Array
    logps: jax.Array
    length: jax.Array
    done: jax.Array

    def take(self, index: jax.Array) -> "_Beams":
        """Beams `index` [B, any number] of each prompt."""
        return jax.tree.map(lambda x: _take(x, index), self)


class _Loop(NamedTuple):
    """Carry of the search. `open` [B]: a better end is still to be hoped for. `text`, `seen`: as in `decode.Rows`."""

    step: jax.Array
    open: jax.Array
    running: _Beams
    finished: _Beams
    text: jax.Array | None
    seen: jax.Array | None
    cache: caches.Caches


def _take(x: jax.Array, index: jax.Array, axis: int = 1) -> jax.Array:
    """Of x [..., M, ...] with the beams on `axis` the beams `index` [B, any number]; the prompts stand on axis - 1."""
    shape = (1,) * (axis - 1) + index.shape + (1,) * (x.ndim - axis - 1)
    return jnp.take_along_axis(x, index.reshape(shape), axis=axis)


@partial(jax.jit, static_argnames=("program", "beams", "new", "slots"))
def _search(
    weights: Weights,
    prompts: jax.Array,
    lengths: jax.Array,
    penalty: jax.Array,
    settings: decode.Settings,
    *,
    program: Program,
    beams: int,
    new: int,
    slots: int,
) -> Generation:
    count = len(prompts)
    decoder = decode.Decoder(program, weights, settings)
    keys = jnp.zeros((count * beams, 2), jnp.uint32)  # nothing is drawn
    size = {"samples": beams, "new": new, "slots": slots, "plain": False}
    rows, logits = decoder.fresh(prompts, lengths, keys, **size)
    candidates = max(2, 1 + len(settings.stop)) * beams
    every_length = jnp.repeat(lengths, beams)

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(count * beams, *x.shape[2:])

    def by_prompt(x: jax.Array) -> jax.Array:
        return x.reshape(count, beams, *x.shape[1:])

    def choose(loop: _Loop, logits: jax.Array) -> _Loop:
        """One more token for every running beam, from logits [B M, V]."""
        t, running = loop.step, loop.running
        logps = jax.nn.log_softmax(logits, axis=-1)
        adjusted = logps
        if settings.adjustments is not None:
            steps = jnp.full(count * beams, t)
            adjusted = filters.adjust(
                logps, settings.adjustments, count=steps, lengths=every_length + t, seen=loop.seen, text=loop.text
            )
        vocab = logits.shape[-1]
        sums = by_prompt(adjusted) + running.scores[:, :, None]
        sums, index = jax.lax.top_k(sums.reshape(count, -1), candidates)
        parent, token = index // vocab, (index % vocab).astype(jnp.int32)
        logp = jnp.take_along_axis(by_prompt(logps).reshape(count, -1), index, axis=1)
        ends = jnp.any(token[..., None] == settings.stop, axis=-1) | (t + 1 >= settings.limit)
        grown = running.take(parent)
        grown = grown._replace(
            scores=sums,
            tokens=grown.tokens.at[:, :, t].set(token),
            logps=grown.logps.at[:, :, t].set(logp),
            length=jnp.full_like(grown.length, t + 1),
            done=ends,
        )
        # The best of those that go on.
        scores, kept = jax.lax.top_k(sums + jnp.where(ends, OUT, 0.0), beams)
        going = grown.take(kept)._replace(scores=scores, done=jnp.zeros((count, beams), bool))
        # The best of those that have ended, before and now; now only the first M candidates count.
        real = ends & (jnp.arange(candidates) < beams)
        scored = sums / (t + 1).astype(jnp.float32) ** penalty + jnp.where(real, 0.0, OUT)
        ended = grown._replace(scores=scored, done=real)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), loop.finished, ended)
        finished = both.take(jax.lax.top_k(both.scores, beams)[1])

        best = going.scores[:, :1] / (t + 1).astype(jnp.float32) ** penalty
        worst = jnp.where(finished.done, jnp.min(finished.scores, axis=1, keepdims=True), OUT)
        still = loop.open & jnp.any(best > worst, axis=1) & (t + 1 < settings.limit)

        def keep(after: Any, before: Any) -> Any:
            """A prompt that was done before keeps what it had."""
            return jax.tree.map(lambda a, b: jnp.where(loop.open.reshape(-1, *[1] * (a.ndim - 1)), a, b), after, before)

        origin = jnp.take_along_axis(parent, kept, axis=1)
        newest = jnp.take_along_axis(token, kept, axis=1).reshape(-1)
        text, seen, at = loop.text, loop.seen, jnp.arange(count * beams)
        if text is not None:
            text = flat(_take(by_prompt(text), origin)).at[at, every_length + t].set(newest)
        if seen is not None:
            seen = flat(_take(by_prompt(seen), origin)).at[at, newest].set(True)

        def follow(x: jax.Array, axis: int) -> jax.Array:
            split = x.reshape(*x.shape[:axis], count, beams, *x.shape[axis + 1 :])
            return _take(split, origin, axis + 1).reshape(x.shape)

        return _Loop(
            step=t + 1,
            open=still,
            running=keep(going, running),
            finished=keep(finished, loop.finished),
            text=text,
            seen=seen,
            cache=caches.constrain(caches.map_rows(follow, loop.cache)),
        )

    def advance(loop: _Loop) -> _Loop:
        token = jnp.take_along_axis(loop.running.tokens, (loop.running.length - 1)[..., None], axis=2).reshape(-1)
        logits, cache = decoder.step(token, every_length + loop.step - 1, loop.cache)
        return choose(loop._replace(cache=cache), logits)

    nothing = _Beams(
        scores=jnp.full((count, beams), OUT),
        tokens=jnp.full((count, beams, new), decode.PAD, jnp.int32),
        logps=jnp.zeros((count, beams, new)),
        length=jnp.zeros((count, beams), jnp.int32),
        done=jnp.zeros((count, beams), bool),
    )
    # All beams are the prompt at first: only the first one has children.
    start = _Loop(
        step=jnp.int32(0),
        open=lengths > 0,
        running=nothing._replace(scores=nothing.scores.at[:, 0].set(0.0)),
        finished=nothing,
        text=rows.text,
        seen=rows.seen,
        cache=rows.cache,
    )
    loop = jax.lax.while_loop(lambda loop: jnp.any(loop.open), advance, choose(start, logits))
    best = jax.tree.map(lambda x: x[:, 0], loop.finished)
    mask = jnp.arange(new) < best.length[:, None]
    out = Generation(jnp.where(mask, best.tokens, decode.PAD), mask, jnp.where(mask, best.logps, 0.0))
    return decode.everywhere(program, out)


def beam_search(
    model: llama.Llama,
    variables: Any,
    prompts: decode.Prompts,
    *,
    config: SampleConfig,
    prompt_lengths: Sequence[int] | np.ndarray | None = None,
    vocabulary: int | None = None,
    mesh: Mesh | None = None,
) -> Generation:
    """The best continuation of each prompt that a beam search finds.

    Args:
      model, variables, prompts, prompt_lengths, vocabulary, mesh: as for `engine.generate`.
      config: with `beams`; see `SampleConfig`.

    Returns:
      `Generation` [B, max_new_tokens]; `logps` are the model's at temperature 1, before all filters.

    Raises:
      InputError: as `engine.generate`; no `beams`, or a vocabulary of fewer ids than candidates.
    """
    if config.beams is None:
        raise InputError("beam_search needs beams in its config; without them call dpo_jax.sample.generate")
    program = Program.of(model, config, str(jax.random.key_impl(jax.random.key(0))), mesh, variables)
    vocab = model.config.vocab_size
    candidates = max(2, 1 + len(config.stop_tokens)) * config.beams
    ids = vocab if vocabulary is None else vocabulary
    if candidates > ids:
        raise InputError(f"{config.beams} beams need {candidates} candidates of a vocabulary of {ids}; lower beams")
    table, lengths, slots = decode.batch_of(program, prompts, prompt_lengths, config)
    penalty = np.float32(config.settled.length_penalty)
    static = {"beams": config.beams, "new": decode.bucket(config.max_new_tokens), "slots": slots}
    settings = decode.settings(config, vocab, vocabulary)
    with meshes.in_force(program.mesh):
        weights = make_weights(program, variables, config.weights)
        batch = meshes.put_batch(program.mesh, (table, lengths))
        out = _search(weights, *batch, penalty, settings, program=program, **static)
    count = np.count_nonzero(lengths)
    return Generation(*(x[:count, : config.max_new_tokens] for x in out))
