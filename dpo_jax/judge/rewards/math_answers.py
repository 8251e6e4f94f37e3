"""Whether two mathematical answers are equal: math-verify, in the process of `judge/rewards/user_process.py`."""

import re
from collections.abc import Sequence
from typing import Any

_MARKED = re.compile(r"\$|\\boxed|\\\[|\\\(")
"""Where LaTeX begins and ends in a text."""
_PROSE = re.compile(r"[^\\]*(?<!\S)[A-Za-z]{3,}[.,:;]?(?!\S)[^\\]*")
"""Words, and no command of LaTeX."""


def read(right: str) -> list[Any]:
    r"""What math-verify reads in a right answer; empty where it reads nothing.

    `parse` looks for mathematics in a text, and of `2\sqrt{3}` or `3x + 2` finds the first number alone: what is
    neither marked as LaTeX nor a sentence is LaTeX as a whole.
    """
    from math_verify import parse

    whole = f"${right}$"
    if _MARKED.search(right) or _PROSE.fullmatch(right):
        return parse(right) or parse(whole)
    return parse(whole)


def verified(prompts: Sequence[str], responses: Sequence[str], right: Sequence[str]) -> list[float]:
    """1 where the answer that is found in a response equals the right one, else 0.

    A response is read as math-verify reads it: what is boxed, LaTeX, or the last expression; a right answer as `read`
    does. Raises `ValueError` for a right answer that it cannot read.
    """
    from math_verify import parse, verify

    found: list[float] = []
    for response, text in zip(responses, right, strict=True):
        gold = read(text)
        if not gold:
            raise ValueError(f"the right answer {text[:60]!r} is none that math-verify reads")
        found.append(float(verify(gold, parse(response))))
    return found
