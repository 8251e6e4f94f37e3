"""Options of judges."""

import re
from dataclasses import dataclass

from dpo_jax.config.checks import Options, not_given, require


@dataclass(frozen=True, kw_only=True)
class EndpointConfig(Options):
    """An OpenAI-compatible endpoint: POST {url}/chat/completions. The key comes from the environment alone."""

    url: str | None = None
    """Such as https://api.openai.com/v1 or http://127.0.0.1:8000/v1."""
    model: str | None = not_given(needs="url")
    """What the endpoint calls the model."""
    key_variable: str | None = not_given("OPENAI_API_KEY", needs="url")
    """Environment variable that holds the key; without one nothing is sent. The key stands in no file and no log."""
    concurrency: int | None = not_given(8, needs="url")
    """Requests in flight at once."""
    per_minute: float | None = not_given(needs="url")
    """Most requests that are begun in a minute. Not given: no limit but the server's."""
    timeout: float | None = not_given(120.0, needs="url")
    """Seconds for one attempt, all of it."""
    attempts: int | None = not_given(6, needs="url")
    """Of one request, where a fault may pass: no connection, time-out, 429, 5xx, a body that is cut or no JSON."""
    longest_wait: float | None = not_given(120.0, needs="url")
    """Seconds: the longest wait between two attempts; a server that asks for more ends the command."""
    temperature: float | None = not_given(0.0, needs="url")
    """Of the answers."""
    top_p: float | None = not_given(1.0, needs="url")
    """Of the answers."""
    max_tokens: int | None = not_given(1024, needs="url")
    """Longest answer. One that was cut gives no verdict."""
    stream: bool | None = not_given(False, needs="url")
    """Ask for the answer piece by piece."""
    price_in: float | None = not_given(needs="url")
    """Price of a million tokens of prompts, in the currency of `budget`."""
    price_out: float | None = not_given(needs="url")
    """Price of a million tokens of answers."""
    budget: float | None = not_given(needs="url")
    """Most that all answers may cost, those of runs before included. What would go beyond is not asked: the command
    ends, and goes on with a larger budget."""

    def __post_init__(self) -> None:
        self.refuse_idle("endpoint.")
        require(self.url is None or self.model, "endpoint.model is missing: what the endpoint calls the model")
        self.at_least("endpoint.", concurrency=1, attempts=1, max_tokens=1)
        self.positive("endpoint.", "per_minute", "timeout", "longest_wait", "budget", "top_p")
        for name in ("price_in", "price_out", "temperature"):
            require((getattr(self, name) or 0) >= 0, f"endpoint.{name} must not be negative")
        priced = self.price_in is not None and self.price_out is not None
        require(self.budget is None or priced, "endpoint.budget needs endpoint.price_in and endpoint.price_out")
        name = self.resolved("key_variable")
        require(
            re.fullmatch(r"[A-Za-z_]\w{0,63}", name, re.ASCII),
            "endpoint.key_variable is the name of an environment variable, and not the key itself",
        )
