"""A log as the body of an HTTP response, until its end: what the SSE and OpenAI faces share.

What lies between the head and the end goes straight to the transport, each read of the provider's
as one chunk (RFC 9112, 7.1), without a task switch. A `ReadyStream`'s head and end go with it, any
other response's are aiohttp's.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp.http import HttpVersion11

from aioserver.faces import context
from aioserver.faces.http import Request
from aioserver.faces.ready import LAST_CHUNK, ReadyStream
from aioserver.protocol import eventstream
from aioserver.streams.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from aioserver.streams.cursor import Cursor
    from aioserver.streams.formats import Format
    from aioserver.streams.stream import Stream


async def follow(
    request: web.Request,
    response: web.StreamResponse,
    stream: Stream,
    after: int,
    look: Format,
    *,
    first: bytes = b"",
    queued: Callable[[int, float], bytes] | None = None,
    begun: Callable[[], None] = lambda: None,
) -> None:
    """Send the head of *response*, *first*, and the events of *stream* behind *after* to its end.

    *begun* is called once the stream has this reader.

    However it ends, the writer follows nothing then: an append that came later would land inside
    the next response on this connection.

    Raises:
        ResumeGap: before anything is sent.
        ConnectionError: the client left before the head was sent.
    """
    app = request.app
    gateway = app[context.GATEWAY]
    chat = app[context.SETTINGS].chat
    stream.locate(after)
    head = tail = b""
    if isinstance(response, ReadyStream):
        head, tail = response.head, LAST_CHUNK
        assert isinstance(request, Request)
        request.begun = response
    else:
        await response.prepare(request)
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client has left")
    writer = Writer(
        transport,
        request.writer.drain,
        app[context.OUTBOX],
        send_timeout=chat.streams.send_timeout,
        on_drop=lambda why: app[context.ADMISSION].dropped("http", why),
        chunked=request.version >= HttpVersion11,
        head=head,
        tail=tail,
        on_unfollow=gateway.lifetime.reader_removed,
    )
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finished(_cursor: Cursor) -> None:
        if not ended.done():  # the handler may have been cancelled in this very turn
            ended.set_result(None)

    beat = Heartbeat(writer, chat.websocket.ping_interval)
    try:
        if first:
            writer.send(first)
        writer.follow(stream, after, look, render_position=queued, on_end=finished)
        begun()
        gateway.lifetime.reader_added(stream)
        app[context.WHEEL].add(beat, chat.websocket.ping_interval)
        writer.pump()
        writer.send_head()
        if not ended.done():
            await ended
        await writer.flush()
    finally:
        app[context.WHEEL].remove(beat)
        writer.close()


class Heartbeat:
    """A member of the wheel: a comment after *interval* seconds in which nothing was written."""

    __slots__ = ("_interval", "_writer", "bucket")

    def __init__(self, writer: Writer, interval: float) -> None:
        self.bucket = 0
        self._writer = writer
        self._interval = interval

    def visit(self, now: float) -> float | None:
        """Write the comment if it is due."""
        if self._writer.closed:
            return None
        silence = now - self._writer.last_write
        if silence < self._interval * 0.99:
            return self._interval - silence
        self._writer.send(eventstream.HEARTBEAT)
        return self._interval
