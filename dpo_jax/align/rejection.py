"""Rejection sampling: learn from the best of K responses (Touvron et al. 2023, arXiv 2307.09288, section 3.2.3).

For each prompt p of P, K responses g₁ … g_K are drawn from the newest model π_t and judged by a reward r:

    g*_t(p) = argmax_k r(p, g_k),           g_k ~ π_t(· | p)                    the best of iteration t
    g*(p)   = argmax_{s ≤ t} r(p, g*_s(p))                                     the best of all iterations: the pool
    π_{t+1} = argmin_π − Σ_p log π(g*(p) | p)                                   ordinary fine-tuning

How much there is to gain: with K samples the largest reward grows with K while the median stays (Figure 7), and the
temperature at which it is largest depends on K (Figure 8). From N ≥ K samples x₍₁₎ ≤ … ≤ x₍N₎ of a prompt the mean of
the r-th smallest of K over all subsets of K samples, an unbiased estimate of its expectation, is

    Ê[x_(r:K)] = Σᵢ C(i−1, r−1) C(N−i, K−r) / C(N, K) · x₍ᵢ₎                     i = 1 … N

with r = K for the maximum, and for the median r = (K+1)/2, or the mean of r = K/2 and K/2 + 1 where K is even.

A score that is not finite marks a sample that cannot be chosen. P prompts, K samples, N samples, C values of K.
"""

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Best(NamedTuple):
    """The best sample of each prompt.

    Attributes:
      index: int32 [P], which sample, the first of equals; -1 where none can be chosen.
      score: float32 [P]; -inf there.
      tied:  bool [P], all samples that can be chosen have the same score, and there are at least two.
    """

    index: jax.Array
    score: jax.Array
    tied: jax.Array


def best_of(scores: jax.Array) -> Best:
    """g*_t, from `scores` [P, K]. Raises `ValueError` for another shape."""
    if scores.ndim != 2 or not scores.shape[1]:
        raise ValueError(f"scores have shape {scores.shape}; [prompts, samples] is asked for")
    scores = scores.astype(jnp.float32)
    usable = jnp.isfinite(scores)
    highest = jnp.where(usable, scores, -jnp.inf)
    lowest = jnp.where(usable, scores, jnp.inf)
    score = highest.max(axis=1)
    count = usable.sum(axis=1)
    index = jnp.where(count > 0, jnp.argmax(highest, axis=1), -1).astype(jnp.int32)
    return Best(index, score, (count >= 2) & (score == lowest.min(axis=1)))


class Pool(NamedTuple):
    """The best response to each prompt so far, and where it comes from.

    Attributes:
      score: float32 [P]; -inf where there is none yet.
      iteration: int32 [P], when it was sampled; -1 where there is none.
      sample: int32 [P], which of that iteration's samples it is; -1 where there is none.
      temperature: float32 [P], at which it was sampled; NaN where there is none.
    """

    score: jax.Array
    iteration: jax.Array
    sample: jax.Array
    temperature: jax.Array


def empty_pool(prompts: int) -> Pool:
    """A pool without responses, for so many prompts."""
    none = jnp.full(prompts, -1, jnp.int32)
    return Pool(jnp.full(prompts, -jnp.inf), none, none, jnp.full(prompts, jnp.nan))


def merge(pool: Pool, other: Pool) -> Pool:
    """g*: of each prompt the better one; that of `pool`, the earlier one, where they are equal."""
    better = other.score > pool.score
    return Pool(*(jnp.where(better, new, old) for new, old in zip(other, pool, strict=True)))


def of_iteration(scores: jax.Array, temperatures: jax.Array, iteration: int) -> Pool:
    """The bests of one iteration.

    Args:
      scores: [P, K].
      temperatures: [K], at which the samples were drawn.
      iteration: its number.
    """
    best = best_of(scores)
    there = best.index >= 0
    when = jnp.where(there, jnp.int32(iteration), -1)
    at = jnp.where(there, jnp.asarray(temperatures, jnp.float32)[best.index], jnp.nan)
    return Pool(best.score, when, best.index, at)


# ---------------------------------------------------------------- the reward against K


class Curve(NamedTuple):
    """Expected rewards of K samples, the mean over prompts.

    Attributes:
      maximum: float32 [C], of the best of K.
      median: float32 [C], of the median of K.
    """

    maximum: jax.Array
    median: jax.Array


def order_statistic(n: int, k: int, r: int) -> list[float]:
    """[N]: the weights of the sorted samples in Ê[x_(r:K)]; they sum to 1."""
    subsets = comb(n, k)
    return [comb(i - 1, r - 1) * comb(n - i, k - r) / subsets for i in range(1, n + 1)]


def curve(scores: jax.Array, counts: Sequence[int]) -> Curve:
    """Expected maximum and median of K samples, for each K of `counts`, from all subsets of N samples.

    Args:
      scores: [P, N], finite.
      counts: C values of K, from 1 to N.

    Raises:
      ValueError: a K beyond the samples.
    """
    n = scores.shape[1]
    if not all(1 <= k <= n for k in counts):
        raise ValueError(f"counts {list(counts)} must lie in [1, {n}]: there are {n} samples a prompt")
    upper = [order_statistic(n, k, k) for k in counts]
    middle = [[order_statistic(n, k, (k + 1) // 2), order_statistic(n, k, k // 2 + 1)] for k in counts]
    # Prompts differ more than samples do: their mean is taken first, of each place in the order.
    ordered = jnp.sort(scores.astype(jnp.float32), axis=1).mean(axis=0)
    return Curve(jnp.asarray(upper) @ ordered, jnp.asarray(middle).mean(axis=1) @ ordered)


def best_temperature(maxima: jax.Array) -> jax.Array:
    """int32 [C]: which of T temperatures has the largest expected maximum for each K, the first of equals.

    `maxima` [T, C]: `Curve.maximum` of each temperature.
    """
    return jnp.argmax(maxima, axis=0).astype(jnp.int32)
