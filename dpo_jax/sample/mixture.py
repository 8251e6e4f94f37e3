"""Sampling from the geometric mixture of two models, token by token.

    π_mix(v | x, y_<t) ∝ π(v | x, y_<t)^(1−a) π_ref(v | x, y_<t)^a        Munos et al. 2023 (Nash-MD, arXiv 2312.00886)

Logits are mixed, (1 − a) z + a z_ref, which the softmax makes that; a temperature divides the mixed ones, so it mixes
the two models at that temperature. Each model keeps a cache of its own.
"""

import jax

from dpo_jax.model import cache as caches
from dpo_jax.sample import decode
from dpo_jax.sample.program import Program, Weights


class MixedDecoder(decode.Decoder):
    """`decode.Decoder` of two sets of weights of one model."""

    def __init__(self, program: Program, weights: Weights, other: Weights, share: jax.Array, settings: decode.Settings):
        """`share`: a, float32 [] between 0 and 1, of `other`."""
        super().__init__(program, weights, settings)
        self._other, self._share = decode.Decoder(program, other, settings), share

    def prefill(self, prompts: jax.Array, lengths: jax.Array, slots: int) -> tuple[jax.Array, caches.Caches]:
        """As of one model; the cache is two."""
        (own, first), (others, second) = (
            super().prefill(prompts, lengths, slots),
            self._other.prefill(prompts, lengths, slots),
        )
        return self._mixed(own, others), caches.Two(first, second)

    def step(self, tokens: jax.Array, positions: jax.Array, cache: caches.Two) -> tuple[jax.Array, caches.Two]:
        """As of one model; the cache is two."""
        own, first = super().step(tokens, positions, cache.first)
        others, second = self._other.step(tokens, positions, cache.second)
        return self._mixed(own, others), caches.Two(first, second)

    def _mixed(self, own: jax.Array, others: jax.Array) -> jax.Array:
        return (1 - self._share) * own + self._share * others
