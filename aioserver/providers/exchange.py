"""One request and its answer on a pooled connection, without aiohttp's `ClientSession`.

`ClientSession` costs a third of a request's time, and a task switch per read. Here the
connection's own protocol parses the answer (http1.py) and pushes the body into a sink as it
arrives, from `data_received` itself. The sink appends to the log, and the log notifies the
writers. One task per request waits for one future, the end of the exchange; nothing else is
scheduled per read.

    Exchange.run: write the request → (1xx)* head → sink = on_head(status, headers)
                  → sink.feed(block)* → sink.end() → the connection is released, or closed

The connection goes back to the pool only after a clean end. The whole request was written, the
whole answer came, with a length or in chunks, the provider keeps the connection, and nothing
followed the answer. Any other end aborts it at once, without TLS's closing handshake, which may
take 30 s.

Timeouts: each read must come within `read_timeout` of the last one. One lazy timer per connection
checks the time of the last byte; it rests while the log has paused the exchange
(streams/stream.py). The first content of a streamed answer must come within `first_token_timeout`
of the request's last byte, if that is set. A write must make progress within `write_timeout`, or a
WriteWatchdog ends the exchange.

This file is one concept: an exchange, and each way in which it can end.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

from aioserver.provider_errors import (
    ConnectionBroken,
    FirstTokenTimeout,
    ProviderDisconnected,
    ReadTimeout,
    StaleConnection,
    WriteTimeout,
)
from aioserver.providers.upload import UPLOAD_PIECE, upload
from aioserver.telemetry.kernel import least_round_trip
from aioserver.telemetry.request_log import NO_RECORD

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.providers.backpressure import Backpressure
    from aioserver.providers.connections import PooledConnection
    from aioserver.providers.http1 import Sink
    from aioserver.providers.upload import Body
    from aioserver.telemetry.request_log import RequestRecord

# Seconds after a request was written within which a reused connection may prove dead.
STALE_WITHIN = 1.0
# Seconds in which the last chunk may follow a `[DONE]`; after that the connection is closed.
LAST_CHUNK_TIMEOUT = 0.25


class Exchange:
    """One request and its answer. `run` may be called once.

    Always: after `run`, however it ended, the connection is released or closed, and the protocol
    holds no exchange. If the last chunk of a good answer is still to come, this may take
    LAST_CHUNK_TIMEOUT longer.
    """

    def __init__(
        self,
        connection: PooledConnection,
        *,
        read_timeout: float,
        write_timeout: float,
        on_head: Callable[[int, Mapping[str, str]], Sink],
        record: RequestRecord = NO_RECORD,
        backpressure: Backpressure | None = None,
    ) -> None:
        self._connection = connection
        self.protocol = protocol = connection.protocol
        self._loop = loop = asyncio.get_running_loop()
        self._read_timeout = read_timeout
        self._write_timeout = write_timeout
        self._parser = parser = protocol.response_parser
        parser.begin(on_head)
        self._done: asyncio.Future[None] = loop.create_future()
        # When the provider last sent anything, or the request was sent, and the progress of the
        # sink then.
        self.last_byte_at = self.spoke_at = loop.time()
        self._progress = 0
        self.record = record
        self._backpressure = backpressure
        # Whether the whole request is written; and whether the sink needs no more, so that only
        # the end of the body's framing may still come.
        self._written = self._ended = False
        # The fault with which it ends, until that is raised: its traceback refers to this object.
        self._fault: Exception | None = None
        # The bound of the wait for the first content, and whether that has come; None if there is
        # no bound. The timer of that bound, or later of the last chunk.
        self._first_token: tuple[float, Callable[[], bool]] | None = None
        self._timer: asyncio.TimerHandle | None = None
        # Whether reading is paused, since the client reads more slowly than the provider sends.
        self._paused = False
        # The monotonic time of the first byte; 0.0 until then.
        self._heard_at = 0.0

    def bound_first_token(self, seconds: float, answered: Callable[[], bool]) -> None:
        """Fail if there is no content *seconds* after the request was written; *answered* says
        whether there is.
        """
        self._first_token = seconds, answered

    async def run(self, request: Sequence[bytes], body: Body | None = None) -> None:
        """Send *request* (the pieces of head and body, or those before *body*) and push the answer
        to its sink.

        Cancelling is safe: the connection is closed at once.

        Raises:
            StaleConnection: a reused connection was lost within STALE_WITHIN of the request,
                before a byte of the answer.
            ProviderFault: there is no complete answer for another reason.
            AioserverError: raised by the sink.
        """
        protocol, done = self.protocol, self._done
        protocol.exchange = self
        try:
            if protocol.transport is None:
                self.connection_lost(None)
            elif body is None and len(request) == 1 and len(request[0]) <= UPLOAD_PIECE:
                # For so few bytes no transport asks its writer to wait.
                protocol.write_soon(request[0])
            else:
                watch = self._write_timeout, self._write_timed_out
                await upload(request, protocol, done, *watch, body)
                self.last_byte_at = self.spoke_at = self._loop.time()
            del request  # it may be large, and its answer may take long
            if not done.done():
                self._written = True
                protocol.watch_deadline(self._read_timeout)
                if self._first_token is not None:
                    self._timer = self._loop.call_later(self._first_token[0], self._too_late)
            await done
        except BaseException:
            if not self._ended:
                self._settle()
            raise
        if self._fault is not None:
            try:
                raise self._fault
            finally:
                self._fault = None

    def feed(self, data: bytes) -> None:
        """Parse bytes from the provider, and push the parsed body to the sink."""
        now, parser = self._loop.time(), self._parser
        if self.protocol.fast_path is not None:
            self.spoke_at, self.protocol.fast_path = self._last(self.spoke_at), None
        # Once there is a sink, the answer has begun.
        if parser.sink is not None:
            self.record.silent(self.spoke_at, now)
        elif not self._heard_at:
            self._heard_at = monotonic()
        self.last_byte_at = now
        if parser.between_chunks and data.endswith(b"\r\n"):
            # Most reads of a stream are one whole chunk. Between two chunks the parser need not
            # see it.
            start = data.find(b"\r\n") + 2
            size = len(data) - start - 2
            if size > 0 and data.startswith(b"%x\r\n" % size):
                parser.parts.append(data[start:-2])
                self._push()
                self._open_fast_path()
                return
        try:
            parser.feed(data)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it ends this request
            if not parser.whole:
                # The good part before the error passes, as if it had come in a read of its own.
                self._push()
            self._fail(exc)
            return
        self._push()
        if parser.between_chunks:
            self._open_fast_path()

    def _open_fast_path(self) -> None:
        """Let the fast path take the next read, if the sink has one.

        The parser is between two chunks.
        """
        sink = self._parser.sink
        if sink is not None and not self._done.done():
            self.protocol.fast_path = fast_path = sink.fast()
            if fast_path is not None:
                fast_path.read_at = self.spoke_at

    def _push(self) -> None:
        """Push the body's new bytes, and its end, to the sink."""
        parser = self._parser
        sink, parts = parser.sink, parser.parts
        if self._done.done():
            self._finish()
        elif sink is not None:
            try:
                if parts:
                    data = parts[0] if len(parts) == 1 else b"".join(parts)
                    parts.clear()
                    if not sink.feed(data):
                        self._finish()
                        return
                if parser.whole:
                    sink.end()
                    self._finish()
                elif (progress := sink.progress) != self._progress:
                    self._progress, self.spoke_at = progress, self.last_byte_at
            except Exception as exc:  # noqa: BLE001 - as in `feed`
                self._fail(exc)

    def stale(self) -> None:
        """Fail, since the provider has sent something on a kept connection before it can have read
        the request.
        """
        self._fail(StaleConnection("the provider has ended the kept connection"))

    def connection_lost(self, exc: BaseException | None) -> None:
        """End the exchange, since its connection is lost.

        *exc* None: it was closed in an orderly way.
        """
        parser = self._parser
        if self._done.done():
            self._settle()
        elif parser.sink is not None and not parser.framed and exc is None:
            # The end of the connection is the end of this body (RFC 9112, 6.3).
            parser.whole = True
            self._push()
        elif not parser.begun and self.protocol.reused and self._unprocessed():
            self._fail(StaleConnection("the provider had closed the kept connection"))
        elif not parser.begun and not self.protocol.reused:
            self._fail(ConnectionBroken("the provider closed a new connection without an answer"))
        else:
            self._fail(ProviderDisconnected("the provider closed the connection early"))

    def _unprocessed(self) -> bool:
        """Return whether the provider cannot have worked on the request yet.

        If the connection is lost later than that, the request may have cost money.
        """
        return not self._written or self._loop.time() - self.last_byte_at < STALE_WITHIN

    def _write_timed_out(self) -> None:
        self._fail(WriteTimeout(f"the provider took nothing for {self._write_timeout} s"))

    def _too_late(self) -> None:
        """Fail, unless there is content."""
        assert self._first_token is not None
        seconds, answered = self._first_token
        if not answered():
            self._fail(FirstTokenTimeout(f"the provider sent no content for {seconds} s"))

    def check_deadline(self) -> float | None:
        """Fail if the read deadline has passed.

        Return the seconds until the deadline; None if there is no deadline at the moment.
        """
        if not self._written or self._ended or self._paused:
            return None
        seconds = self._last(self.last_byte_at) + self._read_timeout - self._loop.time()
        if seconds > 0:
            return seconds
        self._fail(ReadTimeout(f"the provider sent nothing for {self._read_timeout} s"))
        return None

    def silence(self, now: float) -> float | None:
        """Return the seconds since the provider last sent anything, or since the request was sent.

        None if nothing is awaited.
        """
        if not self._written or self._paused or self._done.done():
            return None
        return max(0.0, now - self._last(self.spoke_at))

    def pause(self) -> None:
        """Read nothing from the provider for now; the read deadline rests meanwhile.

        An exchange without backpressure, or at whose provider a request waits, reads on.
        """
        transport = self.protocol.transport
        if (
            not self._paused
            and not self._done.done()
            and transport is not None
            and not transport.is_closing()
            and self._backpressure is not None
            and self._backpressure.add(self)
        ):
            self._paused = True
            transport.pause_reading()

    def resume(self) -> None:
        """Read on after a pause."""
        if not self._paused:
            return
        self._paused = False
        assert self._backpressure is not None
        self._backpressure.discard(self)
        # The pause does not count as a silence of the provider.
        self.last_byte_at = self.spoke_at = self._loop.time()
        if self.protocol.fast_path is not None:
            self.protocol.fast_path.read_at = self.last_byte_at
        transport = self.protocol.transport
        if transport is not None and not transport.is_closing():
            transport.resume_reading()
            self.protocol.watch_deadline(self._read_timeout)

    def _last(self, moment: float) -> float:
        """Return *moment*, in the loop's time, or the time at which the fast path has forwarded
        something since.
        """
        fast_path = self.protocol.fast_path
        return moment if fast_path is None else max(moment, fast_path.forwarded_at)

    def _finish(self) -> None:
        """End the exchange well, unless it has ended: the sink needs no more.

        The connection is free once the answer is whole, and not only when the task runs next. A
        `[DONE]` may come a moment before the last chunk.
        """
        parser, done = self._parser, self._done
        if not done.done():
            if self._paused:
                self.resume()
            self._ended = True
            done.set_result(None)
            if not parser.whole and not parser.parts and self._written:
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._loop.call_later(LAST_CHUNK_TIMEOUT, self._settle)
                return
        elif self._ended and not (parser.whole or parser.parts):
            return
        self._settle()

    def complete(self) -> bool:
        """End the exchange well if only the end mark of its answer is missing, and return whether
        it was. The connection is not kept.
        """
        cut = ProviderDisconnected("the end mark of the answer was not waited for")
        if self._done.done() or not self._broken(cut):
            return False
        self._done.set_result(None)
        self._parser.reusable = False
        self._settle()
        return True

    def _broken(self, fault: Exception) -> bool:
        """Return whether the answer is complete although it ends now with *fault*."""
        sink = self._parser.sink
        if sink is None or not sink.broken(fault):
            return False
        if self._paused:
            self.resume()
        self._ended = True
        return True

    def _fail(self, fault: Exception) -> None:
        parser = self._parser
        if not self._done.done():
            if not self._broken(fault):
                self._fault = fault
            self._done.set_result(None)
        # The connection is not kept after an end of this kind, even a good one.
        parser.reusable = False
        self._settle()

    def _settle(self) -> None:
        """Release or close the connection. Only the first call has an effect."""
        protocol, parser = self.protocol, self._parser
        if protocol.exchange is not self:
            return
        if not self._ended:
            if self._paused:
                self.resume()
            if self._written:
                # A silence that lasts until the end counts as any other. The record drops a
                # silence before the answer when the answer comes.
                self.record.silent(self._last(self.spoke_at), self._loop.time())
        protocol.exchange = protocol.fast_path = None
        if self._timer is not None:
            self._timer.cancel()
        parser.sink = None
        kept = False
        try:
            if parser.reusable and self._ended and self._written and not parser.parts:
                kept = parser.status < 400 or not self._answers_another()
        finally:
            if kept:
                protocol.reused = True
                self._connection.release()
            else:
                self._connection.close()

    def _answers_another(self) -> bool:
        """Return whether the answer, an error, may be for no request at all, so that this
        request's answer is still to come.

        A 408 ends an idle connection (RFC 9110, 15.5.9), and may cross the request. So may any
        error which comes on a kept connection in less than a round trip.
        """
        status, protocol = self._parser.status, self.protocol
        if status == 408 or protocol.transport is None or not protocol.reused:
            return status == 408
        sock = protocol.transport.get_extra_info("socket")
        round_trip = 0.0 if sock is None else least_round_trip(sock)
        return self._heard_at - protocol.written_at < round_trip
