"""Is a response right? Its final answer against the one that is known: equal texts, equal numbers, or math-verify.

The final answer is what `--answer_pattern` says, or else what stands after the last of the field's own marks: GSM8K's
`####` and MATH's \\boxed{}, or, without one of those, Minerva's and Iterative RPO's `final answer:` and `answer is`.
Without any mark it is the last number (lm-evaluation-harness calls that `flexible-extract`), where it is said plainly
(`plain_numbers.py`).
"""

import importlib
import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from dpo_jax.data.rows.cells import absent
from dpo_jax.errors import InputError
from dpo_jax.judge.rewards.plain_numbers import LONGEST, last_number, normal, number_with_unit, only_number

_WRITTEN = re.compile(r"####|\\boxed\{")
_SAID = re.compile(r"final answer[:：]|answer is\b[:：]?", re.IGNORECASE)
_HOPE = re.compile("I hope it is correct", re.IGNORECASE)
"""How Minerva's prompt ends its answers."""


def final_answer(text: str, pattern: str | None = None) -> str | None:
    """The final answer of a response (or of a solution); None where there is none. See the module."""
    if pattern is not None:
        found = list(re.finditer(pattern, text))
        return ((found[-1][1] or "").strip() or None) if found else None
    marks = list(_WRITTEN.finditer(text)) or list(_SAID.finditer(text))
    if not marks:
        return last_number(text)
    mark = marks[-1]
    rest = text[mark.end() :]
    if mark[0].startswith("\\"):
        return _inside_braces(rest).strip() or None
    # The mark may stand in bold: **Final answer:** 18
    line = re.sub(r"^(?:\*+(?=\s)|\s)+", "", rest).partition("\n")[0]
    return _HOPE.split(line, maxsplit=1)[0].strip() or None


def _inside_braces(text: str) -> str:
    """Up to the brace that closes one opened before `text`; nothing where it is never closed."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if not depth:
            return text[:i]
    return ""


def same(answer: str, known: str) -> bool:
    """Whether an answer equals the `known` one, both `normal`.

    Where one is a number and the other is not, that may still say one: the answer in words (`only_number`), the known
    one before its unit.
    """
    said, wanted = normal(answer), normal(known)
    if isinstance(wanted, Fraction) and not isinstance(said, Fraction):
        return only_number(answer) == wanted
    if isinstance(said, Fraction) and not isinstance(wanted, Fraction):
        return number_with_unit(known) == said
    return said == wanted


def near(number: str, known: str) -> bool:
    """Whether two numbers, as `NUMBER` finds them, are the `same` or differ by less than 1e-6 (relative, or 1e-9)."""
    said, wanted = normal(number), normal(known)
    if not isinstance(said, Fraction) or not isinstance(wanted, Fraction):
        return said == wanted
    return abs(said - wanted) <= max(Fraction(1, 10**6) * max(abs(said), abs(wanted)), Fraction(1, 10**9))


def exact(response: str, known: str, pattern: str | None = None) -> bool:
    """Whether the final answer of `response` is the `same` as the `known` one."""
    found = final_answer(response, pattern)
    return found is not None and same(found, known)


def is_missing(value: Any) -> bool:
    """Whether a column holds no value: null, NaN, an infinity."""
    return absent(value) or (isinstance(value, float) and math.isinf(value))


def known_answer(value: Any, pattern: str | None = None) -> str | None:
    """The right answer that a column holds: a number, a text whose final answer it is, or, of one line of at most 100
    characters without a mark, the text itself; None where it is neither number nor text.

    Raises `InputError` for a longer text without a mark: no response would equal all of it.
    """
    if is_missing(value) or isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if not isinstance(value, str):
        return str(value)
    marks = (_WRITTEN.pattern, f"(?i:{_SAID.pattern})") if pattern is None else (pattern,)
    if any(re.search(mark, value) for mark in marks):
        return final_answer(value, pattern)
    whole = value.strip()
    if len(whole) > LONGEST or "\n" in whole:
        where = "none of ####, final answer:, answer is and \\boxed{}" if pattern is None else "no --answer_pattern"
        raise InputError(
            f"holds a text of {len(whole)} characters with {where} in it; give --answer_pattern, or another column"
        )
    return whole or None


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
