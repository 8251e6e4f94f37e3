"""Rows dealt out to batches, and those of a batch to its windows, so that each has as many tokens as the others.

    which rows share a batch   All rows, longest first, are cut into B strata of one row for each batch, and each batch
                               gets a row of each stratum: the longest of it goes where the fewest tokens are so far.
                               With `shuffle`, ties, and which batches count as emptier in all strata but the last two,
                               are drawn anew every epoch. What does not fill a batch is taken from all lengths alike
                               and comes last. Neither devices nor micro-batches decide anything here.
    which share a window       The same, of the rows of a batch.

N rows, B rows a batch, M batches, W windows a batch.
"""

import numpy as np

from dpo_jax.data.sets.batches import permutation

_LOOSE = 0.25  # of all batches: how far one may seem fuller than it is, in the order of fullness


def compose(
    totals: np.ndarray, reads: np.ndarray, batch_size: int, *, seed: int, epoch: int, shuffle: bool
) -> list[np.ndarray]:
    """The ceil(N / B) batches of an epoch, in order: int [B] each, of the last one perhaps fewer; see the module.

    totals, reads: int [N], tokens of each row, and those in its responses.
    """
    n, many = len(totals), len(totals) // batch_size
    order = permutation(n, seed, epoch, 0) if shuffle else np.arange(n)
    order = order[np.argsort(-totals[order], kind="stable")]
    rest = n - many * batch_size
    last = ((2 * np.arange(rest) + 1) * n) // (2 * max(rest, 1))
    strata = np.delete(order, last).reshape(batch_size, many)
    words = np.random.Philox(key=[seed, 2**63 + epoch]).random_raw(strata.size).reshape(strata.shape)
    loose = (words >> np.uint64(11)) * 2.0**-53 * _LOOSE * many * shuffle
    found = list(_dealt(totals, reads, strata[None], loose)[0].T)
    if shuffle:
        found = [found[i] for i in permutation(many, seed, epoch, 1)]
    return [*found, *([order[last]] if rest else [])]


def arrange(totals: np.ndarray, reads: np.ndarray, rows: np.ndarray, windows: int) -> np.ndarray:
    """The rows of batches, int [M, B], in windows of as many rows and nearly as many tokens: int [M, W, B / W].

    totals, reads: as for `compose`, int [N + 1]: at -1 stands a row that is not there.
    """
    rows = np.take_along_axis(rows, np.lexsort((rows, -totals[rows]), axis=-1), axis=1)
    return _dealt(totals, reads, rows.reshape(len(rows), -1, windows), np.zeros((rows.shape[1], 1))).swapaxes(1, 2)


def _dealt(totals: np.ndarray, reads: np.ndarray, strata: np.ndarray, loose: np.ndarray) -> np.ndarray:
    """Strata of rows, int [M, S, n], longest first -> the same in another order each: int [M, S, n], [:, :, i] for i.

    So that the i have as many tokens: the longest row of a stratum goes to the one with the fewest so far. Rows of the
    strata in between are nearly of one length, and are dealt out by the tokens that they have in responses. `loose`
    [S, n]: by how many places one seems fuller than it is; not in the last two strata.
    """
    dealt, count = np.empty_like(strata), strata.shape[1]
    sums, read = (np.zeros((len(strata), strata.shape[2]), int) for _ in range(2))
    for i in range(count):
        rows, within = strata[:, i], count // 2 <= i < count - 2
        fullness = np.argsort(np.argsort(read if within else sums, axis=1, kind="stable"), axis=1, kind="stable")
        if within:
            rows = np.take_along_axis(rows, np.argsort(-reads[rows], axis=1, kind="stable"), axis=1)
        if i < count - 2:
            fullness = fullness + loose[i]
        np.put_along_axis(dealt[:, i], np.argsort(fullness, axis=1, kind="stable"), rows, axis=1)
        sums += totals[dealt[:, i]]
        read += reads[dealt[:, i]]
    return dealt
