"""Supervised fine-tuning: next-token prediction on dialogues or plain text, as one pure step.

    L(θ) = − Σ_{i,t} m_{i,t} log p_θ(y_{i,t} | y_{i,<t})  /  Σ_{i,t} m_{i,t}

y_i are the sequences of a batch, and m marks the tokens to be predicted: those of the answers (Touvron et al. 2023,
arXiv 2307.09288, section 3.1: the loss on the prompt is zeroed out) or all of them (Tunstall et al. 2023, arXiv
2310.16944, Eq. 1; pre-training).

The mean runs over the tokens of the whole batch, not first over those of a sequence, a window or a device, and Σ m is
counted before the batch is split into `config.accumulate` micro-batches. So packing several sequences into a window
(each sees only itself, and its positions start at 0), padding, micro-batches and devices change nothing but rounding.

With `config.loss == "sampled"` log p is estimated from a sample of the vocabulary (`align/sampled_softmax.py`), drawn
anew in each step; `eval_step` is always exact.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax import masked, state as states
from dpo_jax.align import update
from dpo_jax.align.figures import Metrics
from dpo_jax.align.sampled_softmax import Negatives, draw, sampled_logps
from dpo_jax.config import SFTConfig
from dpo_jax.errors import InputError
from dpo_jax.model.llama import Llama
from dpo_jax.model.logprobs import token_scores
from dpo_jax.state import TrainState
from dpo_jax.types import TokenBatch

__all__ = ["eval_step", "init_state", "jit_eval_step", "jit_train_step", "train_step"]


def init_state(model: Llama, variables: Mapping[str, Any], config: SFTConfig) -> TrainState:
    """The training state at step 0: the adapters are trained where `variables` has them, all parameters otherwise.

    `variables`: {"params": ...[, "adapters": ...]}; what becomes of its arrays: see `dpo.init_state`.
    """
    return states.create(model.apply, variables, states.make_optimizer(config.optimizer))


@struct.dataclass
class _Windows:
    """Sums over the target tokens of each window, [B] each; `correct` and `entropy` only of the exact loss.

    Attributes:
      nll:     negative log-likelihood, nats.
      correct: tokens that are the greedy choice.
      entropy: of the predictions, nats.
    """

    nll: jax.Array
    correct: jax.Array | None = None
    entropy: jax.Array | None = None


def _predicted(batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
    """What each position is to predict, the token after it: ids int32 [B, T], and bool [B, T] whether that counts."""
    targets = batch.targets & (batch.segments > 0)
    following = jnp.roll(batch.tokens, -1, axis=1)
    counts = jnp.roll(targets, -1, axis=1).at[:, -1].set(False)
    return jnp.where(counts, following, 0), counts


def _window_values(
    apply_fn: Callable[..., Any], variables: Any, batch: TokenBatch, negatives: Negatives | None, config: SFTConfig
) -> _Windows:
    real = batch.segments > 0
    # Padding may hold any value, even ids outside the vocabulary.
    tokens, positions = (jnp.where(real, x, 0) for x in (batch.tokens, batch.positions))
    if batch.views is None:
        hidden = apply_fn(variables, tokens, positions, batch.segments, packed=config.packed)
    else:
        hidden = _joined(apply_fn, variables, tokens, positions, batch)
    unembedding = apply_fn(variables, method="unembedding")
    following, counts = _predicted(batch)
    budget = config.head_budget_bytes
    if negatives is not None:
        logps = sampled_logps(hidden, unembedding, following, negatives, budget_bytes=budget)
        return _Windows(nll=masked.total(-logps, counts, axis=1))
    scores = token_scores(hidden, unembedding, following, budget_bytes=budget)
    return _Windows(
        nll=masked.total(-scores.logps, counts, axis=1),
        correct=masked.total(scores.correct.astype(jnp.float32), counts, axis=1),
        entropy=masked.total(scores.entropy, counts, axis=1),
    )


def _joined(
    apply_fn: Callable[..., Any], variables: Any, tokens: jax.Array, positions: jax.Array, batch: TokenBatch
) -> jax.Array:
    """[B, T, D]: hidden states where attention sees the sequences that `batch.views` says."""
    assert batch.views is not None
    (b, t), units = tokens.shape, batch.views.homes.shape[0]
    # A sequence is known by its window, too.
    apart = jnp.where(batch.segments > 0, batch.segments + (t + 1) * (jnp.arange(b) % (b // units))[:, None], 0)
    own = (x.reshape(units, -1) for x in (tokens, positions, apart))
    return apply_fn(variables, *own, packed=False, views=batch.views).reshape(b, t, -1)


def _target_tokens(batch: TokenBatch) -> jax.Array:
    """float32 [B]: the tokens of each window that are to be predicted."""
    return jnp.sum(_predicted(batch)[1], axis=1, dtype=jnp.float32)


def _draw(state: TrainState, config: SFTConfig) -> Negatives | None:
    """This step's sample of the vocabulary: a function of the seed and the step alone."""
    if config.loss == "exact":
        return None
    vocab = jax.eval_shape(lambda v: state.apply_fn(v, method="unembedding"), state.variables).shape[1]
    count = config.settled.negatives
    if count >= vocab:
        raise InputError(
            f"--sft.negatives {count}: the vocabulary has only {vocab} ids; draw fewer, or use --sft.loss exact"
        )
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    return draw(key, vocab, count, config.settled.proposal)


def train_step(state: TrainState, batch: TokenBatch, *, config: SFTConfig) -> tuple[TrainState, Metrics]:
    """One optimizer step on a batch of windows; pure, and safe against what is not finite: see `dpo.train_step`.

    A batch without a single target token is such a case: its loss is NaN.

    Args:
      state: from `init_state`.
      batch: see `types.TokenBatch`.
      config: the one that `init_state` was given.

    Returns:
      The new state, and metrics: float32 scalars over the target tokens of the batch,
        loss (nats a token; of the sampled loss an estimate, a little too small on average), grad_norm (before
        clipping), learning_rate (the one used in this step),
        mean_token_accuracy (share of them that greedy decoding would give), entropy (of the predictions, nats; these
        two not with the sampled loss, which has no whole distribution),
        tokens (in the batch, without padding), target_tokens, padding (share of the batch's places),
      and rows/nonfinite, int32 [B, S]: the row numbers (`batch.rows`) of each window whose loss is not finite, -1 for
      all others. Where it names no row though grad_norm is not finite, the backward pass overflowed.

    Raises:
      InputError: the batch does not split into micro-batches, or the sample is as large as the vocabulary (at trace
        time).
    """
    negatives = _draw(state, config)
    count = jnp.sum(_target_tokens(batch))

    def values(variables: Any, windows: TokenBatch) -> _Windows:
        return _window_values(state.apply_fn, variables, windows, negatives, config)

    def share(_: TokenBatch, found: _Windows) -> jax.Array:
        return jnp.sum(found.nll) / count

    new_state, found, metrics = update.descend(state, batch, values, share, config)
    tokens = jnp.sum(batch.segments > 0, dtype=jnp.float32)
    bad = ~jnp.isfinite(found.nll) | (count == 0)
    metrics |= {
        "tokens": tokens,
        "target_tokens": count,
        "padding": 1 - tokens / batch.tokens.size,
        "rows/nonfinite": jnp.where(bad[:, None], batch.rows, -1),
    }
    if found.correct is not None and found.entropy is not None:
        metrics["mean_token_accuracy"] = jnp.sum(found.correct) / count
        metrics["entropy"] = jnp.sum(found.entropy) / count
    return new_state, metrics


jit_train_step = update.jit_train(train_step)


def eval_step(state: TrainState, batch: TokenBatch, *, config: SFTConfig) -> Metrics:
    """Sums over the target tokens of each window; nothing is trained. Exact, whatever `config.loss` is.

    Returns:
      Arrays float32 [B]: nll (negative log-likelihood, nats), correct (tokens that are the greedy choice), entropy (of
      the predictions, nats), target_tokens; 0 for windows without targets. A mean over many batches is the quotient of
      two sums: the loss is Σ nll / Σ target_tokens, and its exponential the perplexity.
    """
    values = _window_values(state.apply_fn, state.variables, batch, None, config)
    assert values.correct is not None
    assert values.entropy is not None
    return {
        "nll": values.nll,
        "correct": values.correct,
        "entropy": values.entropy,
        "target_tokens": _target_tokens(batch),
    }


jit_eval_step = update.jit_eval(eval_step)
