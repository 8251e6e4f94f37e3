"""Questions to whoever answers, an endpoint or a model of this machine; asked once more where no whole answer came."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from dpo_jax.complete.chat_client import Question
from dpo_jax.complete.reply_cache import Reply

AGAIN = 1_000_003
"""Added to the seed of a question that is asked once more."""


class Asker(Protocol):
    """Whoever answers questions: `ChatClient`, or `LocalModel`."""

    def ask(self, questions: Sequence[Question], done: Callable[[int], None] = ...) -> list[Reply]: ...


class Answer(NamedTuple):
    """What a question came to.

    Attributes:
      text: of the answer, without reasoning and blank ends; "" where there is none.
      fault: why it is no whole answer: "cut", "refused by the endpoint", "empty", or None.
      finish_reason: of the reply, where one is known; "length" where `text` ends where it was cut.
    """

    text: str
    fault: str | None
    finish_reason: str | None = None


def without_reasoning(reply: str) -> str:
    """`reply` without what stands in <think> ... </think>; one that was not closed leaves nothing behind it."""
    reply = re.sub(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", "", reply, flags=re.DOTALL | re.IGNORECASE)
    # Templates that open the reasoning themselves leave its end only.
    return reply.rpartition("</think>")[2] if "</think>" in reply else reply


def answer_of(reply: Reply, *, cut_allowed: bool = False) -> Answer:
    """What a reply says. `cut_allowed`: one that was cut counts as an answer, up to where it was cut."""
    text = without_reasoning(reply.text).strip()
    if reply.finish_reason in ("content_filter", "refusal"):
        return Answer("", "refused by the endpoint")
    if not reply.whole and not (cut_allowed and reply.finish_reason == "length"):
        return Answer("", "cut")
    return Answer(text, None, reply.finish_reason) if text else Answer("", "empty")


def answers(
    asker: Asker,
    questions: Sequence[Question],
    done: Callable[[int], None] = lambda _: None,
    *,
    cut_allowed: bool = False,
) -> list[Answer]:
    """The answer to each question, in order; where there is none, the question is asked once more with another seed.

    Raises what `asker` raises.
    """
    found = [answer_of(reply, cut_allowed=cut_allowed) for reply in asker.ask(questions, done)]
    again = [i for i, answer in enumerate(found) if answer.fault is not None]
    if again:
        seconds = [replace(questions[i], seed=(questions[i].seed or 0) + AGAIN) for i in again]
        for i, reply in zip(again, asker.ask(seconds), strict=True):
            found[i] = answer_of(reply, cut_allowed=cut_allowed)
    return found
