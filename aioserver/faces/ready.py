"""Responses whose head is made here, and written together with the first bytes of the body.

aiohttp's work for a head costs a tenth of a request's time: a dictionary, a signal, the serialization, and
for a stream two more writes. Here the ordinary head is made from one template, and a stream's last
chunk goes out with its last bytes. A response that is not ordinary (HTTP/1.0, a page's Origin, the last
one on a connection) is left to aiohttp: see `fits`.
"""

from __future__ import annotations

import time
from email.utils import formatdate
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http import HttpVersion11

from aioserver.faces.http import SERVER, last_on_connection, request_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aiohttp.abc import AbstractStreamWriter

# Bytes in the transport's buffer above which the handler waits until the client has read.
HIGH_WATER = 1 << 16
LAST_CHUNK = b"0\r\n\r\n"
_HEAD = f"HTTP/1.1 200 OK\r\nDate: {{}}\r\nServer: {SERVER}\r\nx-request-id: {{}}\r\n{{}}{{}}: {{}}\r\n\r\n"
_date = (0, "")


def date() -> str:
    """Return the value of the header `Date` (RFC 9110, 6.6.1); it is made once a second."""
    global _date  # noqa: PLW0603 - a cache of one value
    now = int(time.time())
    if _date[0] != now:
        _date = now, formatdate(now, usegmt=True)
    return _date[1]


def fits(request: web.Request) -> bool:
    """Return whether the head of the response to *request* is an ordinary one."""
    return (
        request.version == HttpVersion11
        and request.keep_alive
        and "Origin" not in request.headers
        and not last_on_connection(request)
    )


def _head(
    request: web.BaseRequest, headers: Mapping[str, str], framing: str, value: object
) -> bytes:
    lines = "".join([f"{name}: {text}\r\n" for name, text in headers.items()])
    return _HEAD.format(date(), request_id(request), lines, framing, value).encode("latin-1")


def pieces_of(body: bytes) -> Iterator[memoryview]:
    """Yield *body* in pieces of HIGH_WATER bytes at most, without a copy."""
    view = memoryview(body)
    for start in range(0, len(body), HIGH_WATER):
        yield view[start : start + HIGH_WATER]


class ReadyResponse(web.StreamResponse):
    """A 200 with a whole *body*, for a request that `fits`."""

    def __init__(self, body: bytes, headers: Mapping[str, str]) -> None:
        super().__init__()
        self._ready = body, headers

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Write the whole response, unless `pieces` were written.

        Raises:
            ConnectionResetError: the client has left.
        """
        if self._eof_sent:
            return None
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        for piece in self.pieces(request):
            transport.write(piece)
        if transport.get_write_buffer_size() > HIGH_WATER:
            await request.writer.drain()
        return None

    def pieces(self, request: web.BaseRequest) -> Iterator[bytes | memoryview]:
        """Yield the bytes of the response, HIGH_WATER of the body at most in each piece."""
        body, headers = self._ready
        self._keep_alive = True
        self._eof_sent = True
        self._body_length = len(body)
        head = _head(request, headers, "Content-Length", len(body))
        if len(body) <= HIGH_WATER:
            yield head + body
            return
        first, *others = pieces_of(body)
        yield head + first
        yield from others

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: `prepare` has written the whole response."""


class ReadyStream(web.StreamResponse):
    """A 200 in chunks, for a request that `fits`; `streaming.follow` writes all of it, head included."""

    def __init__(self, request: web.Request, headers: Mapping[str, str]) -> None:
        super().__init__()
        self.head = _head(request, headers, "Transfer-Encoding", "chunked")
        self._keep_alive = True
        # aiohttp must not write an end.
        self._eof_sent = True
