"""What files say of themselves, read within bounds: JSON that someone else wrote, and its fields one at a time.

A header may be damaged, made by hand, or made to do harm. JSON is refused by size, depth, digits and broken text
before anything trusts it; a field is asked for by type and range. Whatever is wrong becomes one line.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from dpo_jax.errors import InputError, first_line

MAX_BYTES = 64 << 20
"""Largest JSON header that is read. The index of a model of a trillion parameters has a few."""
MAX_DEPTH = 64
"""Deepest nesting of a JSON header."""
MAX_WHOLE = 2**31 - 1
"""Largest whole number that a field may hold where no tighter bound is asked for."""


def told(value: Any) -> str:
    """A value as messages show it: its repr, cut where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested without end; a number of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def mended(text: str) -> str:
    """A text without halves of surrogate pairs, which UTF-8 cannot say; each becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_json(path: Any, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in the file `path` (a `Path`). `InputError` for anything else, a key given twice included."""
    try:
        with path.open("rb") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(text) > limit:
        raise InputError(f"{path}: is larger than {limit >> 20} MiB, which no such file is; fetch it again")
    return parse_json(text, str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `text` spells; `where` names it in errors. Raises `InputError`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise InputError(f"{where}: key {told(twice)} twice; fetch the file again")
        return result

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=constant)
    except InputError:
        raise
    except RecursionError as error:
        raise InputError(f"{where}: nested deeper than {MAX_DEPTH} levels; fetch the file again") from error
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise InputError(f"{where}: not valid JSON ({first_line(error)}); fetch the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON object is expected, and this is a {type(value).__name__}")
    _check_values(value, where)
    return value


def _check_values(value: Any, where: str) -> None:
    """Refuse nesting without end, halves of characters, and numbers beyond all measure."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise InputError(f"{where}: nested deeper than {MAX_DEPTH} levels; fetch the file again")
        below = []
        for item in level:
            if isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                if not item.isascii() and any("\ud800" <= letter <= "\udfff" for letter in item):
                    raise InputError(f"{where}: {told(item)} holds half a character (a lone surrogate); mend it")
            elif isinstance(item, float) and not math.isfinite(item):
                raise InputError(f"{where}: holds a number that is too large for any purpose; mend it")
        level = below


class Fields:
    """The fields of a header, each asked for by type and range. A field that is null is absent.

    Attributes:
      raw:   name -> value, as it was read.
      where: names the file in errors.
      asked: the names that were asked for so far.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, prefix: str = ""):
        """`prefix` stands before a field's name in errors."""
        self.raw, self.where, self._prefix = raw, where, prefix
        self.asked: set[str] = set()

    def get(self, key: str) -> Any:
        """The value of a field as it is; None where there is none."""
        self.asked.add(key)
        return self.raw.get(key)

    def whole(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_WHOLE) -> int:
        """A whole number in [low, high]. Without a default the field must be there."""
        value = self.maybe_whole(key, low=low, high=high)
        return self._present(key, default if value is None else value)

    def maybe_whole(self, key: str, *, low: int = 1, high: int = MAX_WHOLE) -> int | None:
        """A whole number in [low, high], or None."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0, high: float = 1e12) -> float:
        """A number in (low, high]. Without a default the field must be there."""
        value = self.get(key)
        if value is None:
            return self._present(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low < value <= high:
            raise self.wrong(key, f"a number above {low:g} and up to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        return self._checked(key, lambda value: isinstance(value, bool), "true or false", default)

    def text(self, key: str, default: str | None = None) -> str | None:
        """A text, or None."""
        return self._checked(key, lambda value: isinstance(value, str), "a text", default)

    def items(self, key: str, kind: type | tuple[type, ...], what: str) -> list[Any]:
        """A list of values of one kind; empty where the field is absent."""

        def fits(value: Any) -> bool:
            return isinstance(value, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)

        return self._checked(key, fits, f"a list of {what}", [])

    def _checked(self, key: str, fits: Callable[[Any], bool], expected: str, default: Any) -> Any:
        """The value of a field, where it fits; `default` where there is none."""
        value = self.get(key)
        if value is not None and not fits(value):
            raise self.wrong(key, expected)
        return default if value is None else value

    def wrong(self, key: str, expected: str) -> InputError:
        """The error for a field that is not what it should be."""
        return InputError(f"{self.where}: {self._prefix}{key} = {told(self.raw.get(key))} is not {expected}")

    def _present(self, key: str, value: Any) -> Any:
        if value is None:
            raise InputError(f"{self.where}: {self._prefix}{key} is missing")
        return value
