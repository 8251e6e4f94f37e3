"""Rotary positions (Su et al. 2021, arXiv 2104.09864) and the ways in which they are stretched for longer contexts.

angle of pair i at position p:  p w_i,   w_i = theta^(-2 i / C)

linear    w_i / f                                                          (Chen et al. 2023, arXiv 2306.15595)
llama3    low frequencies / f, high ones kept, blended between             (Llama 3, arXiv 2407.21783, section 3.4)
yarn      likewise, blended over pairs; q and k scaled too                 (Peng et al. 2023, arXiv 2309.00071)
dynamic   theta grows with the length n of a sequence beyond the trained one:
          theta (f n / N - (f - 1))^(C / (C - 2))                          (NTK-aware; section 3.2 of the same paper)
longrope  w_i / s_i, s the short list up to the original length, the long one beyond; q and k scaled
                                                                           (Ding et al. 2024, arXiv 2402.13753)
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@dataclass(frozen=True)
class RopeScaling:
    """Rescaling of rotary frequencies for contexts beyond the original one; see the head of this file for the kinds.

    Attributes:
      kind: "linear", "llama3", "yarn", "dynamic" or "longrope".
      factor: f. Of longrope it is what `scale` follows from.
      low_freq_factor, high_freq_factor: (llama3) turns within the original length, where blending ends and begins.
      original_max_position: the original length N, in tokens.
      beta_fast, beta_slow: (yarn) turns within the original length, where blending begins and ends.
      truncate: (yarn) whether the ends of the blend are whole pairs.
      scale: (yarn, longrope) what cosines and sines are multiplied by, so that scores grow by its square.
      short_factors, long_factors: (longrope) s, one number a pair.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    scale: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def follows_length(self) -> bool:
        """Whether the frequencies depend on how long a sequence is."""
        return self.kind in ("dynamic", "longrope")


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequency of each rotary pair, float32 [C / 2], radians per position (Su et al. 2021, section 3.2.2).

    Made by NumPy in float32, as other implementations do: at position 10,000 the last bit of a frequency is 6e-4 rad.
    Where they follow the length (`RopeScaling.follows_length`), those up to the original length.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freqs = (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)
    if scaling is None or scaling.kind == "dynamic":
        return freqs
    if scaling.kind == "linear":
        return freqs / np.float32(scaling.factor)
    if scaling.kind == "longrope":
        return _divided(exponents, theta, scaling.short_factors)
    if scaling.kind == "yarn":
        blend = _yarn_blend(head_dim, theta, scaling)
        return (freqs / np.float32(scaling.factor) * (1 - blend) + freqs * blend).astype(np.float32)
    # Llama 3.1: wavelengths beyond original / low are slowed by the factor, those under original / high are kept.
    turns = scaling.original_max_position * freqs / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * freqs / scaling.factor + blend * freqs).astype(np.float32)


def _divided(exponents: np.ndarray, theta: float, factors: tuple[float, ...]) -> np.ndarray:
    return (1.0 / (np.asarray(factors, np.float32) * np.power(np.float32(theta), exponents))).astype(np.float32)


def _yarn_blend(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """1 where a pair's frequency is kept, 0 where it is slowed (section 3.2 of the paper, as in the released code)."""

    def pair(turns: float) -> float:
        """The pair that makes so many turns within the original length."""
        return head_dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return 1 - np.clip(ramp, 0, 1)


def rotary_angles(
    positions: jax.Array, lengths: jax.Array | None, head_dim: int, theta: float, scaling: RopeScaling | None
) -> jax.Array:
    """float32 [B, T, C / 2], the angle of each pair.

    Args:
      positions: int32 [B, T].
      lengths: int32, broadcast over [B, T]: how long the sequence of each token is, for the kinds that follow it; None:
        no longer than the original length.
      head_dim, theta, scaling: as for `rotary_frequencies`.
    """
    freqs = rotary_frequencies(head_dim, theta, scaling)
    at = positions.astype(jnp.float32)[..., None]
    if scaling is None or not scaling.follows_length or lengths is None:
        return at * freqs
    original, exponents = scaling.original_max_position, np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    lengths = jnp.broadcast_to(lengths, positions.shape)[..., None]
    if scaling.kind == "longrope":
        beyond: jax.Array | np.ndarray = _divided(exponents, theta, scaling.long_factors)
    else:
        growth = scaling.factor * lengths.astype(jnp.float32) / original - (scaling.factor - 1)
        base = theta * jnp.maximum(growth, 1.0) ** (head_dim / (head_dim - 2))
        beyond = 1.0 / base**exponents
    return at * jnp.where(lengths > original, beyond, freqs)


def sequence_lengths(positions: jax.Array, segments: jax.Array | None) -> jax.Array:
    """int32 [B, T]: one more than the last position of each token's own segment (of the whole row without segments)."""
    if segments is None:
        return jnp.max(positions, axis=1, keepdims=True) + 1
    most = segments.shape[1] + 1

    def one(at: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.ops.segment_max(at, ids, num_segments=most)[ids] + 1

    return jax.vmap(one)(positions, segments)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn each pair (x_i, x_{i + R/2}) of the first R channels of x [B, T, H, C] by its angle; the rest stay.

    cos and sin are [B, T, R / 2], float32.
    """
    rotary = 2 * cos.shape[-1]
    rest = x[..., rotary:]
    turned = x if rotary == x.shape[-1] else x[..., :rotary]
    x1, x2 = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
    return turned if rotary == x.shape[-1] else jnp.concatenate([turned, rest], axis=-1)


@struct.dataclass
class Layer:
    """What differs from layer to layer, with L in front for all: bool each, or None where all layers are alike.

    Attributes:
      windowed: whether the layer has the window.
      rotated: whether it turns q and k.
    """

    windowed: jax.Array | None = None
    rotated: jax.Array | None = None


@struct.dataclass
class Places:
    """Where tokens stand, as attention takes it.

    Attributes:
      cos, sin: float32 [B, T, R / 2], of the angles by which q and k are turned.
      local_cos, local_sin: those of layers with a window, where these have a base of their own.
    """

    cos: jax.Array
    sin: jax.Array
    local_cos: jax.Array | None = None
    local_sin: jax.Array | None = None

    def of(self, layer: Layer | None) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines of one layer."""
        cos, sin = self.cos, self.sin
        if layer is None:
            return cos, sin
        if self.local_cos is not None and self.local_sin is not None and layer.windowed is not None:
            cos = jnp.where(layer.windowed, self.local_cos, cos)
            sin = jnp.where(layer.windowed, self.local_sin, sin)
        if layer.rotated is not None:
            cos, sin = jnp.where(layer.rotated, cos, 1.0), jnp.where(layer.rotated, sin, 0.0)
        return cos, sin
