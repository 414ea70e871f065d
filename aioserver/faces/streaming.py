"""A stream as the body of an HTTP response, to its end, for the SSE face and those of OpenAI's and
Anthropic's APIs.

The events go straight to the transport, without a task switch: each read of the provider's bytes
becomes one chunk (RFC 9112, 7.1). The head and the last chunk of a `ReadyStream` go the same way;
aiohttp writes those of any other response. A stream that has ended before its head could be sent
is written whole.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from aiohttp.http import HttpVersion11

from aioserver.faces.http import Request
from aioserver.faces.intake import begin_visit, end_visit
from aioserver.faces.ready import LAST_CHUNK, ReadyStream
from aioserver.faces.whole import flush
from aioserver.protocol import eventstream
from aioserver.streams.ending import run_all
from aioserver.streams.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from aioserver.faces.context import Context
    from aioserver.faces.ready import ReadyResponse
    from aioserver.streams.contracts import Queued
    from aioserver.streams.cursor import ConditionReader, Cursor
    from aioserver.streams.formats import Format
    from aioserver.streams.stream import Stream
    from aioserver.telemetry.tracer import Visit


async def follow(
    context: Context,
    request: web.Request,
    response: web.StreamResponse,
    stream: Stream,
    after: int,
    event_format: Format,
    *,
    opening: ConditionReader | None = None,
    heartbeat: bytes = eventstream.HEARTBEAT,
    render_wait: Callable[[Queued], bytes] | None = None,
) -> None:
    """Send the head of *response*, then the events of *stream* after event *after*, to its end.

    *opening* has read the stream until now, and hands it over to this reader. *heartbeat* is
    written after each `ping_interval` of silence. While the request waits, the result of
    *render_wait* is written instead, and also with the head.

    However this ends, the writer follows nothing afterwards: an event that is appended later would
    land inside the next response on this connection.

    Raises:
        ResumeGap: the events after *after* are no longer kept; nothing was sent then.
        ConnectionError: the client left before the head was sent.
    """
    gateway = context.gateway
    chat = context.settings.chat
    head = tail = b""
    if isinstance(response, ReadyStream):
        head, tail = response.head, LAST_CHUNK
    else:
        stream.locate(after)
        await response.prepare(request)
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client has left")
    writer = Writer(
        transport,
        request.writer.drain,
        context.outbox,
        send_timeout=chat.streams.send_timeout,
        on_drop=lambda reason: context.admission.dropped("http", reason),
        chunked=request.version >= HttpVersion11,
        head=head,
        tail=tail,
        on_unfollow=gateway.lifetime.reader_removed,
    )
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finished(_cursor: Cursor) -> None:
        # The handler may have been cancelled in this very iteration of the event loop.
        if not ended.done():
            ended.set_result(None)

    visit: Visit | None = None

    def beat() -> bytes:
        waits = stream.queued
        return heartbeat if waits is None or render_wait is None else render_wait(waits)

    beats = Heartbeat(writer, chat.websocket.ping_interval, beat)
    try:
        writer.follow(stream, after, event_format, on_end=finished)
        if opening is None:
            gateway.lifetime.reader_added(stream)
        else:
            opening.leave()
        if context.tracer is not None:
            visit = begin_visit(context, request, stream, after)
        if head:
            assert isinstance(request, Request)
            request.started = response
        context.wheel.add(beats, chat.websocket.ping_interval)
        writer.pump()
        if stream.queued is not None and render_wait is not None:
            writer.send(beat())
        writer.send_head()
        if not ended.done():
            await ended
        if writer.blocked:
            await writer.flush()
    finally:
        steps: list[Callable[[], object]] = [partial(context.wheel.remove, beats), writer.close]
        if visit is not None:
            steps.append(partial(end_visit, visit, stream))
        run_all(steps)


async def write_ended(
    context: Context,
    request: web.Request,
    response: ReadyResponse,
    stream: Stream,
    face: str,
) -> None:
    """Write *response* with all events of *stream*, which ended before it could be followed.

    Raises:
        ConnectionError: the client has left, or is dropped.
    """
    visit = None if context.tracer is None else begin_visit(context, request, stream)
    try:
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        # Written at once and not with other sockets' writes: the next request then finds this
        # connection idle.
        transport.write(response.first_piece(request))
        if transport.get_write_buffer_size():
            timeout = context.settings.chat.streams.send_timeout
            drop = partial(context.admission.dropped, face)
            await flush(transport, request.writer.drain, timeout, drop)
    finally:
        if visit is not None:
            end_visit(visit, stream)


class Heartbeat:
    """A member of the timer wheel that writes what *beat* returns after *interval* seconds without
    a write. It writes nothing while the client does not read: the beat would be outdated by the
    time it is read.
    """

    __slots__ = ("_beat", "_interval", "_writer", "bucket")

    def __init__(self, writer: Writer, interval: float, beat: Callable[[], bytes]) -> None:
        # Set by the wheel.
        self.bucket = 0
        self._writer = writer
        self._interval = interval
        self._beat = beat

    def visit(self, now: float) -> float | None:
        """Write the beat if it is due. Return the seconds until the next visit."""
        if self._writer.closed:
            return None
        silence = now - self._writer.last_write
        # The wheel rounds its time, so a visit may come a moment early.
        if silence < self._interval * 0.99:
            return self._interval - silence
        if not self._writer.blocked:
            self._writer.send(self._beat())
        return self._interval
