"""Cells of a row as other programs write them: pandas has NaN where there is nothing, and so 81.0 for 81; CSV has
text; JSON has integers past all floats."""

import contextlib
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"[-+]?(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:[eE][-+]?\d{1,3})?")


def absent(value: Any) -> bool:
    """Whether a cell holds nothing: null, or NaN."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def present(row: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a row that hold something."""
    return {name: value for name, value in row.items() if not absent(value)}


def as_number(value: Any) -> float | None:
    """The finite number that a cell holds, as text too; None for all else: true, infinity, what no float can hold."""
    spelled = isinstance(value, str) and _NUMBER.fullmatch(value.strip())
    if spelled or (isinstance(value, int | float | Decimal) and not isinstance(value, bool)):
        with contextlib.suppress(OverflowError):
            found = float(value)
            return found if math.isfinite(found) else None
    return None


def as_whole(value: Any) -> int | None:
    """The whole number that a cell holds, as 81.0 or text too; None for all else."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    found = as_number(value)
    return int(found) if found is not None and found.is_integer() else None
