"""Taking in what clients send: the bytes of a body, bounded and under a deadline.

The bytes count against `max_body_bytes` from the first one. What is read of them comes in steps
(protocol/top_level.py, limits/turns.py).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aioserver.errors import (
    InvalidRequest,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)
from aioserver.limits.turns import in_turns
from aioserver.protocol import model_body
from aioserver.protocol.client_frames import MAX_ID_CHARACTERS
from aioserver.protocol.client_headers import collect
from aioserver.protocol.model_body import ModelBody
from aioserver.protocol.top_level import simple

if TYPE_CHECKING:
    from aiohttp import StreamReader, web

    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.protocol.client_headers import ClientHeaders

# Seconds for a whole body, or a whole WebSocket message: aiohttp has no deadline for either.
BODY_TIMEOUT = 15.0


async def read_body(request: web.Request, hold: BodyHold, max_bytes: int) -> bytes:
    """Read the body, and return its bytes, which *hold* counts.

    Raises:
        UnsupportedMediaType: the body is not `application/json`, or is compressed.
        RequestTooLarge: the body has more than *max_bytes*.
        RequestTimeout: the body was not complete within BODY_TIMEOUT.
        ServerAtCapacity: see `Admission.grow`.
    """
    if "Content-Encoding" in request.headers:
        raise UnsupportedMediaType("a compressed body is not accepted")
    header = request.headers.get("Content-Type")
    # For nearly all clients, comparing the header itself saves parsing it.
    if header != "application/json" and request.content_type != "application/json":
        raise UnsupportedMediaType("Content-Type must be application/json")
    content = request.content
    if content.is_eof():
        body = content.read_nowait()
        if len(body) <= max_bytes:
            hold.grow(len(body))
    else:
        length = request.content_length
        if length is not None and length > max_bytes:
            raise RequestTooLarge(f"a body of {length} bytes, at most {max_bytes}")
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                body = await _collect(content, hold, max_bytes)
        except TimeoutError:
            raise RequestTimeout(f"the body did not come within {BODY_TIMEOUT} s") from None
    if len(body) > max_bytes:
        raise RequestTooLarge(f"a body of {len(body)} bytes, at most {max_bytes}")
    return body


async def _collect(content: StreamReader, hold: BodyHold, max_bytes: int) -> bytes:
    # Not a list: a body that comes byte by byte would cost many times its size.
    body = bytearray()
    while part := await content.readany():
        if len(body) + len(part) > max_bytes:
            raise RequestTooLarge(f"a body of more than {max_bytes} bytes")
        hold.grow(len(part))
        body += part
    return bytes(body)


async def read_model_body(
    request: web.Request, hold: BodyHold, max_bytes: int
) -> tuple[ModelBody, bytes]:
    """Read a body that is a JSON object with a `model`, which *hold* counts; return it, and the bytes as they came.

    Raises:
        InvalidJson, InvalidRequest: as `ModelBody`.
        AioserverError: as `read_body`.
    """
    data = await read_body(request, hold, max_bytes)
    # Steps, for which nearly no body has a use, would cost each request a coroutine.
    body = ModelBody(data) if simple(data) else await in_turns(model_body.reading(data))
    return body, data


def idempotency_key(request: web.Request) -> str | None:
    """Return the `Idempotency-Key` of *request*, None if it has none.

    Raises:
        InvalidRequest: the key is empty, too long, or not printable.
    """
    key = request.headers.get("Idempotency-Key")
    if key is not None and (len(key) > MAX_ID_CHARACTERS or not key.isprintable() or not key):
        raise InvalidRequest(
            f"Idempotency-Key must have 1 to {MAX_ID_CHARACTERS} printable characters"
        )
    return key


def client_headers(context: Context, request: web.Request, api: str = "") -> ClientHeaders:
    """Return the headers of *request* that go on to a provider: its trace, and those that settings name.

    Those of the API, if it has any, whose names begin with *api*, are among them.
    """
    return collect(request.headers, context.router.passed_headers, api)
