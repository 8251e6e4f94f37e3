"""From logits to one token a row: what changes logits, what cuts the distribution, and the draw.

Order: bias, repetition penalty, n-grams, minimal length; then logits / temperature, top-k, top-p on what top-k left,
min-p; then the draw from what all left. This is the order of `transformers`. Every filter sees its own row only.
B rows, V vocabulary, S slots of text.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def _cut(scores: jax.Array, weights: jax.Array, goal: jax.Array) -> jax.Array:
    """The highest value t for which the weights of {score >= t} still sum to `goal`, float32 [B, 1].

    Bisection over the bits of t: non-negative floats sort like their bits, so 31 passes find t exactly, without sorting
    the vocabulary. Equal scores stay or go together.

    Args:
      scores: [B, V], not negative.
      weights: [B, V], not negative.
      goal: [B, 1]; at most the row's whole weight.
    """
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)

    def narrow(i: jax.Array, low: jax.Array) -> jax.Array:
        candidate = low | (1 << (30 - i))
        reached = jnp.sum(jnp.where(bits >= candidate, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(reached >= goal, candidate, low)

    low = jax.lax.fori_loop(0, 31, narrow, jnp.zeros((scores.shape[0], 1), jnp.int32))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def keep_top_k(probabilities: jax.Array, k: jax.Array) -> jax.Array:
    """Set all but the k most likely tokens to 0; the rest is not renormalised.

    Tokens as likely as the k-th all stay, so that no token is preferred for its id. k >= V keeps everything.

    Args:
      probabilities: float32 [B, V].
      k: int32 [], at least 1.
    """
    count = jnp.minimum(k, probabilities.shape[-1]).astype(jnp.float32)
    cut = _cut(probabilities, jnp.ones_like(probabilities), jnp.full((probabilities.shape[0], 1), count))
    return jnp.where(probabilities >= cut, probabilities, 0.0)


def keep_top_p(probabilities: jax.Array, p: jax.Array) -> jax.Array:
    """Set all but the nucleus to 0: the fewest, likeliest tokens whose share of the row's mass reaches p.

    Nucleus sampling (Holtzman et al. 2020, Eq. 2). Tokens as likely as the last one kept all stay; the likeliest token
    always does. The rest is not renormalised.

    Args:
      probabilities: float32 [B, V], not negative; rows need not sum to 1.
      p: float32 [], in (0, 1]; p = 1 keeps everything.
    """
    # The same sum as inside `_cut`, so that the goal p = 1 is reached at the lowest score and not missed by rounding.
    mass = jnp.sum(probabilities, axis=-1, keepdims=True)
    cut = _cut(probabilities, probabilities, p * mass)
    return jnp.where((probabilities >= cut) | (p >= 1), probabilities, 0.0)


def keep_min_p(probabilities: jax.Array, p: jax.Array) -> jax.Array:
    """Set all tokens to 0 that are less than p times as likely as the likeliest (Nguyen et al. 2024, section 3).

    Args:
      probabilities: float32 [B, V], not negative; rows need not sum to 1.
      p: float32 [], in (0, 1].
    """
    likeliest = jnp.max(probabilities, axis=-1, keepdims=True)
    return jnp.where(probabilities >= p * likeliest, probabilities, 0.0)


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Divide the logits of seen tokens by the penalty, where negative multiply them (Keskar et al. 2019, section 4.1).

    Args:
      logits: float32 [B, V].
      seen: bool [B, V], the tokens of each row's text.
      penalty: float32 [], positive; above 1 makes seen tokens less likely.
    """
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def repeats(text: jax.Array, lengths: jax.Array, n: jax.Array, vocab: int) -> jax.Array:
    """Which tokens would end a run of n tokens that the row's text already holds: bool [B, V].

    Args:
      text: int32 [B, S].
      lengths: int32 [B]; row i's text is text[i, :lengths[i]].
      n: int32 [], at least 1.
    """
    rows, slots = jnp.arange(text.shape[0]), jnp.arange(text.shape[1])

    def compare(i: jax.Array, same: jax.Array) -> jax.Array:
        """Slot j begins a run that equals the row's last n - 1 tokens, token i included."""
        last = jnp.take_along_axis(text, jnp.maximum(lengths - (n - 1) + i, 0)[:, None], axis=1)
        return same & (jnp.roll(text, -i, axis=1) == last)

    whole = slots + n - 1 < lengths[:, None]
    same = jax.lax.fori_loop(0, n - 1, compare, whole)
    following = jnp.roll(text, -(n - 1), axis=1)
    return jnp.zeros((len(rows), vocab), bool).at[rows[:, None], following].max(same)


class Adjustments(NamedTuple):
    """What changes logits, as arrays: another number compiles nothing anew. None is off.

    Attributes:
      bias:        float32 [V]
      repetition:  float32 []  penalty
      ngram:       int32 []
      min_new:     int32 []    no stop token (int32 [stop tokens]) before so many new ones.
    """

    bias: Any
    repetition: Any
    ngram: Any
    min_new: Any
    stop: Any


def adjust(
    logits: jax.Array,
    how: Adjustments,
    *,
    count: jax.Array,
    lengths: jax.Array,
    seen: jax.Array | None,
    text: jax.Array | None,
) -> jax.Array:
    """Logits [B, V] after bias, repetition penalty, n-grams and minimal length.

    Args:
      logits: float32 [B, V]; log-probabilities do too.
      count: int32 [B], new tokens so far; lengths: int32 [B], prompt and new tokens so far.
      seen: bool [B, V] the tokens of that text, where `how.repetition` is on.
      text: int32 [B, S] that text, where `how.ngram` is on.
    """
    if how.bias is not None:
        logits = logits + how.bias
    if how.repetition is not None:
        assert seen is not None
        logits = penalise(logits, seen, how.repetition)
    if how.ngram is not None:
        assert text is not None
        logits = jnp.where(repeats(text, lengths, how.ngram, logits.shape[-1]), -jnp.inf, logits)
    if how.min_new is not None:
        stops = jnp.zeros(logits.shape[-1], bool).at[how.stop].set(True)
        logits = jnp.where(stops & (count < how.min_new)[:, None], -jnp.inf, logits)
    return logits


_BLOCK = 256


def draw_noise(key: jax.Array, vocab: int) -> jax.Array:
    """What one draw among `vocab` tokens needs: float32 [N] from the standard Gumbel distribution."""
    return jax.random.gumbel(key, (-(-vocab // _BLOCK) + _BLOCK,), jnp.float32, mode="high")


def draw(weights: jax.Array, noise: jax.Array) -> jax.Array:
    """One index a row, with probability proportional to its weight, never 0: argmax(log w + Gumbel noise).

    First among the sums of blocks, then inside the block that won, which is the same distribution for a hundredth of
    the random numbers (Maddison et al. 2014, arXiv 1411.0030). A draw changes only where rounding decides between the
    two that lead. The inverse of a cumulative sum would change at each of its V edges: for a flat row of 49,152 tokens
    at relative errors of 1e-6 in one draw of a thousand, and with it the text that a row gets in another batch.

    Args:
      weights: float32 [B, V], not negative, no row all 0.
      noise: float32 [B, N], each row's own `draw_noise`.

    Returns:
      int32 [B].
    """
    rows, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    count = blocks.shape[1]
    block = jnp.argmax(jnp.log(jnp.sum(blocks, axis=-1)) + noise[:, :count], axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * _BLOCK + jnp.argmax(jnp.log(inside) + noise[:, count:], axis=-1)).astype(jnp.int32)


def token_logps(logits: jax.Array, tokens: jax.Array, temperature: jax.Array) -> jax.Array:
    """log softmax(logits / temperature) at the tokens: float32 [B] from [B, V] and int32 [B], before any filter."""
    logps = jax.nn.log_softmax(logits / temperature, axis=-1)
    return jnp.take_along_axis(logps, tokens[:, None], axis=-1)[:, 0]


def pick(
    logits: jax.Array,
    noise: jax.Array,
    *,
    temperature: jax.Array | None,
    top_k: jax.Array | None,
    top_p: jax.Array | None,
    min_p: jax.Array | None = None,
    adjusted: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row and its log-probability.

    Args:
      logits: float32 [B, V], the model's.
      noise: float32 [B, N], each row's own `draw_noise`; greedy reads none.
      temperature: [], or [B, 1] where each row has its own. None is greedy, and so is a row's own 0: the highest
        logit, the lowest id among equals.
      top_k, top_p, min_p: [] or [B, 1]; None is off.
      adjusted: float32 [B, V], what the token is taken from; None means `logits`.

    Returns:
      tokens int32 [B], and the model's log-probabilities float32 [B] at the sampling temperature (greedy: at 1), before
      all filters.
    """
    source = logits if adjusted is None else adjusted
    likeliest = jnp.argmax(source, axis=-1).astype(jnp.int32)
    if temperature is None:
        return likeliest, token_logps(logits, likeliest, jnp.float32(1))
    drawn = temperature[:, 0] > 0 if jnp.ndim(temperature) else None
    if drawn is not None:
        temperature = jnp.where(temperature > 0, temperature, 1.0)
    weights = jax.nn.softmax(source / temperature, axis=-1)
    if top_k is not None:
        weights = keep_top_k(weights, top_k)
    if top_p is not None:
        weights = keep_top_p(weights, top_p)
    if min_p is not None:
        weights = keep_min_p(weights, min_p)
    tokens = draw(weights, noise)
    if drawn is not None:
        tokens = jnp.where(drawn, tokens, likeliest)
    return tokens, token_logps(logits, tokens, temperature)
