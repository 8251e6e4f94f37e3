"""A right solution made wrong in one place.

Pairs that differ by a few characters are those where DPO lowers both log-probabilities, and for which DPOP was made
(Pal et al. 2024, arXiv 2402.13228, section 5: MetaMath with one intermediate result changed).

number   one number of the solution, in ASCII digits, becomes another of as many digits
step     two neighbouring steps change places: lines, or sentences (which . ! ? 。 ！ ？ end) where there is one line
"""

import random
import re
from typing import Literal, NamedTuple

Corruption = Literal["number", "step"]
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?", re.ASCII)
_SENTENCES = r"((?<=[.!?])\s+|(?<=[。！？])(?![。！？」』”’）])\s*)"
"""Ends of sentences with the blanks behind them; Chinese and Japanese have none."""


class Corrupted(NamedTuple):
    """What became of a solution.

    Attributes:
      text: the wrong solution.
      changed: what stood there, and what stands there now.
    """

    text: str
    changed: tuple[str, str]


def corrupt(solution: str, kind: Corruption, *, key: str) -> Corrupted | None:
    """`solution` with one number or step changed, drawn by `key`; None where it has no number, or not two steps."""
    rng = random.Random(key)
    if kind == "number":
        places = list(_NUMBER.finditer(solution))
        if not places:
            return None
        place = rng.choice(places)
        other = _another(place[0], rng)
        return Corrupted(solution[: place.start()] + other + solution[place.end() :], (place[0], other))
    parts = re.split(r"(\n+)" if len(solution.strip().splitlines()) > 1 else _SENTENCES, solution)
    steps, gaps = parts[::2], parts[1::2]
    places = [
        i for i in range(len(steps) - 1) if steps[i].strip() and steps[i + 1].strip() and steps[i] != steps[i + 1]
    ]
    if not places:
        return None
    i = rng.choice(places)
    steps[i], steps[i + 1] = steps[i + 1], steps[i]
    mixed = "".join(step + gap for step, gap in zip(steps, [*gaps, ""], strict=True))
    return Corrupted(mixed, (steps[i + 1], steps[i]))


def _another(number: str, rng: random.Random) -> str:
    """A number of as many digits and of another value; the point and the commas stay, and no zero is put in front."""
    while True:
        drawn = [rng.choice("0123456789") if x.isdigit() else x for x in number]
        if drawn[0] == "0" != number[0] and len(number) > 1:
            continue
        found = "".join(drawn)
        if found != number:
            return found


def edit_distance(a: str, b: str) -> int:
    """Fewest characters to insert, delete or replace that make `a` into `b` (Levenshtein 1966).

    By columns of bits (Myers 1999, in the form of Hyyrö 2003): one step a character of `b` for all characters of `a`,
    so that two texts of 100,000 characters take seconds and not hours.
    """
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    end = next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1], strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[: len(a) - end], b[: len(b) - end]
    if not a:
        return len(b)
    # Bit i: character i of `a`. Going down a column of the table, the distance rises where `up` is set and falls where
    # `down` is; `right` and `left` say the same of the step from the last column to this one.
    every, last, distance = (1 << len(a)) - 1, 1 << (len(a) - 1), len(a)
    places: dict[str, int] = {}
    for i, one in enumerate(a):
        places[one] = places.get(one, 0) | 1 << i
    up, down = every, 0
    for one in b:
        equal = places.get(one, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right, left = (down | ~(diagonal | up)) & every, up & diagonal
        distance += bool(right & last) - bool(left & last)
        right, left = (right << 1) | 1, left << 1
        vertical = equal | down
        up, down = (left | ~(vertical | right)) & every, right & vertical & every
    return distance
