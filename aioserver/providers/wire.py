"""One request and its answer on a pooled connection: the fast path.

`ClientSession` costs a third of a request and a task switch per read. Here the connection's own
protocol parses the answer (httptools: llhttp) and pushes the body, as it comes, into a sink, from
`data_received` itself; the sink appends to the log, the log pokes the writers. One task per
request waits for one future, the end; nothing else is scheduled per read.

    Exchange.run: write the request → (1xx)* head → sink = on_head(status, headers)
                  → sink.feed(block)* → sink.end() → the connection goes back, or is closed

The connection goes back to the pool only after a clean end: the request was written whole, the
answer came whole with a length or in chunks, the peer wants to keep it, and nothing came behind.
Everything else aborts it at once; TLS has no farewell then (a polite close may take 30 s).

Bytes that come while no exchange is under way (a late 408, a close) abort the connection: aiohttp
would hand them to the next request as its answer. The connector's own proxy handshake (CONNECT)
still uses aiohttp's parser; it runs before any exchange and is passed to the base class.

Timeouts: each read within `read_timeout` of the last, by one lazy timer that looks at the time of
the last byte; each write that makes no progress within `write_timeout`, by a StallWatch.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import httptools
from aiohttp.client_proto import ResponseHandler

from aioserver.errors import (
    ProviderBadResponse,
    ProviderDisconnected,
    ReadTimeout,
    StaleConnection,
    WriteTimeout,
)
from aioserver.stall import StallWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp.connector import Connection

MAX_HEAD_BYTES = 65_536  # of an answer's head, interim answers included
UPLOAD_PIECE = 65_536  # written before the transport is asked whether it takes more
LINGER = 0.25  # seconds for the last chunk to follow a `[DONE]`; then the connection is closed


class Sink(Protocol):
    """Where an answer's body goes. Called from `data_received`; may raise AioserverError."""

    def feed(self, data: bytes) -> bool:
        """A part of the body, never empty. False: no more is wanted, the answer is complete."""

    def end(self) -> None:
        """The body is whole."""


class WireProtocol(ResponseHandler):
    """A pooled connection that pushes: to the exchange under way, if there is one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.exchange: Exchange | None = None
        self.reused = False
        self.resumed: asyncio.Future[None] | None = None
        self.idle_lost: Callable[[WireProtocol], None] | None = None

    def data_received(self, data: bytes) -> None:
        """Push *data* on; abort where nobody asked for it."""
        if self.exchange is not None:
            self.exchange.feed(data)
        elif self._parser is not None:
            super().data_received(data)  # a proxy answers CONNECT
        elif data and self.transport is not None:
            self.transport.abort()

    def resume_writing(self) -> None:
        """Wake the upload that waits."""
        super().resume_writing()
        if self.resumed is not None and not self.resumed.done():
            self.resumed.set_result(None)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End the exchange under way, or leave the pool."""
        super().connection_lost(exc)
        if self.exchange is not None:
            self.exchange.lost(exc)
        elif self.idle_lost is not None:
            self.idle_lost(self)


class Exchange:
    """One request and its answer. `run` may be called once.

    Always: after `run`, however it ended, the connection is released or closed and the protocol
    holds no exchange.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        read_timeout: float,
        write_timeout: float,
        on_head: Callable[[int, Mapping[str, str]], Sink],
    ) -> None:
        protocol = connection.protocol
        transport = connection.transport
        assert isinstance(protocol, WireProtocol)
        assert transport is not None
        self._connection = connection
        self._protocol = protocol
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._on_head = on_head
        self._read_timeout = read_timeout
        self._write_timeout = write_timeout
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._last_byte = 0.0
        self._written = False
        self._head_bytes = 0  # that came before the head was whole, some of the body perhaps
        self._header_bytes = 0
        self._headers: dict[str, str] = {}
        self._has_head = False
        self._interim = False
        self._framed = False  # the body has a length, or comes in chunks
        self._whole = False
        self._keep = False  # the provider wants to keep the connection
        self._surplus = False  # something came behind the answer
        self._lingering = False  # the sink has all it wants, the framing's end is awaited
        self._parts: list[bytes] = []
        self._sink: Sink | None = None

    async def run(self, request: bytes) -> None:
        """Send *request* (head and body) and push the answer to its sink.

        Cancelling is safe: the connection is closed at once.

        Raises:
            StaleConnection: a reused connection was dead, nothing of an answer had come.
            ProviderFault: any other; an error raised by the sink passes too.
        """
        self._protocol.exchange = self
        try:
            if not self._protocol.is_connected():
                self.lost(None)
            else:
                await self._upload(request)
            if not self._done.done():
                self._written = True
                self._last_byte = self._loop.time()
                self._timer = self._loop.call_later(self._read_timeout, self._look)
            await self._done
        finally:
            if not self._lingering:
                self._settle()

    def feed(self, data: bytes) -> None:
        """Bytes from the provider."""
        self._last_byte = self._loop.time()
        if not self._has_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._surplus = True
            if not self._whole:  # what follows a whole answer is not ours to judge
                if self._sink is not None and self._parts and not self._done.done():
                    self._push(self._sink)  # what was good before it, as in a read of its own
                fault = ProviderBadResponse("the provider's answer is not HTTP")
                self._fail(exc.__context__ or fault)  # the context: raised by a callback of ours
                return
        if self._done.done():
            self._linger()
        elif self._header_bytes > MAX_HEAD_BYTES or (
            self._sink is None and self._head_bytes > MAX_HEAD_BYTES
        ):
            self._fail(_head_too_long())
        elif self._sink is not None:
            self._push(self._sink)

    def _push(self, sink: Sink) -> None:
        try:
            if self._parts:
                parts, self._parts = self._parts, []
                if not sink.feed(parts[0] if len(parts) == 1 else b"".join(parts)):
                    self._finish()
                    return
            if self._whole:
                sink.end()
                self._finish()
        except Exception as exc:  # noqa: BLE001 - whatever it is ends this request and is told there
            self._fail(exc)

    def lost(self, exc: BaseException | None) -> None:
        """The connection is gone."""
        if self._done.done():
            self._settle()
        elif self._sink is not None and not self._framed and exc is None:
            self._surplus = self._whole = True  # a body that ends with its connection
            self._push(self._sink)
        elif not self._head_bytes and self._protocol.reused:
            self._fail(StaleConnection("the provider had closed the kept connection"))
        else:
            self._fail(ProviderDisconnected("the provider closed the connection early"))

    # What httptools calls, from feed_data.

    def on_message_begin(self) -> None:
        """A head begins; after a whole answer it is one that nobody asked for."""
        if self._whole:
            self._surplus = True
        else:
            self._headers = {}

    def on_status(self, reason: bytes) -> None:
        """A part of what nobody reads; it counts."""
        self._header_bytes += len(reason)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; of repeated ones the last counts. Or a trailer, which nobody reads."""
        self._header_bytes += len(name) + len(value) + 4  # ": " and the line's end
        if not self._has_head:
            self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head is whole: ask where the body goes."""
        if self._whole:
            return
        if self._header_bytes > MAX_HEAD_BYTES:
            raise _head_too_long()
        status = self._parser.get_status_code()
        self._interim = 100 <= status < 200
        if self._interim:
            if status == 101:
                raise ProviderBadResponse("the provider switched the protocol")
            return
        self._has_head = True
        encoding = self._headers.get("transfer-encoding", "").lower()
        self._framed = (
            "content-length" in self._headers or "chunked" in encoding or status in {204, 304}
        )
        self._sink = self._on_head(status, self._headers)

    def on_body(self, body: bytes) -> None:
        """A part of the body, the chunks' framing undone."""
        if not self._whole:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        """The answer is whole, unless it was an interim one."""
        if not self._interim and not self._whole:
            self._whole = True
            self._keep = self._parser.should_keep_alive()

    # The rest is ours.

    async def _upload(self, request: bytes) -> None:
        if len(request) <= UPLOAD_PIECE:
            self._transport.write(request)
            if self._protocol.writing_paused:
                await self._drained()
            return
        view = memoryview(request)
        for start in range(0, len(request), UPLOAD_PIECE):
            if self._done.done():
                return  # answered, or failed, before all was sent
            self._transport.write(view[start : start + UPLOAD_PIECE])
            if self._protocol.writing_paused:
                await self._drained()

    async def _drained(self) -> None:
        """Wait until the transport takes more, or all is over."""
        watch = StallWatch(self._loop, self._transport, self._write_timeout, self._stuck)
        try:
            while self._protocol.writing_paused and not self._done.done():
                self._protocol.resumed = resumed = self._loop.create_future()
                await asyncio.wait((resumed, self._done), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._protocol.resumed = None
            watch.stop()

    def _stuck(self) -> None:
        self._fail(WriteTimeout(f"the provider took nothing for {self._write_timeout} s"))

    def _look(self) -> None:
        """The read deadline, moved by each byte but looked at only when it seems to have come."""
        left = self._last_byte + self._read_timeout - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self._timer = None
            self._fail(ReadTimeout(f"the provider sent nothing for {self._read_timeout} s"))

    def _finish(self) -> None:
        """The sink has all it wants; the connection is free now, not when the task runs."""
        if not self._done.done():
            self._done.set_result(None)
            self._linger()

    def _linger(self) -> None:
        """Settle when the answer is whole; a `[DONE]` may come a moment before the last chunk."""
        if self._whole or self._parts or not self._written or self._done.cancelled():
            self._settle()
        elif not self._lingering:
            self._lingering = True
            self._stop_timer()
            self._timer = self._loop.call_later(LINGER, self._settle)

    def _fail(self, error: BaseException) -> None:
        if not self._done.done():
            self._done.set_exception(error)
        self._settle()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _settle(self) -> None:
        """Release or close the connection; what is done twice does nothing the second time."""
        protocol = self._protocol
        if protocol.exchange is not self:
            return
        protocol.exchange = None
        self._stop_timer()
        done = self._done
        ended_well = done.done() and not done.cancelled() and done.exception() is None
        if (
            ended_well
            and self._whole
            and self._written
            and self._framed
            and self._keep
            and not self._surplus
            and not self._parts
        ):
            protocol.reused = True
            self._connection.release()
        else:
            self._transport.abort()
            self._connection.close()


def _head_too_long() -> ProviderBadResponse:
    return ProviderBadResponse(f"a head of more than {MAX_HEAD_BYTES} bytes")
