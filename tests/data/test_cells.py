"""Cells as pandas, CSV and JSON write them."""

from decimal import Decimal
from typing import Any

import pytest

from dpo_jax.data.rows.cells import absent, as_number, as_whole, present

NAN = float("nan")


def test_nothing_is_null_or_nan() -> None:
    assert present({"a": None, "b": NAN, "c": 0, "d": "", "e": False, "f": Decimal("nan")}) == {
        "c": 0,
        "d": "",
        "e": False,
    }
    assert [absent(value) for value in ("nan", [NAN], float("inf"))] == [False] * 3


@pytest.mark.parametrize(
    ("value", "number", "whole"),
    [
        (81, 81.0, 81),
        (81.0, 81.0, 81),
        (0.5, 0.5, None),
        ("81", 81.0, 81),
        (" 81.0 ", 81.0, 81),
        ("-1e-1", -0.1, None),
        (Decimal("2"), 2.0, 2),
        (2**63 + 1, float(2**63), 2**63 + 1),
        (10**400, None, 10**400),
        ("1e400", None, None),
        *((value, None, None) for value in (True, None, NAN, float("-inf"), "", "nan", "1_0", "0x1", [1])),
    ],
)
def test_numbers(value: Any, number: float | None, whole: int | None) -> None:
    assert as_number(value) == number
    assert as_whole(value) == whole
    assert type(as_number(value)) is type(number)
