"""A running server, as tools reach it: its URL, a key, a session, its errors."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import click
import orjson
from yarl import URL

from aioserver.client import faults
from aioserver.client.client import base_url
from aioserver.protocol.eventstream import Splitter, parse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aioserver.client.faults import Fault
    from aioserver.protocol.eventstream import ServerEvent

RICH_MISSING = (
    "rich is not installed, and this command draws with it: run pip install '.[cli]' in the clone"
    " of aioserver"
)
DEFAULT_URL = "http://127.0.0.1:8000"
# Seconds for DNS, TCP and TLS together.
CONNECT_TIMEOUT = 10.0
# Our server's response to a plain request on a TLS port.
SPEAK_TLS = "this port speaks TLS: use https://"
# Characters of a server's message that are shown.
MAX_TEXT = 300
# Bytes of one event or of a small answer, which may hold ten minutes of history with many providers.
MAX_EVENT_BYTES = 16 << 20
# The paths of the faces, for a server whose overview does not name them.
PATHS = {
    "websocket": "/ws/chat",
    "sse": "/sse/chat",
    "openai": "/v1",
    "responses_ws": "/v1/responses",
    "anthropic": "/v1",
}
# The faults of our key, by the error code of the server.
KEY_FAULTS = {
    "invalid_api_key": "does not know this key: see --key and AIOSERVER_KEY",
    "missing_api_key": "wants an API key: give it by --key or AIOSERVER_KEY",
}
JSON = {"Accept": "application/json"}


class Unreachable(Exception):
    """There is no server at the URL, or it refuses us; the message is one line for people."""


class KeyNeeded(Unreachable):
    """The server wants a key, and does not know ours, or we have none."""


def _check_url(_context: click.Context, _parameter: click.Parameter, text: str) -> str:
    try:
        return base_url(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


url_argument = click.argument("url", callback=_check_url, default=DEFAULT_URL)
url_option = click.option(
    "--url", callback=_check_url, default=DEFAULT_URL, show_default=True, help="Server to ask."
)
key_option = click.option(
    "--key",
    envvar="AIOSERVER_KEY",
    help="Client key, for a server that wants one.  [env: AIOSERVER_KEY]",
)


def session(key: str | None) -> aiohttp.ClientSession:
    """Open a session without a limit of connections and without a deadline: callers set their own.

    The caller must close it.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Authorization": f"Bearer {key}"} if key else None,
        timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT),
    )


class Answered(NamedTuple):
    """The answer to a small request: its status, its headers, and its JSON object, or {}.

    *reason* says why there is no answer: nothing came (the status is then 0), or the server
    redirects to another address.
    """

    status: int
    headers: Any
    content: dict[str, Any]
    took: float = 0.0
    path: str = ""
    reason: str = ""

    @property
    def text(self) -> str:
        """The path, and why it gave no answer, or else the status and the error code."""
        return f"GET {self.path}: {self.reason or f'HTTP {self.status} {self.code}'.rstrip()}"

    @property
    def code(self) -> str:
        """The error code of an aioserver; empty if the answer has none."""
        error = self.content.get("error")
        return printable(error.get("code") or "") if isinstance(error, dict) else ""

    @property
    def healthy(self) -> bool:
        """Whether it is the answer of a healthy aioserver."""
        return self.status == 200 and self.content.get("status") == "healthy"


async def get(
    session: aiohttp.ClientSession,
    url: str,
    limit: float = CONNECT_TIMEOUT,
    *,
    redirects: bool = False,
    **options: Any,
) -> Answered:
    """GET *url*, and read the answer, within *limit* seconds; follow *redirects* if wanted."""
    began, path = time.perf_counter(), URL(url).path
    try:
        async with (
            asyncio.timeout(limit),
            session.get(url, allow_redirects=redirects, **options) as response,
        ):
            body = await faults.read_body(response, MAX_EVENT_BYTES)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return Answered(0, {}, {}, path=path, reason=describe(error))
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        content = None
    content, reason = content if isinstance(content, dict) else {}, ""
    if response.status == HTTPStatus.BAD_REQUEST and SPEAK_TLS in str(content):
        reason = SPEAK_TLS
    elif 300 <= response.status < 400:
        target = response.headers.get("Location", "")
        reason = f"redirects to {target}: give that address, as a POST is not redirected"
    took = time.perf_counter() - began
    return Answered(response.status, response.headers, content, took, path, reason)


async def paths(session: aiohttp.ClientSession, url: str) -> dict[str, str] | None:
    """Return the path of each face from the server's public overview; None if the other side is no
    aioserver.

    Raises:
        Unreachable: nothing answered in time.
    """
    answer = await get(session, f"{url}/", redirects=True, headers=JSON)
    if answer.reason:
        raise Unreachable(f"{url} cannot be reached: {answer.reason}")
    endpoints = answer.content.get("endpoints")
    if not isinstance(endpoints, dict):
        return None
    usable = {
        face: path
        for face, path in endpoints.items()
        if isinstance(path, str) and path.startswith("/")
    }
    return PATHS | usable


async def check_key(session: aiohttp.ClientSession, url: str, key: str | None) -> None:
    """Ask for the models, which needs a key if other requests do, and costs nothing.

    Raises:
        KeyNeeded: the server does not know *key*, with which *session* was made, or there is none
            and it wants one.
        Unreachable: the server did not answer.
    """
    answer = await get(session, f"{url}/v1/models", redirects=True)
    if not answer.status:
        raise Unreachable(f"{url} cannot be reached: {answer.reason}")
    if answer.status == HTTPStatus.UNAUTHORIZED:
        raise KeyNeeded(f"{url} {KEY_FAULTS['invalid_api_key' if key else 'missing_api_key']}")


def describe(error: BaseException) -> str:
    """Return in a few words why the server was not reached, for a terminal."""
    text = faults.describe(error)
    if faults.UNTRUSTED in text:
        text += " (SSL_CERT_FILE=authority.pem trusts another authority)"
    return printable(text)


def printable(text: object) -> str:
    """Return *text* for a terminal: on one line, without control characters, cut to MAX_TEXT."""
    line = "".join(char if char.isprintable() else " " for char in str(text)[: MAX_TEXT + 1])
    return line if len(line) <= MAX_TEXT else f"{line[:MAX_TEXT]}…"


async def events(response: aiohttp.ClientResponse) -> AsyncGenerator[ServerEvent]:
    """Yield the events of a response to its end (WHATWG HTML 9.2).

    Raises:
        EventTooLong: one has more than MAX_EVENT_BYTES.
        aiohttp.ClientError, OSError: the connection is lost.
    """
    splitter = Splitter(MAX_EVENT_BYTES)
    async for data in response.content.iter_any():
        for event in parse(splitter.feed(data)):
            yield event


async def read_error(response: aiohttp.ClientResponse) -> Fault:
    """Read the error in a response whose status is not 200, up to a bound of its body; the
    server's message is made printable.
    """
    fault, _final = faults.refusal(
        response.status,
        response.headers,
        await faults.read_body(response, faults.MAX_ERROR_BYTES),
    )
    return dataclasses.replace(fault, code=printable(fault.code), message=printable(fault.message))
