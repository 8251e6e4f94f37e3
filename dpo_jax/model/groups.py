"""How a preference group (one prompt, K responses) is laid out as sequences for the forward pass.

    separate   K sequences a group, prompt + response each:         [B K, P + R]
    shared     one sequence a group, the prompt computed once:      [B, P + K R]
               block 0 is the prompt, block 1 + k the k-th response; a response sees the prompt and itself, and its
               positions go on from the prompt's length, so each response gets the numbers it would get alone.

    windows    B / W groups a sequence, real tokens only:            [W, T]
               as `PreferenceBatch.windows` says; a batch without is laid out as shared.

All give the same log-probabilities. "shared" does less work than "separate" when prompts are long, and "windows" does
none for padding, neither in the layers nor in the head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax import mesh as meshes
from dpo_jax.config import Layout
from dpo_jax.model.chunks import length_axis, split_over
from dpo_jax.model.logprobs import token_logps, token_logps_and_collisions, token_logps_and_entropy
from dpo_jax.types import PreferenceBatch, Windows


@dataclass(frozen=True)
class _Sequences:
    """A batch laid out as sequences, and where its responses stand in them.

    Attributes:
      tokens, positions, segments: int32 [S, T]; see `Llama.__call__`.
      options: its keyword arguments.
      predicting: [S, T, D] -> [B, K, R, D]: the states that predict each response token.
      following: int32 [S, T]: the response token after each one, where there is one.
      spread: [S, T] of what is said of `following` at each token -> [B, K, R]. In the shared layout the last token of a
        prompt is followed by several; what is said of those is filled in afterwards. Of windows: [S, M] of what is said
        of `picked`.
      last: int32 [S, n]: index of the last token of each response that stands in the sequence.
      picked: of windows: [S, T, D] -> the states [S, M, D] that predict response tokens, and these tokens [S, M].
    """

    tokens: jax.Array
    positions: jax.Array
    segments: jax.Array | None
    options: dict[str, Any]
    predicting: Callable[[jax.Array], jax.Array]
    following: jax.Array | None
    spread: Callable[[jax.Array], jax.Array]
    last: jax.Array
    picked: Callable[[jax.Array], tuple[jax.Array, jax.Array]] | None = None


def _windows(batch: PreferenceBatch, windows: Windows) -> _Sequences:
    """B / W groups a sequence."""
    (b, p), (_, k, r), w = batch.prompts.shape, batch.responses.shape, windows.source.shape[0]
    if (windows.first, windows.last) != (0, k):
        raise ValueError(f"windows of responses {windows.first} to {windows.last - 1} for a batch of {k}")
    rows = jnp.concatenate([batch.prompts, batch.responses.reshape(b, k * r)], axis=1).reshape(w, b // w * (p + k * r))

    def at(x: jax.Array, places: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)

    def picked(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        states = at(hidden, windows.reads)
        return meshes.constrain(states, ("batch", length_axis(states.shape[1]), None)), at(rows, windows.targets)

    def spread(x: jax.Array) -> jax.Array:
        return at(x, windows.spread).reshape(b, k, r, *x.shape[2:])

    tokens = _clean(at(rows, windows.source), windows.real)
    options = {"packed": False, "views": windows.views}
    return _Sequences(
        tokens=tokens,
        positions=windows.positions,
        segments=None,
        options=options,
        predicting=lambda hidden: spread(at(hidden, windows.reads)),
        following=None,
        spread=spread,
        last=windows.ends,
        picked=picked,
    )


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

    def spread(x: jax.Array) -> jax.Array:
        return jnp.roll(x[:, p:].reshape(b, k, r), 1, axis=2)

    responses = _clean(batch.responses, batch.response_mask)
    following = jnp.roll(responses, -1, axis=2).reshape(b, k * r)
    following = jnp.concatenate([jnp.zeros_like(batch.prompts), following], axis=1)
    last = p + r * jnp.arange(k) + batch.response_lengths - 1
    segments = real.astype(jnp.int32)
    options = {"prefix": (p, k, r), "packed": False}
    return _Sequences(_clean(tokens, real), positions, segments, options, predicting, following, spread, last)


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

    before = lengths - 1 + jnp.arange(r)

    def predicting(hidden: jax.Array) -> jax.Array:
        return jnp.take_along_axis(hidden, before[..., None], axis=1).reshape(b, k, r, -1)

    def spread(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, before, axis=1).reshape(b, k, r)

    tokens, segments = _clean(tokens, real), real.astype(jnp.int32)
    following = jnp.roll(tokens, -1, axis=1)
    return _Sequences(tokens, at, segments, {"packed": False}, predicting, following, spread, ends - 1)


def _clean(tokens: jax.Array, real: jax.Array) -> jax.Array:
    """Padding may hold any value, even ones outside the vocabulary."""
    return jnp.where(real, tokens, 0)


def _layout(batch: PreferenceBatch, layout: Layout) -> _Sequences:
    if layout == "windows" and batch.windows is not None:
        (windows,) = batch.windows
        return _windows(batch, windows)
    return _separate(batch) if layout == "separate" else _shared(batch)


def response_states(
    apply_fn: Callable[..., Any], variables: Any, batch: PreferenceBatch, *, layout: Layout = "shared"
) -> jax.Array:
    """The hidden state at the last token of each response (its terminator, where it was not cut), [B, K, D].

    In the dtype the model computes in; 0 for an absent response. Heads read it (`model/heads.py`).
    Arguments as for `response_logps`.
    """
    b, k, _ = batch.responses.shape
    hidden = predicting_states(apply_fn, variables, batch, layout=layout).hidden
    states = jnp.take_along_axis(hidden, _layout(batch, layout).last[..., None], axis=1).reshape(b, k, -1)
    states = meshes.constrain(states, ("batch", "responses", None))
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
      layout: "windows", "shared" or "separate", see above.
      temperature: divides the logits.
      vocabulary: see `logprobs.token_logps`.
      head_budget_bytes: see `logprobs.token_logps`.
    """
    unembedding = apply_fn(variables, method="unembedding")

    def logps(states: jax.Array, targets: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"temperature": temperature, "vocabulary": vocabulary}
        return token_logps(states, unembedding, targets, **options, budget_bytes=head_budget_bytes)

    found = predicting_states(apply_fn, variables, batch, layout=layout).read(logps)
    return jnp.where(batch.response_mask, found, 0.0)


def response_logps_and_collisions(
    apply_fn: Callable[..., Any],
    variables: Any,
    batch: PreferenceBatch,
    *,
    layout: Layout = "shared",
    head_budget_bytes: int = 256 * 2**20,
) -> tuple[jax.Array, jax.Array]:
    """`response_logps`, and log Σ_v p_v² of the prediction of each response token, without gradient.

    float32 [B, K, R] each, 0 past `response_lengths`. Arguments as for `response_logps`.
    """
    unembedding = apply_fn(variables, method="unembedding")
    read = partial(token_logps_and_collisions, unembedding=unembedding, budget_bytes=head_budget_bytes)
    states = predicting_states(apply_fn, variables, batch, layout=layout)
    found = states.read(lambda hidden, targets: read(hidden, targets=targets))
    return jax.tree.map(lambda x: jnp.where(batch.response_mask, x, 0.0), found)


@struct.dataclass
class PredictingStates:
    """The hidden states before the response tokens of a batch, which predict them.

    Attributes:
      hidden: [S, T, D], of the sequences.
      batch:  whose responses they predict.
      layout: static.
    """

    hidden: jax.Array
    batch: PreferenceBatch
    layout: Layout = struct.field(pytree_node=False)

    def read(self, f: Callable[[jax.Array, jax.Array], Any]) -> Any:
        """What `f` says of each response token: (states [N, n, D], tokens int32 [N, n]) -> tree of arrays [N, n].

        Returns the tree of arrays [B, K, R]; any value at padding. Where the mesh splits sequences, states stay on
        their devices: `f` then reads every place of the sequences, those of the prompts too, and its numbers are picked
        out.
        """
        batch = self.batch
        b, k, r = batch.responses.shape
        at, targets = _layout(batch, self.layout), _clean(batch.responses, batch.response_mask)
        if at.picked is not None:
            return jax.tree.map(at.spread, f(*at.picked(self.hidden)))
        if split_over(self.hidden.shape[1]) == 1:
            found = f(self.whole().reshape(b * k, r, -1), targets.reshape(b * k, r))
            return jax.tree.map(lambda x: x.reshape(b, k, r), found)
        assert at.following is not None
        found = jax.tree.map(at.spread, f(self.hidden, at.following))
        if self.layout == "separate":
            return found
        last = jnp.take_along_axis(self.hidden, batch.prompt_lengths[:, None, None] - 1, axis=1)
        first = f(jnp.broadcast_to(last, (b, k, last.shape[-1])), targets[:, :, 0])
        return jax.tree.map(lambda x, one: x.at[:, :, 0].set(one), found, first)

    def whole(self) -> jax.Array:
        """The states themselves, [B, K, R, D]; any value at padding."""
        states = _layout(self.batch, self.layout).predicting(self.hidden)
        return meshes.constrain(states, ("batch", "responses", length_axis(states.shape[2]), None))


def predicting_states(
    apply_fn: Callable[..., Any], variables: Any, batch: PreferenceBatch, *, layout: Layout = "shared"
) -> PredictingStates:
    """The hidden state before each response token. Arguments as for `response_logps`."""
    at = _layout(batch, layout)
    return PredictingStates(apply_fn(variables, at.tokens, at.positions, at.segments, **at.options), batch, layout)


@struct.dataclass
class ResponsePredictions:
    """What a policy predicts along given responses.

    Attributes:
      logps:   float32 [B, K, R], log-probability of each response token in nats, 0 at padding.
      entropy: float32 [B, K, R], of each prediction, in nats, 0 at padding.
      states:  the hidden states that predict.
    """

    logps: jax.Array
    entropy: jax.Array
    states: PredictingStates


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
    unembedding = apply_fn(variables, method="unembedding")

    def both(states: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        options: dict[str, Any] = {"temperature": temperature, "vocabulary": vocabulary}
        return token_logps_and_entropy(states, unembedding, targets, **options, budget_bytes=head_budget_bytes)

    states = predicting_states(apply_fn, variables, batch, layout=layout)
    logps, entropy = (jnp.where(batch.response_mask, x, 0.0) for x in states.read(both))
    return ResponsePredictions(logps, entropy, states)
