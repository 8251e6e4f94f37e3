"""The training state, the optimizer and its schedule."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding

from dpo_jax.config import OptimizerConfig
from dpo_jax.errors import InputError
from dpo_jax.mesh import replicated, split_as
from dpo_jax.moments import is_matrix
from dpo_jax.moments.adafactor import scale_by_adafactor
from dpo_jax.moments.adamw_8bit import scale_by_adam_8bit


@struct.dataclass
class TrainState:
    """All that a step reads and writes.

    Attributes:
      step:      int32 [], optimizer steps done.
      trainable: what the optimizer sees: {"params": ...} or, under LoRA, {"adapters": ...}, and {"heads": ...} beside
                 it where the model has heads (see `model/heads.py`); float32.
      frozen:    what the step reads and never trains: {}, or {"params": ...} under LoRA, or {"reference": ...} for a
                 reference policy that is computed in the step.
      opt_state: optax state.
      carried:   what a step hands to the next one besides, without an optimizer: {} but for losses that remember (a
                 running mean, a reference policy that moves). Part of a checkpoint.
      apply_fn:  `Llama.apply` (static).
      tx:        the optax transformation (static).
      schedule:  step (from 0) -> learning rate, of `tx` (static).
    """

    step: jax.Array
    trainable: Any
    frozen: Any
    opt_state: Any
    apply_fn: Callable[..., Any] = struct.field(pytree_node=False)
    tx: optax.GradientTransformation = struct.field(pytree_node=False)
    schedule: optax.Schedule = struct.field(pytree_node=False)
    carried: Any = struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """The policy's variables, as `apply_fn` takes them."""
        base = {"params": self.frozen["params"]} if "params" in self.frozen else {}
        return {**base, **self.trainable}

    def apply_gradients(self, gradients: Any, *, finite: jax.Array | bool = True) -> "TrainState":
        """The state after one optimizer step along `gradients` (a tree like `trainable`).

        Where `finite` (bool []) does not hold it is the state as it was: a step that went wrong leaves no trace.
        """
        trainable, opt_state = apply_update(self.tx, gradients, self.trainable, self.opt_state, keep=finite)
        return dataclasses.replace(self, step=self.step + finite, trainable=trainable, opt_state=opt_state)


class Optimizer(NamedTuple):
    """What makes updates of gradients.

    Attributes:
      tx: the optax transformation.
      schedule: its learning rate, step (from 0) -> rate.
    """

    tx: optax.GradientTransformation
    schedule: optax.Schedule


def apply_update(
    tx: optax.GradientTransformation,
    gradients: Any,
    trainable: Any,
    opt_state: Any,
    *,
    keep: jax.Array | bool,
    rate: jax.typing.ArrayLike | None = None,
) -> tuple[Any, Any]:
    """(trainable, opt_state) after one update along `gradients`, times `rate` where given; as they were without `keep`.

    Weights and moments are written over where they lie. As plain expressions XLA's CPU compiler would hold every moment
    twice, and so would any compiler of a choice between two whole states. Hence two loops that run once, or never: the
    second waits for the count of the first, because the weights need the old moments; and a barrier in each keeps what
    only reads from being computed, and held, outside.
    """

    def learn(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        slope, moments, weights = jax.lax.optimization_barrier((gradients, opt_state, carry[1]))
        changes, _ = tx.update(slope, moments, weights)
        if rate is not None:
            changes = jax.tree.map(lambda u: rate * u, changes)
        return carry[0] + 1, optax.apply_updates(weights, changes)

    def remember(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        slope, moments = jax.lax.optimization_barrier((gradients, carry[1]))
        return carry[0] + 1, tx.update(slope, moments, trainable)[1]

    def repeat(body: Callable[[Any], Any], start: Any, times: jax.Array) -> tuple[jax.Array, Any]:
        return jax.lax.while_loop(lambda carry: carry[0] < times, body, (jnp.zeros((), jnp.int32), start))

    done, learned = repeat(learn, trainable, jnp.asarray(keep, jnp.int32))
    return learned, repeat(remember, opt_state, done)[1]


def create(
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    optimizer: Optimizer,
    *,
    frozen: Mapping[str, Any] | None = None,
) -> TrainState:
    """A state at step 0. With an `adapters` collection that is trained in place of `params`; `heads` always are, and
    so is `value`, PPO's value model.

    The trained weights become float32, whatever they were loaded as. Each optimizer moment is laid out over devices
    like its parameter, axis by axis where it is smaller. With `jax.ShapeDtypeStruct`s in place of arrays (their
    shardings set, where there is a mesh) the state is abstract too.
    """
    learn = {"adapters" if "adapters" in variables else "params", "heads", "value"}
    trainable = {k: jax.tree.map(as_float32, v) for k, v in variables.items() if k in learn}
    frozen = {**{k: v for k, v in variables.items() if k not in learn}, **(frozen or {})}
    leaf, tx = jax.tree.leaves(trainable)[0], optimizer.tx
    opt_state: Any = jax.eval_shape(tx.init, trainable)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    like = None
    if isinstance(leaf.sharding, NamedSharding):
        mesh: Any = leaf.sharding.mesh
        everywhere = replicated(mesh)
        like = _places(opt_state, trainable, everywhere)
        opt_state, step = jax.tree.map(lambda x, where: x.update(sharding=where), (opt_state, step), (like, everywhere))
        like = (like, everywhere)
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        # One jitted call makes each array in its place: no moment is ever whole on one device.
        start = jax.jit(lambda weights: (tx.init(weights), jnp.zeros((), jnp.int32)), out_shardings=like)
        opt_state, step = start(trainable)
    return TrainState(
        step=step,
        trainable=trainable,
        frozen=frozen,
        opt_state=opt_state,
        apply_fn=apply_fn,
        tx=tx,
        schedule=optimizer.schedule,
    )


def _places(opt_state: Any, trainable: Any, everywhere: NamedSharding) -> Any:
    """A tree like `opt_state` of where its arrays lie: what belongs to a parameter and has its axes is split as it is,
    along each axis of which every device can hold as much; all else is whole on every device.
    """

    def name(path: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(key for key in path if isinstance(key, jax.tree_util.DictKey))  # others are the optimizer's own

    owners = {name(path): x for path, x in jax.tree_util.tree_leaves_with_path(trainable)}

    def place(path: tuple[Any, ...], x: Any) -> NamedSharding:
        owner = owners.get(name(path))
        return everywhere if owner is None or owner.ndim != x.ndim else split_as(owner, x.shape)

    return jax.tree_util.tree_map_with_path(place, opt_state)


def as_float32(x: jax.Array | jax.ShapeDtypeStruct) -> jax.Array | jax.ShapeDtypeStruct:
    """An array or its shape as float32."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=jnp.float32)
    return x.astype(jnp.float32)


def copied(tree: Any) -> Any:
    """A real copy, for a step is given the buffers of its trained weights for good; of shapes, themselves."""
    abstract = isinstance(jax.tree.leaves(tree)[0], jax.ShapeDtypeStruct)
    return tree if abstract else jax.tree.map(jnp.copy, tree)


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """step (from 0) -> learning rate.

    Warm-up over W steps is peak x (step + 1) / (W + 1), so the first step already moves; then constant, or a linear or
    cosine fall that reaches floor x peak at `total_steps`.
    """
    total = config.total_steps
    if total is None and (config.schedule != "constant" or config.warmup_ratio is not None):
        raise InputError("this learning-rate schedule needs --optimizer.total_steps (a training command fills it in)")
    warmup = config.warmup_steps or 0
    if config.warmup_ratio is not None:
        assert total is not None
        warmup = max(int(config.warmup_ratio * total), config.settled.warmup_min)
    peak, floor = config.learning_rate, config.settled.floor
    if total is not None and warmup >= total:
        lower = "warmup_steps" if config.warmup_min is None else "warmup_min"
        raise InputError(f"warm-up of {warmup} steps does not fit into {total} steps; lower --optimizer.{lower}")

    def schedule(step: Any) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        ramp = jnp.minimum((t + 1) / (warmup + 1), 1.0)
        if config.schedule == "constant":
            return peak * ramp
        assert total is not None
        progress = jnp.clip((t - warmup) / max(total - warmup, 1), 0.0, 1.0)
        fall = 1 - progress if config.schedule == "linear" else 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return peak * ramp * (floor + (1 - floor) * fall)

    return schedule


@lru_cache(maxsize=64)
def make_optimizer(config: OptimizerConfig, *, scheduled: bool = True) -> Optimizer:
    """Clipping, then the rule that `config.name` says, weight decay, then the schedule. The same for the same options,
    so that a step is compiled once for all states that have it.

    Without `scheduled` the updates are those of a learning rate of 1: for steps of several updates, which multiply them
    by the `schedule` of the step themselves.
    """
    told, schedule = config.settled, learning_rate_schedule(config)
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    rate = optax.scale_by_learning_rate(schedule if scheduled else optax.constant_schedule(1.0))
    if config.name == "rmsprop":
        # PyTorch's, which the DPO authors used: epsilon outside the root, no bias correction, second moment from 0.
        rms = optax.scale_by_rms(decay=told.decay, eps=config.eps, eps_in_sqrt=False)
        made = optax.chain(clip, rms, rate)
    else:
        if config.name == "adafactor":
            eps2 = told.eps2 if config.parameter_scale else None
            rule = scale_by_adafactor(exponent=told.exponent, update_clip=told.update_clip, eps1=told.eps1, eps2=eps2)
        elif config.name == "adamw_8bit":
            rule = scale_by_adam_8bit(b1=told.b1, b2=told.b2, eps=config.eps)
        else:
            rule = optax.scale_by_adam(b1=told.b1, b2=told.b2, eps=config.eps, mu_dtype=told.mu_dtype)
        decay = optax.add_decayed_weights(told.weight_decay, mask=_matrices)
        made = optax.chain(clip, optax.chain(rule, decay, rate))
    return Optimizer(made, schedule)


def _matrices(tree: Any) -> Any:
    """Which leaves are matrices, that weight decay acts on: a tree of bools."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), tree)
