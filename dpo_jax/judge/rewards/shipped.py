"""Rewards that come with the package; each is written KIND or KIND:WHAT.

vader              sentiment, from -1 to 1 (Hutto & Gilbert 2014)
length             hundreds of characters
regex:PATTERN      1 where Python's re finds the pattern, else 0
language:CODE      share of the letters that belong to the script of a language, such as language:zh; of a language
                   without a script of its own, such as language:fr, 1 where trigrams say so (py3langid), else 0
exact:COLUMN       1 where the whole response is the row's value in COLUMN (or one of a list), else 0; what counts as
                   equal is `right_answers.same`
numeric:COLUMN     1 where the last numbers of the two are equal (to 1e-6), such as "#### 42" of GSM8K
math:COLUMN        1 where math-verify finds the two answers equal (LaTeX, sets, fractions); an extra
json, json:FILE    1 where the whole response is JSON, and satisfies the JSON schema in FILE; an extra
format:PATTERN     1 where Python's re matches the whole response (. is any character), else 0
ramp:A:B           1 up to A characters, 0 from B on, linear between (B < A: 0 up to B, 1 from A on)
repetition:N       -(share of the response's N-grams of words that occurred in it before), 0 to -1
run:COMMAND        what a command of the user says, see `judge/rewards/command.py`

Those of a COLUMN give None for a row without a value.
"""

import contextlib
import importlib.util
import json
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.data.sources.attributes import identify, languages
from dpo_jax.errors import InputError
from dpo_jax.judge.rewards import math_answers
from dpo_jax.judge.rewards.command import Command
from dpo_jax.judge.rewards.plain_numbers import NUMBER, clean
from dpo_jax.judge.rewards.right_answers import is_missing, near, same
from dpo_jax.judge.rewards.user_code import PythonFunction

# Beginnings of the Unicode names of the letters of a language; only languages that their script tells apart.
SCRIPTS = {
    "ar": ("ARABIC",),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK UNIFIED", "CJK COMPATIBILITY"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "th": ("THAI",),
    "zh": ("CJK UNIFIED", "CJK COMPATIBILITY"),
}

_PASSED = ("PATH", "LANG", "LD_LIBRARY_PATH", "PYTHONHOME")
"""What Python itself may need of the environment."""


class OfText:
    """A function of each response alone."""

    everywhere = False

    def __init__(self, identity: str, function: Callable[[str], float]):
        self.identity, self._function = identity, function

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [self._function(text) for text in responses]


class OfColumn:
    """A function of responses and of one column of their rows: (responses, values, none of them None) -> numbers."""

    everywhere = False

    def __init__(self, spec: str, column: str, function: Callable[[list[str], list[Any]], Sequence[float]]):
        """`spec`: as it is written. Raises `InputError` without a column."""
        if not column:
            kind = spec.rstrip(":")
            raise InputError(f"--reward {spec}: name the column of the right answers, such as {kind}:answer")
        self.identity, self.column, self._function = spec, column, function

    def check_columns(self, prompts: Sequence[Prompt]) -> None:
        """Raise `InputError` where no row has the column."""
        there = sorted({name for prompt in prompts for name in prompt.columns})
        if self.column not in there:
            raise InputError(
                f"--reward {self.identity}: {self.column!r} is no column of the prompts; they have"
                f" {', '.join(there) or 'none beside the prompt'}"
            )

    def without(self, prompts: Sequence[Prompt]) -> list[int]:
        """Places of the prompts of which it says None."""
        return [i for i, prompt in enumerate(prompts) if is_missing(prompt.columns.get(self.column))]

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        values = [prompt.columns.get(self.column) for prompt in prompts]
        at = [i for i, value in enumerate(values) if not is_missing(value)]
        found: list[float | None] = [None] * len(values)
        for i, score in zip(at, self._function([responses[i] for i in at], [values[i] for i in at]), strict=True):
            found[i] = score
        return found


# ---------------------------------------------------------------- functions of a text, and of a text and a right answer


class Vader:
    """VADER (Hutto & Gilbert 2014): a sentiment lexicon with rules for negation and emphasis."""

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, text: str) -> float:
        """The compound score: -1 most negative, 0 neutral, 1 most positive."""
        return float(self._analyzer.polarity_scores(text)["compound"])


def share_of_script(text: str, language: str) -> float:
    """Share of the letters of `text` that belong to the script of `language`; 0 where there is no letter."""
    letters = [character for character in text if character.isalpha()]
    own = [x for x in letters if unicodedata.name(x, "").startswith(SCRIPTS[language])]
    return len(own) / len(letters) if letters else 0.0


def is_same(text: str, right: Any) -> float:
    """1 where the text is the right answer, or one of a list of them."""
    answers = right if isinstance(right, list | tuple) else [right]
    return float(any(same(text, str(answer)) for answer in answers))


def last_number(text: str) -> str | None:
    """The last number of a text: 1,234.5 and 1e-3 are numbers, the 3 of 5-3 is not negative."""
    found = NUMBER.findall(clean(text))
    return found[-1] if found else None


def is_same_number(text: str, right: Any) -> float:
    """1 where the last numbers are equal to 1e-6 (relative, or 1e-9)."""
    said, wanted = last_number(text), last_number(str(right))
    return float(said is not None and wanted is not None and near(said, wanted))


def ramp(length: float, one: float, zero: float) -> float:
    """1 at a length of `one` and beyond, 0 at `zero` and beyond, linear between them."""
    return min(max((length - zero) / (one - zero), 0.0), 1.0)


def repetition(text: str, n: int) -> float:
    """-(1 - distinct / all) of the n-grams of lower-case words; 0 of a text with fewer words.

    Yeo et al. 2025 (arXiv 2502.03373), as TRL's and Open-R1's repetition penalty with a greatest penalty of -1.
    """
    words = text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) - 1.0 if grams else 0.0


def parsed_json(text: str) -> Any:
    """What JSON the whole text is; raises `ValueError` where it is none. NaN and Infinity are none."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


# ---------------------------------------------------------------- by name


def shipped(spec: str, *, timeout: float | None, memory: int | None) -> Any:
    """The reward function that `spec` names, or None where it is none of these.

    `timeout`: seconds; `memory`: MiB of a command. Raises `InputError` for what cannot be used.
    """
    kind, colon, rest = spec.partition(":")
    match kind:
        case "vader" if not colon:
            return OfText(spec, Vader())
        case "length" if not colon:
            return OfText(spec, lambda text: len(text) / 100)
        case "regex":
            found = compiled(spec, rest)
            return OfText(spec, lambda text: float(found.search(text) is not None))
        case "language":
            return OfText(spec, _language(spec, rest))
        case "exact":
            return OfColumn(spec, rest, lambda texts, values: list(map(is_same, texts, values)))
        case "numeric":
            return OfColumn(spec, rest, lambda texts, values: list(map(is_same_number, texts, values)))
        case "math" if colon:
            return _math(spec, rest, timeout)
        case "json":
            return _json(spec, rest)
        case "format" if colon:
            pattern = compiled(spec, rest, re.DOTALL)
            return OfText(spec, lambda text: float(pattern.fullmatch(text) is not None))
        case "ramp":
            one, zero = _lengths(spec, rest)
            return OfText(spec, lambda text: ramp(len(text), one, zero))
        case "repetition":
            if not (rest.isascii() and rest.isdigit() and int(rest)):
                raise InputError(f"--reward {spec}: write repetition:N, words of an n-gram, such as repetition:3")
            return OfText(spec, lambda text: repetition(text, int(rest)))
        case "run" if colon:
            return Command(spec, rest, timeout, memory)
        case _:
            return None


def compiled(spec: str, pattern: str, flags: int = 0) -> "re.Pattern[str]":
    """A regular expression of the user. Raises `InputError`."""
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise InputError(f"--reward {spec}: {error}") from error


def _language(judge: str, code: str) -> Callable[[str], float]:
    """Share of the letters in the language's script, where that tells it from others; else 1 where trigrams do."""
    if code in SCRIPTS:
        return lambda text: share_of_script(text, code)
    if code not in languages():
        raise InputError(f"--reward {judge}: {code!r} is no language that is told apart; such as en, fr or zh")
    return lambda text: float(bool(text.strip()) and identify(text)[0] == code)


def _lengths(spec: str, rest: str) -> tuple[int, int]:
    words = rest.split(":")
    if len(words) != 2 or not all(word.isascii() and word.isdigit() for word in words) or words[0] == words[1]:
        raise InputError(f"--reward {spec}: write ramp:A:B, two lengths in characters: 1 at A, 0 at B")
    return int(words[0]), int(words[1])


def _math(spec: str, column: str, timeout: float | None) -> OfColumn:
    if importlib.util.find_spec("math_verify") is None:
        raise InputError(f"--reward {spec}: needs math-verify: pip install 'dpo_jax[math]'")
    # In a process of its own: simplifying an expression of the model may take for ever. No secret is in its reach.
    environment = {name: os.environ[name] for name in _PASSED if name in os.environ}
    verified = PythonFunction(f"{math_answers.__file__}:verified", timeout, environment=environment)

    def scores(texts: list[str], values: list[Any]) -> Sequence[float]:
        nothing = Prompt((), "")
        return verified([nothing._replace(columns={"right": str(value)}) for value in values], texts)

    return OfColumn(spec, column, scores)


def _json(spec: str, file: str) -> OfText:
    if not file:
        return OfText("json", lambda text: float(_satisfies(spec, text, None)))
    if importlib.util.find_spec("jsonschema") is None:
        raise InputError(f"--reward {spec}: needs jsonschema: pip install 'dpo_jax[json]'")
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    schema = _schema(spec, file)
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
        validator = kind(schema, registry=Registry())  # one that fetches nothing
        with contextlib.suppress(Unresolvable):  # told where a response needs it
            validator.is_valid({})
    except SchemaError as error:
        raise InputError(f"--reward {spec}: {file} is no JSON schema: {error.message[:80]}") from error
    except RecursionError as error:
        raise InputError(f"--reward {spec}: {file}: refers to itself without end, or is nested too deep") from error
    except ValueError as error:  # of an $id that is no URI
        raise InputError(f"--reward {spec}: {file} is no JSON schema: {error}") from error
    return OfText(f"json:{json.dumps(schema, sort_keys=True)}", lambda text: float(_satisfies(spec, text, validator)))


def _schema(spec: str, file: str) -> Any:
    """What a file holds, if it may be a schema."""
    try:
        schema = parsed_json(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--reward {spec}: {file}: {error}") from error
    if not isinstance(schema, dict | bool):
        raise InputError(
            f"--reward {spec}: {file} is no JSON schema: it holds {json.dumps(schema)[:40]}, not an object"
        )
    named = schema.get("$schema", "") if isinstance(schema, dict) else ""
    if not isinstance(named, str):
        raise InputError(
            f"--reward {spec}: {file} is no JSON schema: its $schema is {json.dumps(named)[:40]}, not a URI"
        )
    return schema


def _satisfies(spec: str, text: str, validator: Any) -> bool:
    try:
        value = parsed_json(text)
    except ValueError:
        return False
    if validator is None:
        return True
    from referencing.exceptions import Unresolvable

    try:
        return validator.is_valid(value)
    except Unresolvable as error:
        raise InputError(f"--reward {spec}: the schema refers to what it does not hold: {str(error)[:80]}") from error
    except (RecursionError, ArithmeticError):  # of the response's making: the schema was tried when it was read
        return False
