"""What the HTTP handlers share: the id of a request, reading a body, writing an error."""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
from typing import TYPE_CHECKING, Any

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
    from aioserver.faces.admission import BodyHold

BODY_TIMEOUT = 15.0  # seconds for a whole body: aiohttp has no deadline for it
SERVER = "aioserver"
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_prefix = secrets.token_hex(6)
_numbers = itertools.count(1)


class Request(web.Request):
    """aiohttp's request; every one of ours is made as this (runner.py).

    *known_id*: see `request_id`. *begun*: the response whose head is on the way.
    """

    ATTRS = web.Request.ATTRS | frozenset(["begun", "known_id"])

    known_id: str = ""
    begun: web.StreamResponse | None = None


def request_id(request: web.BaseRequest) -> str:
    """The id of a request, for logs: the client's where it is harmless, else one of ours."""
    assert isinstance(request, Request)
    known = request.known_id
    if not known:
        given = request.headers.get("X-Request-Id")
        if given is not None and _ID.fullmatch(given):
            known = given
        else:
            known = f"{_prefix}-{next(_numbers):x}"
        request.known_id = known
    return known


async def read_json(request: web.Request, hold: BodyHold, max_bytes: int) -> tuple[bytes, Any]:
    """The body, as it came and as JSON.

    Raises:
        UnsupportedMediaType: not `application/json`, or compressed.
        RequestTooLarge: more than *max_bytes*.
        RequestTimeout: not whole within 15 s.
        InvalidJson: not JSON.
    """
    if "Content-Encoding" in request.headers:
        raise UnsupportedMediaType("a compressed body is not accepted")
    given = request.headers.get("Content-Type")
    if given != "application/json" and request.content_type != "application/json":
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


async def _collect(content: Any, hold: BodyHold, max_bytes: int) -> bytes:
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
    """*error* as an HTTP answer."""
    headers = error.headers()
    headers["Content-Type"] = "application/json"
    if error.force_close:
        headers["Connection"] = "close"
    response = web.Response(status=error.http_status, body=error.body(), headers=headers)
    if error.force_close:
        response.force_close()
    return response


def last_of_connection(
    request: web.Request, response: web.StreamResponse, *, streamed: bool = False
) -> None:
    """Tell the client that this is the last answer on its connection, where it is.

    A *streamed* body of HTTP/1.0 has neither chunks nor a length: only the close ends it.
    """
    connection: Any = request.protocol
    if connection.last or (streamed and request.version < HttpVersion11):
        response.headers["Connection"] = "close"
        response.force_close()
