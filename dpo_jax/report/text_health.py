"""Is a text healthy? Diversity and repetition of generated responses, on token ids (any hashable items will do).

Ids rather than words, so that the numbers mean the same for Chinese as for English.
"""

from collections.abc import Hashable, Sequence

import numpy as np

Tokens = Sequence[Hashable]


def ngrams(tokens: Tokens, n: int) -> list[tuple[Hashable, ...]]:
    """All runs of n neighbouring tokens, in order; none where the text is shorter than n."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct_n(texts: Sequence[Tokens], n: int) -> float:
    """Distinct n-grams over all n-grams of all texts (Li et al. 2016, distinct-n); 0 where there is none."""
    every = [gram for tokens in texts for gram in ngrams(tokens, n)]
    return len(set(every)) / len(every) if every else 0.0


def repetition_rate(tokens: Tokens, n: int = 4) -> float:
    """1 - distinct / all n-grams of one text (Welleck et al. 2020, seq-rep-n); 0 where it is shorter than n."""
    every = ngrams(tokens, n)
    return 1 - len(set(every)) / len(every) if every else 0.0


def longest_repeat(tokens: Tokens) -> int:
    """Length of the longest run of tokens that occurs twice (the two may overlap); 0 where nothing does."""

    def occurs_twice(n: int) -> bool:
        every = ngrams(tokens, n)
        return len(set(every)) < len(every)

    low, high = 0, max(len(tokens) - 1, 0)
    while low < high:  # whatever repeats at length n repeats at every shorter length
        middle = (low + high + 1) // 2
        low, high = (middle, high) if occurs_twice(middle) else (low, middle - 1)
    return low


def health(texts: Sequence[Tokens]) -> dict[str, float]:
    """Diversity, repetition and length of at least one text.

    Returns:
      texts:          how many there are.
      distinct_1, distinct_2, distinct_3: distinct n-grams over all n-grams, of all texts together.
      repetition_4:   mean over texts of the share of 4-grams that are repeats.
      looping:        share of texts whose `repetition_4` exceeds one half: they have fallen into a loop.
      longest_repeat: mean over texts of the longest run that occurs twice, in tokens.
      longest_repeat_max: the longest of them.
      length:         mean length in tokens.
      length_p10, length_p50, length_p90: its quantiles, between neighbouring lengths linear.
      empty:          share of texts without a token.
    """
    rates = np.array([repetition_rate(tokens) for tokens in texts])
    lengths = np.array([len(tokens) for tokens in texts])
    repeats = [longest_repeat(tokens) for tokens in texts]
    p10, p50, p90 = np.quantile(lengths, [0.1, 0.5, 0.9]).tolist()
    return {
        "texts": len(texts),
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
        "repetition_4": float(rates.mean()),
        "looping": float((rates > 0.5).mean()),
        "longest_repeat": float(np.mean(repeats)),
        "longest_repeat_max": max(repeats),
        "length": float(lengths.mean()),
        "length_p10": p10,
        "length_p50": p50,
        "length_p90": p90,
        "empty": float((lengths == 0).mean()),
    }
