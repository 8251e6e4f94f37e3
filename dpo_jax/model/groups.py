"""How a preference group (one prompt, K responses) is laid out as sequences for the forward pass.

    separate   K sequences a group, prompt + response each:         [B K, P + R]
    shared     one sequence a group, the prompt computed once:      [B, P + K R]
               block 0 is the prompt, block 1 + k the k-th response; a response sees the prompt and itself, and its
               positions go on from the prompt's length, so each response gets the numbers it would get alone.

Both give the same log-probabilities; "shared" does less work when prompts are long.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax import mesh as meshes
from dpo_jax.config import Layout
from dpo_jax.model.logprobs import token_logps, token_logps_and_entropy
from dpo_jax.types import PreferenceBatch


@dataclass(frozen=True)
class _Sequences:
    """A batch laid out as sequences, and where its responses stand in them.

    Attributes:
      tokens, positions, segments: int32 [S, T]; see `Llama.__call__`.
      options: its keyword arguments.
      predicting: [S, T, D] -> [B, K, R, D]: the states that predict each response token.
      last: int32 [S, n]: index of the last token of each response that stands in the sequence.
    """

    tokens: jax.Array
    positions: jax.Array
    segments: jax.Array
    options: dict[str, Any]
    predicting: Callable[[jax.Array], jax.Array]
    last: jax.Array


def _shared(batch: PreferenceBatch) -> _Sequences:
    """One sequence a group."""
    (b, p), (_, k, r) = batch.prompts.shape, batch.responses.shape
    lengths = batch.prompt_lengths[:, None]
    tokens = jnp.concatenate([batch.prompts, batch.responses.reshape(b, k * r)], axis=1)
    at_prompt = jnp.broadcast_to(jnp.arange(p), (b, p))
    at_response = jnp.tile(lengths + jnp.arange(r), (1, k))
    real = jnp.concatenate([at_prompt < lengths, batch.response_mask.reshape(b, k * r)], axis=1)
    positions = jnp.concatenate([at_prompt, at_response], axis=1)

    def predicting(hidden: jax.Array) -> jax.Array:
        last = jnp.take_along_axis(hidden, batch.prompt_lengths[:, None, None] - 1, axis=1)[:, None]
        states = hidden[:, p:].reshape(b, k, r, -1)
        return jnp.concatenate([jnp.broadcast_to(last, (b, k, 1, last.shape[-1])), states[:, :, :-1]], axis=2)

    last = p + r * jnp.arange(k) + batch.response_lengths - 1
    segments = real.astype(jnp.int32)
    options = {"prefix": (p, k, r), "packed": False}
    return _Sequences(_clean(tokens, real), positions, segments, options, predicting, last)


def _separate(batch: PreferenceBatch) -> _Sequences:
    """K contiguous sequences a group."""
    (b, p), (_, k, r) = batch.prompts.shape, batch.responses.shape
    lengths = jnp.repeat(batch.prompt_lengths, k)[:, None]
    at = jnp.broadcast_to(jnp.arange(p + r), (b * k, p + r))
    prompts, responses = jnp.repeat(batch.prompts, k, axis=0), batch.responses.reshape(b * k, r)
    in_prompt = jnp.take_along_axis(prompts, jnp.minimum(at, p - 1), axis=1)
    in_response = jnp.take_along_axis(responses, jnp.clip(at - lengths, 0, r - 1), axis=1)
    tokens = jnp.where(at < lengths, in_prompt, in_response)
    ends = lengths + batch.response_lengths.reshape(b * k, 1)
    real = at < ends

    def predicting(hidden: jax.Array) -> jax.Array:
        states = jnp.take_along_axis(hidden, (lengths - 1 + jnp.arange(r))[..., None], axis=1)
        return states.reshape(b, k, r, -1)

    return _Sequences(_clean(tokens, real), at, real.astype(jnp.int32), {"packed": False}, predicting, ends - 1)


def _clean(tokens: jax.Array, real: jax.Array) -> jax.Array:
    """Padding may hold any value, even ones outside the vocabulary."""
    return jnp.where(real, tokens, 0)


def _run(
    apply_fn: Callable[..., Any], variables: Any, batch: PreferenceBatch, layout: Layout
) -> tuple[_Sequences, jax.Array]:
    """The sequences of a batch, and their hidden states [S, T, D]."""
    at = _shared(batch) if layout == "shared" else _separate(batch)
    return at, apply_fn(variables, at.tokens, at.positions, at.segments, **at.options)


def response_states(
    apply_fn: Callable[..., Any], variables: Any, batch: PreferenceBatch, *, layout: Layout = "shared"
) -> jax.Array:
    """The hidden state at the last token of each response (its terminator, where it was not cut), [B, K, D].

    In the dtype the model computes in; 0 for an absent response. Heads read it (`model/heads.py`).
    Arguments as for `response_logps`.
    """
    b, k, _ = batch.responses.shape
    at, hidden = _run(apply_fn, variables, batch, layout)
    states = jnp.take_along_axis(hidden, at.last[..., None], axis=1).reshape(b, k, -1)
    states = meshes.constrain(states, ("batch", "responses", "embed"))
    return jnp.where((batch.response_lengths > 0)[..., None], states, 0)


def response_logps(
    apply_fn: Callable[..., Any],
    variables: Any,
    batch: PreferenceBatch,
    *,
    layout: Layout = "shared",
    temperature: float = 1.0,
    vocabulary: int | None = None,
    head_budget_bytes: int = 256 * 2**20,
) -> jax.Array:
    """Log-probability of every response token, float32 [B, K, R], in nats; 0 past `response_lengths`.

    Args:
      apply_fn: `Llama.apply`.
      variables: {"params": ...} and, for an adapted policy, {"adapters": ...}.
      batch: see `types.PreferenceBatch`.
      layout: "shared" or "separate", see above.
      temperature: divides the logits.
      vocabulary: see `logprobs.token_logps`.
      head_budget_bytes: see `logprobs.token_logps`.
    """
    b, k, r = batch.responses.shape
    mask = batch.response_mask
    hidden = predicting_states(apply_fn, variables, batch, layout=layout).reshape(b * k, r, -1)
    unembedding = apply_fn(variables, method="unembedding")
    targets = _clean(batch.responses, mask).reshape(b * k, r)
    options: dict[str, Any] = {"temperature": temperature, "vocabulary": vocabulary, "budget_bytes": head_budget_bytes}
    logps = token_logps(hidden, unembedding, targets, **options)
    return jnp.where(mask, logps.reshape(b, k, r), 0.0)


def predicting_states(
    apply_fn: Callable[..., Any], variables: Any, batch: PreferenceBatch, *, layout: Layout = "shared"
) -> jax.Array:
    """The hidden state before each response token, the one that predicts it, [B, K, R, D]; any value at padding.

    Arguments as for `response_logps`.
    """
    at, hidden = _run(apply_fn, variables, batch, layout)
    return meshes.constrain(at.predicting(hidden), ("batch", "responses", "length", "embed"))


@struct.dataclass
class ResponsePredictions:
    """What a policy predicts along given responses.

    Attributes:
      logps:   float32 [B, K, R], log-probability of each response token in nats, 0 at padding.
      entropy: float32 [B, K, R], of each prediction, in nats, 0 at padding.
      states:  [B, K, R, D], the hidden states that predict; see `predicting_states`.
    """

    logps: jax.Array
    entropy: jax.Array
    states: jax.Array


def response_predictions(
    apply_fn: Callable[..., Any],
    variables: Any,
    batch: PreferenceBatch,
    *,
    layout: Layout = "shared",
    temperature: float = 1.0,
    vocabulary: int | None = None,
    head_budget_bytes: int = 256 * 2**20,
) -> ResponsePredictions:
    """`response_logps` with the entropies and the states, from one forward pass. Arguments as there."""
    b, k, r = batch.responses.shape
    mask = batch.response_mask
    states = predicting_states(apply_fn, variables, batch, layout=layout)
    logps, entropy = token_logps_and_entropy(
        states.reshape(b * k, r, -1),
        apply_fn(variables, method="unembedding"),
        _clean(batch.responses, mask).reshape(b * k, r),
        temperature=temperature,
        vocabulary=vocabulary,
        budget_bytes=head_budget_bytes,
    )
    return ResponsePredictions(
        logps=jnp.where(mask, logps.reshape(b, k, r), 0.0),
        entropy=jnp.where(mask, entropy.reshape(b, k, r), 0.0),
        states=states,
    )
