"""Matrices that are not trained, kept in 8 or 4 bits and made whole where they are multiplied by: QLoRA.

    W_ij ~ s_bj v(Q_ij)         b: the block of 64 inputs that i is in, of output j; |W_ij| <= s_bj within it

    int8   v(Q) = Q / 127, |Q| <= 127; s in float32: 8.5 bits a weight.
    nf4    v: the 16 levels of NormalFloat (Dettmers et al. 2023, arXiv 2305.14314, appendix E), which hold as many
           numbers of a normal distribution each; two of them to a byte. The scales are quantised too (section 3, double
           quantisation): less their mean, in 8 bits, 256 neighbouring outputs to a block: 4.13 bits a weight.

In both, s is the largest |W| of its block: a scale for each block loses a third less than one for each output. The
paper's second quantisation is an 8-bit float; evenly spaced levels, as here, are off by less. A model whose inputs do
not divide by 64 has blocks of the largest power of two that does.

A `Quantised` stands in a model's parameters in place of the kernel. Its product keeps no whole matrix for the backward
pass, whatever `--train.remat` says: that makes it again from the codes. No gradient flows into it.
"""

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

BLOCK, SECOND_BLOCK = 64, 256
"""Inputs that share a scale; scales that share the step of their second quantisation."""

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Of nf4, appendix E of the paper."""

Kind = Literal["int8", "nf4"]
_ENOUGH = 1023
"""Steps that scales are counted in for their mean: their sum stays below 2^32 for four million of them."""


@struct.dataclass
class Quantised:
    """A matrix [..., D, F]; B inputs share a scale, G outputs a step.

    Attributes:
      codes:  int8 [..., D, F], or of nf4 uint8 [..., D / 2, F]: in each block the first half in the upper four bits.
      scales: float32 [..., D / B, F], or of nf4 int8.
      steps:  float32 [..., D / B, F / G], of nf4's scales.
      middle: float32 [...], of nf4's scales.
      origin: uint32 [..., 2], sums over the bits of what it was made from, by which that is known
        (`weights/integrity/fingerprint.py`); None where it was made from no file.
    """

    codes: jax.Array
    scales: jax.Array
    steps: jax.Array | None = None
    middle: jax.Array | None = None
    origin: jax.Array | None = None

    @property
    def kind(self) -> Kind:
        """Which of the two."""
        return "int8" if self.steps is None else "nf4"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        *lead, rows, width = self.codes.shape
        return (*lead, rows * (1 if self.steps is None else 2), width)

    @property
    def size(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    def whole(self, dtype: Any = jnp.float32) -> jax.Array:
        """[..., D, F], made in float32 and rounded once."""
        *lead, blocks, width = self.scales.shape
        if self.steps is None:
            values, scales = self.codes.astype(jnp.float32), self.scales
            values = values.reshape(*lead, blocks, -1, width)
        else:
            halves = self.codes.reshape(*lead, blocks, 1, -1, width)
            values = jnp.concatenate([_level(halves >> 4), _level(halves & 15)], axis=-3)
            values = values.reshape(*lead, blocks, -1, width)
            assert self.middle is not None
            steps = jnp.repeat(self.steps, width // self.steps.shape[-1], axis=-1)
            scales = self.scales.astype(jnp.float32) * steps + self.middle[..., None, None]
        return (values * scales[..., None, :]).astype(dtype).reshape(self.shape)


def kind_of(dtype: Any) -> Kind | None:
    """Which quantisation a word of `--train.frozen_dtype` names; None for a dtype, which NumPy's int8 is too."""
    return dtype if isinstance(dtype, str) and dtype in ("int8", "nf4") else None  # type: ignore[return-value]


def kind_in(tree: Any) -> Kind | None:
    """How the matrices of a tree are quantised; None where none is."""
    return next((x.kind for x in jax.tree.leaves(tree, is_leaf=is_quantised) if is_quantised(x)), None)


def is_quantised(x: Any) -> bool:
    """Whether it is a `Quantised`: where a tree is read matrix by matrix, not array by array."""
    return isinstance(x, Quantised)


def quantise(matrix: jax.Array, kind: Kind, origin: jax.Array | None = None) -> Quantised:
    """`matrix` [..., D, F], D even, in fewer bits; the same bits however it lies on devices."""
    *lead, rows, width = matrix.shape
    each = math.gcd(BLOCK, rows)
    w = matrix.astype(jnp.float32).reshape(*lead, rows // each, each, width)
    largest = jnp.max(jnp.abs(w), axis=-2)
    w = w / jnp.where(largest > 0, largest, 1.0)[..., None, :]
    if kind == "int8":
        codes = jnp.round(127 * w).astype(jnp.int8)
        return Quantised(codes.reshape(matrix.shape), largest / 127, origin=origin)
    levels = np.asarray(LEVELS, np.float32)
    between = (levels[:-1] + levels[1:]) / 2
    codes = sum(((w > middle).astype(jnp.uint8) for middle in between), start=jnp.zeros(w.shape, jnp.uint8))
    upper, lower = jnp.split(codes, 2, axis=-2)
    codes = (upper << 4 | lower).reshape(*lead, rows // 2, width)
    scales, steps, middle = _second(largest)
    return Quantised(codes, scales, steps, middle, origin)


def _second(scales: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """int8 scales, steps and middle of float32 scales [..., D / B, F].

    The middle is their mean to a thousandth of the largest, summed in integers: the same in every order.
    """
    *lead, blocks, width = scales.shape
    top = jnp.max(scales, axis=(-2, -1))
    share = scales / jnp.where(top > 0, top, 1.0)[..., None, None]
    total = jnp.sum(jnp.round(_ENOUGH * share).astype(jnp.uint32), axis=(-2, -1), dtype=jnp.uint32)
    middle = top * (total.astype(jnp.float32) / (_ENOUGH * blocks * width))
    left = (scales - middle[..., None, None]).reshape(*lead, blocks, -1, math.gcd(SECOND_BLOCK, width))
    steps = jnp.max(jnp.abs(left), axis=-1) / 127
    codes = jnp.round(left / jnp.where(steps > 0, steps, 1.0)[..., None]).astype(jnp.int8)
    return codes.reshape(scales.shape), steps, middle


def _level(codes: jax.Array) -> jax.Array:
    """float32 levels of codes 0 to 15: a tree of choices, bit by bit, of which no backend makes a slow gather."""
    found: list[Any] = [jnp.float32(level) for level in LEVELS]
    for bit in range(4):
        odd = (codes >> bit & 1).astype(bool)
        found = [jnp.where(odd, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
    return found[0]


# ---------------------------------------------------------------- trees of parameters


def is_kept(path: tuple[Any, ...]) -> bool:
    """Whether the parameter at `path` is quantised where the others are: kernels of layers; embedding, head, norms and
    biases are not."""
    names = [p.key for p in path]
    return "layers" in names and names[-1] == "kernel"


@partial(jax.jit, static_argnames="dtype")
def _whole(matrix: Quantised, dtype: Any) -> jax.Array:
    return matrix.whole(dtype)


def whole(tree: Any, dtype: Any = None) -> Any:
    """A tree with every quantised matrix made whole, in `dtype`, as other leaves then are too; one by one.

    Without `dtype` in float32, and other leaves stay as they are.
    """

    def make(x: Any) -> Any:
        if is_quantised(x):
            return _whole(x, jnp.dtype(dtype or jnp.float32))
        return x if dtype is None else x.astype(dtype)

    return jax.tree.map(make, tree, is_leaf=is_quantised)
