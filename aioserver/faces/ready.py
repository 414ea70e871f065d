"""Responses whose head is made here, and written together with the first bytes of the body.

aiohttp's work for a head costs a tenth of a request's time: a dictionary, a signal, the
serialization, and for a stream two more writes. Here the ordinary head is made from one template,
and a stream's last chunk goes out with its last bytes. Any other response (HTTP/1.0, a page's
Origin, the last one on a connection) is left to aiohttp: see `fits`.
"""

from __future__ import annotations

import time
from email.utils import formatdate
from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from aiohttp.http import HttpVersion11

from aioserver.faces.http import SERVER, Request, last_on_connection, request_id, with_limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aiohttp.abc import AbstractStreamWriter

# Bytes in the transport's buffer above which the handler waits until the client has read.
HIGH_WATER = 1 << 16
LAST_CHUNK = b"0\r\n\r\n"
CHUNKED = "Transfer-Encoding: chunked"
# The first lines of a head, made once a second for `Date` (RFC 9110, 6.6.1), and that second.
_begun, _begun_at = "", 0
_line = ": ".join


def fits(request: web.Request) -> bool:
    """Return whether the head of the response to *request* is an ordinary one."""
    return (
        request.version == HttpVersion11
        and request.keep_alive
        and hdrs.ORIGIN not in request.headers
        and not last_on_connection(request)
    )


def _head(request: web.BaseRequest, headers: Mapping[str, str], framing: str) -> bytes:
    """Return the head with *headers*; *framing* is the line that says how the body ends."""
    global _begun, _begun_at
    assert isinstance(request, Request)
    if request.limits is not None:
        headers = with_limits(request, headers)
    now = int(time.time())
    if _begun_at != now:
        date = formatdate(now, usegmt=True)
        _begun, _begun_at = f"HTTP/1.1 200 OK\r\nDate: {date}\r\nServer: {SERVER}\r\n", now
    lines = "\r\n".join([*map(_line, headers.items()), framing])
    log_id = request.known_id or request_id(request)
    return f"{_begun}x-request-id: {log_id}\r\n{lines}\r\n\r\n".encode("latin-1")


class _Ready(web.StreamResponse):
    """A response that aiohttp does not write, and after which the connection goes on."""

    keep_alive = True

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing."""


class ReadyResponse(_Ready):
    """A 200 with a whole *body*, for a request that `fits`; in one chunk if it is *chunked*.

    *prepared*: whether it is written.
    """

    prepared = False

    def __init__(self, body: bytes, headers: Mapping[str, str], *, chunked: bool = False) -> None:
        super().__init__()
        if chunked:
            body = b"%x\r\n%b\r\n%b" % (len(body), body, LAST_CHUNK)
        self._ready = body, headers
        self._framing = CHUNKED if chunked else f"Content-Length: {len(body)}"

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Write the whole response, unless its pieces were written.

        Raises:
            ConnectionResetError: the client has left.
        """
        if self.prepared:
            return None
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        transport.write(self.first_piece(request))
        for piece in self.more_pieces():
            transport.write(piece)
        if transport.get_write_buffer_size() > HIGH_WATER:
            await request.writer.drain()
        return None

    @property
    def body_length(self) -> int:
        """The number of body bytes as they are written."""
        return len(self._ready[0])

    def first_piece(self, request: web.BaseRequest) -> bytes:
        """Return the head with the first HIGH_WATER bytes of the body; the caller writes the
        response.
        """
        body, headers = self._ready
        self.prepared = True
        head = _head(request, headers, self._framing)
        return head + (body if len(body) <= HIGH_WATER else memoryview(body)[:HIGH_WATER])

    def more_pieces(self) -> Iterator[memoryview]:
        """Yield the rest of the body, HIGH_WATER bytes at most in each piece."""
        view = memoryview(self._ready[0])
        for start in range(HIGH_WATER, len(view), HIGH_WATER):
            yield view[start : start + HIGH_WATER]


class ReadyStream(_Ready):
    """A 200 in chunks, for a request that `fits`.

    `streaming.follow` writes all of it, head included.
    """

    prepared = True

    def __init__(self, request: web.Request, headers: Mapping[str, str]) -> None:
        super().__init__()
        self.head = _head(request, headers, CHUNKED)

    async def prepare(self, _request: web.BaseRequest) -> None:
        """Do nothing."""
