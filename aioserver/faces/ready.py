"""Answers whose bytes are made here: the head with the body's first bytes, the end with its last.

What aiohttp does for a head costs a tenth of a request: a dictionary, a signal, serialization, and
for a stream two writes more. Here the ordinary case has its head from one template; what is not
ordinary (HTTP/1.0, a page's Origin, the last answer of a connection) stays aiohttp's: see `fits`.
"""

from __future__ import annotations

import time
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.http import HttpVersion11

from aioserver.faces.http import SERVER, request_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.abc import AbstractStreamWriter

HIGH_WATER = 1 << 16  # bytes in the transport from which the handler waits for the client
LAST_CHUNK = b"0\r\n\r\n"
_HEAD = f"HTTP/1.1 200 OK\r\nDate: {{}}\r\nServer: {SERVER}\r\nx-request-id: {{}}\r\n{{}}{{}}: {{}}\r\n\r\n"
_date = (0, "")


def date() -> str:
    """The `Date` header's value; made once a second."""
    global _date  # noqa: PLW0603 - a cache of one
    now = int(time.time())
    if _date[0] != now:
        _date = now, formatdate(now, usegmt=True)
    return _date[1]


def fits(request: web.Request) -> bool:
    """Whether the answer to *request* has nothing special in its head."""
    connection: Any = request.protocol
    return (
        request.version == HttpVersion11
        and request.keep_alive
        and "Origin" not in request.headers
        and not connection.last
    )


def _head(
    request: web.BaseRequest, fields: Mapping[str, str], framing: str, value: object
) -> bytes:
    lines = "".join([f"{name}: {text}\r\n" for name, text in fields.items()])
    return _HEAD.format(date(), request_id(request), lines, framing, value).encode("latin-1")


class ReadyResponse(web.StreamResponse):
    """A 200 with a whole *body*, for a request that `fits`."""

    def __init__(self, body: bytes, fields: Mapping[str, str]) -> None:
        super().__init__()
        self._ready = body, fields

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Write all of it.

        Raises:
            ConnectionResetError: the client has left.
        """
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        body, fields = self._ready
        transport.write(_head(request, fields, "Content-Length", len(body)) + body)
        self._keep_alive = True
        self._eof_sent = True
        self._body_length = len(body)
        if transport.get_write_buffer_size() > HIGH_WATER:
            await request.writer.drain()
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing: `prepare` has written it."""


class ReadyStream(web.StreamResponse):
    """A 200 in chunks, for a request that `fits`; who follows a stream writes all of it."""

    def __init__(self, request: web.Request, fields: Mapping[str, str]) -> None:
        super().__init__()
        self.head = _head(request, fields, "Transfer-Encoding", "chunked")
        self._keep_alive = True
        self._eof_sent = True  # nothing of it is aiohttp's to write
