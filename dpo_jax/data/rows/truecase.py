"""Truecasing of dialogues by rules: the first letter of a sentence, and the English pronoun I, become capitals.

Zephyr (Tunstall et al. 2023, section 4.1) truecases UltraChat by heuristics, since about 5 % of it reads "Hello. how
are you?". These rules are this project's: they touch no code (fenced or between backticks), URL, address, file name or
word that has a capital in it, and nothing behind an abbreviation or an ellipsis. Text without capital letters in its
script, such as Chinese, stays as it is.
"""

import re

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_ABBREVIATIONS = frozenset(
    "e.g i.e etc vs cf mr mrs ms dr prof st no vol fig approx ca al inc ltd jr sr dept est p pp".split()
)
_WORD = re.compile(r"(?P<open>[\"'(\[]*)(?P<word>[^\W\d_]+(?:['\u2019-][^\W\d_]+)*)(?P<close>[.,;:!?\"')\]]*)")
_PRONOUN = re.compile(r"(?<![\w.'’/@#+-])i(?=(?:['’](?:m|ve|ll|d|re))?(?:[\s,;:!?)\"]|\.(?:\s|\Z)|\Z))")


def truecased(text: str) -> str:
    """`text` with these capitals."""
    parts, at = [], 0
    for code in _CODE.finditer(text):
        parts += [_prose(text[at : code.start()], first=at == 0), code[0]]
        at = code.end()
    return "".join([*parts, _prose(text[at:], first=at == 0)])


def _prose(text: str, *, first: bool) -> str:
    """`first`: a sentence begins with it."""
    start = first

    def word(match: re.Match[str]) -> str:
        nonlocal start
        said, begins = match[0], start
        found = _WORD.fullmatch(said)
        start = _ends_sentence(said)
        # What is more than a word is a URL, an address, the name of a file; one with a capital is spelt on purpose.
        if not begins or found is None or found["word"] != found["word"].lower():
            return said
        at = found.start("word")
        return said[:at] + said[at].upper() + said[at + 1 :]

    text = re.sub(r"\S+", word, text)
    return _PRONOUN.sub("I", text) if re.search(r"[a-zA-Z]{2}", text) else text


def _ends_sentence(word: str) -> bool:
    """Whether a sentence may begin behind `word`."""
    bare = word.rstrip("\"')]")
    if bare.endswith(("!", "?")):
        return True
    core = bare.removesuffix(".").lstrip("(\"'[").lower()
    known = core in _ABBREVIATIONS or core.isdigit() or core.endswith(".") or re.fullmatch(r"(?:\w\.)*\w", core)
    return bare.endswith(".") and (core == "i" or not known)
