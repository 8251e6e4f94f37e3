"""Rows dealt out to batches, and those of a batch to its windows, so that each has as many tokens as the others.

    which rows share a batch   All rows, longest first, are cut into B strata of one row for each batch, and each batch
                               gets a row of each stratum: the longest of it goes where the fewest tokens are so far.
                               With `shuffle` the rows of each stratum are drawn into pools of a few batches anew every
                               epoch, and dealt out within them. What does not fill a batch is drawn from all lengths
                               alike. Neither devices nor micro-batches decide anything here.
    which share a window       The same, of the rows of a batch.

N rows, B rows a batch, M batches, W windows a batch.
"""

import numpy as np

from dpo_jax.data.sets.batches import permutation

_POOL = 32
"""Most batches whose rows are dealt out together when they are shuffled: more are fuller of tokens, fewer are of more
different rows."""


def compose(
    totals: np.ndarray, reads: np.ndarray, batch_size: int, *, seed: int, epoch: int, shuffle: bool
) -> list[np.ndarray]:
    """The ceil(N / B) batches of an epoch: int [B] each, of one perhaps fewer; see the module.

    totals, reads: int [N], tokens of each row, and those in its responses.
    """
    n, many = len(totals), len(totals) // batch_size
    order = permutation(n, seed, epoch, 0) if shuffle else np.arange(n)
    order = order[np.argsort(-totals[order], kind="stable")]
    rest = n - many * batch_size
    edges = np.arange(rest + 1) * n // max(rest, 1)
    spare = _words(rest, seed, epoch, 0) % np.maximum(np.diff(edges), 1).astype(np.uint64)
    last = edges[:-1] + (spare.astype(int) if shuffle else np.diff(edges) // 2)
    strata = np.delete(order, last).reshape(batch_size, many)
    pool = max(1, min(_POOL, many // 4)) if shuffle else max(1, many)
    if shuffle:
        mixed = [np.argsort(_words(many, seed, epoch, 1 + i), kind="stable") for i in range(batch_size)]
        strata = np.take_along_axis(strata, np.stack(mixed), axis=1)
    cut = many - many % pool
    pools = strata[:, :cut].reshape(batch_size, -1, pool).swapaxes(0, 1)
    found = [*_dealt(totals, reads, pools).swapaxes(1, 2).reshape(cut, batch_size)]
    found += [*_dealt(totals, reads, strata[None, :, cut:])[0].T]
    found += [order[last]] * (rest > 0)
    return [found[i] for i in permutation(len(found), seed, epoch, 1)] if shuffle else found


def _words(n: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """Random uint64 [n], others than `permutation`'s."""
    key = np.array([seed, 2**63 + (epoch << 24) + purpose], np.uint64)  # of a list with them NumPy makes floats
    return np.random.Philox(key=key).random_raw(n)


def arrange(totals: np.ndarray, reads: np.ndarray, rows: np.ndarray, windows: int) -> np.ndarray:
    """The rows of batches, int [M, B], in windows of as many rows and nearly as many tokens: int [M, W, B / W].

    totals, reads: as for `compose`, int [N + 1]: at -1 stands a row that is not there.
    """
    rows = np.take_along_axis(rows, np.lexsort((rows, -totals[rows]), axis=-1), axis=1)
    return _dealt(totals, reads, rows.reshape(len(rows), -1, windows)).swapaxes(1, 2)


def _dealt(totals: np.ndarray, reads: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Strata of rows, int [M, S, n] -> the same, each in another order: int [M, S, n], [:, :, i] for i.

    So that the i have as many tokens: the longest row of a stratum goes to the one with the fewest so far. Rows of the
    strata in between are nearly of one length, and are dealt out by the tokens that they have in responses.
    """
    dealt, count = np.empty_like(strata), strata.shape[1]
    sums, read = (np.zeros((len(strata), strata.shape[2]), int) for _ in range(2))
    for i in range(count):
        within = count // 2 <= i < count - 2
        tokens, full = (reads, read) if within else (totals, sums)
        rows = np.take_along_axis(strata[:, i], np.argsort(-tokens[strata[:, i]], axis=1, kind="stable"), axis=1)
        np.put_along_axis(dealt[:, i], np.argsort(full, axis=1, kind="stable"), rows, axis=1)
        sums += totals[dealt[:, i]]
        read += reads[dealt[:, i]]
    return dealt
