"""A score for each step of a response: what a reward function may give in place of one number.

    [[end, score], ...]    each `score` stands where the first `end` characters of the response end

A step is whatever the function takes for one: a line, a sentence, a call, a character. The response's own score is the
sum, and what several rewards, clipping or penalties make of it beyond its steps stands on its last token, as all of a
plain number does. (Lightman et al. 2023, "Let's Verify Step by Step", arXiv 2305.20050, call such rewards process
rewards.)
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from dpo_jax.errors import InputError

_LARGEST = float(np.finfo(np.float64).max)

Steps = list[list[tuple[int, float]]]
"""Of each response its steps, in order: characters up to the step's end, and its score."""


def split(found: Any, texts: Sequence[str], rows: np.ndarray, name: str) -> tuple[Any, Steps | None]:
    """What a function gave for `texts`, with the sum in place of each list of steps; and the steps, or None.

    `rows`: int [N], of the prompts; `name`: of the function. A response with a plain number has no steps.
    Raises `InputError` for a list that is none of steps.
    """
    if not isinstance(found, list | tuple) or len(found) != len(texts):
        return found, None
    if not any(isinstance(one, list | tuple) for one in found):
        return found, None
    sums, every = list[Any](), Steps()
    for one, text, row in zip(found, texts, rows, strict=True):
        if not isinstance(one, list | tuple):
            sums.append(one)
            every.append([])
            continue
        steps = [_checked(step, text, int(row), name) for step in one]
        sums.append(sum(score for _, score in steps))
        every.append(steps)
    return sums, every


def _checked(step: Any, text: str, row: int, name: str) -> tuple[int, float]:
    is_pair = isinstance(step, list | tuple) and len(step) == 2
    if not is_pair or isinstance(step[0], bool) or not isinstance(step[0], int) or not _number(step[1]):
        raise InputError(
            f"--reward {name}: gave {step!r:.40} for a step of a response to row {row} of the prompts, and no list of"
            " numbers; a number for each response, or for each of its steps [end, score]"
        )
    end, score = step
    if not 0 < end <= len(text):
        raise InputError(
            f"--reward {name}: a step of a response to row {row} of the prompts ends at character {end} of {len(text)};"
            " steps end within their response, from 1 on"
        )
    return end, float(score)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def scaled(steps: Steps | None, factors: np.ndarray) -> Steps | None:
    """Every score times the factor of its response, [N]."""
    if steps is None:
        return None
    return [[(end, score * float(by)) for end, score in own] for own, by in zip(steps, factors, strict=True)]


def together(every: Sequence[Steps | None]) -> Steps | None:
    """The steps of several functions for the same responses; None where none gave any."""
    given = [steps for steps in every if steps is not None]
    if not given:
        return None
    return [[step for own in of_one for step in own] for of_one in zip(*given, strict=True)]


def at_tokens(steps: Sequence[tuple[int, float]], text: str, count: int, prefix: Callable[[int], str]) -> np.ndarray:
    """float32 [count]: the scores of one response's steps, each at the token with which it ends.

    Args:
      steps: of a response.
      text: the response.
      count: its tokens, a terminator included; the step that ends with the text ends with the last of them.
      prefix: the text of the first so many tokens.
    """
    found, place = np.zeros(count, np.float32), 1
    for end, score in sorted(steps, key=itemgetter(0)):
        if end == len(text):
            place = count
        # Part of a character is decoded as one or several others, so lengths of prefixes may shrink.
        while place < count and prefix(place)[:end] != text[:end]:
            place += 1
        found[place - 1] += score
    return found
