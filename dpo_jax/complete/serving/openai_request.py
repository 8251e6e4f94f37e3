"""The body of a request to `/v1/chat/completions` or `/v1/completions`, read strictly.

A field that is known and cannot be honoured is refused by name, one that is not known too; a field whose value says
what happens anyway is let through.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_jax.complete.serving.talker import Question, Talker
from dpo_jax.data.rows.messages import messages_of
from dpo_jax.errors import InputError
from dpo_jax.sample.live import ALTERNATIVES, Settings

MAX_CHOICES = 128
MAX_STOPS = 16
_DEFAULT_NEW = 16
"""`max_tokens` of `/v1/completions` where it is not given; a chat goes on to the end of the context."""

# Fields that change nothing here, whatever they hold: who asks, and where it is kept.
_IDLE = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
# Fields that change something elsewhere: let through with these values, which say what happens here.
_ONLY: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
}
_SHARED = frozenset("model max_tokens temperature top_p top_k min_p n stop seed stream stream_options logprobs".split())
_CHAT = _SHARED | {"messages", "top_logprobs", "max_completion_tokens"}
_PLAIN = _SHARED | {"prompt"}


class BadRequest(InputError):
    """A request that is answered with 400, and the field that is to blame."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
      prompts: ids of each (a chat has one).
      question: what is asked of each; its prompt and `deliver` are set by who asks.
      stream, usage: whether pieces are wanted as they come, and at their end what was used.
      logprobs: how many alternatives to each token are wanted; None: no log-probabilities at all.
    """

    prompts: tuple[tuple[int, ...], ...]
    question: Question
    stream: bool
    usage: bool
    logprobs: int | None


def _whole(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadRequest(f"{name} must be a whole number from {low} to {high}", name)
    return value


def _number(
    body: Mapping[str, Any], name: str, default: float, low: float, high: float, *, above: bool = False
) -> float:
    value = body.get(name)
    if value is None:
        return default
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not low <= value <= high or (above and value == low):
        raise BadRequest(f"{name} must be a number {'above' if above else 'from'} {low:g} to {high:g}", name)
    return float(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false", name)
    return bool(value)


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise BadRequest(f"stop must be a text or at most {MAX_STOPS} texts, none of them empty", "stop")
    return tuple(stops)


def _check_fields(body: Mapping[str, Any], known: frozenset[str]) -> None:
    for name, value in body.items():
        if name in known or name in _IDLE or value is None:
            continue
        if name not in _ONLY:
            raise BadRequest(f"{name} is not known here; leave it out", name)
        if value not in _ONLY[name]:
            raise BadRequest(f"{name} is not supported here; leave it out", name)


def _alternatives(body: Mapping[str, Any], chat: bool) -> int | None:
    if not chat:
        return _whole(body, "logprobs", 0, ALTERNATIVES)
    wanted = _whole(body, "top_logprobs", 0, ALTERNATIVES)
    if not _flag(body, "logprobs"):
        if wanted is not None:
            raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
        return None
    return wanted or 0


def _encoded(body: Mapping[str, Any], talker: Talker, chat: bool) -> list[list[int]]:
    if chat:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest('messages must be a list of at least one {"role": ..., "content": ...}', "messages")
        try:
            return [talker.chat.prompt_ids(messages_of(messages, "messages"))]
        except InputError as problem:
            raise BadRequest(str(problem), "messages") from problem
    prompt = body.get("prompt")
    several = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    if len(several) > MAX_CHOICES:
        raise BadRequest(f"prompt holds {len(several)} prompts; at most {MAX_CHOICES} go into one request", "prompt")
    return [_plain(one, talker) for one in several]


def _plain(prompt: Any, talker: Talker) -> list[int]:
    if isinstance(prompt, list) and prompt:
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < talker.vocab_size for i in prompt):
            raise BadRequest(f"prompt: token ids are whole numbers from 0 to {talker.vocab_size - 1}", "prompt")
        return prompt
    if not isinstance(prompt, str):
        raise BadRequest("prompt must be a text, a list of texts, a list of token ids or a list of those", "prompt")
    try:
        ids = talker.plain.prompt_ids(prompt)
    except InputError as problem:
        raise BadRequest(str(problem), "prompt") from problem
    if not ids:
        raise BadRequest("prompt has no token; give it a text", "prompt")
    return ids


def _room(prompts: Sequence[Sequence[int]], talker: Talker) -> int:
    """New tokens that fit behind the longest prompt."""
    longest = max(map(len, prompts))
    if longest >= talker.longest:
        raise BadRequest(
            f"the prompt has {longest} tokens, and {talker.model} is served with {talker.longest} in all", "messages"
        )
    return talker.longest - longest


def read(body: Any, talker: Talker, *, chat: bool) -> Asked:
    """What a request asks of `talker`. Raises `BadRequest`."""
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    _check_fields(body, _CHAT if chat else _PLAIN)
    prompts = _encoded(body, talker, chat)
    room = _room(prompts, talker)
    names = ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",)
    given = [n for n in (_whole(body, name, 1, 2**31 - 1) for name in names) if n is not None]
    if len(set(given)) == 2:
        raise BadRequest("max_tokens and max_completion_tokens say different things; leave one out", "max_tokens")
    new = given[0] if given else room if chat else min(room, _DEFAULT_NEW)
    if new > room:
        raise BadRequest(
            f"the prompt has {talker.longest - room} tokens, and with {new} new ones it exceeds the {talker.longest} "
            f"that {talker.model} is served with; ask for at most {room}",
            names[0] if body.get(names[0]) is not None else "max_tokens",
        )
    logprobs = _alternatives(body, chat)
    top_k = _whole(body, "top_k", -1, 2**31 - 1)
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise BadRequest("stream_options must be an object", "stream_options")
    streamed = _flag(body, "stream")
    if options is not None and not streamed:
        raise BadRequest("stream_options needs stream: true", "stream_options")
    settings = Settings(
        max_new_tokens=new,
        temperature=_number(body, "temperature", 1.0, 0, 2),
        top_k=top_k if top_k is not None and top_k > 0 else Settings(1).top_k,
        top_p=_number(body, "top_p", 1.0, 0, 1, above=True),
        min_p=_number(body, "min_p", 0.0, 0, 1),
        stop_tokens=talker.terminators,
        alternatives=bool(logprobs),
    )
    seed = _whole(body, "seed", -(2**63), 2**63 - 1)
    question = Question(
        prompts[0],
        settings,
        lambda _: None,
        choices=_whole(body, "n", 1, MAX_CHOICES) or 1,
        seed=secrets.randbelow(2**32) if seed is None else seed % 2**32,
        stop_strings=_stops(body),
        raw=not chat,
    )
    usage = bool(options) and _flag(options, "include_usage")
    return Asked(tuple(map(tuple, prompts)), question, streamed, usage, logprobs)
