"""ROUGE-L between instructions, and self-instruct's rule: what is too close to one that was kept is dropped.

ROUGE-L (Lin 2004) is the F1 of precision LCS / |a| and recall LCS / |b|, LCS being the length of the longest common
subsequence of tokens. Tokens are those of Google's `rouge_score` without stemming, runs of a-z and 0-9 in lower case;
a letter or digit of any other script is a token of its own, so that Chinese is compared by characters.

Self-instruct (Wang et al. 2022, arXiv 2212.10560, section 2.2) keeps a new instruction only where its ROUGE-L with
every one that was kept is below 0.7.
"""

import re
from collections import Counter
from collections.abc import Sequence

LIMIT = 0.7
"""Self-instruct's."""
_TOKEN = re.compile(r"[a-z0-9]+|[^\W_]")


def tokens(text: str) -> list[str]:
    """See the module."""
    return _TOKEN.findall(text.lower())


def common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a bit for each token of `a` (Hyyro 2004)."""
    places: dict[str, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        met = row & places.get(token, 0)
        row = ((row + met) | (row - met)) & full
    return len(a) - row.bit_count()


def rouge_l(a: str, b: str) -> float:
    """F1 in [0, 1]; 0 where one of the texts has no token."""
    return _f1(tokens(a), tokens(b))


def _f1(a: Sequence[str], b: Sequence[str]) -> float:
    return 2 * common(a, b) / (len(a) + len(b)) if a and b else 0.0


class Kept:
    """Instructions that were kept; each new one is compared with all of them."""

    def __init__(self, limit: float = LIMIT):
        """`limit`: of ROUGE-L, in (0, 1]."""
        self._limit = limit
        self._texts: list[tuple[str, list[str], Counter[str]]] = []

    def add(self, text: str) -> None:
        """Keep it, whatever it is close to."""
        found = tokens(text)
        self._texts.append((text, found, Counter(found)))

    def close(self, text: str) -> tuple[str, float] | None:
        """The first kept text whose ROUGE-L with `text` is at least the limit, and that value; None: there is none."""
        found = tokens(text)
        bag = Counter(found)
        for other, theirs, their_bag in self._texts:
            least = self._limit * (len(found) + len(theirs)) / 2
            # No common subsequence is longer than the shorter text, or than what the two have in common in any order.
            if min(len(found), len(theirs)) < least or sum((bag & their_bag).values()) < least:
                continue
            if (value := _f1(found, theirs)) >= self._limit:
                return other, value
        return None
