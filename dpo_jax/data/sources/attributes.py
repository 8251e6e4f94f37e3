"""Does a text keep to an instruction? Checks that need no other model, and what each of them sees.

A check is written as one text:

  language:CODE    the text is written in this language, such as language:fr. Trigrams of bytes decide (py3langid,
                   after Lui & Baldwin 2012), over 140 languages; sense and grammar are not judged.
  keywords:A, B    at least one of the words occurs, whole, in any case and with or without its accents. That a text
                   names what it is to be about is seen; whether it speaks in that voice is not.
  PATTERN          anything else is a regular expression that is found in the text.

A blank text keeps to nothing.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from dpo_jax.data.rows.problems import BadRow

LANGUAGE, KEYWORDS = "language:", "keywords:"

SURE = 0.5
"""Smallest confidence with which the language of an instruction is taken for known."""


@dataclass(frozen=True)
class Check:
    """One attribute of a text.

    Attributes:
      kind: what it is counted under: language, hobby, figure, persona, keywords or pattern.
      spec: the check as written (see the module).
    """

    kind: str
    spec: str

    def __call__(self, text: str) -> bool:
        """Whether `text` has the attribute."""
        return bool(text.strip()) and _predicate(self.spec)(text)


def parse_check(spec: str, kind: str | None = None) -> Check:
    """The check that `spec` writes, counted under `kind` (not given: under what it looks at). Raises `BadRow`."""
    if spec.startswith(LANGUAGE):
        code = spec.removeprefix(LANGUAGE)
        if code not in languages():
            raise BadRow("a check names an unknown language", f"{code!r}; known are {', '.join(languages())}")
        return Check(kind or "language", spec)
    if spec.startswith(KEYWORDS):
        if not _words(spec):
            raise BadRow("a check has no keyword", f"{spec!r}; write keywords:tea, coffee")
        return Check(kind or "keywords", spec)
    if not spec:
        raise BadRow("a check is empty", "write a regular expression, language:CODE or keywords:A, B")
    try:
        re.compile(spec)
    except re.error as error:
        raise BadRow("a check is no regular expression", f"{spec!r}: {error}") from error
    return Check(kind or "pattern", spec)


@functools.lru_cache(maxsize=1024)
def _predicate(spec: str) -> Callable[[str], bool]:
    if spec.startswith(LANGUAGE):
        code = spec.removeprefix(LANGUAGE)
        return lambda text: identify(text)[0] == code
    if spec.startswith(KEYWORDS):
        words = re.compile("|".join(map(_whole, _words(spec))))
        return lambda text: words.search(_plain(text)) is not None
    pattern = re.compile(spec)
    return lambda text: pattern.search(text) is not None


# ---------------------------------------------------------------- keywords


def keywords(words: Sequence[str]) -> str:
    """The check for at least one of `words`."""
    return KEYWORDS + ", ".join(words)


def _words(spec: str) -> list[str]:
    return [_plain(word.strip()) for word in spec.removeprefix(KEYWORDS).split(",") if word.strip()]


def _plain(text: str) -> str:
    """Without case and accents."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in decomposed if not unicodedata.combining(c))


def _whole(word: str) -> str:
    """Where the word begins and ends with a letter of an alphabet, no other letter may stand beside it."""
    before, after = (r"(?<!\w)" if _spaced(word[0]) else "", r"(?!\w)" if _spaced(word[-1]) else "")
    return before + re.escape(word) + after


def _spaced(character: str) -> bool:
    """Whether the script of a letter puts spaces between words. (Chinese, Japanese and Thai do not.)"""
    name = unicodedata.name(character, "")
    return character.isalnum() and not name.startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER"))


# ---------------------------------------------------------------- languages


@functools.cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@functools.cache
def languages() -> tuple[str, ...]:
    """Codes (ISO 639) of the languages that are told apart."""
    return tuple(sorted(set(_identifier().labels) - {"zxx"}))


def identify(text: str) -> tuple[str, float]:
    """(code of the likeliest language, confidence in (0, 1])."""
    code, confidence = _identifier().classify(text)
    return str(code), float(confidence)
