"""Made-up token sequences, laid out in windows in different ways, for the tests of next-token training."""

from collections.abc import Sequence

import numpy as np

from dpo_jax.types import TokenBatch

JUNK = 2**30
"""Stands at padded places: outside every vocabulary."""

Sequences = Sequence[tuple[np.ndarray, np.ndarray]]


def make_sequences(count: int = 8, *, longest: int = 12, vocab: int = 64, seed: int = 0) -> Sequences:
    """(tokens int [n], targets bool [n]) of unequal lengths n >= 2, each with a target, none at its first token."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        n = int(rng.integers(2, longest + 1))
        targets = rng.random(n) < 0.6
        targets[0], targets[-1] = False, True
        made.append((rng.integers(0, vocab, n).astype(np.int32), targets))
    return made


def lay_out(sequences: Sequences, plan: Sequence[Sequence[int]], length: int) -> TokenBatch:
    """One window of `length` places for each entry of `plan`, which names its sequences; junk at padded places."""
    shape, most = (len(plan), length), max(map(len, plan), default=1)
    tokens, positions = np.full(shape, JUNK, np.int32), np.full(shape, JUNK, np.int32)
    segments, targets = np.zeros(shape, np.int32), np.ones(shape, bool)
    rows = np.full((len(plan), max(most, 1)), -1, np.int32)
    for w, members in enumerate(plan):
        start = 0
        for s, index in enumerate(members):
            ids, wanted = sequences[index]
            here = slice(start, start + len(ids))
            tokens[w, here], targets[w, here] = ids, wanted
            positions[w, here], segments[w, here] = np.arange(len(ids)), s + 1
            rows[w, s] = index + 1
            start += len(ids)
            assert start <= length
    return TokenBatch(tokens=tokens, segments=segments, positions=positions, targets=targets, rows=rows)


def one_each(sequences: Sequences, length: int) -> TokenBatch:
    """A window for each sequence."""
    return lay_out(sequences, [[i] for i in range(len(sequences))], length)


def packed(sequences: Sequences, windows: int, length: int) -> TokenBatch:
    """All sequences in so many windows, filled one after another; windows left over hold nothing."""
    plan: list[list[int]] = [[]]
    room = length
    for i, (ids, _) in enumerate(sequences):
        if len(ids) > room:
            plan.append([])
            room = length
        plan[-1].append(i)
        room -= len(ids)
    assert len(plan) <= windows, f"{len(plan)} windows of {length} are needed"
    return lay_out(sequences, plan + [[]] * (windows - len(plan)), length)
