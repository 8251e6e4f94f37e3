"""What everything behind a URL needs: the URL checked, which answers are asked for again, and when."""

import asyncio
import contextlib
import datetime
import email.utils
import random
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any

import httpx

from dpo_jax.errors import InputError

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses that may pass."""
_SHOWN = 160
"""Characters of a server's words in a message."""


def checked_url(url: str, option: str, token: str) -> httpx.URL:
    """`url`, parsed. Raises `InputError` where it is none, or holds a password: variable `token` is for that."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InputError(f"{option} {url}: {error}") from error
    if parsed.userinfo:
        raise InputError(f"{option} {parsed.host}: leave the password out of the URL and set {token} instead")
    if parsed.scheme not in ("http", "https"):
        raise InputError(f"{option} {url}: begins with neither http:// nor https://")
    if not parsed.host:
        raise InputError(f"{option} {url}: names no host")
    return parsed


def refusal(answer: httpx.Response) -> str:
    """What a server's answer without a result says, in one line; of a redirect, which is not followed, where to."""
    if answer.has_redirect_location:
        return f"HTTP {answer.status_code}: moved to {answer.headers['location'][:_SHOWN]}; give that address"
    return f"HTTP {answer.status_code}: {' '.join(answer.text[:_SHOWN].split())}"


def retry_after(headers: httpx.Headers, now: datetime.datetime | None = None) -> float | None:
    """Seconds that a server asks to wait (RFC 9110, 10.2.3): a number or a date. None: it says nothing readable."""
    said = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(said)) if said.replace(".", "", 1).isdigit() else _until(said, now)
    except (ValueError, TypeError, OverflowError):
        return None


def _until(date: str, now: datetime.datetime | None) -> float | None:
    at = email.utils.parsedate_to_datetime(date)
    at = at if at.tzinfo else at.replace(tzinfo=datetime.UTC)
    return max(0.0, (at - (now or datetime.datetime.now(datetime.UTC))).total_seconds())


def backoff(attempt: int, first: float, longest: float, rng: random.Random) -> float:
    """Seconds before attempt `attempt` (from 1): first 2^(attempt - 1), at most `longest`, of which half is chance."""
    return min(longest, first * 2.0 ** (attempt - 1)) * (0.5 + 0.5 * rng.random())


class KeptHTTP:
    """An HTTP client and the event loop that it lives in, kept from one call to the next: certificates are read once,
    and connections stay open. Both end with this object."""

    def __init__(self, timeout: float, connections: int):
        """`timeout`: seconds of a request's steps; `connections`: at once."""
        self._options: dict[str, Any] = {
            "timeout": timeout,
            "limits": httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        }
        self._runner, self._clients = asyncio.Runner(), list[httpx.AsyncClient]()
        weakref.finalize(self, _end, self._runner, self._clients)

    def run(self, work: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        """Run a coroutine to its end, in a notebook too, whose own loop runs already. Raises what it raises."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._runner.run(self._plain(work))
            return
        with ThreadPoolExecutor(1) as thread:
            thread.submit(lambda: self._runner.run(self._plain(work))).result()

    async def _plain(self, work: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        if not self._clients:
            self._clients.append(httpx.AsyncClient(**self._options))
        try:
            await work(self._clients[0])
        except BaseExceptionGroup as group:  # of the tasks: the first says it all
            raise group.exceptions[0] from None


def _end(runner: asyncio.Runner, clients: list[httpx.AsyncClient]) -> None:
    async def close() -> None:
        for client in clients:
            await client.aclose()

    def end() -> None:
        runner.run(close())
        runner.close()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        end()
        return
    with contextlib.suppress(RuntimeError):  # no thread begins any more where the process ends: its end closes them
        thread = Thread(target=end)  # in a notebook, whose own loop runs here
        thread.start()
        thread.join()
