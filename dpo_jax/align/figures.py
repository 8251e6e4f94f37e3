"""Figures that a batch may leave undefined, told from figures that are broken.

The mean chosen reward of a batch without a chosen response is no number, and nothing is wrong; a mean over one response
that is NaN is a step that went wrong. So beside such a figure stands, as `weights/NAME`, how many examples it is over:
where that is 0 the figure does not exist (its value is NaN), and a log leaves it out; any other NaN stops the run.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dpo_jax import masked

WEIGHTS = "weights/"
"""In front of the name of a figure: the name of how many examples it is over."""

Metrics = dict[str, jax.Array]


def figure(name: str, value: jax.Array, weight: jax.Array) -> Metrics:
    """A figure, and over how many examples it is; scalars. Without any its value is NaN, whatever was computed."""
    weight = weight.astype(jnp.float32)
    return {name: jnp.where(weight > 0, value, jnp.nan), WEIGHTS + name: weight}


def mean(name: str, x: jax.Array, mask: jax.Array) -> Metrics:
    """The mean of `x` where `mask` holds as a figure; arrays of one shape."""
    return figure(name, masked.mean(x.astype(jnp.float32), mask), jnp.sum(mask))


def difference(name: str, first: str, second: str, among: Metrics) -> Metrics:
    """One figure of `among` less another, defined where both are."""
    weight = jnp.minimum(among[WEIGHTS + first], among[WEIGHTS + second])
    return figure(name, among[first] - among[second], weight)


def defined(values: Mapping[str, float]) -> dict[str, float]:
    """The figures without those that do not exist, and without the weights."""
    shown = (name for name in values if not name.startswith(WEIGHTS) and values.get(WEIGHTS + name, 1) > 0)
    return {name: values[name] for name in shown}
