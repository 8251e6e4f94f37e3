"""What every tokenised data set has beside its ids: of which rows it was made, what was left out."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from dpo_jax.data.tokens.cuts import RowCut
from dpo_jax.data.tokens.ragged import Ragged
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

    def taken(self, rows: Sequence[int] | np.ndarray) -> Self:
        """The rows at the positions `rows`, in that order. What was left out of the file stays told."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OF_THE_FILE}
        return replace(self, **{name: _some(value, np.asarray(rows, int), len(self)) for name, value in own.items()})

    def joined(self, other: Self) -> Self:
        """All rows of both, those of `other` numbered on; they have the same columns."""
        other = replace(other, row_numbers=other.row_numbers + self.last_row)
        own = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return replace(
            self,
            **{name: _both(*values) for name, values in own.items() if name not in _OF_THE_FILE},
            dropped=self.dropped + other.dropped,
            rows_read=self.rows_read + other.rows_read,
            source=f"{self.source} + {other.source}",
            used_columns=tuple(sorted({*self.used_columns, *other.used_columns})),
            unused_columns=tuple(sorted({*self.unused_columns, *other.unused_columns})),
        )


_OF_THE_FILE = {f.name for f in fields(Tokenised)} - {"cuts", "row_numbers"}
"""Fields that say something of a file, not of each of its rows."""


def _some(value: Any, rows: np.ndarray, n: int) -> Any:
    """Of what a field holds of n rows (of `Ragged`s one or several sequences each), what it holds of `rows`."""
    if isinstance(value, Ragged):
        each = len(value) // n
        return value.take((rows[:, None] * each + np.arange(each)).reshape(-1))
    if isinstance(value, dict):
        return {name: _some(one, rows, n) for name, one in value.items()}
    if isinstance(value, list | tuple) and value:
        return type(value)(value[i] for i in rows)
    return value[rows] if isinstance(value, np.ndarray) else value


def _both(value: Any, other: Any) -> Any:
    """What a field holds of the rows of both; None where it holds nothing of one."""
    if value is None or other is None:
        return None
    if isinstance(value, dict):
        return {name: _both(one, other[name]) for name, one in value.items()}
    return np.concatenate([value, other]) if isinstance(value, np.ndarray) else value + other


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
