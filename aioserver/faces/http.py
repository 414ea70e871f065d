"""What every HTTP handler shares: reading a body, writing an error, ids, limits, CORS.

`front` is the middleware in front of all handlers, and the border at which an error becomes an
answer. A header block or a request line over its limit, and a connection that has had its
`max_keepalive_requests`, are seen here, since aiohttp has no such limits of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import secrets
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.http import HttpVersion11

from aioserver.errors import (
    AioserverError,
    Denied,
    ExpectationFailed,
    HeadersTooLarge,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
    UriTooLong,
)
from aioserver.protocol import messages
from aioserver.provider_errors import ProviderFault

if TYPE_CHECKING:
    from aioserver.auth.callers import Origins
    from aioserver.auth.guard import Guard
    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import InEffect
    from aioserver.telemetry.metrics import Metrics

logger = logging.getLogger("aioserver.faces.http")

BODY_TIMEOUT = 15.0  # seconds for a whole body: aiohttp has no deadline for it
EXPOSED = "x-request-id, x-aioserver-provider, x-aioserver-attempts, retry-after, retry-after-ms"
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


def front(settings: InEffect, guard: Guard, origins: Origins, metrics: Metrics) -> Any:
    """The middleware in front of every handler; *guard* says who is let in."""

    def check(request: web.Request) -> None:
        limits = settings.chat.websocket.concurrency.uvicorn
        max_line, max_head = limits.h11_max_request_line_size, limits.h11_max_header_size
        connection: Any = request.protocol  # the listener's, which counts
        connection.requests += 1
        if connection.requests >= limits.max_keepalive_requests:
            connection.last = True
        line = len(request.method) + len(request.raw_path) + len(" HTTP/1.1 ")
        if line > max_line:
            raise UriTooLong(f"a request line of {line} bytes, at most {max_line}")
        head = sum([len(name) + len(value) + 4 for name, value in request.raw_headers])
        if head > max_head:
            raise HeadersTooLarge(f"{head} bytes of headers, at most {max_head}")

    @web.middleware
    async def shield(request: web.Request, handler: Any) -> web.StreamResponse:
        connection: Any = request.protocol
        try:
            check(request)
            guard.admit(request)
            if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
                return preflight(request)
            response: web.StreamResponse = await handler(request)
        except AioserverError as error:
            asked = isinstance(error, ProviderFault) and error.provider
            if not asked and not error.counted:  # else it has a record
                metrics.count_error(error)
            if isinstance(error, Denied):
                guard.refused(request, error)
            response = error_response(error)
        except web.HTTPException as exc:
            fault = _ours(exc, request)
            metrics.count_error(fault)
            response = error_response(fault)
            if isinstance(exc, web.HTTPMethodNotAllowed):
                response.headers["Allow"] = ", ".join(sorted(exc.allowed_methods))
        except ConnectionError:
            raise  # the client left while its answer began: aiohttp ends the connection
        except Exception:
            logger.exception(
                "bug in a handler", extra={"fields": {"request_id": request_id(request)}}
            )
            metrics.bugs.value += 1
            response = error_response(InternalError("internal error"))
        assert isinstance(request, Request)
        begun = request.begun
        if begun is not None and begun is not response:
            if request.transport is not None:
                request.transport.abort()  # a second head would be taken for a part of the body
            return begun
        if not response.prepared:
            last_of_connection(request, response)
        elif connection.last and response.keep_alive:  # not known when its head was sent
            connection.linger()
        return response

    def preflight(request: web.Request) -> web.Response:
        headers = {
            "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Max-Age": "600",
        }
        asked = request.headers.get("Access-Control-Request-Headers", "")
        if asked.isascii() and asked.isprintable():
            headers["Access-Control-Allow-Headers"] = asked
        return web.Response(headers=headers)

    async def dress(request: web.Request, response: web.StreamResponse) -> None:
        assert isinstance(request, Request)
        request.begun = response
        headers = response.headers
        headers["Server"] = SERVER
        headers["x-request-id"] = request_id(request)
        if "Origin" in request.headers:
            headers.update(origins.cors(request.headers))
            headers["Access-Control-Expose-Headers"] = EXPOSED

    return shield, dress


def _ours(exc: web.HTTPException, request: web.Request) -> AioserverError:
    match exc.status:
        case 404:
            return NotFound(f"no such path: {request.path[:200]}")
        case 405:
            return MethodNotAllowed(f"{request.method} is not for this path")
        case 413:
            return RequestTooLarge("the body is too large")
        case 417:
            return ExpectationFailed("Expect may be 100-continue and nothing else")
    return InvalidRequest(exc.reason)
