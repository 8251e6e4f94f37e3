"""What everything behind a URL needs: the URL checked, which answers are asked for again, and when."""

import datetime
import email.utils
import random

import httpx

from dpo_jax.errors import InputError

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses that may pass."""


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
