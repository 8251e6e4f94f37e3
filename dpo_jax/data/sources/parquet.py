"""Parquet files as rows: a value that Python cannot hold costs that value alone, where somebody needs it.

Dates, times and durations become text, with all their digits: Python's own hold no nanoseconds and no year past 9999.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dpo_jax.errors import InputError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 256
"""Rows that are converted at once."""


class Unreadable:
    """In place of a value that cannot be converted; its text says why."""

    def __init__(self, error: Exception):
        """`error`: what the conversion raised."""
        self._reason = "text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else first_line(error)

    def __repr__(self) -> str:
        return self._reason


def read_parquet(path: Path, stream: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, row). Raises `InputError` where the file is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=BATCH):
            names = batch.schema.names
            for values in zip(*map(_values, batch.columns), strict=True):
                number += 1
                yield number, dict(zip(names, values, strict=True))
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file ({first_line(error)}); fetch it again") from error


def _values(column: "pa.Array") -> list[Any]:
    import pyarrow as pa

    try:
        for at_utc in (True, False):  # two casts, for the first only names another time zone
            wanted = _as_text(column.type, at_utc)
            column = column if wanted == column.type else column.cast(wanted)
        return column.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError):  # one value, perhaps: UnicodeDecodeError is a ValueError
        return [_value(value) for value in column]


def _value(value: "pa.Scalar") -> Any:
    import pyarrow as pa

    try:
        return value.as_py()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        return Unreadable(error)


def _as_text(kind: "pa.DataType", at_utc: bool) -> "pa.DataType":
    """The type with text for every date and time in it; or, with `at_utc`, those with a time zone in UTC."""
    import pyarrow as pa

    types = pa.types
    if at_utc and types.is_timestamp(kind) and kind.tz is not None:
        return pa.timestamp(kind.unit, "UTC")
    if not at_utc and types.is_temporal(kind):
        return pa.string()
    if types.is_struct(kind):
        return pa.struct([field.with_type(_as_text(field.type, at_utc)) for field in kind])
    if types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_as_text(kind.value_type, at_utc)))
    if types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_as_text(kind.value_type, at_utc)), kind.list_size)
    if types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_text(kind.value_type, at_utc)))
    return kind
