"""What every tokenised data set has beside its ids: of which rows it was made, what was left out."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from dpo_jax.data.tokens.cuts import RowCut
from dpo_jax.errors import InputError

if TYPE_CHECKING:
    from dpo_jax.data.sets.row_mixture import RowMixture


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """N rows of a source.

    Attributes:
      row_numbers: int32 [N], numbers of the rows in their file, from 1.
      dropped: how many rows were left out, by reason.
      rows_read: how many rows the file held (or `limit`).
      source: what was read.
      cuts: what the length limits cut off each of the N rows; empty where nobody measured it.
      used_columns, unused_columns: columns of the file that are read, in words, and that nothing reads.
      terminators: ids that end a whole response (of comparisons: see `encode.ScoredEncoder`); none: not known.
      mixture: the sources it was joined from, where they were several.
      problems: what was left out, in words.
    """

    row_numbers: np.ndarray
    dropped: Counter[str]
    rows_read: int
    source: str
    cuts: tuple[RowCut, ...] = ()
    used_columns: tuple[str, ...] = ()
    unused_columns: tuple[str, ...] = ()
    terminators: tuple[int, ...] = ()
    mixture: "RowMixture | None" = None
    problems: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.row_numbers)

    @property
    def last_row(self) -> int:
        """The number behind which those of another data set can begin."""
        return max(self.rows_read, int(self.row_numbers.max()))

    def told(self, *lines: str) -> str:
        """The lines of a summary, and those about columns."""
        used = (("columns used", self.used_columns), ("columns not used", self.unused_columns))
        return "\n".join([*filter(None, lines), *(f"{what}: {', '.join(names)}" for what, names in used if names)])

    def taken(self, rows: Sequence[int] | np.ndarray, **own: Any) -> Self:
        """The rows at the positions `rows`, whose own fields are `own`. What was left out of the file stays told."""
        cuts = tuple(self.cuts[i] for i in rows) if self.cuts else ()
        return replace(self, row_numbers=self.row_numbers[np.asarray(rows, int)], cuts=cuts, **own)

    def joined(self, other: Self, **own: Any) -> Self:
        """All rows of both, whose own fields are `own`; those of `other` are numbered on."""
        return replace(
            self,
            row_numbers=np.concatenate([self.row_numbers, other.row_numbers + self.last_row]),
            dropped=self.dropped + other.dropped,
            rows_read=self.rows_read + other.rows_read,
            source=f"{self.source} + {other.source}",
            cuts=self.cuts + other.cuts,
            used_columns=tuple(sorted({*self.used_columns, *other.used_columns})),
            unused_columns=tuple(sorted({*self.unused_columns, *other.unused_columns})),
            **own,
        )


def fingerprint_of(arrays: Iterable[np.ndarray], *texts: bytes) -> str:
    """SHA-256 of `texts`, and of the types, shapes and values of `arrays`, in order."""
    digest = hashlib.sha256(b"".join(texts))
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def held_out(prompts: Sequence[np.ndarray], share: float, seed: int, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions of (the rest, the rows of about `share` of the prompts): rows of one prompt stay together.

    `prompts`: the ids of each row's. Which of them depends on the seed. Raises `InputError` where one side would be
    empty.
    """
    keys = [hashlib.sha256(f"{seed} ".encode() + prompt.tobytes()).digest() for prompt in prompts]
    different = sorted(set(keys))
    count = round(share * len(different))
    if not 0 < count < len(different):
        raise InputError(
            f"{source}: a share of {share:g} of {len(different)} prompts leaves one side empty; change the share"
        )
    held = set(different[:count])
    inside = np.asarray([key in held for key in keys])
    return np.flatnonzero(~inside), np.flatnonzero(inside)
