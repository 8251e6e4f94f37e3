"""Block-wise 8-bit numbers with a dynamic exponent (Dettmers et al. 2022, arXiv 2110.02861).

A block of numbers is kept as its largest magnitude N, float32, and one byte each (section 2.1, figure 2). A byte stands
for ±v with v in [0, 1] of one of seven decades, 10^(i-6) [.1, 1), i = 0..6; decade i is cut into 2^i equal bins with a
sign, 2^(i+1) without one, and v is the middle of its bin. 0 and 1 have a byte of their own. So

    signed:    byte 127 + s p, p = 2^i + bin, 0 for p = 0, 1 for p = 128
    unsigned:  byte q, q + 1 = 2^(i+1) + bin, 0 for q = 0, 1 for q = 255

in ascending order of what they stand for; bytes and values are bitsandbytes' `create_dynamic_map`, and what is written
is the nearest. Arithmetic takes the place of its table of 256: accelerators are slow at looking up.

A block is a tile of a matrix, 16 x 16 numbers where its axes divide (bitsandbytes: 256 in a row), for a matrix is split
over devices along both its axes: tiles then lie within a device's piece, on any mesh whose pieces are multiples of 16.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

_BLOCK = 256
_LEAST = 64
_DECADES = 7


class Blocks(NamedTuple):
    """Matrices of 8-bit numbers.

    Attributes:
      codes:  uint8 [..., n, m].
      scales: N of each tile, float32 [..., n / a, m / b].
    """

    codes: jax.Array
    scales: jax.Array


def tile_of(n: int, m: int) -> tuple[int, int] | None:
    """(a, b): rows and columns of a block of a matrix [n, m], powers of two, 256 numbers where they divide it so.

    None where a block would hold fewer than 64, whose scales are no longer small beside it.
    """

    def largest(size: int, limit: int) -> int:
        return min(size & -size, 1 << (limit.bit_length() - 1))

    b = largest(m, math.isqrt(_BLOCK))
    a = largest(n, _BLOCK // b)
    b = largest(m, _BLOCK // a)
    return (a, b) if a * b >= _LEAST else None


def decoded(blocks: Blocks, *, signed: bool) -> jax.Array:
    """The numbers, float32 [..., n, m]."""
    return _value(blocks.codes, signed=signed) * _spread(blocks.scales, blocks.codes.shape)


def encoded(x: jax.Array, *, signed: bool) -> Blocks:
    """The nearest 8-bit numbers of x [..., n, m], which has a tile (`tile_of`)."""
    *stack, n, m = x.shape
    tile = tile_of(n, m)
    assert tile is not None
    a, b = tile
    # Rows first: what is left has its columns, along which an accelerator's registers lie, still whole.
    largest = jnp.max(jnp.abs(x).reshape(*stack, n // a, a, m), axis=-2)
    scales = jnp.max(largest.reshape(*stack, n // a, m // b, b), axis=-1)
    return Blocks(_code(x * _spread(1 / jnp.where(scales > 0, scales, 1.0), x.shape), signed=signed), scales)


def _spread(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Each block's number for each of its places: [..., n, m]."""
    *stack, n, m = shape
    wide = jnp.repeat(scales, m // scales.shape[-1], axis=-1)
    return jnp.broadcast_to(wide[..., None, :], (*stack, scales.shape[-2], n // scales.shape[-2], m)).reshape(shape)


def _of_decade(i: jax.Array, values: tuple[float, ...]) -> jax.Array:
    """values[i], by comparisons."""
    found = jnp.full(i.shape, values[0], jnp.float32)
    for k, value in enumerate(values[1:], 1):
        found = jnp.where(i >= k, value, found)
    return found


_TENTHS = tuple(10.0 ** (k - _DECADES + 1) for k in range(_DECADES))


def _value(code: jax.Array, *, signed: bool) -> jax.Array:
    """What a byte stands for: float32 in [-1, 1]."""
    number = code.astype(jnp.int32)
    first = 0 if signed else 1
    place = jnp.abs(number - 127) if signed else number + 1  # 2^(i + first) + bin
    i = 31 - first - jax.lax.clz(jnp.maximum(place, 1))
    bins = jnp.left_shift(1, jnp.clip(i, 0, _DECADES) + first)
    middle = ((place - bins).astype(jnp.float32) + 0.5) / bins.astype(jnp.float32)
    value = _of_decade(i, _TENTHS) * (0.1 + 0.9 * middle)
    value = jnp.where(i == _DECADES, 1.0, value)
    value = jnp.where(place == first, 0.0, value)
    return jnp.where(number < 127, -value, value) if signed else value


def _code(x: jax.Array, *, signed: bool) -> jax.Array:
    """The byte that stands for what is nearest to x, in [-1, 1], or [0, 1] where not `signed`: uint8."""
    first = 0 if signed else 1
    size = jnp.abs(x)
    # The last value of each decade and the first of the next; half way between them the next one begins.
    ends = [(t * (1 - 0.45 / 2 ** (k + first)), t * (0.1 + 0.45 / 2 ** (k + first))) for k, t in enumerate(_TENTHS)]
    starts = [ends[0][1] / 2] + [
        (low[0] + high[1]) / 2 for low, high in zip(ends, [*ends[1:], (1.0, 1.0)], strict=True)
    ]
    i = jnp.full(size.shape, -1)  # nearest to 0; 7: nearest to 1
    for start in starts:
        i = i + (size > start)
    bins = jnp.left_shift(1, jnp.clip(i, 0, _DECADES - 1) + first)
    tenth = _of_decade(i, tuple(1 / t for t in _TENTHS))
    found = jnp.floor((size * tenth - 0.1) / 0.9 * bins.astype(jnp.float32)).astype(jnp.int32)
    place = bins + jnp.clip(found, 0, bins - 1)
    place = jnp.where(i < 0, first, jnp.where(i == _DECADES, 1 << (_DECADES + first), place))
    number = jnp.where(x < 0, 127 - jnp.minimum(place, 127), 127 + place) if signed else place - 1
    return number.astype(jnp.uint8)
