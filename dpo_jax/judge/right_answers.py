"""Is a response right? Its final answer against the one that is known: equal texts, equal numbers, or math-verify.

The final answer is what `--answer_pattern` says, or else what stands after the last of the field's own marks: GSM8K's
`####`, Minerva's and Iterative RPO's `final answer:`, `answer is`, and MATH's \\boxed{}. Without any mark it is the
last number (lm-evaluation-harness calls that `flexible-extract`).
"""

import importlib
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from dpo_jax.errors import InputError

_MARK = re.compile(r"####|final answer:|answer is:?|\\boxed\{", re.IGNORECASE)
_NUMBER = re.compile(r"-?(?:\d[\d,]*)(?:\.\d+)?|-?\.\d+")
_LONGEST = 100
"""Characters of an answer that are compared by value; a longer one is no number that anybody means."""


def final_answer(text: str, pattern: str | None = None) -> str | None:
    """The final answer of a response (or of a solution); None where there is none. See the module."""
    if pattern is not None:
        found = list(re.finditer(pattern, text))
        return ((found[-1][1] or "").strip() or None) if found else None
    marks = list(_MARK.finditer(text))
    if not marks:
        numbers = _NUMBER.findall(text)
        return numbers[-1] if numbers else None
    mark = marks[-1]
    rest = text[mark.end() :]
    inside = _inside_braces(rest) if mark[0].startswith("\\") else rest.strip().partition("\n")[0]
    return inside.strip() or None


def _inside_braces(text: str) -> str:
    """Up to the brace that closes one opened before `text`; nothing where it is never closed."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if not depth:
            return text[:i]
    return ""


def normal(answer: str) -> str | Fraction:
    """An answer as it is compared: without case, spaces, commas, $ and a last point; a number by its value."""
    plain = re.sub(r"\s+", " ", answer.strip().strip("$").strip()).rstrip(".").strip().casefold()
    number = plain.replace(",", "").removeprefix("$").replace("-$", "-").strip()
    if len(number) <= _LONGEST and re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)", number):
        return Fraction(number)
    return plain


def exact(response: str, known: str, pattern: str | None = None) -> bool:
    """Whether the final answer of `response` equals the `known` one, both `normal`."""
    found = final_answer(response, pattern)
    return found is not None and normal(found) == normal(known)


def known_answer(value: Any, pattern: str | None = None) -> str | None:
    """The right answer that a column holds: a number, or a text whose final answer it is; None where it is neither."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if not isinstance(value, str):
        return str(value)
    marked = _MARK.search(value) is not None if pattern is None else re.search(pattern, value) is not None
    return final_answer(value, pattern) if marked else value.strip() or None


def open_matcher(match: str, pattern: str | None) -> Callable[[str, str], bool]:
    """(response, known answer) -> whether it is right. Raises `InputError` where math-verify is not installed."""
    if match == "exact":
        return lambda response, known: exact(response, known, pattern)
    try:
        verify = importlib.import_module("math_verify")
    except ImportError as error:
        raise InputError("--match math_verify: needs the package; pip install 'dpo_jax[math]'") from error

    def equal(response: str, known: str) -> bool:
        found = response if pattern is None else final_answer(response, pattern)
        # Its own marks decide where no pattern does; a known answer stands alone, as LaTeX.
        return found is not None and bool(verify.verify(verify.parse(f"${known}$"), verify.parse(found)))

    return equal


def draw_pairs(right: list[str], wrong: list[str], most: int, rng: Any) -> Iterator[tuple[str, str]]:
    """At most `most` different (right, wrong) pairs, drawn without replacement from all there are.

    right, wrong: different texts. rng: a `numpy.random.Generator`.
    """
    count = len(right) * len(wrong)
    for place in rng.permutation(count)[:most].tolist():
        yield right[place // len(wrong)], wrong[place % len(wrong)]
