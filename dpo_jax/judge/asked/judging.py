"""Rows of a prompt and its responses, put to a judge, and what it said of them.

rating, checklist  a question for each response;
expected           likewise, and the score is read from the probabilities of the first token: the sum of p(s) s over
                   the scores s, with p scaled to sum to 1 (G-Eval, Liu et al. 2023); unparsed where all scores
                   together have less than `LEAST_MASS`;
pair               two questions, one in each order: a response wins where both say so, else it is a tie (as in
                   FastChat); where one reply is unparsed there is no verdict;
list               one question for all responses, in an order drawn from the seed and the row, mapped back.

A reply without a defined reading (`verdicts.py`), or that was cut or refused, is asked for once more with another seed
and a key of its own; then it is unparsed, counted and kept. No score is guessed.
"""

import logging
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from dpo_jax.complete.asking.answers import Asker
from dpo_jax.complete.asking.chat_client import Question
from dpo_jax.complete.asking.reply_cache import Reply
from dpo_jax.data.rows.messages import Message
from dpo_jax.errors import InputError
from dpo_jax.judge.asked import verdicts
from dpo_jax.judge.asked.judge_prompts import JudgePrompt

log = logging.getLogger(__name__)

LEAST_MASS = 0.1
FIRST_TOKENS = 20
"""Likeliest first tokens that `expected` looks at: what endpoints give at most."""
AGAIN = 1
"""Seed of the second question, added to that of the first."""
SHARES = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": (0.5, 0.5)}
"""A verdict on two -> the scores of both."""
ONE_SCORE = 0.95
"""A judge that gives this share of its scores the same value is warned about."""


class Item(NamedTuple):
    """A row to be judged. `reference`: a right answer, where the prompt asks for one; `columns`: for functions."""

    number: int
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    reference: str | None = None
    columns: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Judgement:
    """What was said of a row.

    Attributes:
      scores: of each response, in the row's order; None where unparsed or N/A. Of a pair 1, 0, or .5 each.
      verdict: of a pair: "a", "b", "tie" or None.
      flipped: of a pair: whether the two orders contradict each other; None where one is unparsed.
      unparsed: questions without a reading.
      replies: [{"order", "reply", "finish_reason", "read"}], of second questions too.
    """

    scores: tuple[float | None, ...]
    verdict: str | None
    flipped: bool | None
    unparsed: int
    replies: tuple[dict[str, Any], ...]

    def as_row(self) -> dict[str, Any]:
        """For a file."""
        pair = {"verdict": self.verdict, "flipped": self.flipped} if len(self.scores) == 2 else {}
        return {"scores": list(self.scores), **pair, "unparsed": self.unparsed, "replies": list(self.replies)}


def _orders(item: Item, prompt: JudgePrompt, seed: int) -> list[tuple[int, ...]]:
    count = len(item.responses)
    if prompt.ask == "pair":
        return [(0, 1), (1, 0)]
    if prompt.ask == "list":
        order = list(range(count))
        random.Random(f"{seed} {item.number}").shuffle(order)
        return [tuple(order)]
    return [(i,) for i in range(count)]


def _question(item: Item, order: Sequence[int], prompt: JudgePrompt, criteria: Sequence[str]) -> Question:
    shown = [item.responses[i] for i in order]
    asked = prompt.question(item.messages)
    values = {"question": asked, "instruction": asked, "low": f"{prompt.low:g}", "high": f"{prompt.high:g}"}
    values |= {"answer": shown[0], "completion": shown[0], "count": str(len(shown))}
    values |= dict(zip(("answer_a", "answer_b"), shown, strict=False))
    values |= {f"text_{i}": text for i, text in enumerate(shown, 1)}
    values["texts"] = "\n\n".join(f"<{prompt.text} {i}>\n{text}" for i, text in enumerate(shown, 1))
    values["criteria"] = "\n".join(f"{i}. {text}" for i, text in enumerate(criteria, 1))
    if item.reference is not None:
        values |= {"ref_answer_1": item.reference, "world_knowledge": item.reference}
    try:
        first = FIRST_TOKENS if prompt.ask == "expected" else 0
        return Question(prompt.messages(values), version=prompt.version, logprobs=first)
    except KeyError as error:
        name = error.args[0]
        advice = "a column `reference`" if name in ("ref_answer_1", "world_knowledge") else "other rows or prompts"
        raise InputError(
            f"row {item.number}: the prompt {prompt.name} has a place {{{name}}}: it needs {advice}"
        ) from None


def read(reply: Reply, order: Sequence[int], prompt: JudgePrompt, criteria: Sequence[str]) -> Any:
    """What a reply says, as JSON: a number; "A", "B" or "tie"; a list of ratings; a list of yes and no. None: unparsed.

    What was cut or refused says nothing.
    """
    if prompt.ask == "expected":
        return expected_score(reply.top, prompt.low, prompt.high)
    if not reply.whole:
        return None
    if prompt.ask == "rating":
        return verdicts.rating(reply.text, prompt.low, prompt.high)
    if prompt.ask == "pair":
        return verdicts.verdict(reply.text)
    if prompt.ask == "checklist":
        return verdicts.checklist(reply.text, len(criteria))
    found = verdicts.ratings(reply.text, len(order), prompt.low, prompt.high)
    return None if found is None else [one._asdict() for one in found]


def expected_score(top: Sequence[tuple[str, float]], low: float, high: float) -> float | None:
    """sum of p(s) s / sum of p(s) over the whole numbers s from `low` to `high` among first tokens and their
    log-probabilities (tokens " 4" and "4" are one number); None where sum p(s) is below `LEAST_MASS`."""
    chances: dict[int, float] = {}
    for token, logprob in top:
        if token.strip().isdecimal() and token.isascii() and low <= int(token) <= high:
            chances[int(token)] = chances.get(int(token), 0.0) + math.exp(logprob)
    mass = sum(chances.values())
    return sum(score * p for score, p in chances.items()) / mass if mass >= LEAST_MASS else None


def judge(
    items: Sequence[Item],
    prompt: JudgePrompt,
    asker: Asker,
    *,
    seed: int = 0,
    criteria: Sequence[str] = (),
    done: Callable[[int], None] = lambda _: None,
) -> list[Judgement]:
    """What `asker` says of each of `items`.

    `seed`: of the order of lists, and of second questions; `criteria`: of a checklist; `done` is told how many
    questions are answered.

    Raises `InputError` for a row that the prompt does not fit, and what `asker` raises.
    """
    calls = [(i, order) for i, item in enumerate(items) for order in _orders(item, prompt, seed)]
    for item in items:
        if prompt.ask == "pair" and len(item.responses) != 2:
            raise InputError(
                f"row {item.number}: {len(item.responses)} responses; a pair has two: --ask list takes more"
            )
        if not item.responses:
            raise InputError(f"row {item.number}: no response to judge")
        if prompt.ask == "list" and "text_4" in prompt.places and len(item.responses) != 4:
            raise InputError(f"row {item.number}: {len(item.responses)} responses; {prompt.name} takes four")
    questions = [_question(items[i], order, prompt, criteria) for i, order in calls]
    replies = asker.ask(questions, done)
    found = [read(reply, order, prompt, criteria) for reply, (_, order) in zip(replies, calls, strict=True)]
    told: list[list[dict[str, Any]]] = [[_told(o, r, f)] for (_, o), r, f in zip(calls, replies, found, strict=True)]
    again = [k for k, value in enumerate(found) if value is None]
    if again:
        seconds = [replace(questions[k], seed=seed + AGAIN) for k in again]
        for k, reply in zip(again, asker.ask(seconds), strict=True):
            found[k] = read(reply, calls[k][1], prompt, criteria)
            told[k].append(_told(calls[k][1], reply, found[k]))
    per_item: list[list[int]] = [[] for _ in items]
    for k, (i, _) in enumerate(calls):
        per_item[i].append(k)
    return [
        _judgement(len(item.responses), prompt, [(calls[k][1], found[k]) for k in ks], [t for k in ks for t in told[k]])
        for item, ks in zip(items, per_item, strict=True)
    ]


def _told(order: Sequence[int], reply: Reply, value: Any) -> dict[str, Any]:
    return {"order": list(order), "reply": reply.text, "finish_reason": reply.finish_reason, "read": value}


def _judgement(
    count: int, prompt: JudgePrompt, found: Sequence[tuple[Sequence[int], Any]], told: Sequence[dict[str, Any]]
) -> Judgement:
    unparsed = sum(value is None for _, value in found)
    scores: list[float | None] = [None] * count
    if prompt.ask == "pair":
        said = [
            None if value is None else value if value == "tie" else "ab"[order["AB".index(value)]]
            for order, value in found
        ]
        if unparsed:
            return Judgement(tuple(scores), None, None, unparsed, tuple(told))
        verdict = said[0] if said[0] == said[1] else "tie"
        return Judgement(SHARES[str(verdict)], verdict, said[0] != said[1], 0, tuple(told))
    for order, value in found:
        if value is None:
            continue
        if prompt.ask == "list":
            for place, one in zip(order, value, strict=True):
                scores[place] = one["value"]
        else:
            scores[order[0]] = sum(value) / len(value) if prompt.ask == "checklist" else value
    verdict = side_of(scores)
    return Judgement(tuple(scores), verdict, None, unparsed, tuple(told))


def side_of(scores: Sequence[float | None]) -> str | None:
    """Of two scores: "a", "b" or "tie", whichever is larger; None where one is missing, or there are not two."""
    if len(scores) != 2 or scores[0] is None or scores[1] is None:
        return None
    return "tie" if scores[0] == scores[1] else "a" if scores[0] > scores[1] else "b"


def one_score(scores: Sequence[float | None]) -> tuple[float, float] | None:
    """(value, share) where nearly all of ten scores or more are one value: such a judge tells nothing apart."""
    given = [score for score in scores if score is not None]
    if len(given) < 10:
        return None
    value, count = Counter(given).most_common(1)[0]
    return (value, count / len(given)) if count / len(given) >= ONE_SCORE else None


def family(model: str) -> str:
    """Of a model's name: the letters that its last part begins with: gpt of openai/gpt-4o, llama of Llama-2-7b."""
    match = re.match(r"[a-z]+", model.lower().rstrip("/").rpartition("/")[2])
    return match[0] if match else model.lower()


def warn_of_family(judge_name: str, models: set[str]) -> None:
    """Say so where a judge is of the family of models that it judges."""
    own = sorted(name for name in models if family(name) == family(judge_name))
    if own:
        log.warning(
            "the judge %s is of the family of %s, which it judges: judges favour their own (Zheng et al. 2023)",
            judge_name,
            ", ".join(own[:4]),
        )


def contestants(row: Mapping[str, Any]) -> set[str]:
    """Names of the models that wrote a row's responses, where it says so."""
    found = [row.get(name) for name in ("model", "model_a", "model_b", "chosen_model", "rejected_model")]
    found += row.get("models") or [] if isinstance(row.get("models"), list) else []
    for value in row.values():
        if isinstance(value, list):
            found += [entry.get("model") for entry in value if isinstance(entry, dict)]
    return {name for name in found if isinstance(name, str) and name}
