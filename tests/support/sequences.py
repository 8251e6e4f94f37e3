"""Made-up token sequences, for the tests of packing and of the loader."""

from collections import Counter

import numpy as np

from dpo_jax.data.sets.sequences import SequenceDataset
from dpo_jax.data.tokens.ragged import Ragged


def lengths(n: int, longest: int, seed: int = 0) -> np.ndarray:
    """Lengths like a chat data set's, from 2 to `longest`."""
    rng = np.random.default_rng(seed)
    return np.minimum(rng.lognormal(4, 0.8, n).astype(int) + 2, longest)


def dataset(n: int = 103, longest: int = 256, seed: int = 0) -> SequenceDataset:
    """Sequences of these lengths with random ids and targets, rows numbered from 1001."""
    rng = np.random.default_rng(seed + 1)
    tokens = [rng.integers(1, 1000, length) for length in lengths(n, longest, seed)]
    targets = [np.concatenate([[False], rng.random(len(ids) - 1) < 0.7]) for ids in tokens]
    return SequenceDataset(
        tokens=Ragged.of(tokens, np.int32),
        targets=Ragged.of(targets, bool),
        row_numbers=np.arange(n, dtype=np.int32) + 1001,
        dropped=Counter(),
        rows_read=n,
        source="made up",
    )
