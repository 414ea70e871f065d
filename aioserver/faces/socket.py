"""One client's WebSocket (RFC 6455), for any face: messages, pings, closing.

A face derives its sockets from `Socket`, and upgrade.py runs one for each handshake. `Socket` owns
the connection and its one writer; the face carries out messages in `receive`, and lets the writer
follow streams.

One task always reads, since only a reader notices that its client leaves. Messages are carried out
in that task, without waiting for anything but the next step of a large one. Incoming frames are
counted first (client_messages.py). Outgoing frames go straight to the transport, ready-made: no
compression, and no masking from a server.

Pings are made here: aiohttp's heartbeat waits for a fixed time, and closes without a close frame.
A ping is read after all earlier bytes, so a client that reads slowly has as much longer for its
pong as limits/write_watchdog.py gives it for those bytes. The closing handshake is made here, too:
aiohttp ends the connection together with its close frame, and if the client is still sending then,
the kernel's reset can destroy that frame.

This file is one concept: the state of one connection decides on each of these.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import struct
from abc import ABC, abstractmethod
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

from aiohttp import WebSocketError, WSCloseCode, WSMsgType

from aioserver.auth.callers import SKEW
from aioserver.errors import (
    AioserverError,
    InvalidApiKey,
    ServerAtCapacity,
    ServerShutdown,
    public,
)
from aioserver.faces.admission import MAX_OWNERS
from aioserver.faces.client_messages import FULL_ROOM, ClientMessages, Upgraded, too_much
from aioserver.faces.idle_sockets import IDLE_SECONDS
from aioserver.gateway.contracts.instances import Elsewhere, Lost
from aioserver.limits.quota import REVOKED
from aioserver.limits.timer_wheel import EARLY
from aioserver.limits.write_watchdog import (
    CLIENT_BYTES,
    MOST_UNREAD,
    patience,
    peer_of,
    vanished,
)
from aioserver.protocol.steps import at_once
from aioserver.streams.ending import run_all
from aioserver.streams.formats import WS_CLOSE, WS_PING, WS_PONG, ws_frame
from aioserver.streams.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from aioserver.auth.callers import Caller
    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.gateway.contracts.instances import Reading, Start
    from aioserver.limits.resource import Grant
    from aioserver.protocol.request_headers import ClientHeaders, RequestOptions
    from aioserver.streams.stream import Stream

logger = logging.getLogger("aioserver.connections")

# The most messages, and bytes of them, that are kept of a socket that waits for its place.
MAX_WAITING_MESSAGES = 16
MAX_WAITING_BYTES = 1 << 20
# Seconds for a client to read the remaining bytes, and again to answer a close frame.
CLOSE_TIMEOUT = 2.0
# Seconds for the first question of a socket that gets its place when others serve already.
LAST_QUESTION = 1.0
# Seconds for the running answers of a socket whose token has expired.
LAST_ANSWERS = 60.0
# The close code of a connection that ends without a close frame (RFC 6455, 7.1.5).
ABNORMAL_CLOSURE = 1006


class Socket(ABC):
    """One client's WebSocket.

    Always: messages that come before the socket has its place are kept in order, and carried out
    then; every byte to the client goes through `_writer`. *face* is a metric label. *protocols*
    are the subprotocols that may be selected, beside ours. A pong may take *min_ping_timeout*
    seconds, even if `ping_timeout` is shorter.
    """

    # The class has more members than Python can share the names of (30): a dictionary for each
    # idle socket would take 1.5 KiB.
    __slots__ = (
        "_client_done",
        "_client_headers",
        "_close_code",
        "_closing",
        "_context",
        "_expiry",
        "_inside",
        "_last_request",
        "_loop",
        "_messages",
        "_ping",
        "_ping_ahead",
        "_ping_at",
        "_ping_behind",
        "_pinged",
        "_pings",
        "_place",
        "_read_bytes",
        "_refused_closing",
        "_request_options",
        "_transport",
        "_unreadable",
        "_waiting",
        "_writer",
        "_ws",
        "bucket",
        "caller",
    )

    face: ClassVar[str]
    protocols: ClassVar[tuple[str, ...]] = ()
    min_ping_timeout: ClassVar[float] = 0.0

    def __init__(
        self,
        context: Context,
        caller: Caller,
        ws: Upgraded,
        messages: ClientMessages,
        transport: asyncio.Transport,
        drain: Callable[[], Awaitable[None]],
        client_headers: ClientHeaders,
        request_options: RequestOptions,
    ) -> None:
        # Set by the timer wheel.
        self.bucket = 0
        # A reload replaces the caller if the limits of its key have changed.
        self.caller = caller
        # The headers of the handshake, which go on to the provider with each question.
        self._client_headers = client_headers
        # The options of the handshake, which apply to each request.
        self._request_options = request_options
        self._context = context
        self._ws = ws
        self._messages = messages
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        settings = context.settings.chat
        self._writer = Writer(
            transport,
            drain,
            context.outbox,
            send_timeout=settings.streams.send_timeout,
            on_drop=self._dropped,
            on_unfollow=context.gateway.lifetime.reader_removed,
        )
        self._inside = False
        # The place; None before it has one, and after it gave way.
        self._place: Grant | None = None
        self._waiting: list[tuple[bytes, BodyHold]] = []
        self._pings = itertools.count(1)
        # The payload of a ping whose pong has not come.
        self._ping: bytes | None = None
        # The time at which it was sent, the bytes that were written until then, and those of them
        # that the client may have had to read first.
        self._ping_at, self._ping_behind, self._ping_ahead = 0.0, 0, 0
        # The bytes that were written before the last answered ping.
        self._read_bytes = 0
        # Whether a ping was sent less than `ping_timeout` ago.
        self._pinged = False
        self._last_request = self._loop.time()
        self._closing: asyncio.Task[None] | None = None
        # Set when the client has sent its close frame, or is gone.
        self._client_done: asyncio.Event | None = None
        # After a fault in the client's frames nothing more is parsed.
        self._unreadable = False
        self._refused_closing = False
        self._close_code = ABNORMAL_CLOSURE
        # The timer of the moment at which the caller's key or token expires, and then of the
        # moment at which its answers must have ended.
        self._expiry: asyncio.TimerHandle | None = None
        self.admit(caller)
        context.wheel.add(self, settings.websocket.ping_interval)

    # The interface that a face implements.

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether answers run on this socket: it is then neither idle nor drained."""

    @abstractmethod
    async def receive(self, data: bytes, hold: BodyHold) -> None:
        """Carry out one message of the client, which is read in several turns of the event loop if
        it is large; raises nothing.

        *hold* counts its bytes. It is released afterwards, unless it was given to a request.
        """

    @abstractmethod
    def show_position(self, position: int, eta: float) -> None:
        """Report the position in the queue for a place to the client; *eta* in seconds."""

    @abstractmethod
    def show_error(self, error: AioserverError) -> None:
        """Report *error*, which belongs to no request, to the client; the socket closes
        after it.
        """

    def admit(self, caller: Caller) -> None:
        """Serve the same *caller* with other limits from now on, until its key or token has
        expired.
        """
        self.caller = caller
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if caller.expires < inf:
            left = caller.expires + SKEW - monotonic()
            self._expiry = self._loop.call_later(left, self._has_expired)

    @property
    def open(self) -> bool:
        """Whether the socket has its place, and has not begun to close."""
        return self._inside and self._closing is None and not self._transport.is_closing()

    # The interface for admission.

    def entered(self, place: Grant) -> None:
        """Carry out the messages that came while the socket waited: it has its *place* now."""
        self._place = place
        context = self._context
        context.admission.opened(context.metrics.faces[self.face], self.caller.name)
        self._inside, self._messages.room = True, None
        self._context.admission.idle_sockets.add(self)
        # The list is released at the end, even if a message raises.
        while self._waiting:
            data, hold = self._waiting.pop(0)
            with hold:
                # A socket that is closing gets no answers, and nothing is paid for them.
                if self._closing is None:
                    at_once(self.receive(data, hold))
        if context.lifecycle.retired.is_set():
            # It has waited for its place, and may have a question.
            self._loop.call_later(LAST_QUESTION, self.drain)

    def refused(self, error: AioserverError) -> None:
        """Report to the client that it gets no place, and close."""
        admission = self._context.admission
        admission.log(
            "refused", self.face, logging.WARNING, caller=self.caller.name, code=error.code
        )
        self._context.metrics.count_error(error)
        if not self._refused_closing:
            self._refused_closing = True
            admission.refused_closing += 1
        self.end(error)

    # Reading.

    async def read(self) -> None:
        """Read until the client has gone, or the connection has been closed."""
        ws = self._ws
        while True:
            message = await ws.receive()
            match message.type:
                case WSMsgType.TEXT:
                    data = message.data
                    # The next message may be long in coming.
                    del message
                    await self._take(data)
                    del data
                    continue
                case WSMsgType.PONG:
                    if bytes(message.data) == self._ping:
                        self._ping, self._read_bytes = None, self._ping_behind
                case WSMsgType.PING:
                    self._writer.send(ws_frame(WS_PONG, bytes(message.data)))
                case WSMsgType.BINARY:
                    self._messages.take_hold().release()
                    self.close(WSCloseCode.UNSUPPORTED_DATA, b"text frames only")
                case _:
                    if message.type is WSMsgType.CLOSE and self._closing is None:
                        self._close_code = message.data
                    if isinstance(message.data, WebSocketError):
                        self._unreadable = True
                        if self._messages.fault is not None:
                            self.end(self._messages.fault)
                        self.close(message.data.code, b"")
                    return

    async def _take(self, data: bytes) -> None:
        hold = self._messages.take_hold()
        if not self._inside and self._closing is None:
            hold.waited_since = monotonic()
            self._waiting.append((data, hold))
            room = MAX_WAITING_BYTES - sum(hold.size for _, hold in self._waiting)
            self._messages.room = max(0, room)
            if len(self._waiting) > MAX_WAITING_MESSAGES or room < 0:
                self.end(too_much(FULL_ROOM))
            return
        with hold:
            if self._closing is None:
                await self.receive(data, hold)

    def break_off(self, error: AioserverError) -> None:
        """Close with *error*; nothing more is read."""
        self._unreadable = True
        self.end(error)

    def client_gone(self) -> None:
        """Note that the connection is lost, so that no close frame is awaited."""
        if self._client_done is not None:
            self._client_done.set()

    # Pings.

    def visit(self, now: float) -> float | None:
        """Send a ping, or check whether the last ping was answered.

        Return the seconds until the next visit.
        """
        if self._writer.closed or self._closing is not None:
            return None
        # The settings in effect now, which may have changed since the handshake.
        limits = self._context.settings.chat.websocket
        idle = limits.idle_timeout
        if idle and now - self._last_request >= idle and not self.busy and self._inside:
            self.close(WSCloseCode.OK, b"idle")
            return None
        timeout = max(limits.ping_timeout, self.min_ping_timeout)
        if self._ping is not None:
            left = self._ping_at + patience(timeout, self._ping_ahead, CLIENT_BYTES) - now
            if left <= EARLY or vanished(self._transport, timeout):
                self.close(WSCloseCode.INTERNAL_ERROR, b"keepalive ping timeout", lost=True)
                return None
            return min(left, timeout)
        if self._pinged:
            self._pinged = False
            delay = limits.ping_interval - timeout
            if delay > 0:
                return delay
        self._ping = struct.pack("!I", next(self._pings))
        self._pinged = True
        peer = peer_of(self._transport)
        self._ping_at, self._ping_behind = now, peer.taken + peer.waiting
        unread = min(self._ping_behind - self._read_bytes - peer.waiting, MOST_UNREAD)
        self._ping_ahead = max(0, unread) + peer.waiting
        self._writer.send(ws_frame(WS_PING, self._ping))
        return timeout

    # Closing.

    def drain(self) -> None:
        """Close with 1012, unless answers run: the server stops, and the client should come back.

        A socket that waits for its place is closed by the refusal of admission instead.
        """
        if self.open and not self.busy:
            self.close(ServerShutdown.close or 1012, ServerShutdown.close_reason)

    def revoke(self) -> None:
        """Report to the client that its key is no longer valid, and close."""
        self.end(InvalidApiKey(REVOKED))

    def check_token(self) -> None:
        """Check that the token of the caller, if it came with one, is still valid.

        Raises:
            InvalidApiKey: it is not.
        """
        if self._expired:
            raise self.caller.expired()

    def answers_ended(self) -> None:
        """Close now that no answer runs, if others serve in place of this process, the server
        stops, or the caller's token has expired.
        """
        if self.busy:
            return
        if self._context.lifecycle.retired.is_set():
            self.drain()
        elif self._expired:
            self._end_expired()

    @property
    def _expired(self) -> bool:
        expires = self.caller.expires
        return expires < inf and monotonic() >= expires + SKEW

    def _has_expired(self) -> None:
        """Close as soon as no answer runs, and LAST_ANSWERS later in any case."""
        if self.busy:
            self._expiry = self._loop.call_later(LAST_ANSWERS, self._end_expired)
        else:
            self._end_expired()

    def _end_expired(self) -> None:
        self.end(self.caller.expired())

    def give_way(self) -> None:
        """Give the place to others, report that to the client, and close with 1013.

        The remaining work counts as the end of a refused socket.
        """
        admission = self._context.admission
        admission.gave_way(self.face, self.caller.name)
        place, self._place = self._place, None
        if place is not None:
            self._refused_closing = True
            admission.refused_closing += 1
            place.release()
        reason = f"nothing was asked for {IDLE_SECONDS:.0f} s, and other keys wait for a place"
        self.end(ServerAtCapacity(reason, retry_after=admission.gate.retry_after()))

    def end(self, error: AioserverError) -> None:
        """Report *error* to the client, and close with the code of the error."""
        if self._closing is None:
            self.show_error(error)
            assert error.close is not None
            self.close(error.close, error.close_reason)

    def close(self, code: int, reason: bytes, *, lost: bool = False) -> None:
        """Begin to close with *code*; a second call does nothing.

        *lost*: the client does not answer any more, and the close frame is a courtesy.
        """
        if self._closing is None:
            self._close_code = code
            # Made only here, since an event is a twentieth of an idle socket.
            self._client_done = asyncio.Event()
            self._closing = self._loop.create_task(
                self._handshake(code, reason, self._client_done, lost=lost)
            )

    async def _handshake(
        self, code: int, reason: bytes, client_done: asyncio.Event, *, lost: bool
    ) -> None:
        """Do the closing handshake (RFC 6455, 7.1.2), and close the connection."""
        if not lost:
            # An answer may still be running meanwhile, and its client be slow.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self._writer.flush()
        self._send_close(code, reason)
        if lost:
            self._transport.close()
            return
        if self._unreadable and not self._transport.is_closing():
            # The client's close frame cannot be read, but the end of its data can.
            self._transport.write_eof()
        # Bytes that the client still sends are read and ignored. A connection that is closed
        # before the client has read the close frame may be reset, and that frame is then lost.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await client_done.wait()
        if client_done.is_set():
            self._transport.close()
        else:
            # close() would wait for ever for a client that reads nothing.
            self._transport.abort()

    def _send_close(self, code: int, reason: bytes) -> None:
        self._writer.end(ws_frame(WS_CLOSE, struct.pack("!H", code) + reason))

    # Answers of other instances.

    async def reach(
        self,
        find: Callable[[Lost | None], Awaitable[Stream]],
        start: Start,
        api: str = "",
        lane: str | None = None,
    ) -> Stream | Reading:
        """Return the stream that *find* finds, or the reading of another instance's stream from
        *start* on: in messages of chats, or of *api* on its *lane*. *find* gets the owner that has
        lost the answer, if one has.

        Raises:
            AioserverError: there is no such answer, or it is not known whether there is one.
        """
        lost: Lost | None = None
        for _ in range(MAX_OWNERS):
            try:
                return await find(lost)
            except Elsewhere as elsewhere:
                try:
                    return await elsewhere.follow(start, api, lane)
                except Lost as no_more:
                    lost = no_more
        assert lost is not None
        raise lost.error

    def work(
        self, work: Coroutine[Any, Any, None], refuse: Callable[[AioserverError], None]
    ) -> asyncio.Task[None]:
        """Begin *work* for a command, and *refuse* its errors; a client that leaves does not
        cancel it.
        """

        async def working() -> None:
            try:
                await work
            except Exception as exc:
                if not isinstance(exc, AioserverError):
                    logger.exception("bug in a command", exc_info=exc)
                    self._context.metrics.bugs.note(exc)
                refuse(public(exc))

        task = self._loop.create_task(working())
        # A task that is cancelled before its first step has not begun the work.
        task.add_done_callback(lambda _task: work.close())
        return task

    async def finish(self) -> None:
        """Complete the close after the last read, and release everything.

        It must be called exactly once.
        """
        admission = self._context.admission
        holds, self._waiting = [hold for _, hold in self._waiting], []
        steps: list[Callable[[], object]] = [
            partial(self._context.wheel.remove, self),
            self._messages.close,
            *[hold.release for hold in holds],
            partial(admission.idle_sockets.remove, self),
        ]
        if self._expiry is not None:
            steps.append(self._expiry.cancel)
        if self._inside:
            code, name = str(self._close_code), self.caller.name
            meter, gave_way = self._context.metrics.faces[self.face], self._place is None
            closed = partial(admission.closed, meter, code, name, gave_way=gave_way)
            steps.append(closed)
        try:
            run_all(steps)
            if self._closing is None:
                self._send_close(WSCloseCode.OK, b"")
                self._transport.close()
                return
            if not self._unreadable and self._client_done is not None:
                self._client_done.set()
            await self._closing
        finally:
            if self._refused_closing:
                admission.refused_closing -= 1
            self._messages.forget_receiver()
            self._writer.close()
            # It holds unread messages, and this socket and its writer refer to each other.
            del self._ws

    def _dropped(self, reason: str) -> None:
        self._context.admission.dropped(self.face, reason)
