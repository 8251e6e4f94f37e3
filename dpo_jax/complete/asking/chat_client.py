"""A client of OpenAI-compatible endpoints: many questions at once, each answered once, whatever the network does.

What may pass (no connection, a time-out, 408, 409, 425, 429, 5xx, a body that is cut or no JSON) is asked again after
Retry-After, which holds all requests, or an exponential back-off with jitter. What will not pass (401, 403, 404, 400)
ends the command: nothing new is begun, what is in flight is awaited and kept. Every reply is on the disk before it is
used, under a hash of all that decides it; so the same command goes on where it ended.
"""

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from dpo_jax.complete.asking.http import RETRIED, KeptHTTP, backoff, checked_url, refusal, retry_after
from dpo_jax.complete.asking.reply_cache import Reply, ReplyCache, key_of
from dpo_jax.config.commands.judge import EndpointConfig
from dpo_jax.errors import InputError
from dpo_jax.headers import mended

FIRST_WAIT = 1.0
"""Seconds before the second attempt, about; doubled from one to the next."""
_SHOWN = 160
# Faults of one prompt, and not of the command: no answer, and the others go on.
_OF_THE_PROMPT = {"content_filter": "content_filter", "content_policy_violation": "content_filter"}


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
      messages: [{"role": ..., "content": ...}].
      version: of the prompt that they were made from: another version asks anew.
      seed: sent along; another seed asks anew.
      logprobs: of how many first tokens the log-probability is wanted.
    """

    messages: tuple[Mapping[str, str], ...]
    version: str = ""
    seed: int | None = None
    logprobs: int = 0


class BudgetReached(InputError):
    """What is left to ask would cost more than the budget allows."""


class _NoAnswer(Exception):
    """A fault that may pass; `wait`: what the server asks for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class ChatClient:
    """Asks an endpoint.

    Attributes:
      asked: requests sent, second attempts included.
      cached: questions that were answered from the disk.
      prompt_tokens, completion_tokens: of all answers, those from the disk included, as far as the server says.
      uncounted: answers whose tokens the server did not say.
    """

    def __init__(self, config: EndpointConfig, cache: ReplyCache, *, first_wait: float = FIRST_WAIT):
        """Raises `InputError` for a URL that is none."""
        assert config.url is not None
        self._config, self._cache, self._first_wait = config, cache, first_wait
        self._variable = config.settled.key_variable
        self._key = os.environ.get(self._variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):  # an HTTP library would quote it in its refusal
            raise InputError(f"{self._variable} holds characters that no key has; set it again")
        checked_url(config.url, "endpoint.url", self._variable)
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        self._name = f"{config.url} ({config.model})"
        self._rng = random.Random(0)
        self._http = KeptHTTP(config.settled.timeout, config.settled.concurrency)
        self.asked = self.cached = self.prompt_tokens = self.completion_tokens = self.uncounted = 0

    @property
    def cost(self) -> float:
        """Of all answers; 0 where no prices are given."""
        return self._price(self.prompt_tokens, self.completion_tokens)

    def _price(self, prompt: float, completion: float) -> float:
        return (prompt * (self._config.price_in or 0) + completion * (self._config.price_out or 0)) / 1e6

    def body(self, question: Question) -> dict[str, Any]:
        """What is sent."""
        config = self._config
        body = {
            "model": config.model,
            "messages": [dict(message) for message in question.messages],
            "temperature": config.settled.temperature,
            "top_p": config.settled.top_p,
            "max_tokens": config.settled.max_tokens,
        }
        if question.seed is not None:
            body["seed"] = question.seed
        if question.logprobs:
            body |= {"logprobs": True, "top_logprobs": question.logprobs}
        if config.settled.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    def key(self, question: Question) -> str:
        """Under which the reply is kept: URL, body (but for how it is sent) and version of the prompt."""
        body = {name: value for name, value in self.body(question).items() if not name.startswith("stream")}
        return key_of({"url": self._url, "version": question.version, **body})

    def ask(self, questions: Sequence[Question], done: Callable[[int], None] = lambda _: None) -> list[Reply]:
        """The replies, in order; equal questions are asked once. `done` is told how many are there.

        Raises `InputError` for what will not pass, or did not in all attempts, and `BudgetReached`; replies that came
        are kept on the disk.
        """
        keys = [self.key(question) for question in questions]
        wanted = dict(zip(keys, questions, strict=True))
        found: dict[str, Reply] = {}
        for key in wanted:
            if (reply := self._cache.get(key)) is not None:
                found[key] = reply
                self._count(reply)
        self.cached += len(found)
        done(len(found))
        missing = {key: question for key, question in wanted.items() if key not in found}
        if missing:
            self._http.run(lambda http: _Asking(self, missing, found, done).all(http))
        return [found[key] for key in keys]

    def _count(self, reply: Reply) -> None:
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            self.uncounted += 1
            if self._config.budget is not None:
                raise InputError(f"{self._name}: does not count its tokens (usage), so endpoint.budget cannot be kept")
            return
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens

    def told(self, text: str) -> str:
        """A server's words in a message: one line, short, and without the key, which some repeat."""
        text = " ".join(text.replace(self._key, "***").split()) if self._key else " ".join(text.split())
        return text[:_SHOWN]

    async def attempt(self, http: httpx.AsyncClient, question: Question) -> Reply:
        """One request. Raises `_NoAnswer` for what may pass, `InputError` for what will not."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self.asked += 1
        try:
            async with asyncio.timeout(self._config.settled.timeout):
                answer = await http.post(self._url, json=self.body(question), headers=headers)
        except TimeoutError as error:
            raise _NoAnswer(f"no whole answer in {self._config.settled.timeout:g} s") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _NoAnswer(self.told(f"{type(error).__name__}: {error}")) from error
        if answer.status_code in RETRIED:
            raise _NoAnswer(self.told(refusal(answer)), retry_after(answer.headers))
        if answer.status_code != httpx.codes.OK:
            return self._refused(answer)
        try:
            if "text/event-stream" in answer.headers.get("content-type", ""):
                return _streamed(answer.text)
            return _reply(json.loads(answer.content))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise _NoAnswer(f"the body is no whole chat completion: {self.told(answer.text)}") from error

    def _refused(self, answer: httpx.Response) -> Reply:
        if answer.status_code in (400, 422):
            try:
                error = answer.json()["error"]
                code = f"{error.get('code')} {error.get('type')}".split()
            except (ValueError, KeyError, TypeError, AttributeError):
                code = []
            for name in code:
                if name in _OF_THE_PROMPT:
                    return Reply("", _OF_THE_PROMPT[name], prompt_tokens=0, completion_tokens=0)
        advice = ""
        if answer.status_code in (401, 403):
            advice = f"; {self._variable} {'is refused' if self._key else 'is not set'}"
        raise InputError(f"{self._name}: {self.told(refusal(answer))}{advice}")


class _Asking:
    """The questions of one call, in flight."""

    def __init__(
        self, client: ChatClient, missing: Mapping[str, Question], found: dict[str, Reply], done: Callable[[int], None]
    ):
        self._client, self._config, self._found, self._done = client, client._config, found, done
        self._left, self._total = list(missing.items())[::-1], len(missing) + len(found)
        self._reserved, self._flying = 0.0, 0
        self._next_start = self._paused_until = 0.0
        self._failure: InputError | None = None
        self._changed = asyncio.Condition()

    async def all(self, http: httpx.AsyncClient) -> None:
        """Ask them all. Raises `InputError`."""
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._config.settled.concurrency, len(self._left))):
                group.create_task(self._worker(http))
        if self._failure is not None:
            raise self._failure

    async def _worker(self, http: httpx.AsyncClient) -> None:
        while taken := await self._take():
            key, question, worst = taken
            try:
                reply = await self._answer(http, question)
                if reply is not None:
                    request = {"url": self._client._url, "version": question.version, **self._client.body(question)}
                    self._client._cache.put(key, request, reply)
                    self._client._count(reply)
                    self._found[key] = reply
                    self._done(len(self._found))
            except InputError as error:
                self._failure = self._failure or error
            finally:
                async with self._changed:
                    self._reserved, self._flying = self._reserved - worst, self._flying - 1
                    self._changed.notify_all()

    async def _take(self) -> tuple[str, Question, float] | None:
        """The next question, once the budget holds what it may cost at most; None: there is no more to do."""
        async with self._changed:
            while self._left and self._failure is None:
                key, question = self._left[-1]
                worst = self._worst(question)
                budget = self._config.budget
                if budget is None or self._client.cost + self._reserved + worst <= budget:
                    self._left.pop()
                    self._reserved, self._flying = self._reserved + worst, self._flying + 1
                    return key, question, worst
                if self._flying == 0:
                    self._failure = BudgetReached(
                        f"endpoint.budget {budget:g}: {len(self._found)} of {self._total} questions are answered for"
                        f" {self._client.cost:.4f}, and the next may go beyond; what is answered is kept: the same"
                        " command with a larger budget goes on"
                    )
                    return None
                await self._changed.wait()
            return None

    def _worst(self, question: Question) -> float:
        """The most that it may cost: a token of the prompt is at least a byte, beside some for the template."""
        size = sum(len(m["content"].encode()) + 16 for m in question.messages)
        return self._client._price(size, self._config.settled.max_tokens)

    async def _answer(self, http: httpx.AsyncClient, question: Question) -> Reply | None:
        """None where another question's failure ended all."""
        attempts, longest, reason = self._config.settled.attempts, self._config.settled.longest_wait, ""
        least = 0.0
        for attempt in range(attempts):
            await self._slot(least)
            if self._failure is not None:
                return None
            try:
                return await self._client.attempt(http, question)
            except _NoAnswer as fault:
                reason, wait = str(fault), fault.wait
            if attempt + 1 == attempts:
                break
            if wait is None:
                pause = backoff(attempt + 1, self._client._first_wait, longest, self._client._rng)
                least = time.monotonic() + pause
            elif wait > longest:
                raise InputError(
                    f"{self._client._name}: asks to wait {wait:.0f} s ({reason}), longer than endpoint.longest_wait"
                    f" {longest:g}; what is answered is kept: the same command goes on later"
                )
            else:
                self._paused_until = max(self._paused_until, time.monotonic() + wait)
        raise InputError(
            f"{self._client._name}: no answer after {attempts} attempts ({reason}); what is answered is kept: the same"
            " command goes on when the server is back"
        )

    async def _slot(self, least: float) -> None:
        """Wait until a request may begin: not before `least`, after what the server asked for, `per_minute` at most."""
        while (now := time.monotonic()) < (until := max(self._paused_until, self._next_start, least)):
            await asyncio.sleep(min(until - now, 0.5))
            if self._failure is not None:
                return
        if self._config.per_minute is not None:
            self._next_start = time.monotonic() + 60 / self._config.per_minute


def _tokens(usage: Any) -> dict[str, int | None]:
    usage = usage if isinstance(usage, dict) else {}
    found = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return {name: value if isinstance(value, int) and value >= 0 else None for name, value in found.items()}


def _reply(body: dict[str, Any]) -> Reply:
    """A chat completion's body as a reply. Raises `ValueError`, `KeyError`, `TypeError` and so on for another."""
    choice = body["choices"][0]
    message, finish = choice["message"], choice["finish_reason"]
    content, refusal = (_whole(message.get(name)) for name in ("content", "refusal"))
    if not isinstance(finish, str) or not (content is None or isinstance(content, str)):
        raise TypeError("content or finish_reason is of the wrong kind")
    reasoning = _whole(message.get("reasoning_content") or message.get("reasoning") or "")
    first = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
    top = tuple((str(one["token"]), float(one["logprob"])) for one in first)
    if isinstance(refusal, str) and refusal:
        content, finish = refusal, "refusal"
    return Reply(
        content or "", finish, reasoning if isinstance(reasoning, str) else "", top=top, **_tokens(body.get("usage"))
    )


def _whole(said: Any) -> Any:
    """A text without halves of surrogate pairs. All else as it is."""
    return mended(said) if isinstance(said, str) else said


def _streamed(text: str) -> Reply:
    """Server-sent events of a chat completion as a reply; without [DONE] and a finish_reason it was cut."""
    parts: dict[str, list[str]] = {"content": [], "reasoning_content": [], "reasoning": [], "refusal": []}
    finish, usage, logprobs, ended = None, None, None, False
    for line in text.splitlines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            ended = True
            break
        event = json.loads(data)
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            for name, found in parts.items():
                if isinstance(delta.get(name), str):
                    found.append(delta[name])
            finish = choice.get("finish_reason") or finish
            logprobs = logprobs or choice.get("logprobs")
    if not ended or finish is None:
        raise ValueError("the stream was cut")
    message = {name: "".join(found) for name, found in parts.items()}
    return _reply({"choices": [{"message": message, "finish_reason": finish, "logprobs": logprobs}], "usage": usage})
