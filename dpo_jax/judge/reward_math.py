"""Whether two mathematical answers are equal: math-verify, in the process of `judge/reward_worker.py`."""

from collections.abc import Sequence


def verified(prompts: Sequence[str], responses: Sequence[str], right: Sequence[str]) -> list[float]:
    """1 where the answer that is found in a response equals the right one, else 0.

    Both are read as math-verify reads them: what is boxed, LaTeX, or the last expression; a right answer also as LaTeX
    without its dollars. Raises `ValueError` for a right answer that it cannot read.
    """
    from math_verify import parse, verify

    found: list[float] = []
    for response, text in zip(responses, right, strict=True):
        gold = parse(text) or parse(f"${text}$")
        if not gold:
            raise ValueError(f"the right answer {text[:60]!r} is none that math-verify reads")
        found.append(float(verify(gold, parse(response))))
    return found
