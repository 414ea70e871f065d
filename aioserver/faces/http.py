"""What the HTTP handlers share: the id of a request, reading a body, writing an error."""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web
from aiohttp.http import HttpVersion11

from aioserver.errors import (
    AioserverError,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)
from aioserver.protocol import messages

if TYPE_CHECKING:
    from aiohttp import StreamReader


# Seconds for a whole body: aiohttp has no deadline for it.
BODY_TIMEOUT = 15.0
# The value of the header `Server`.
SERVER = "aioserver"
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_prefix = secrets.token_hex(6)
_numbers = itertools.count(1)


class Hold(Protocol):
    """Counts the bytes of one body (admission.py)."""

    def grow(self, size: int) -> None:
        """Count another *size* bytes, or raise `ServerAtCapacity`."""


class Request(web.Request):
    """aiohttp's request with two attributes of ours; server/runner.py makes every request one.

    *known_id*: the id that `request_id` has returned before. *started*: the response whose head was sent, or is
    about to be.
    """

    ATTRS = web.Request.ATTRS | frozenset(["known_id", "started"])

    known_id: str = ""
    started: web.StreamResponse | None = None


def request_id(request: web.BaseRequest) -> str:
    """Return the id of *request* for logs: the client's `X-Request-Id` if it is harmless, or a new one."""
    assert isinstance(request, Request)
    log_id = request.known_id
    if not log_id:
        header = request.headers.get("X-Request-Id")
        if header is not None and _ID.fullmatch(header):
            log_id = header
        else:
            log_id = f"{_prefix}-{next(_numbers):x}"
        request.known_id = log_id
    return log_id


def last_on_connection(request: web.BaseRequest) -> bool:
    """Return whether the connection ends with this response; false on another server's connections."""
    return getattr(request.protocol, "last", False)


async def read_json(request: web.Request, hold: Hold, max_bytes: int) -> tuple[bytes, Any]:
    """Read the body, and return its bytes and their content as JSON. *hold* counts the bytes.

    Raises:
        UnsupportedMediaType: the body is not `application/json`, or is compressed.
        RequestTooLarge: the body has more than *max_bytes*.
        RequestTimeout: the body was not complete within BODY_TIMEOUT.
        ServerAtCapacity: see `Admission.grow`.
        InvalidJson: the body is no JSON.
    """
    if "Content-Encoding" in request.headers:
        raise UnsupportedMediaType("a compressed body is not accepted")
    header = request.headers.get("Content-Type")
    # For nearly all clients, comparing the header itself saves parsing it.
    if header != "application/json" and request.content_type != "application/json":
        raise UnsupportedMediaType("Content-Type must be application/json")
    length = request.content_length
    if length is not None and length > max_bytes:
        raise RequestTooLarge(f"a body of {length} bytes, at most {max_bytes}")
    content = request.content
    if content.is_eof():
        body = content.read_nowait()
        hold.grow(len(body))
    else:
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                body = await _collect(content, hold, max_bytes)
        except TimeoutError:
            raise RequestTimeout(f"the body did not come within {BODY_TIMEOUT} s") from None
    if len(body) > max_bytes:
        raise RequestTooLarge(f"a body of {len(body)} bytes, at most {max_bytes}")
    return body, messages.load(body)


async def _collect(content: StreamReader, hold: Hold, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := await content.readany():
        size += len(part)
        if size > max_bytes:
            raise RequestTooLarge(f"a body of more than {max_bytes} bytes")
        hold.grow(len(part))
        parts.append(part)
    return b"".join(parts)


def error_response(error: AioserverError) -> web.Response:
    """Return *error* as an HTTP response."""
    headers = error.headers()
    headers["Content-Type"] = "application/json"
    if error.force_close:
        headers["Connection"] = "close"
    response = web.Response(status=error.http_status, body=error.body(), headers=headers)
    if error.force_close:
        response.force_close()
    return response


def announce_close(
    request: web.Request, response: web.StreamResponse, *, streamed: bool = False
) -> None:
    """Announce in the head of *response* that the connection ends with it, if it does.

    The connection of an HTTP/1.0 client ends with a *streamed* body in any case: the body has neither
    chunks nor a length, and only the close ends it.
    """
    if last_on_connection(request) or (streamed and request.version < HttpVersion11):
        response.headers["Connection"] = "close"
        response.force_close()
