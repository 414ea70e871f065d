"""One WebSocket for many answers (RFC 6455).

A connection asks first for a `pong`, which proves that it has its place at the server: a socket that
waits for its place may send no more than 16 frames. Then it sends what its readings want, as fast as the server's
bound of frames allows. What comes is given to the readings at once, so that a slow reader delays no other one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol, cast

import aiohttp
from aiohttp import WSMsgType

from aioserver.client.errors import Broken, Fault, Interrupted, protocol_error
from aioserver.client.reading import fault_of
from aioserver.client.refusals import closed_fault
from aioserver.client.retries import FINAL_CLOSE_CODES, QUIET_CLOSE_CODES
from aioserver.protocol import server_frames

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from aioserver.client.retries import Reconnection
    from aioserver.client.socket_reading import SocketReading
    from aioserver.protocol.server_frames import Frame

# Answers at once on one socket. The server's bound is 32; the others are for answers whose `cancel` is on its way.
MAX_ANSWERS = 28
# Seconds for commands that wait to be sent when the client is closed.
FLUSH_TIMEOUT = 2.0
# The server closes a socket that sends more than 100 frames or 16 MiB a second, after a burst of twice as
# much. Pongs are frames, too.
SECONDS_PER_FRAME = 1 / 80
SECONDS_PER_BYTE = 1 / (8 << 20)
BURST_SECONDS = 1.0

_PING = b'{"action":"ping","request_id":"place"}'


class Owner(Protocol):
    """A transport, as its connections use it."""

    @property
    def closed(self) -> bool:
        """Whether the client is closed."""

    @property
    def reconnection(self) -> Reconnection:
        """When it connects again."""

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that ends before the transport is closed."""

    def gone(self, connection: Connection) -> None:
        """Forget a connection that is closed."""

    def emptied(self, connection: Connection) -> None:
        """Close a connection without readings, if there are others."""

    def lost(self, fault: Fault, delay: float) -> Interrupted:
        """Return the loss of a connection, which holds the next one back for *delay* seconds."""


class Connection:
    """One socket. Always: each reading in `readings` has it as its `connection`; at most MAX_ANSWERS."""

    def __init__(self, transport: Owner, ws: aiohttp.ClientWebSocketResponse[bool]) -> None:
        self.readings: dict[str, SocketReading] = {}
        # Whether it takes no more questions, since it is closed or will be; and whether it sends nothing any more.
        self.leaving = self.closed = False
        self._transport = transport
        self._ws = ws
        self._loop = asyncio.get_running_loop()
        # Frames to be sent, with the reading that wants them, and what is done when they were sent.
        self._outbox: deque[tuple[bytes, SocketReading | None, asyncio.Future[None] | None]] = (
            deque()
        )
        self._more = asyncio.Event()
        # Set when the server has given the socket its place.
        self._placed = asyncio.Event()
        # Set when nothing waits to be sent.
        self._flushed = asyncio.Event()
        self._flushed.set()
        # The last remark of the server about the whole socket.
        self._remark: Fault | None = None
        # The last remark of the server about the wait for a place, until there is one.
        self._queued: Frame | None = None
        self._receiver = transport.start(self._receive())
        self._sender = transport.start(self._send())

    def room_for(self, request_id: str) -> bool:
        """Return whether it can take another reading; the server sends each answer once on a socket."""
        return (
            not self.leaving
            and len(self.readings) < MAX_ANSWERS
            and request_id not in self.readings
        )

    def add(self, reading: SocketReading) -> None:
        """Let a reading ask, or resume."""
        self.readings[reading.question.request_id] = reading
        reading.connection = self
        self.send(reading.command(), reading)
        if self._queued is not None:
            # It may have come with the handshake, before there was a reading.
            reading.receive(self._queued, 0)

    def remove(self, reading: SocketReading) -> None:
        """Let a reading go; an extra connection closes with its last one."""
        if self.readings.get(reading.question.request_id) is reading:
            del self.readings[reading.question.request_id]
            self._transport.emptied(self)

    def send(
        self,
        frame: bytes,
        reading: SocketReading | None = None,
        done: asyncio.Future[None] | None = None,
    ) -> None:
        """Send *frame* when its turn comes, unless *reading* has gone by then."""
        self._outbox.append((frame, reading, done))
        self._flushed.clear()
        self._more.set()

    async def close(self) -> None:
        """Send what waits, for a short time, and close the socket."""
        self.leaving = self.closed = True
        try:
            if not self._ws.closed and self._placed.is_set():
                async with asyncio.timeout(FLUSH_TIMEOUT):
                    await self._flushed.wait()
        except TimeoutError:
            pass
        finally:
            self._receiver.cancel()
            self._sender.cancel()
            await asyncio.wait([self._receiver, self._sender])
            await self._ws.close()
            self._forget_outbox()

    async def _receive(self) -> None:
        """Give each frame to its reading, until the socket is closed."""
        end: Interrupted | None = None
        try:
            await self._ws.send_frame(_PING, WSMsgType.TEXT)
            while True:
                message = await self._ws.receive()
                if message.type is not WSMsgType.TEXT:
                    break
                self._take(cast("bytes", message.data))
            if message.type is WSMsgType.BINARY:
                end = protocol_error("a binary frame")
            elif message.type is WSMsgType.ERROR and isinstance(
                message.data, aiohttp.WebSocketError
            ):
                end = protocol_error(f"the server's frames break RFC 6455: {message.data}")
        except server_frames.BadFrame as error:
            end = protocol_error(str(error))
        except (OSError, aiohttp.ClientError):
            # The socket was lost with the first ping.
            pass
        finally:
            self.leaving = self.closed = True
            self._transport.gone(self)
            self._finish(end)
        # Of no effect if the server has closed it.
        await self._ws.close(code=aiohttp.WSCloseCode.PROTOCOL_ERROR)

    def _take(self, data: bytes) -> None:
        frame = server_frames.parse(data)
        reconnection = self._transport.reconnection
        reconnection.reached = True
        if frame.request_id is not None and frame.status != "pong":
            reading = self.readings.get(frame.request_id)
            if frame.event_id is not None:
                reconnection.progressed()
            elif frame.status == "error" and frame.chunk.code == "server_shutdown":
                # The next question is for another process.
                self.leaving = True
            if reading is not None:
                reading.receive(frame, len(data))
        elif frame.status == "pong":
            self._queued = None
            self._placed.set()
        elif frame.status == "queued":
            self._queued = frame
            for reading in list(self.readings.values()):
                reading.receive(frame, len(data))
        elif frame.status == "error":
            self._remark = fault_of(frame)

    async def _send(self) -> None:
        """Send what waits, as fast as the server allows."""
        await self._placed.wait()
        # The time at which an even flow would send the next frame (GCRA, ITU-T I.371).
        due = self._loop.time()
        while True:
            while not self._outbox:
                self._flushed.set()
                self._more.clear()
                await self._more.wait()
            early = due - BURST_SECONDS - self._loop.time()
            if early > 0:
                await asyncio.sleep(early)
            frame, reading, done = self._outbox.popleft()
            if reading is None or reading.connection is self:
                if reading is not None:
                    reading.sent = True
                due = max(due, self._loop.time())
                due += max(SECONDS_PER_FRAME, len(frame) * SECONDS_PER_BYTE)
                try:
                    await self._ws.send_frame(frame, WSMsgType.TEXT)
                except (OSError, aiohttp.ClientError):
                    # `_receive` sees that the socket is lost, and knows more about it.
                    self.leaving = self.closed = True
                    self._outbox.appendleft((frame, None, done))
                    break
            if done is not None and not done.done():
                done.set_result(None)
        self._forget_outbox()

    def _finish(self, end: Interrupted | None) -> None:
        """Interrupt the readings: the socket is closed, by the server if *end* is None."""
        self._sender.cancel()
        self._forget_outbox()
        readings = list(self.readings.values())
        if self._transport.closed or not readings:
            return
        code, remark = self._ws.close_code, self._remark
        if end is None and code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG:
            # It was one of the questions that have no answer yet; it can only be the largest.
            unanswered = [reading for reading in readings if reading.sent and not reading.last]
            if unanswered:
                largest = max(unanswered, key=lambda reading: len(reading.question.payload))
                readings.remove(largest)
                too_large = Fault("request_too_large", "the server takes no question of this size")
                largest.interrupt(Broken(remark or too_large))
        if end is None:
            end = self._end(code, remark)
        for reading in readings:
            reading.interrupt(end)

    def _end(self, code: int | None, remark: Fault | None) -> Interrupted:
        """Return what the close *code*, and the *remark* before it, mean for the readings."""
        if code in FINAL_CLOSE_CODES:
            return protocol_error(f"the server closed the socket with close code {code}")
        if code == aiohttp.WSCloseCode.POLICY_VIOLATION and remark and not remark.retryable:
            return Broken(remark)
        fault = remark or closed_fault(code)
        reconnection = self._transport.reconnection
        if code in QUIET_CLOSE_CODES:
            code = None
        delay = reconnection.after_loss(code, None if remark is None else remark.retry_after)
        return self._transport.lost(fault, delay)

    def _forget_outbox(self) -> None:
        for _frame, _reading, done in self._outbox:
            if done is not None and not done.done():
                done.set_result(None)
        self._outbox.clear()
        self._flushed.set()
