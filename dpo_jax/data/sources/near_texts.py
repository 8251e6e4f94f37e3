"""Texts one after the other, each compared with those before it: equal, or nearly so.

Nearly equal is as in `duplicates.py`: MinHash signatures that agree in a given share of their bins,
among texts that share a band. Every candidate is compared, so what is dropped does not depend on how many share a band.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

from dpo_jax.data.sources.duplicates import BANDS, BINS, SIMILAR, signatures


def plain(text: str) -> str:
    """Without what a copy may differ in: NFKC, case, runs of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class NearTexts:
    """Texts that were kept."""

    def __init__(self, similar: float = SIMILAR):
        """`similar`: the share of bins from which on two texts are nearly equal, in (0, 1]."""
        self._similar = similar
        self._found: list[tuple[str, np.ndarray]] = []
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]
        self._equal: dict[str, str] = {}

    def near(self, text: str, name: str, *, keep: bool = True) -> tuple[str, float] | None:
        """(name of a kept text nearly equal to this one, estimated similarity), or None: then this one is kept, too.

        keep: False only asks.
        """
        text = plain(text)
        if text in self._equal:
            return self._equal[text], 1.0
        [signature] = signatures([text])
        keys = [part.tobytes() for part in np.split(signature, BANDS)]
        others = sorted({i for band, key in zip(self._bands, keys, strict=True) for i in band.get(key, ())})
        for i in others:
            similarity = float((self._found[i][1] == signature).sum()) / BINS
            if similarity >= self._similar:
                return self._found[i][0], similarity
        if keep:
            self._equal[text] = name
            for band, key in zip(self._bands, keys, strict=True):
                band.setdefault(key, []).append(len(self._found))
            self._found.append((name, signature))
        return None

    def keep(self, texts: Sequence[str], name: str) -> None:
        """Keep all of them, whatever they are close to."""
        for text in texts:
            self.near(text, name)
