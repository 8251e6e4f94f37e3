"""Reward models: a scalar head on a chat model, trained on comparisons, as Llama 2 and InstructGPT trained theirs.

Touvron et al. 2023 (arXiv 2307.09288), section 3.2.2, Eq. 1 and 2:

    L_ranking = −log σ(r_θ(x, y_c) − r_θ(x, y_r) − m(r))          m from Table 27 or elsewhere; 0 gives Eq. 1

Ouyang et al. 2022 (arXiv 2203.02155), Eq. 1, for K ranked replies to one prompt:

    loss(θ) = −1 / C(K, 2) · Σ_{(w, l)} log σ(r_θ(x, y_w) − r_θ(x, y_l))

so that each PROMPT counts once, whatever its K. (w, l) are all pairs of a better and a worse reply, or with
`config.pairs` "adjacent" those of neighbouring ranks only; replies of equal rank give no pair.

    score      r_θ(x, y) = h_T · w, h_T the final state at the last token of y, which is that of the rendered template
               (`ScoredEncoder` of `data/tokens/encode.py`); w from N(0, 1/(D+1)) (Lambert et al. 2024, Tulu 3, arXiv
               2411.15124)
    centering  + c (r_w + r_l)², the mean over the pairs of a prompt (Eisenstein et al. 2023, arXiv 2312.09244)

Auxiliary heads read the same state h_T and add a weighted cross-entropy, the mean over the labelled responses of the
batch (`multi_class_loss`, `multi_label_loss`). Which one applies depends on the classes, not on their number:

    multi-class   classes exclude each other (a 4-level rating; safe or unsafe): softmax, one label a response
    multi-label   classes overlap (kinds of harm: a text may threaten and reveal an address): one sigmoid each

Llama 2's safety reward model has such a term (section 3.2.2, "auxiliary safety loss", Table 29: accuracy 63.7 -> 64.5,
recall of unsafe responses 73.0 -> 90.4). The paper does not print it; here it is the multi-class head
`safety=safe,unsafe`. For very many classes, `class_negatives` trains a multi-class head against drawn classes
(`align/sampled_softmax.py`); evaluation is exact.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dpo_jax import masked, state as states
from dpo_jax.align import figures, sampled_softmax, update
from dpo_jax.align.figures import Metrics
from dpo_jax.config import ClassHead, RewardConfig
from dpo_jax.errors import InputError
from dpo_jax.model import heads
from dpo_jax.model.groups import response_states
from dpo_jax.model.llama import Llama
from dpo_jax.state import TrainState
from dpo_jax.types import PreferenceBatch

__all__ = [
    "centering",
    "eval_step",
    "init_state",
    "jit_eval_step",
    "jit_train_step",
    "multi_class_loss",
    "multi_label_loss",
    "pair_mask",
    "ranking_loss",
    "train_step",
    "with_heads",
]

_BUDGET = 256 * 2**20  # bytes a device may spend on the logits of drawn classes


# ---------------------------------------------------------------- losses, one value an example


def ranking_loss(chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0) -> jax.Array:
    """−log σ(r_c − r_r − m), elementwise (Llama 2, Eq. 2; with margin 0 Eq. 1, the Bradley-Terry likelihood).

    Args:
      chosen, rejected: scores [B] (any equal shapes).
      margin: scalar or [B], not negative.

    Returns:
      float32 [B]. Scores [1.2, .3, -.5] against [.2, .8, -.5] give .3132616875, .9740769842, .6931471806.
    """
    return -jax.nn.log_sigmoid(jnp.asarray(chosen, jnp.float32) - rejected - margin)


def centering(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """(r_c + r_r)²: holds the scores, of which the ranking loss fixes only differences, around 0. Elementwise."""
    return jnp.square(jnp.asarray(chosen, jnp.float32) + rejected)


def multi_class_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """−log softmax(z)_y, for classes of which exactly one holds. logits [..., C], labels int [...], result [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))


def multi_label_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """−Σ_c [y_c log σ(z_c) + (1 − y_c) log σ(−z_c)] / C, for classes that hold or not, each by itself.

    logits [..., C]; labels [..., C], 1 or 0, -1 where nobody said (left out of the mean); result [...], 0 where nobody
    said anything.
    """
    known = labels >= 0
    losses = optax.sigmoid_binary_cross_entropy(logits, jnp.maximum(labels, 0).astype(logits.dtype))
    return masked.total(losses, known, axis=-1) / jnp.maximum(jnp.sum(known, axis=-1), 1)


def pair_mask(ranks: jax.Array, present: jax.Array, pairs: str = "all") -> jax.Array:
    """Which responses are compared: bool [B, K, K], True at (w, l) where w ranks better than l.

    Args:
      ranks: int32 [B, K], 0 the best; equal ranks are a tie.
      present: bool [B, K].
      pairs: "all", or "adjacent": l has the next worse rank that occurs.
    """
    better = (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]
    if pairs == "adjacent":
        # (w, l) is adjacent where no response stands between them.
        between = jnp.any(better[:, :, :, None] & better[:, None, :, :], axis=2)
        return better & ~between
    return better


# ---------------------------------------------------------------- state


def init_state(model: Llama, variables: Mapping[str, Any], config: RewardConfig) -> TrainState:
    """The training state at step 0: heads, and the adapters where `variables` has them, else all parameters.

    Heads that `variables` lacks are made (seed `config.seed`): `score` and the auxiliary heads of `config`. The output
    matrix of a language model plays no part in a score and is left out. What becomes of the arrays of `variables`: see
    `dpo.init_state`.

    Raises `InputError` where a head of `variables` has another number of classes.
    """
    params = {name: leaf for name, leaf in variables["params"].items() if name != "lm_head"}
    variables = {**variables, "params": params, "heads": with_heads(model, variables, config)}
    return states.create(model.apply, variables, states.make_optimizer(config.optimizer))


def with_heads(model: Llama, variables: Mapping[str, Any], config: RewardConfig) -> dict[str, Any]:
    """The heads of `variables`, and fresh ones for those that `config` names and `variables` lacks."""
    sizes = {heads.SCORE: 1} | {head.name: len(head.classes) for head in config.heads}
    given = dict(variables.get("heads", {}))
    for name, n in sizes.items():
        if name in given and given[name]["kernel"].shape[1] != n:
            raise InputError(
                f"head '{name}' of the checkpoint has {given[name]['kernel'].shape[1]} classes, and the options name"
                f" {n}; give it another name, or the same classes"
            )
    missing = {name: n for name, n in sizes.items() if name not in given}
    return given | heads.heads_beside(model, variables, missing, key=jax.random.key(config.seed))


# ---------------------------------------------------------------- the loss of each row


@struct.dataclass
class _Whole:
    """What the loss of one row takes from the whole batch.

    Attributes:
      weight:   [] Σ w over the rows that have a pair.
      labelled: head -> [] number of labelled responses.
      drawn:    head -> drawn classes, where it is trained on a sample.
    """

    weight: jax.Array
    labelled: dict[str, jax.Array]
    drawn: dict[str, sampled_softmax.Negatives]


@struct.dataclass
class _Rows:
    """What the step computes for each row, [B] each; a filler row's values mean nothing but `loss`, which is 0.

    Attributes:
      loss:      ranking + centering + auxiliary terms, so that Σ w loss / Σ w is the loss of the batch.
      ranking:   mean over the row's pairs.
      scores:    [B, K].
      chosen, rejected: mean score of the better and of the worse sides of the pairs.
      wins:      share of the pairs whose better side scores strictly higher.
      auxiliary: head -> summed loss of the row's labelled responses.
      right:     head -> how many of them (of their classes, where these overlap) the head gets right.
      predicted: head -> [B, K] likeliest class, or [B, K, C] whether each class is likelier than not.
    """

    loss: jax.Array
    ranking: jax.Array
    scores: jax.Array
    chosen: jax.Array
    rejected: jax.Array
    wins: jax.Array
    auxiliary: dict[str, jax.Array]
    right: dict[str, jax.Array]
    predicted: dict[str, jax.Array]


def _pairs(batch: PreferenceBatch, config: RewardConfig) -> jax.Array:
    """bool [B, K, K]."""
    k = batch.responses.shape[1]
    if k < 2:
        raise InputError("a reward model is trained on comparisons: the batch must have at least 2 responses a prompt")
    ranks = jnp.broadcast_to(jnp.arange(k), batch.responses.shape[:2]) if batch.ranks is None else batch.ranks
    return pair_mask(ranks, batch.response_lengths > 0, config.pairs)


def _compared(batch: PreferenceBatch, config: RewardConfig) -> jax.Array:
    """bool [B]: rows that count and have a pair (not all their responses are tied)."""
    return jnp.any(_pairs(batch, config), axis=(1, 2)) & (batch.weights > 0)


def _labels(batch: PreferenceBatch, head: ClassHead) -> jax.Array:
    """int32 [B, K] or int8 [B, K, C]; -1 at absent responses and filler rows."""
    if batch.labels is None or head.name not in batch.labels:
        raise InputError(f"head '{head.name}': the batch has no labels for it; rows give them in the column 'labels'")
    labels, present = batch.labels[head.name], batch.present
    return jnp.where(present[..., None] if head.overlapping else present, labels, -1)


def _whole(batch: PreferenceBatch, config: RewardConfig, step: jax.Array | None) -> _Whole:
    """`step` chooses the drawn classes; None (evaluation): none are drawn."""
    labelled, drawn = {}, {}
    for place, head in enumerate(config.heads):
        known = _labels(batch, head) >= 0
        known = jnp.any(known, axis=-1) if head.overlapping else known
        labelled[head.name] = jnp.sum(known.astype(jnp.float32))
        k, many = config.class_negatives, len(head.classes)
        if step is not None and k is not None and not head.overlapping and many > k:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), place)
            drawn[head.name] = sampled_softmax.draw(key, many, k, config.settled.class_proposal)
    return _Whole(weight=jnp.sum(batch.weights * _compared(batch, config)), labelled=labelled, drawn=drawn)


def _row_values(
    apply_fn: Callable[..., Any], variables: Any, batch: PreferenceBatch, whole: _Whole, config: RewardConfig
) -> _Rows:
    hidden = response_states(apply_fn, variables, batch, layout=config.layout).astype(jnp.float32)
    scores = heads.apply(variables, heads.SCORE, hidden)[..., 0]
    pairs = _pairs(batch, config)
    count = jnp.maximum(jnp.sum(pairs, axis=(1, 2)), 1)

    def mean(x: jax.Array) -> jax.Array:
        """[B, K, K] -> [B], over the pairs of each row."""
        return jnp.sum(masked.select(x, pairs), axis=(1, 2)) / count

    w, l = jnp.broadcast_arrays(scores[:, :, None], scores[:, None, :])
    margin = 0.0
    if config.margin != "none":
        if batch.margins is None:
            raise InputError(f'margin "{config.margin}": the batch has no margins; load the data with this margin')
        if batch.margins.ndim == 1:
            margin = masked.select(batch.margins, batch.weights > 0)[:, None, None]
        else:
            marks = masked.select(batch.margins, batch.present)
            margin = marks[:, :, None] - marks[:, None, :]
    ranking = mean(ranking_loss(w, l, margin))
    loss = ranking
    if config.centering > 0:
        loss = loss + config.centering * mean(centering(w, l))
    auxiliary, right, predicted = {}, {}, {}
    for head in config.heads:
        name, labels = head.name, _labels(batch, head)
        kernel = variables["heads"][name]["kernel"]
        logits = heads.apply(variables, name, hidden)
        if head.overlapping:
            losses = multi_label_loss(logits, labels)
            predicted[name] = logits > 0
            known = labels >= 0
            hits = jnp.sum((predicted[name] == (labels > 0)) & known, axis=-1)
            right[name] = jnp.sum(hits / jnp.maximum(jnp.sum(known, axis=-1), 1), axis=1)
        else:
            known = labels >= 0
            if name in whole.drawn:
                logps = sampled_softmax.sampled_logps(
                    hidden, kernel, jnp.maximum(labels, 0), whole.drawn[name], budget_bytes=_BUDGET
                )
                losses = masked.select(-logps, known)
            else:
                losses = masked.select(multi_class_loss(logits, labels), known)
            predicted[name] = jnp.argmax(logits, axis=-1)
            right[name] = jnp.sum((known & (predicted[name] == labels)).astype(jnp.float32), axis=1)
        auxiliary[name] = jnp.sum(losses, axis=1)
        loss = loss + head.weight * auxiliary[name] * whole.weight / jnp.maximum(whole.labelled[name], 1)
    return _Rows(
        loss=masked.select(loss, batch.weights > 0),
        ranking=ranking,
        scores=scores,
        chosen=mean(w),
        rejected=mean(l),
        wins=mean((w > l).astype(jnp.float32)),
        auxiliary=auxiliary,
        right=right,
        predicted=predicted,
    )


# ---------------------------------------------------------------- the step


def train_step(state: TrainState, batch: PreferenceBatch, *, config: RewardConfig) -> tuple[TrainState, Metrics]:
    """One optimizer step on a batch of comparisons; pure, and safe against what is not finite: see `dpo.train_step`.

    Args:
      state: from `init_state`.
      batch: K >= 2 responses a prompt, best first or as `batch.ranks` says; a response of length 0 is absent.
      config: the one that `init_state` was given.

    Returns:
      The new state, and metrics: float32 scalars over the rows that count, each prompt once,
        loss, ranking_loss (without centering and auxiliary terms), grad_norm (before clipping), learning_rate,
        accuracy (share of pairs whose better response scores strictly higher; also as rewards/accuracies),
        margin (mean score of the better minus that of the worse; also as rewards/margins),
        mean_reward, min_reward, max_reward (over all responses), rewards/chosen, rewards/rejected,
        NAME/loss and NAME/accuracy of each auxiliary head (over labelled responses),
        lengths/chosen, lengths/rejected (mean tokens of the first and of the other responses), tokens,
        weights/NAME/loss and weights/NAME/accuracy: how many responses are labelled (see `align/figures.py`),
      and rows/nonfinite, int32 [B]: `batch.rows` of each row whose loss or scores are not finite, -1 for all others.

    Raises:
      InputError: the batch lacks what `config` asks for (at trace time).
    """
    whole = _whole(batch, config, state.step)

    def values(variables: Any, part: PreferenceBatch) -> _Rows:
        return _row_values(state.apply_fn, variables, part, whole, config)

    def share(part: PreferenceBatch, rows: _Rows) -> jax.Array:
        return jnp.sum(part.weights * rows.loss) / whole.weight

    new_state, rows, metrics = update.descend(state, batch, values, share, config)
    return new_state, metrics | _row_metrics(batch, rows, whole, config)


def _row_metrics(batch: PreferenceBatch, rows: _Rows, whole: _Whole, config: RewardConfig) -> Metrics:
    present, compared, counted = batch.present, _compared(batch, config), batch.weights > 0
    lengths = batch.response_lengths.astype(jnp.float32)
    chosen, rejected = masked.mean(rows.chosen, compared), masked.mean(rows.rejected, compared)
    accuracy = masked.mean(rows.wins, compared)
    metrics = {
        "ranking_loss": masked.mean(rows.ranking, compared),
        "accuracy": accuracy,
        "margin": chosen - rejected,
        "mean_reward": masked.mean(rows.scores, present),
        "min_reward": jnp.min(jnp.where(present, rows.scores, jnp.inf)),
        "max_reward": jnp.max(jnp.where(present, rows.scores, -jnp.inf)),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": accuracy,
        "rewards/margins": chosen - rejected,
        "lengths/chosen": masked.mean(lengths[:, 0], present[:, 0]),
        "lengths/rejected": masked.mean(lengths[:, 1:], present[:, 1:]),
        **update.of_batch(batch, rows.loss, rows.scores),
    }
    for name, count in whole.labelled.items():
        metrics |= figures.figure(f"{name}/loss", masked.total(rows.auxiliary[name], counted) / count, count)
        metrics |= figures.figure(f"{name}/accuracy", masked.total(rows.right[name], counted) / count, count)
    return metrics


jit_train_step = update.jit_train(train_step)


def eval_step(state: TrainState, batch: PreferenceBatch, *, config: RewardConfig) -> Metrics:
    """What the step computes for each row; nothing is trained, and no classes are drawn.

    Returns:
      Arrays: loss, ranking_loss, accuracy, rewards/chosen, rewards/rejected [B] (means over the pairs of a row), scores
      [B, K] (0 where absent), and for each auxiliary head NAME/predicted, [B, K] the likeliest class or bool [B, K, C].
      Values of filler rows mean nothing.
    """
    whole = _whole(batch, config, None)
    rows = _row_values(state.apply_fn, state.variables, batch, whole, config)
    return {
        "loss": rows.loss,
        "ranking_loss": rows.ranking,
        "accuracy": rows.wins,
        "rewards/chosen": rows.chosen,
        "rewards/rejected": rows.rejected,
        "scores": rows.scores,
        **{f"{name}/predicted": value for name, value in rows.predicted.items()},
    }


jit_eval_step = update.jit_eval(eval_step)
