"""On-policy distillation: a student learns a teacher's distribution of each next token, on its own responses.

Agarwal et al. 2024 (GKD, arXiv 2306.13649), Eq. 1 and Algorithm 1, with P the teacher and Q the student:

    D_β(P, Q) = β KL(P ‖ M) + (1 − β) KL(Q ‖ M),   M = β P + (1 − β) Q        0 < β < 1
    D_0 = KL(P ‖ Q)  (forward)      D_1 = KL(Q ‖ P)  (reverse)                  the limits of D_β / β and D_β / (1 − β)
    L(θ) = Σ_{i,t} m_{i,t} D_β(P, Q_θ)(· | x_i, y_{i,<t})  /  Σ_{i,t} m_{i,t}

over the tokens of responses y, which the student drew (with the probability λ of a step) or the data give; no gradient
flows through the draw. Both distributions are softmaxes of logits over a temperature. The mean runs over the tokens of
the whole batch, so that micro-batches and devices change nothing but rounding. (TRL's GKDTrainer: the same.)
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpo_jax import masked, mesh as meshes, state as states
from dpo_jax.align import update
from dpo_jax.align.figures import Metrics
from dpo_jax.config import DistillStepConfig
from dpo_jax.model.divergence import token_divergence
from dpo_jax.model.groups import predicting_states
from dpo_jax.model.llama import Llama
from dpo_jax.state import TrainState
from dpo_jax.types import PreferenceBatch

__all__ = ["init_state", "jit_train_step", "train_step"]

TEACHER = "teacher"
"""Name of the teacher's parameters among the frozen ones."""


def init_state(
    model: Llama, variables: Mapping[str, Any], teacher: Mapping[str, Any], config: DistillStepConfig
) -> TrainState:
    """The training state at step 0: the adapters are trained where `variables` has them, all parameters otherwise.

    Args:
      model: the student.
      variables: {"params": ...[, "adapters": ...]}; what becomes of its arrays: see `dpo.init_state`.
      teacher: {"params": ...}, in any dtype.
    """
    frozen = {TEACHER: teacher["params"]}
    return states.create(model.apply, variables, states.make_optimizer(config.optimizer), frozen=frozen)


def _divergence(
    state: TrainState,
    variables: Any,
    batch: PreferenceBatch,
    teacher: Callable[..., Any],
    config: DistillStepConfig,
) -> jax.Array:
    """[B]: the divergence summed over the response tokens of each row."""

    def whole(apply_fn: Callable[..., Any], variables: Any) -> tuple[jax.Array, Any]:
        # With one response there is nothing to share, and every kernel runs whole sequences.
        states = predicting_states(apply_fn, variables, batch, layout="separate")
        return states.whole()[:, 0], apply_fn(variables, method="unembedding")

    of_teacher = {"params": state.frozen[TEACHER]}
    found = token_divergence(
        whole(state.apply_fn, variables),
        jax.lax.stop_gradient(whole(teacher, of_teacher)),
        beta=config.beta,
        temperature=config.temperature,
        vocabulary=config.vocabulary,
        budget_bytes=config.head_budget_bytes,
    )
    mask = batch.response_mask[:, 0] & (batch.weights > 0)[:, None]
    return masked.total(found, mask, axis=1)


def train_step(
    state: TrainState, batch: PreferenceBatch, *, config: DistillStepConfig, teacher: Callable[..., Any]
) -> tuple[TrainState, Metrics]:
    """One optimizer step. Pure. Where the loss or the gradient is not finite, the state comes back as it was.

    Args:
      state: from `init_state`.
      batch: K = 1 response a prompt.
      config: the one that `init_state` was given.
      teacher: the teacher's `Llama.apply`.

    Returns:
      The new state, and metrics: loss (nats a token), grad_norm, learning_rate, lengths/response, tokens, and
      rows/nonfinite (see `dpo.train_step`).
    """
    lengths = batch.response_lengths[:, 0] * (batch.weights > 0)
    tokens = jnp.maximum(jnp.sum(lengths), 1).astype(jnp.float32)

    def values(variables: Any, part: PreferenceBatch) -> jax.Array:
        return _divergence(state, variables, part, teacher, config)

    def share(_: PreferenceBatch, divergence: jax.Array) -> jax.Array:
        return jnp.sum(divergence) / tokens

    new_state, divergence, metrics = update.descend(state, batch, values, share, config)
    real = batch.weights > 0
    metrics |= update.of_batch(batch, divergence, divergence[:, None])
    return new_state, metrics | {"lengths/response": masked.mean(lengths.astype(jnp.float32), real)}


def jit_train_step(config: DistillStepConfig, mesh: Mesh, teacher: Callable[..., Any]) -> meshes.ShardedStep:
    """`step(state, batch) -> (state, metrics)`, jitted for `mesh`, anew for each call; see `update.jit_train`."""
    return update.jit_train(partial(train_step, teacher=teacher))(config, mesh)
