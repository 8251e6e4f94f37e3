"""Which number a text says: 18 of `18`, `$18$`, `18 dollars`, `18元` and `x = 18`, -18 of `−18` and `negative 18`.

A wrong "right" is worse than a wrong "wrong": the winner of a pair to learn from would come of it. So what stands
around a number has to be known to leave it as it is: no sign but those of a page (`√18`, `18!`, `18^2`, `x + 18` say no
number), no letter that may be a variable (`2x`, `2πr`), and none of the words of `plain_numbers.json`, English and
Chinese, that make another number of it, or none: not, about, or, less than, million, squared, 万, 以上.
"""

import json
import re
import unicodedata
from fractions import Fraction
from functools import cache
from pathlib import Path

_DIGITS = (
    r"(?:[0-9]+/0*[1-9][0-9]*(?![0-9/]|\.[0-9])|[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?"
    r"|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?"
)
NUMBER = re.compile(rf"(?<![0-9])[-+]?{_DIGITS}")
"""A number in a `clean` text: 1,234.5 and 1e-3 and 3/4 are numbers, the 3 of 5-3 is not negative."""
LONGEST = 100
"""Characters of an answer that are compared by value; a longer one is no number that anybody means."""
_AROUND = 10 * LONGEST
"""Characters on a side of a number that are read."""
_SENTENCE = re.compile(r"\.(?=\s)|(?<![0-9$)\]])[!?](?=\s)|[。！；]")
"""Where a sentence ends; 18! is a factorial, and 18? is no answer."""

_SAME = (
    {code: chr(code - 0xFEE0) for code in range(0xFF02, 0xFF5F)}  # full width, but for ！, which is no factorial
    | dict.fromkeys(map(ord, "−﹣‐‑–"), "-")
    | {0x3000: " ", 0xFFE5: "¥", 0x2019: "'"}
)
_FORMS = [
    (re.compile(pattern), put)
    for pattern, put in (
        # thousands
        (r"(?<=[0-9])(?:\{,\}|,\\!|\\[,!:; ]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))", ","),
        (r"(?<=[0-9])~(?=\\|[A-Za-z])", " "),
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
        (r"\\[()\[\]$]", "$"),
        (r"\\%", "%"),
        (r"\^\{?(?:\\circ|°)\}?|\\degree(?![A-Za-z])", "°"),
        (r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|boldsymbol)\{~?([^{}]*)\}", r" \1 "),
        (r"\\(?:[,;:!> ]|q?quad(?![A-Za-z]))", " "),
        # fractions; a mixed number, 3\frac{1}{2}, stays
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"(?<![0-9])\\frac ?(?:\{ ?(-?[0-9]+) ?\} ?\{ ?([0-9]+) ?\}|([0-9])([0-9]))(?![0-9])", r"\1\3/\2\4"),
        # signs
        (r"-\$\s?(?=[0-9.])", "-"),
        (r"((?:^|(?<=[=:(]))\s*)-\s+(?=[0-9.])", r"\1-"),
    )
]
_DRESS = [
    (re.compile(pattern), put)
    for pattern, put in (
        (r"<<[^<>]*>>", ""),  # GSM8K's calculator
        (r"</?[A-Za-z_]{2,20}>", "\n"),
        (r"(?<![\w)])(?:\*\*|__)|(?:\*\*|__)(?![\w(])|`", " "),
        (r"(?<![\w)*])\*(?![\s*])([^*\n]{1,80})\*(?![\w(*])", r" \1 "),
        (r"\\(?:Rightarrow|implies)(?![A-Za-z])|⇒", "="),
        (r"[^\S\n]+", " "),
    )
]
"""What may stand around a number, and is more than dress where a text is compared: <b>, __init__."""

_WHOLE = re.compile(rf"([-+]?{_DIGITS})(?:\$? ?(?:%|°|percent|per cent))?")
_UNIT_OF_LENGTH = r"(?<![A-Za-z])(units?|inches|feet|met(?:er|re)s?|mm|cm|dm|km|ft|yd|in|mi|(?<=\s)m(?:/s)?)"
_POWER = re.compile(rf"{_UNIT_OF_LENGTH}\s?(?:\^\s?\{{?[23]\}}?|[²³])")
"""A square or a cube of a unit: the number before it is not squared."""
_UNIT = re.compile(
    rf"\s*{_WHOLE.pattern}\s*(?:\\(?:text|textrm|mathrm|mbox)\{{[^{{}}]*\}}(?:\^\{{?[23]\}}?)?|[\u4e00-\u9fff]{{1,2}})\s*"
)
"""A number with a unit that leaves no doubt of it: MATH's \\text{ cm}^2, 元."""

_ALPHABET = "A-Za-z\u00c0-\u024f\u0370-\u03ff\u0400-\u04ff"
_WORD = re.compile(rf"[{_ALPHABET}]+(?:'[{_ALPHABET}]+)*")
_OPEN = r"[\s$(\[\"'“]*$"
_NEGATIVE = re.compile(
    r"(?:(^|[\s=:(是为$])-(?=[$(])|(^|[=:是为]|\b(?:is|was|be|equals)\s)\s*\$?(?:minus|negative|[负負]))[\s$(]*$",
    re.IGNORECASE,
)
_BULLET = re.compile(r"^\s*(?:[-*•]|#+)\s+(?=\S)")
_INSIDE = re.compile(rf"(?<=[{_ALPHABET}])[-/](?=[{_ALPHABET}])|(?<=[\u4e00-\u9fff])/(?=[\u4e00-\u9fff])")
"""What joins two words: km/h, well-known, 元/人."""
_PER = re.compile(rf"^[-/](?=[{_ALPHABET}]{{2}}|[\u4e00-\u9fff])")
"""18-inch, 18/day."""
_HANGING = re.compile(
    rf"[)\]{_ALPHABET}]$|[)\]{_ALPHABET}][(\[]+$|(?<![{_ALPHABET}'])[A-Za-z\u0370-\u03ff]\s*,{_OPEN}"
    rf"|(?<![{_ALPHABET}'])[b-zB-HJ-Z\u0370-\u03ff]\s{_OPEN}|[!<>~]="
    rf"|(?:(?:^|[\s:,=(])-|√)[{_ALPHABET}]\s?={_OPEN}"
)
"""What makes a number before it a part: a factor, a function, a variable, the other coordinate; and != and -x =."""
_JOINED = re.compile(r"[\s,;、~*/x×^+$(\['-]*(?:(?:and|or|to|through|(?:out )?of(?: the)?|和|与|到|至|或)\s*)?[$-]?|\.")
"""Between numbers that say one thing together, or two: 5-3, 10 to 18, 18 000, 1.2.5."""
_LETTER_UNITS = frozenset("mgshlL")
_MARKS = frozenset(" \n:;,.?\"'“”‘()[]$€£¥₹。、！…《》「」【】✅✓✔👉")
_MARKS_BEHIND = (_MARKS - {"?", "…"}) | frozenset("!%°℃℉㎡㎏㎝㎞㎜—")


def clean(text: str) -> str:
    """A text with one sign for what is written with several: minus signs, digits of full width, LaTeX's blanks, units
    and fractions of numbers, separators of thousands."""
    text = text.translate(_SAME)
    for pattern, put in _FORMS:
        text = pattern.sub(put, text)
    return text


def _undressed(text: str) -> str:
    text = clean(text)
    for pattern, put in _DRESS:
        text = pattern.sub(put, text)
    return text


def _bare(text: str) -> str:
    """In one line, without what stands around it and belongs to the page."""
    return re.sub(r"\s+", " ", text).lstrip("$*` ").rstrip("$*` .。\\")


def _value(number: str) -> Fraction | None:
    """The value of what `NUMBER` finds; None for one too long, and for 36/2, a division that is not done."""
    if len(number) > LONGEST or re.search(r"[eE][-+]?[0-9]{4}", number):
        return None
    above, _, below = number.replace(",", "").partition("/")
    found = Fraction(above) / Fraction(below or 1)
    return None if below and found.denominator == 1 else found


def normal(answer: str) -> str | Fraction:
    """An answer as it is compared: without case, the signs around it and a last point; a number by its value, without
    commas of thousands, $, % and °."""
    plain = _bare(clean(answer)).casefold() or answer.strip()
    whole = _WHOLE.fullmatch(plain)
    number = _value(whole[1]) if whole else None
    return re.sub(r"(?<=,) | (?=[\u4e00-\u9fff])", "", plain) if number is None else number


def number_with_unit(answer: str) -> Fraction | None:
    """The number of one that has a unit behind it, and nothing else: 18元, 18\\text{ cm}^2."""
    whole = _UNIT.fullmatch(answer.strip("$ ."))
    return only_number(answer) if whole else None


def only_number(answer: str) -> Fraction | None:
    """The number of an answer's first sentence where it has one alone, said plainly. See the module."""
    sentence = _POWER.sub(r"\1", _SENTENCE.split(_bare(_undressed(answer)), maxsplit=1)[0])
    numbers = list(NUMBER.finditer(sentence)) if len(sentence) <= _AROUND else []
    if len(numbers) != 1:
        return None
    said = _said(sentence[: numbers[0].start()], numbers[0][0], sentence[numbers[0].end() :])
    return None if said is None else _value(said)


def last_number(text: str) -> str | None:
    """The last number of a text; None where it is not said plainly (see the module), or is the last of several that are
    joined: 5-3, 10 to 18."""
    text = _undressed(text)
    before, last = None, None
    for found in NUMBER.finditer(text):
        before, last = last, found
    if last is None:
        return None
    left = text[before.end() if before else 0 : last.start()]
    if before and _JOINED.fullmatch(left[-_AROUND:]) and "\n" not in left:
        return None
    left = _SENTENCE.split(left[-_AROUND:].strip("\n").rpartition("\n")[2])[-1]
    end = _SENTENCE.search(text, last.end(), last.end() + _AROUND)
    right = text[last.end() : end.start() if end else last.end() + _AROUND].partition("\n")[0]
    return _said(_BULLET.sub("", left), last[0], _POWER.sub(r"\1", right))


def _said(left: str, number: str, right: str) -> str | None:
    """The number with its sign where both sides leave it as it is."""
    if sign := _NEGATIVE.search(left):
        if number[0] in "+-":
            return None
        left, number = left[: sign.end(sign.lastindex or 0)], f"-{number}"
    return number if _is_plain_before(left) and _is_plain_behind(right) else None


def _is_plain_before(left: str) -> bool:
    if _HANGING.search(left) or any(_words(kind).search(left) for kind in ("anywhere", "before", "just before")):
        return False
    return _has_only(_INSIDE.sub(" ", left.rpartition("=")[2]), _MARKS)


def _is_plain_behind(right: str) -> bool:
    right = re.sub(r"°\s?[CF](?![A-Za-z])", "°", right)
    right = _INSIDE.sub(" ", _PER.sub(" ", right))
    if re.match(r"[\s$)\]]*!", right) or not _has_only(right, _MARKS_BEHIND):
        return False
    if any(_words(kind).search(right) for kind in ("anywhere", "behind")):
        return False
    if _words("just behind").match(right.lstrip(" $)]%°\"'”")):
        return False
    return all(_is_word(word, right) for word in _WORD.finditer(right))


def _is_word(word: re.Match[str], right: str) -> bool:
    """Whether this is a word or a unit, and no variable."""
    text, behind = word[0], right[word.end() :]
    apart = right[: word.start()][-1:].isspace()
    if len(text) == 1:
        article = text == "a" and re.match(r"\s[A-Za-z]{2}", behind)
        return apart and bool(text in _LETTER_UNITS or article or (text == "I" and right[: word.start()].strip(" $")))
    if len(text) == 2 or (len(text) == 3 and not apart):
        return text.casefold() in _short_words()
    return "π" not in text


def _has_only(text: str, marks: frozenset[str]) -> bool:
    """Whether a text has letters of words and these marks alone; 𝑥 and ⁿ are none of words."""
    return all(
        character in marks
        or (unicodedata.category(character) in ("Ll", "Lu", "Lo") and not 0x1D400 <= ord(character) < 0x1D800)
        or character in "々ー"
        for character in text
    )


@cache
def _lists() -> dict[str, list[str]]:
    lists: dict[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return lists


@cache
def _words(kind: str) -> re.Pattern[str]:
    whole = "|".join(_lists()[kind])
    return re.compile(f"(?:{whole}){_OPEN}" if kind == "just before" else whole, re.IGNORECASE)


@cache
def _short_words() -> frozenset[str]:
    return frozenset(" ".join(_lists()["short words"]).split())
