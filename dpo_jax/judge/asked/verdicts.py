"""What a judge's reply says: a rating, two ratings, a verdict on two, ratings of a list, a checklist. Never guessed.

Every reader gives None where the reply has no defined reading: nothing that looks like a verdict, two that differ, one
outside the scale or on another scale ("8/10" where 5 is the most), a range ("7-8", "7 or 8"), a decimal comma, a
percentage. What is read:

* before anything else: full-width letters, digits and punctuation are the plain ones (NFKC), `**`, `__`, `#` and
  backticks are left out, 【】 are [], and what stands in <think> ... </think> is no part of the reply (one that was not
  closed leaves nothing);
* a rating: [[8.5]]; else a line or sentence that begins with a label ("Rating: 8", "Overall score: 8/10", "评分：8分");
  else "8/10" or "8 out of 10" anywhere; else a first or last line that is a number. Where there are brackets, a label
  that says another number makes two verdicts;
* two ratings: "8 9" on the first line (FastChat's first format), with any of , ; | between them;
* a verdict on two: [[A]], [[B]], [[C]] (a tie), and [[A>>B]], [[A>B]], [[A=B]] as in Arena-Hard; else [A]; else a label
  ("Verdict: A", "结论：平局") with nothing behind it that takes it back or names the other; else the whole reply;
* a list: UltraFeedback's blocks ("Output for Text 1", "Rating: 4", "Rationale: ..."), each text exactly once; N/A is no
  number; a Type where there is one;
* a checklist: "1. yes", "2：否", each item exactly once.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from dpo_jax.complete.asking.answers import without_reasoning

Side = Literal["A", "B", "tie"]

_NUMBER = r"\d{1,3}(?:\.\d+)?"
_BEFORE = r"(?<![\w.,/+\-\u2212\u2013\ufffd])"
_SCALE = r"(?:\s*分)?(?:\s*(?:/|out\s+of|of)\s*(?P<scale>\d+(?:\.\d+)?)(?![\w.]*\d)(?:\s*分)?)?"
_AFTER = (
    r"(?![A-Za-z_%\ufffd]|[.,/。点]?\d|\s*(?:[-\u2212\u2013\u2014~/]|to\b|or\b|and\b|或|到|至|、)\s*\d|\s*[%±]"
    r"|[^\S\n]+\d|[^\S\n]*(?:[;&|]|through\b)[^\S\n]*\d|[^\S\n]+if\b)"
)
_VALUE = re.compile(rf"[\[\s(\"']*(?P<value>{_NUMBER}){_SCALE}{_AFTER}")
_LABEL = re.compile(
    r"(?:^|[\n.;!?。;!?,|])[\s>*-]*(?:(?:so|therefore|thus|my|the|your|final|overall|total|quality|最终|综合|总体|总)[\s,]*)*"
    r"(?:rating|score|grade|评分|得分|分数|打分|评级)\s*(?:(?:for|of)\s+(?:the|this)\s+(?:response|answer))?\s*"
    r"(?::|=|\bis\b|为|是)\s*",
    re.IGNORECASE,
)
_DOUBLE, _SINGLE = re.compile(rf"\[\[\s*({_NUMBER})\s*\]\]"), re.compile(rf"(?<!\[)\[\s*({_NUMBER})\s*\](?!\])")
_FRACTION = re.compile(rf"{_BEFORE}({_NUMBER})\s*(?:分\s*)?(?:/|out\s+of)\s*(\d+(?:\.\d+)?)(?![\w/]|\.\d)")
_LINE = re.compile(rf"\s*(?P<value>{_NUMBER}){_SCALE}\s*[.。]?\s*")
_PAIR = re.compile(
    rf"\s*(?:(?:scores?|ratings?|评分|得分|分数)\s*:\s*)?({_NUMBER})(?:/(\d+))?(?:\s*[,;|、]\s*|\s+)({_NUMBER})(?:/(\d+))?\s*"
    r"[.。]?\s*",
    re.IGNORECASE,
)
_TIES = ("c", "tie", "draw", "equal", "平局", "平手", "相同")
_CHOICE = r"[ABC]|tie|draw|平局|平手|[AB]\s*(?:>>?|=|<<?)\s*[AB]"
_DOUBLE_CHOICE = re.compile(rf"\[\[\s*({_CHOICE})\s*\]\]", re.IGNORECASE)
_SINGLE_CHOICE = re.compile(rf"(?<!\[)\[\s*({_CHOICE})\s*\](?!\])", re.IGNORECASE)
# What may stand behind a choice that a label names (group 1): nothing that takes it back, or names the other one.
_ENDS = (
    r"\s*(?:$|[\n.!?。]|[,;(\u2013\u2014-](?!\s*(?!\1\b)(?:(?-i:[ABC])|tie|draw|but|though|or|and)\b)|because\b|since\b"
    r"|due\b|between\b"
    r"|(?:is\s+|was\s+)?(?:(?:the|clearly|much|slightly|overall)\s+)*(?:better|best|winner)\b|wins\b|更好|较好|更优|胜|因为)"
)
_LABELLED_CHOICE = re.compile(
    r"(?:^|[\n.;!?。])[\s>*-]*(?:(?:my|the|final|overall|最终)[\s,]*)*(?:verdict|winner|choice|decision|better(?:\s+(?:answer|"
    r"response|assistant))?|结论|判断|胜者|选择|更好的?(?:回答)?)\s*(?::|=|\bis\b|为|是)\s*(?:assistant\s+|response\s+|answer\s+|回答)?"
    rf"(?:an?\s+)?[\"'(\[]*({_CHOICE})[\"')\]]*(?={_ENDS})",
    re.IGNORECASE,
)
_WHOLE_CHOICE = re.compile(rf"\s*(?:assistant\s+|回答)?[\"'(]*({_CHOICE})[\"')]*\s*[.。]?\s*", re.IGNORECASE)
_HEAD = re.compile(
    r"^[ \t>*-]*(?:output\s+(?:for|of)\s+)?(?:text|response|answer|文本|回答|回复)\s*<?\s*(\d{1,2})\s*>?"
    r"\s*(?:的?(?:评分|输出|得分))?[ \t]*(?::[ \t]*|$)",
    re.IGNORECASE | re.MULTILINE,
)
_FIELD = re.compile(
    r"^[ \t>*-]*(rating|score|rationale|type|评分|得分|理由|类型)\s*:[ \t]*", re.IGNORECASE | re.MULTILINE
)
_FIELDS = {"score": "rating", "评分": "rating", "得分": "rating", "理由": "rationale", "类型": "type"}
_NOT_APPLICABLE = re.compile(r"\s*[\[(\"']*(?:n\s*/\s*a|not\s+applicable|不适用)[\])\"'.。]*\s*", re.IGNORECASE)
_ITEM = re.compile(
    r"^[ \t>*(-]*(?:q|item|第|问题|criterion\s+)?\s*(\d{1,2})\s*(?:[.):、]|条|题)+\s*(.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_YES, _NO = (
    re.compile(r"\b(?:yes|true)\b|是|满足|符合", re.IGNORECASE),
    re.compile(r"\b(?:no|false)\b|否", re.IGNORECASE),
)
_NOT_YES = re.compile(r"(?:不能?|未能?|没有?|无法|并?非)\s*(?:是|满足|符合)|\bnot\s+(?:yes|true)\b", re.IGNORECASE)
_PARTLY = re.compile(
    r"部分|大致|基本|不太|不完全|不够|是否|\b(?:partly|partially|half|almost|nearly|mostly|somewhat)\b"
    r"|\bnot\s+(?:exactly|entirely|fully|quite|really|completely|always|necessarily)\b",
    re.IGNORECASE,
)


class Rating(NamedTuple):
    """Of one text of a list.

    Attributes:
      value: None for N/A.
      rationale: of the rating; "" where there is none.
      types: UltraFeedback's identifiers of kinds of faults or merits; "" where there are none.
      types_rationale: why these.
    """

    value: float | None
    rationale: str = ""
    types: str = ""
    types_rationale: str = ""


def plain(reply: str) -> str:
    """`reply` as it is read: see the module."""
    reply = without_reasoning(reply)
    # NFKC would make 8½ an 81/2 and 8² an 82.
    odd = ("<fraction>", "<super>", "<sub>")
    text = "".join("\ufffd" if unicodedata.decomposition(c).startswith(odd) else c for c in reply)
    text = unicodedata.normalize("NFKC", text).translate({0x3010: "[", 0x3011: "]", 0x200B: None, 0xFEFF: None})
    return re.sub(r"\*\*|__|`|^[ \t]*#+[ \t]*", "", text, flags=re.MULTILINE).replace("*", " ")


def _one(values: Iterable[float | str | None]) -> float | str | None:
    """The one value that all are; None where they differ or one is None."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _scaled(value: str, scale: str | None, high: float) -> float | None:
    return float(value) if scale is None or float(scale) == high else None


def rating(reply: str, low: float, high: float) -> float | None:
    """The rating from `low` to `high` that a reply gives one response; None: unparsed."""
    text = plain(reply)
    labelled = [
        None if value is None else _scaled(value["value"], value["scale"], high)
        for label in _LABEL.finditer(text)
        if re.match(r"[\[\s(\"']*[-+]?\d", text[label.end() :])
        for value in [_VALUE.match(text, label.end())]
    ]
    bracketed = [float(x) for x in _DOUBLE.findall(text) or _SINGLE.findall(text)]
    lines = [line for line in text.splitlines() if line.strip()]
    tiers: tuple[Sequence[float | None], ...] = (
        [*bracketed, *labelled] if bracketed else (),
        labelled,
        [_scaled(value, scale, high) for value, scale in _FRACTION.findall(text)],
        [
            _scaled(found["value"], found["scale"], high)
            for line in dict.fromkeys(lines[:1] + lines[-1:])
            if (found := _LINE.fullmatch(line))
        ],
    )
    value = _one(next((tier for tier in tiers if tier), ()))
    return value if isinstance(value, float) and low <= value <= high else None


def two_ratings(reply: str, low: float, high: float) -> tuple[float, float] | None:
    """The ratings "a b" of two responses on the first line; None: unparsed. A second line "c d" must say the same."""
    lines = [line for line in plain(reply).splitlines() if line.strip()]
    found = [_PAIR.fullmatch(line) for line in lines]
    if not found or found[0] is None:
        return None
    said = {
        (_scaled(a, of_a, high), _scaled(b, of_b, high))
        for a, of_a, b, of_b in (x.groups() for x in found if x is not None)
    }
    a, b = said.pop()
    if said or a is None or b is None or not (low <= a <= high and low <= b <= high):
        return None
    return a, b


def _side(said: str) -> Side:
    said = re.sub(r"\s", "", said).lower()
    if said in _TIES or "=" in said:
        return "tie"
    if len(said) > 1:
        first, second = said[0], said[-1]
        said = first if ">" in said else second
    return "A" if said == "a" else "B"


def verdict(reply: str) -> Side | None:
    """Which of two responses a reply calls better; None: unparsed."""
    text = plain(reply)
    labelled = _LABELLED_CHOICE.findall(text)
    bracketed = _DOUBLE_CHOICE.findall(text) or _SINGLE_CHOICE.findall(text)
    said = bracketed + labelled if bracketed else labelled
    if not said and (whole := _WHOLE_CHOICE.fullmatch(text)):
        said = [whole[1]]
    if any(re.fullmatch(r"([ab])\W+\1", one.lower()) for one in said):
        return None  # "A>A"
    found = _one(map(_side, said))
    return found if found in ("A", "B", "tie") else None


def ratings(reply: str, count: int, low: float, high: float) -> list[Rating] | None:
    """The ratings of `count` texts in the order in which they were shown; None: unparsed, all of it."""
    text = plain(reply)
    heads = list(_HEAD.finditer(text))
    if heads:
        blocks = [(int(head[1]), part) for head, part in zip(heads, _parts(text, heads), strict=True)]
    else:
        fields = [(_name(field), field) for field in _FIELD.finditer(text)]
        if any(name == "type" for name, _ in fields):
            return None  # which Type belongs to which Rating is not said
        marks = [field for name, field in fields if name == "rating"]
        blocks = [(i, mark[0] + part) for i, (mark, part) in enumerate(zip(marks, _parts(text, marks), strict=True), 1)]
    if sorted(number for number, _ in blocks) != list(range(1, count + 1)):
        return None
    found = [_block(block, low, high) for _, block in sorted(blocks)]
    return None if any(one is None for one in found) else [one for one in found if one is not None]


def _name(field: re.Match[str]) -> str:
    return _FIELDS.get(field[1].lower(), field[1].lower())


def _parts(text: str, marks: Sequence[re.Match[str]]) -> list[str]:
    """What stands between the end of each mark and the start of the next."""
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return [text[mark.end() : end] for mark, end in zip(marks, ends, strict=False)]


def _block(block: str, low: float, high: float) -> Rating | None:
    """One text's part of a list. None: unparsed."""
    fields = list(_FIELD.finditer(block))
    said = [(_name(field), part.strip()) for field, part in zip(fields, _parts(block, fields), strict=True)]
    if not any(name == "rating" for name, _ in said):
        said = [("rating", block[: fields[0].start()] if fields else block.strip().partition("\n")[0]), *said]
    at = [i for i, (name, _) in enumerate(said) if name == "rating"]
    types = [value for name, value in said if name == "type"]
    if len(at) != 1 or len(types) > 1:
        return None
    value = said[at[0]][1].partition("\n")[0].strip()
    reasons = [[text for name, text in part if name == "rationale"] for part in (said[: at[0]], said[at[0] + 1 :])]
    rationale = " ".join(reasons[1]) if types or reasons[1] else " ".join(reasons[0])
    told = {
        "rationale": rationale,
        "types": types[0] if types else "",
        "types_rationale": " ".join(reasons[0]) if types else "",
    }
    if _NOT_APPLICABLE.fullmatch(value):
        return Rating(None, **told)
    match = re.fullmatch(rf"[\[(\"']*(?P<value>{_NUMBER}){_SCALE}[\])\"']*\s*[.。]?", value)
    number = None if match is None else _scaled(match["value"], match["scale"], high)
    return Rating(number, **told) if number is not None and low <= number <= high else None


def checklist(reply: str, count: int) -> list[bool] | None:
    """Whether each of `count` criteria is met; None: unparsed."""
    text = plain(reply)
    items = _ITEM.findall(text)
    if not items and count == 1:
        items = [("1", text)]
    if sorted(int(number) for number, _ in items) != list(range(1, count + 1)):
        return None
    found = [_yes(said) for _, said in sorted(items, key=lambda item: int(item[0]))]
    return None if any(one is None for one in found) else [bool(one) for one in found]


def _yes(said: str) -> bool | None:
    head = re.split(r"[.,;。;,(\n]|\s[-\u2013\u2014]\s", said.strip(), maxsplit=1)[0]
    head = head.rpartition(":")[2] if ":" in head else head
    if _PARTLY.search(head):
        return None
    head = _NOT_YES.sub(" no ", head)
    yes, no = _YES.search(head) is not None, _NO.search(head) is not None
    return yes if yes != no else None
