"""The HTTP application of `dpo-jax serve`: `/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/health`.

Shapes of requests, replies, streamed chunks and errors are those of the OpenAI API as its Python client reads them.
"""

import asyncio
import functools
import hmac
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from dpo_jax.complete.serving.openai_request import Asked, BadRequest, read
from dpo_jax.complete.serving.talker import Busy, Piece, Question, Talker, Token
from dpo_jax.errors import InputError

_PATIENCE = 0.5
"""Seconds between two looks whether a client that waits for a whole reply is still there."""


class _Refused(Exception):
    """What a request is answered with instead."""

    def __init__(self, status: int, message: str, kind: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def response(self) -> Response:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        headers = {"Retry-After": "1"} if self.status == 429 else {"WWW-Authenticate": "Bearer"}
        return JSONResponse({"error": error}, self.status, headers if self.status in (401, 429) else None)


@dataclass(frozen=True)
class _Reply:
    """One reply that is being made."""

    talker: Talker
    asked: Asked
    chat: bool
    id: str
    created: int

    @property
    def head(self) -> dict[str, Any]:
        return {"id": self.id, "created": self.created, "model": self.talker.model}

    def usage(self, tokens: int) -> dict[str, int]:
        prompt = sum(map(len, self.asked.prompts))
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """In the form of chats, or in that of completions."""
        if self.asked.logprobs is None:
            return None
        spelled = [self._spelled(token) for token in tokens]
        if self.chat:
            return {"content": spelled, "refusal": None}
        return {
            "tokens": [s["token"] for s in spelled],
            "token_logprobs": [s["logprob"] for s in spelled],
            "top_logprobs": [{t["token"]: t["logprob"] for t in reversed(s["top_logprobs"])} for s in spelled],
        }

    def _spelled(self, token: Token) -> dict[str, Any]:
        def one(id: int, logp: float) -> dict[str, Any]:
            text, raw = _spelling(self.talker.tokenizer, id)
            return {"token": text, "logprob": logp, "bytes": None if raw is None else list(raw)}

        tops = token.tops[: self.asked.logprobs]
        return {**one(token.id, token.logp), "top_logprobs": [one(*top) for top in tops]}

    def choice(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        """A whole choice."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": self.logprobs(tokens), "finish_reason": reason}

    def chunk(self, choices: list[dict[str, Any]], usage: Mapping[str, int] | None = None) -> str:
        """One event of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        body = {**self.head, "object": kind, "choices": choices}
        if self.asked.usage:
            body["usage"] = usage
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def delta(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        """What is new of a choice."""
        said: dict[str, Any] = {"text": piece.text}
        if self.chat:
            said = {"delta": {"role": "assistant"} if first else {}}
            if piece.text or first:
                said["delta"]["content"] = piece.text
        logprobs = self.logprobs(piece.tokens)
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the choice, what is new of it), until all are finished."""
        loop, found = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece | Exception]]()
        choices, questions = self.asked.question.choices, list[Question]()

        def delivery(first: int) -> Any:
            def deliver(piece: Piece | Exception) -> None:
                index = first if isinstance(piece, Exception) else first + piece.choice
                loop.call_soon_threadsafe(found.put_nowait, (index, piece))

            return deliver

        try:
            for i, prompt in enumerate(self.asked.prompts):
                question = replace(self.asked.question, prompt=prompt, deliver=delivery(i * choices))
                question.cancelled = type(question.cancelled)()  # each its own
                questions.append(question)
                self.talker.ask(question)
            left = choices * len(questions)
            while left:
                index, piece = await found.get()
                if isinstance(piece, Exception):
                    raise piece
                left -= piece.finish_reason is not None
                yield index, piece
        finally:
            for question in questions:
                question.cancelled.set()

    async def whole(self) -> dict[str, Any]:
        """The reply in one piece."""
        count = len(self.asked.prompts) * self.asked.question.choices
        texts, tokens = [""] * count, [list[Token]() for _ in range(count)]
        reasons: list[str | None] = [None] * count
        async for index, piece in self.pieces():
            texts[index] += piece.text
            tokens[index] += piece.tokens
            reasons[index] = piece.finish_reason
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self.choice(i, texts[i], tokens[i], reasons[i]) for i in range(count)]
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage(sum(map(len, tokens)))}

    async def events(self) -> AsyncIterator[str]:
        """The reply as it comes."""
        seen, tokens = set[int](), 0
        try:
            async for index, piece in self.pieces():
                tokens += len(piece.tokens)
                yield self.chunk([self.delta(index, piece, first=index not in seen)])
                seen.add(index)
        except Exception as error:  # the status has been sent: the client reads an error object from the stream
            yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error'}})}\n\n"
            return
        if self.asked.usage:
            yield self.chunk([], self.usage(tokens))
        yield "data: [DONE]\n\n"


@functools.cache
def _byte_of() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes (GPT-2's table) -> the bytes."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _spelling(tokenizer: PreTrainedTokenizerBase, id: int) -> tuple[str, bytes | None]:
    r"""The text and the bytes of a token; part of a character is written `bytes:\xe4\xbd`, as the OpenAI API does.

    Bytes are None where the vocabulary does not tell them.
    """
    text = tokenizer.decode([id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text, text.encode()
    token = tokenizer.convert_ids_to_tokens(id)
    assert isinstance(token, str)
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
        raw = bytes.fromhex(byte[1])
    elif all(character in _byte_of() for character in token):
        raw = bytes(_byte_of()[character] for character in token)
    else:
        return token, None
    return "bytes:" + "".join(f"\\x{b:02x}" for b in raw), raw


class _Server:
    """The handlers."""

    def __init__(self, talkers: Mapping[str, Talker], token: str | None, max_body: int):
        self._talkers, self._token, self._max_body, self._started = talkers, token, max_body, int(time.time())

    def _check_token(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self._token is not None and not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise _Refused(401, "the API key is missing or wrong", "invalid_request_error", code="invalid_api_key")

    async def _body(self, request: Request) -> Any:
        raw = bytearray()
        async for part in request.stream():
            raw += part
            if len(raw) > self._max_body:
                raise _Refused(413, f"the body has more than {self._max_body:,} bytes", "invalid_request_error")
        try:
            return json.loads(raw.decode())
        except (ValueError, RecursionError) as problem:
            raise BadRequest(f"the body is no JSON ({problem})") from problem

    def _talker(self, name: object) -> Talker:
        if not isinstance(name, str):
            raise BadRequest(f"model must name one of {', '.join(self._talkers)}", "model")
        if name not in self._talkers:
            message = f"there is no model {name[:200]!r} here; there are {', '.join(self._talkers)}"
            raise _Refused(404, message, "invalid_request_error", param="model", code="model_not_found")
        return self._talkers[name]

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        try:
            self._check_token(request)
            body = await self._body(request)
            talker = self._talker(body.get("model") if isinstance(body, dict) else None)
            # Templates and tokenizers take their time over a long prompt: not on the loop that serves the others.
            asked = await asyncio.to_thread(read, body, talker, chat=chat)
            kind = "chatcmpl" if chat else "cmpl"
            reply = _Reply(talker, asked, chat, f"{kind}-{uuid.uuid4().hex}", int(time.time()))
            if asked.stream:
                return await _streamed(reply.events())
            return await _while_there(request, reply)
        except _Refused as refused:
            return refused.response()
        except Busy as busy:
            return _Refused(429, f"{busy}; try again", "rate_limit_error", code="rate_limit_exceeded").response()
        except InputError as problem:
            param = getattr(problem, "param", None)
            return _Refused(400, str(problem), "invalid_request_error", param=param).response()
        except ClientDisconnect:
            return Response(status_code=499)
        except RuntimeError as error:
            return _Refused(500, str(error), "server_error").response()

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    def _told(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "dpo_jax"}

    async def models(self, request: Request) -> Response:
        try:
            self._check_token(request)
            if (name := request.path_params.get("model")) is not None:
                return JSONResponse(self._told(self._talker(name).model))
            return JSONResponse({"object": "list", "data": [self._told(name) for name in self._talkers]})
        except _Refused as refused:
            return refused.response()

    async def health(self, request: Request) -> Response:
        dead = [name for name, talker in self._talkers.items() if not talker.is_alive()]
        return JSONResponse({"status": "stopped" if dead else "ok", "stopped": dead}, 503 if dead else 200)


async def _streamed(events: AsyncIterator[str]) -> Response:
    """A stream, once its first piece is there: what is refused before that gets a status of its own."""
    first = await anext(events)

    async def all_of_them() -> AsyncIterator[str]:
        yield first
        async for event in events:
            yield event

    return StreamingResponse(all_of_them(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _while_there(request: Request, reply: _Reply) -> Response:
    """The whole reply; given up where the client goes away."""
    task = asyncio.ensure_future(reply.whole())
    try:
        while not (await asyncio.wait([task], timeout=_PATIENCE))[0]:
            if await request.is_disconnected():
                raise ClientDisconnect
        return JSONResponse(await task)
    finally:
        task.cancel()


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _Refused(error.status_code, message, "invalid_request_error").response()


def application(talkers: Mapping[str, Talker], *, token: str | None, max_body: int) -> Starlette:
    """The application.

    Args:
      talkers: by the names that requests call them; running.
      token: what clients must send as their API key; None: anybody may ask.
      max_body: most bytes of a request.
    """
    server = _Server(talkers, token, max_body)
    return Starlette(
        routes=[
            Route("/v1/models", server.models),
            Route("/v1/models/{model:path}", server.models),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/completions", server.complete, methods=["POST"]),
            Route("/health", server.health),
        ],
        exception_handlers={HTTPException: _unknown},
    )
