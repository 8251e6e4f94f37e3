"""Whoever answers questions, an endpoint or a model of this machine, by its options; and answers out of replies.

A question is asked once more where no whole answer came.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jax.sharding import Mesh

from dpo_jax.complete.asking.chat_client import ChatClient, Question
from dpo_jax.complete.asking.local_model import LocalModel
from dpo_jax.complete.asking.reply_cache import Reply, ReplyCache
from dpo_jax.config import DSFTRun, JudgeRun, MTBenchJudgeRun, WriterConfig

Options = DSFTRun | JudgeRun | MTBenchJudgeRun | WriterConfig
"""Those that name an endpoint or a model, and how it answers."""

AGAIN = 1_000_003
"""Added to the seed of a question that is asked once more."""


class Asker(Protocol):
    """Whoever answers questions: `ChatClient`, or `LocalModel`."""

    def ask(self, questions: Sequence[Question], done: Callable[[int], None] = ...) -> list[Reply]: ...


def open_asker(options: Options, replies: Path, mesh: Mesh | None) -> ChatClient | LocalModel:
    """The endpoint of the options, or their model, whose weights are not read yet.

    replies, mesh: where replies are kept, and the devices of a model; an endpoint has none.

    Raises `InputError` for a URL or a model that is none.
    """
    cache = ReplyCache(replies)
    if options.endpoint.url is not None:
        return ChatClient(options.endpoint, cache)
    assert options.model is not None, "there is an endpoint or a model"
    assert mesh is not None, "which a model lies on"
    return LocalModel(
        options.model,
        cache,
        options.sample,
        mesh=mesh,
        batch_size=options.batch_size,
        dtype=options.dtype,
        template=options.template,
        date=options.date,
    )


class Answerer:
    """`open_asker`, of which a model is opened for the first question, and may be given up in between."""

    def __init__(self, options: Options, replies: Path, mesh: Callable[[], Mesh]):
        """`mesh`: makes the devices of a model. Raises `InputError` for a URL that is none."""
        self._open, self._mesh = partial(open_asker, options, replies), mesh
        self._asker = None if options.endpoint.url is None else self._open(None)

    def _opened(self) -> ChatClient | LocalModel:
        self._asker = self._asker or self._open(self._mesh())
        return self._asker

    def ask(self, questions: Sequence[Question], done: Callable[[int], None] = lambda _: None) -> list[Reply]:
        """The replies, in order. Raises `InputError`: see `ChatClient` and `LocalModel`."""
        return self._opened().ask(questions, done) if questions else []

    @property
    def weights(self) -> str | None:
        """The fingerprint of a model's weights, which are read for it; None of an endpoint."""
        return weights_of(self._opened())

    def close(self) -> None:
        """Give the weights of a model up."""
        if isinstance(self._asker, LocalModel):
            self._asker.close()
            self._asker = None

    @property
    def told(self) -> str:
        """What it cost so far, for the screen."""
        asker = self._asker
        if not isinstance(asker, ChatClient):
            return "" if asker is None else f"{asker.asked} written, {asker.cached} from the disk"
        tokens = f"{asker.prompt_tokens:,} + {asker.completion_tokens:,} tokens, cost {asker.cost:.4f}"
        return f"{asker.asked} requests, {asker.cached} from the disk, {tokens}"


def weights_of(asker: "Asker | None") -> str | None:
    """The fingerprint of a model's weights, which are read for it; None of an endpoint."""
    return asker.weights if isinstance(asker, LocalModel) else None


def deciding(options: Options, weights: str | None) -> dict[str, Any]:
    """All of an asker that decides what it replies: for the settings of a file that grows by replies.

    `weights`: see `weights_of`.
    """
    endpoint = options.endpoint
    return {
        "judge": [endpoint.url, endpoint.model, options.model],
        "weights": None if weights is None else [weights, options.dtype, options.template, options.date],
        "sample": asdict(options.sample),
        "endpoint": [endpoint.temperature, endpoint.top_p, endpoint.max_tokens],
    }


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
