"""One request and its answer on a pooled connection: the fast path.

`ClientSession` costs a third of a request and a task switch per read. Here the connection's own
protocol parses the answer (http1.py) and pushes the body, as it comes, into a sink, from
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

Timeouts: each read within `read_timeout` of the last, by one lazy timer a connection that looks at
the time of the last byte; each write that makes no progress within `write_timeout`, by a WriteWatchdog.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp.client_proto import ResponseHandler

from aioserver.limits.write_watchdog import WriteWatchdog
from aioserver.provider_errors import (
    ProviderDisconnected,
    ReadTimeout,
    StaleConnection,
    WriteTimeout,
)
from aioserver.providers.http1 import ResponseParser
from aioserver.telemetry.request_log import NO_RECORD

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp.connector import Connection

    from aioserver.providers.http1 import Sink
    from aioserver.streams.stream import Path
    from aioserver.telemetry.request_log import RequestRecord

UPLOAD_PIECE = 65_536  # written before the transport is asked whether it takes more
STALE_WITHIN = 1.0  # seconds after a request was written in which a kept connection proves dead
LINGER = 0.25  # seconds for the last chunk to follow a `[DONE]`; then the connection is closed


class WireProtocol(ResponseHandler):
    """A pooled connection that pushes: to the exchange under way, if there is one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.exchange: Exchange | None = None
        self.fast: Path | None = None  # of the exchange under way, while it is open
        self.reused = False
        self.response_parser = ResponseParser()
        self.resumed: asyncio.Future[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self.idle_lost: Callable[[WireProtocol], None] | None = None

    def data_received(self, data: bytes) -> None:
        """Push *data* on; abort where nobody asked for it."""
        fast = self.fast
        if fast is not None and fast.forward(data):
            return
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
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self.exchange is not None:
            self.exchange.lost(exc)
        elif self.idle_lost is not None:
            self.idle_lost(self)

    def watch(self, read_timeout: float) -> None:
        """See to the read deadline of the exchange under way.

        One timer a connection, not one a request: it is left to itself when the answer has come,
        and goes on with the next request that it finds.
        """
        deadline = self._deadline
        if deadline is not None:
            if deadline.when() <= self._loop.time() + read_timeout:
                return
            deadline.cancel()  # of a request that might wait longer: a reload has changed that
        self._deadline = self._loop.call_later(read_timeout, self._look)

    def _look(self) -> None:
        self._deadline = None
        if self.exchange is not None and (left := self.exchange.look()) is not None:
            self._deadline = self._loop.call_later(left, self._look)


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
        record: RequestRecord = NO_RECORD,
    ) -> None:
        protocol = connection.protocol
        transport = connection.transport
        assert isinstance(protocol, WireProtocol)
        assert transport is not None
        self._connection = connection
        self._protocol = protocol
        self._transport = transport
        self._loop = protocol._loop  # noqa: SLF001 - our base class's
        self._read_timeout = read_timeout
        self._write_timeout = write_timeout
        self._parser = protocol.response_parser
        self._parser.begin(on_head)
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._linger_timer: asyncio.TimerHandle | None = None
        self._last_byte = 0.0
        self._record = record
        self._written = False
        self._lingering = (
            False  # the sink has all it wants, the end of the answer's framing is awaited
        )

    async def run(self, request: bytes) -> None:
        """Send *request* (head and body) and push the answer to its sink.

        Cancelling is safe: the connection is closed at once.

        Raises:
            StaleConnection: a reused connection was dead: nothing of an answer had come, and it was
            lost within STALE_WITHIN of the request.
            ProviderFault: any other; an error raised by the sink passes too.
        """
        self._protocol.exchange = self
        try:
            if not self._protocol.is_connected():
                self.lost(None)
            else:
                await self._upload(request)
            del request  # it may be large, and the answer long
            if not self._done.done():
                self._written = True
                self._last_byte = self._loop.time()
                self._protocol.watch(self._read_timeout)
            await self._done
        finally:
            if not self._lingering:
                self._settle()

    def feed(self, data: bytes) -> None:
        """Bytes from the provider."""
        now, fast = self._loop.time(), self._protocol.fast
        self._protocol.fast = None
        parser = self._parser
        if parser.sink is not None:  # it has begun to answer
            self._record.silent(self._last_byte if fast is None else fast.read_at, now)
        self._last_byte = now
        if parser.between and data.endswith(b"\r\n"):
            # Most reads of a stream are one whole chunk. That the parser need not see: it stands
            # between two chunks before it and behind it. Every other form is the parser's.
            start = data.find(b"\r\n") + 2
            size = len(data) - start - 2
            if size > 0 and data.startswith(b"%x\r\n" % size):
                parser.parts.append(data[start:-2])
                self._push()
                self._open_fast_path()
                return
        try:
            parser.feed(data)
        except Exception as exc:  # noqa: BLE001 - whatever it is ends this request and is told there
            if not parser.whole:
                self._push()  # what was good before it, as in a read of its own
            self._fail(exc)
            return
        self._push()
        if parser.between:
            self._open_fast_path()

    def _open_fast_path(self) -> None:
        """Let the next read take it, where all agree; the parser stands between two chunks."""
        sink = self._parser.sink
        if sink is not None and not self._done.done():
            self._protocol.fast = fast = sink.fast()
            if fast is not None:
                fast.read_at = self._last_byte

    def _push(self) -> None:
        """Give the sink what has come, and the end."""
        parser = self._parser
        sink = parser.sink
        if self._done.done():
            self._linger()
        elif sink is not None:
            try:
                if parts := parser.parts:
                    parser.parts = []
                    if not sink.feed(parts[0] if len(parts) == 1 else b"".join(parts)):
                        self._finish()
                        return
                if parser.whole:
                    sink.end()
                    self._finish()
            except Exception as exc:  # noqa: BLE001 - as above
                self._fail(exc)

    def lost(self, exc: BaseException | None) -> None:
        """The connection is gone."""
        parser = self._parser
        if self._done.done():
            self._settle()
        elif parser.sink is not None and not parser.framed and exc is None:
            parser.surplus = parser.whole = True  # a body that ends with its connection
            self._push()
        elif not parser.begun and self._protocol.reused and self._soon():
            self._fail(StaleConnection("the provider had closed the kept connection"))
        else:
            self._fail(ProviderDisconnected("the provider closed the connection early"))

    def _soon(self) -> bool:
        """Whether the request cannot have been worked on: what is lost later may have been paid."""
        return not self._written or self._loop.time() - self._last_byte < STALE_WITHIN

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
        watch = WriteWatchdog(self._loop, self._transport, self._write_timeout, self._stuck)
        try:
            while self._protocol.writing_paused and not self._done.done():
                self._protocol.resumed = resumed = self._loop.create_future()
                await asyncio.wait((resumed, self._done), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._protocol.resumed = None
            watch.stop()

    def _stuck(self) -> None:
        self._fail(WriteTimeout(f"the provider took nothing for {self._write_timeout} s"))

    def look(self) -> float | None:
        """Fail if the read deadline has come; else the seconds to it. None: it does not count."""
        if not self._written or self._lingering:
            return None
        fast = self._protocol.fast
        last_byte = self._last_byte if fast is None else max(self._last_byte, fast.forwarded_at)
        left = last_byte + self._read_timeout - self._loop.time()
        if left > 0:
            return left
        self._fail(ReadTimeout(f"the provider sent nothing for {self._read_timeout} s"))
        return None

    def _finish(self) -> None:
        """The sink has all it wants; the connection is free now, not when the task runs."""
        if not self._done.done():
            self._done.set_result(None)
            self._linger()

    def _linger(self) -> None:
        """Settle when the answer is whole; a `[DONE]` may come a moment before the last chunk."""
        parser = self._parser
        if parser.whole or parser.parts or not self._written or self._done.cancelled():
            self._settle()
        elif not self._lingering:
            self._lingering = True
            self._linger_timer = self._loop.call_later(LINGER, self._settle)

    def _fail(self, error: BaseException) -> None:
        if not self._done.done():
            self._done.set_exception(error)
        self._settle()

    def _settle(self) -> None:
        """Release or close the connection; what is done twice does nothing the second time."""
        protocol = self._protocol
        if protocol.exchange is not self:
            return
        protocol.exchange = protocol.fast = None
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        done, parser = self._done, self._parser
        parser.forget()
        ended_well = done.done() and not done.cancelled() and done.exception() is None
        if (
            ended_well
            and self._written
            and parser.whole
            and parser.framed
            and parser.keep
            and not parser.surplus
            and not parser.parts
        ):
            protocol.reused = True
            self._connection.release()
        else:
            self._transport.abort()
            self._connection.close()
