"""A running server, as a command reaches it: its address, the key, and what went wrong."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
from yarl import URL

RICH_MISSING = (
    "rich is not installed, and this command draws with it: pip install 'aioserver[cli]'"
)
CONNECT_TIMEOUT = 10.0  # seconds for DNS, TCP and TLS together
MAX_TEXT = 300  # characters of a server's own words that are shown
MAX_ERROR_BYTES = 1 << 16  # of an error's body


class Unreachable(Exception):
    """No server there, or none that lets us in; the message is one line for people."""


@dataclass(frozen=True, slots=True)
class Told:
    """An error as the server told it. *retry_after* is in seconds; None: no promise."""

    code: str
    message: str
    retry_after: float | None = None


def address(text: str) -> str:
    """The base URL in *text*, without a slash at its end; `http://` may be left out.

    Raises:
        ValueError: not the address of a server.
    """
    url = URL(text if "://" in text else f"http://{text}")
    if url.user is not None:
        raise ValueError("a key goes into --key or AIOSERVER_KEY, not into the URL")
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError(f"{plain(text)} is not the URL of a server, as http://127.0.0.1:8000")
    return str(url.with_query(None).with_fragment(None)).rstrip("/")


def session(key: str | None) -> aiohttp.ClientSession:
    """A session without a limit of its own, and without a deadline: each caller sets his."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Authorization": f"Bearer {key}"} if key else None,
        timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT),
    )


def why(error: BaseException) -> str:
    """What went wrong on the way to the server, short; aiohttp's own texts are long."""
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno
        # a failed look-up of the host has no positive number
        text = os.strerror(number) if number and number > 0 else error.os_error.strerror
        return plain(text or error.os_error)
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return plain(str(error) or type(error).__name__)


def plain(text: object) -> str:
    """*text* from outside, cut, on one line and without control characters."""
    shown = "".join(one if one.isprintable() else " " for one in str(text)[: MAX_TEXT + 1])
    return shown if len(shown) <= MAX_TEXT else f"{shown[:MAX_TEXT]}…"


async def told(response: aiohttp.ClientResponse) -> Told:
    """The error in a response that is none of 200; its body is read, to a bound."""
    body = await response.content.read(MAX_ERROR_BYTES)
    given = response.headers.get("Retry-After", "")
    retry_after = float(given) if given.isascii() and given.isdigit() else None
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    return told_in(answer, f"http_{response.status}", retry_after)


def told_in(answer: Any, code: str, retry_after: float | None = None) -> Told:
    """The error in a body or event: OpenAI's object, ours; *code* where it names none."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        return Told(code, plain(error or ""), retry_after)
    return Told(plain(error.get("code") or code), plain(error.get("message") or ""), retry_after)
