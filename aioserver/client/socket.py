"""The WebSocket transport: a connection for up to MAX_ANSWERS answers, and further ones for more.

This file is one concept: the connections of a client, and the readings that share them. They decide
together which reading sends next, and what is asked for again.

A connection (RFC 6455) asks first for a `pong`, which proves that it has its place at the server:
a socket that waits for its place may send no more than 16 frames. Then it sends the frames of its
readings, as fast as the server's bound of frames allows. Received frames are given to the readings
at once, so that a slow reader delays no other one.

A reading keeps MAX_UNREAD bytes of frames. Further frames are dropped, and asked for again
(`resume`) when the program has read the kept ones: the server keeps an answer anyway, and it is
not kept twice.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, cast

import aiohttp
import orjson
from aiohttp import WSMsgType
from multidict import CIMultiDict

from aioserver.client.credentials import UNAUTHORIZED
from aioserver.client.faults import (
    FINAL_CLOSE_CODES,
    MAX_ERROR_BYTES,
    QUIET_CLOSE_CODES,
    RESTART,
    SHUTDOWN,
    Broken,
    Fault,
    Interrupted,
    closed_fault,
    protocol_error,
    read_body,
    refusal,
    unreachable_fault,
)
from aioserver.client.transport import MAX_FRAME_BYTES, Reading, Transport, fault_of
from aioserver.protocol import frames

if TYPE_CHECKING:
    from aioserver.client.credentials import Credentials
    from aioserver.client.transport import Question
    from aioserver.protocol.frames import Frame

# The most bytes of unread frames, for each answer.
MAX_UNREAD = 1 << 20


class SocketReading(Reading):
    """The reading of an answer on the sockets of a transport."""

    def __init__(
        self, transport: SocketTransport, question: Question, last: int | None = None
    ) -> None:
        super().__init__(transport.room, question, last)
        self.connection: Connection | None = None
        self._transport = transport
        self._frames: list[Frame] = []
        self._unread = 0
        # The interruption that `frames` raises once the waiting frames were read.
        self._interrupted: Interrupted | None = None
        self._waiter: asyncio.Future[None] | None = None
        # Whether frames were dropped; and whether they were asked for again.
        self._behind = self._resuming = False

    async def frames(self) -> list[Frame]:
        """Return the received frames."""
        while True:
            if self._frames:
                frames, self._frames, self._unread = self._frames, [], 0
                return frames
            if self._interrupted is not None:
                interrupted, self._interrupted = self._interrupted, None
                # Its traceback would keep frames of other readings that it has interrupted.
                raise interrupted.with_traceback(None)
            if self.connection is None:
                connection = await self._transport.connection(self.question.request_id)
                connection.add(self)
                if self._frames:
                    continue
            elif self._behind and not self._resuming:
                self._resuming = True
                self.connection.send(self.command(), self)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def command(self) -> bytes:
        """Return the frame that asks for the answer, or its rest."""
        if not self.resumes:
            return self.question.command()
        name = orjson.dumps(self.question.request_id)
        return b'{"action":"resume","request_id":%b,"payload":{"last_event_id":%d}}' % (
            name,
            self.last,
        )

    def receive(self, frame: Frame, size: int) -> None:
        """Take a frame of *size* bytes, of this answer or about the whole socket."""
        if frame.event_id is None:
            self._receive_remark(frame)
        elif self._behind and not (self._resuming and frame.event_id == self.last + 1):
            return
        elif self._unread > MAX_UNREAD:
            self._behind = True
            return
        else:
            try:
                self._count(frame)
            except Broken as broken:
                self.interrupt(broken)
                return
            self._behind = self._resuming = False
            self._unread += size
            self._frames.append(frame)
            if self.ended:
                self._detach()
            if self._had_place:
                self._give_back()
        self._wake()

    def interrupt(self, interrupted: Interrupted) -> None:
        """Take the reading off its connection, and let `frames` raise."""
        self._detach()
        self._interrupted = interrupted
        self._wake()

    def _cancel(self) -> asyncio.Future[None] | None:
        return self._transport.cancel(self.question.request_id, self.connection)

    def _receive_remark(self, frame: Frame) -> None:
        if frame.status == "error":
            fault = fault_of(frame)
            if fault.code == "slow_client":
                self._behind, self._resuming = True, False
            else:
                self.interrupt(self._refuse(fault))
        elif frame.status == "queued":
            # These come often, and only the newest matters.
            if self._frames and self._frames[-1].status == "queued":
                self._frames.pop()
            self._frames.append(frame)

    def _detach(self) -> None:
        if self.connection is not None:
            self.connection.remove(self)
            self.connection = None
        self._behind = self._resuming = False

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


# Answers at once on one socket. The server allows 32; the rest is left to answers whose `cancel`
# is on its way.
MAX_ANSWERS = 28
# Seconds to send waiting commands when the client is closed.
FLUSH_TIMEOUT = 2.0
# The server closes a socket that sends more than 100 frames or 16 MiB a second, after a burst of
# twice as much. Pongs are frames, too.
SECONDS_PER_FRAME = 1 / 80
SECONDS_PER_BYTE = 1 / (8 << 20)
BURST_SECONDS = 1.0

_PING = b'{"action":"ping","request_id":"place"}'


class Connection:
    """A socket. Always: it has at most MAX_ANSWERS `readings`, and is the `connection` of each."""

    def __init__(
        self, transport: SocketTransport, ws: aiohttp.ClientWebSocketResponse[bool]
    ) -> None:
        self.readings: dict[str, SocketReading] = {}
        # Whether it takes no more questions, since it is closed or will be; and whether it sends
        # nothing any more.
        self.leaving = self.closed = False
        # The interruption of its readings by the end of the socket, if it was not closed here.
        self.end: Interrupted | None = None
        self._left = False
        self._transport = transport
        self._ws = ws
        self._loop = asyncio.get_running_loop()
        # Frames to be sent, each with its reading, and the future that is done once it was sent.
        self._outbox: deque[tuple[bytes, SocketReading | None, asyncio.Future[None] | None]] = (
            deque()
        )
        self._more = asyncio.Event()
        # Set when the server has given the socket its place.
        self._placed = asyncio.Event()
        # Set when no frame waits to be sent.
        self._flushed = asyncio.Event()
        self._flushed.set()
        # The last error of the server about the whole socket.
        self._remark: Fault | None = None
        # The last `queued` frame about the whole socket, until the socket has its place.
        self._queued: Frame | None = None
        self._receiver = transport.start(self._receive())
        self._sender = transport.start(self._send())

    def room_for(self, request_id: str) -> bool:
        """Return whether it can take another reading; a socket has each answer once."""
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
            # The frame may have come with the handshake, before there was a reading.
            reading.receive(self._queued, 0)

    def remove(self, reading: SocketReading) -> None:
        """Remove a reading; an extra connection closes with its last one."""
        if self.readings.get(reading.question.request_id) is reading:
            del self.readings[reading.question.request_id]
            self._transport.emptied(self)

    def send(
        self,
        frame: bytes,
        reading: SocketReading | None = None,
        done: asyncio.Future[None] | None = None,
    ) -> None:
        """Send *frame* when its turn comes, unless *reading* was removed by then."""
        self._outbox.append((frame, reading, done))
        self._flushed.clear()
        self._more.set()

    async def close(self) -> None:
        """Send waiting frames, for a short time, and close the socket."""
        self.leaving = self.closed = self._left = True
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
        except frames.BadFrame as error:
            end = protocol_error(str(error))
        except (OSError, aiohttp.ClientError):
            # The first ping has failed: the socket is lost already.
            pass
        finally:
            self.leaving = self.closed = True
            self._transport.gone(self)
            self._finish(end)
        # Of no effect if the server has closed it.
        await self._ws.close(code=aiohttp.WSCloseCode.PROTOCOL_ERROR)

    def _take(self, data: bytes) -> None:
        frame = frames.parse(data)
        reconnection = self._transport.reconnection
        reconnection.reached = True
        if frame.request_id is not None and frame.status != "pong":
            reading = self.readings.get(frame.request_id)
            if frame.event_id is not None:
                reconnection.progressed()
            elif frame.status == "error" and frame.chunk.code == SHUTDOWN and not self.leaving:
                # The server is stopping: the next question waits for its successor.
                self.leaving = True
                self._transport.lost(fault_of(frame), RESTART)
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
        """Send waiting frames, as fast as the server allows."""
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
                    # `_receive` also notices the loss of the socket, and knows more about it.
                    self.leaving = self.closed = True
                    self._outbox.appendleft((frame, None, done))
                    break
            if done is not None and not done.done():
                done.set_result(None)
        self._forget_outbox()

    def _finish(self, end: Interrupted | None) -> None:
        """Interrupt the readings: the socket is closed, by the server if *end* is None.

        The end of a socket without a reading counts as a loss, too: a full server may close a
        socket before its first question.
        """
        self._sender.cancel()
        self._forget_outbox()
        readings = list(self.readings.values())
        if self._left or self._transport.closed:
            return
        code, remark = self._ws.close_code, self._remark
        if end is None and code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG:
            # The server has refused one of the unanswered questions, and only the largest can be
            # too large.
            unanswered = [reading for reading in readings if reading.sent and not reading.last]
            if unanswered:
                largest = max(unanswered, key=lambda reading: len(reading.question.payload))
                readings.remove(largest)
                too_large = Fault("request_too_large", "the server takes no question of this size")
                largest.interrupt(Broken(remark or too_large))
        self.end = self._end(code, remark) if end is None else end
        for reading in readings:
            reading.interrupt(self.end)

    def _end(self, code: int | None, remark: Fault | None) -> Interrupted:
        """Return the interruption that the close *code*, and the *remark* before it, mean for the
        readings.
        """
        if code in FINAL_CLOSE_CODES:
            return protocol_error(f"the server closed the socket with close code {code}")
        if code == aiohttp.WSCloseCode.POLICY_VIOLATION and remark and not remark.retryable:
            if remark.code == INVALID_KEY and self._transport.credentials.renewable:
                # The token has expired: the next connection has another one.
                return self._transport.lost(remark)
            return Broken(remark)
        quiet = code in QUIET_CLOSE_CODES
        return self._transport.lost(remark or closed_fault(code), None if quiet else code)

    def _forget_outbox(self) -> None:
        for _frame, _reading, done in self._outbox:
            if done is not None and not done.done():
                done.set_result(None)
        self._outbox.clear()
        self._flushed.set()


# Seconds for the handshake, connecting included; for asking why it was refused; for the server to
# answer a close frame.
HANDSHAKE_TIMEOUT = 30.0
REASON_TIMEOUT = 5.0
CLOSE_TIMEOUT = 2.0
# Seconds of silence before a ping; the answer may take half as long.
HEARTBEAT = 30.0
# Seconds for which an answer without a reader runs on at the server, by default. After that time
# no `cancel` is needed.
CANCEL_WINDOW = 30.0
INVALID_KEY = "invalid_api_key"
CLOSED = Fault("connect_error", "the client is closed")


class SocketTransport(Transport):
    """The sockets of a client: one, and another one for each further MAX_ANSWERS answers."""

    def __init__(self, session: aiohttp.ClientSession, url: str, credentials: Credentials) -> None:
        super().__init__(session, url, credentials)
        self._connections: list[Connection] = []
        self._opening: asyncio.Task[Connection] | None = None
        # Answers to be cancelled when there is a connection, each until a time of the loop.
        self._cancels: dict[str, float] = {}

    def read(self, question: Question, last: int | None = None) -> SocketReading:
        """Return the reading of the answer to *question*."""
        return SocketReading(self, question, last)

    async def connection(self, request_id: str) -> Connection:
        """Return a connection with room for the answer *request_id*.

        Raises:
            Interrupted: there is none now.
        """
        while True:
            for connection in self._connections:
                if connection.room_for(request_id):
                    return connection
            if self.closed:
                raise Broken(CLOSED)
            if self._opening is None and (loss := self.loss) is not None:
                raise loss
            opening = self._open_once()
            # Others may wait for the same connection, so it is opened even if this one gives up.
            await asyncio.wait([opening])
            if not opening.cancelled() and (end := opening.result().end) is not None:
                raise end.with_traceback(None)

    def gone(self, connection: Connection) -> None:
        """Forget a connection that is closed."""
        if connection in self._connections:
            self._connections.remove(connection)

    def emptied(self, connection: Connection) -> None:
        """Close a connection without readings, if there are others."""
        if connection.readings or self.closed or connection not in self._connections:
            return
        if connection.leaving or len(self._connections) > 1:
            self._connections.remove(connection)
            self.start(connection.close())

    def cancel(
        self, request_id: str, connection: Connection | None
    ) -> asyncio.Future[None] | None:
        """Cancel an answer, on any connection. Returns a future that is done when the command was
        sent.
        """
        if self.closed:
            return None
        loop = asyncio.get_running_loop()
        frame = _cancel_command(request_id)
        for candidate in (connection, *self._connections):
            if candidate is not None and not candidate.closed:
                done: asyncio.Future[None] = loop.create_future()
                candidate.send(frame, done=done)
                return done
        self._cancels[request_id] = loop.time() + CANCEL_WINDOW
        if self.loss is None:
            self._open_once()
        return None

    async def close(self) -> None:
        """Cancel the running answers, and close all connections."""
        if self.closed:
            return
        for connection in self._connections:
            for reading in list(connection.readings.values()):
                reading.leave()
                reading.interrupt(Broken(CLOSED))
        self.closed = True
        if self._opening is not None:
            self._opening.cancel()
        for connection in self._connections:
            self.start(connection.close())
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _open_once(self) -> asyncio.Task[Connection]:
        """Return the task that opens a connection; a running one is shared."""
        if self._opening is None:
            self._opening = self.start(self._open())
            self._opening.add_done_callback(self._opened)
        return self._opening

    async def _open(self) -> Connection:
        """Open a connection.

        Raises:
            Interrupted: it cannot be opened now, or not at all.
        """
        headers = await self.headers(self.lost)
        try:
            return await self._connected(headers)
        except aiohttp.WSServerHandshakeError as error:
            if error.status != UNAUTHORIZED or not self.credentials.renewable:
                raise await self._refused(error, headers) from None
        headers = await self.headers(self.lost)
        try:
            return await self._connected(headers)
        except aiohttp.WSServerHandshakeError as error:
            raise await self._refused(error, headers) from None

    async def _refused(
        self, error: aiohttp.WSServerHandshakeError, headers: dict[str, str]
    ) -> Interrupted:
        """Return the interruption by a handshake with *headers* that the server has refused."""
        fault, final = refusal(error.status, CIMultiDict(error.headers or {}), b"")
        if final:
            return Broken(await self._reason(error.status, fault, headers))
        self.reconnection.reached = True
        return self.lost(fault)

    async def _connected(self, headers: dict[str, str]) -> Connection:
        """Open a connection with *headers*.

        Raises:
            WSServerHandshakeError: the server has refused it.
            Interrupted: it cannot be opened now, or not at all.
        """
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                ws = await self._session.ws_connect(
                    self.url,
                    headers=headers,
                    max_msg_size=MAX_FRAME_BYTES,
                    heartbeat=HEARTBEAT,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT),
                    decode_text=False,
                )
        except aiohttp.WSServerHandshakeError:
            raise
        except aiohttp.TooManyRedirects:
            raise protocol_error(f"{self.url} redirects for ever") from None
        except aiohttp.InvalidURL as error:
            raise Broken(unreachable_fault(self.url, error)) from None
        except (OSError, aiohttp.ClientError) as error:
            raise self.lost(unreachable_fault(self.url, error)) from None
        connection = Connection(self, ws)
        self._connections.append(connection)
        now = asyncio.get_running_loop().time()
        for request_id, until in self._cancels.items():
            if now < until:
                connection.send(_cancel_command(request_id))
        self._cancels.clear()
        return connection

    async def _reason(self, status: int, fault: Fault, headers: dict[str, str]) -> Fault:
        """Return why a handshake was refused with *status*; *fault* if that cannot be known.

        aiohttp does not show the body of a refused handshake, but a plain request is refused for
        the same reason.
        """
        timeout = aiohttp.ClientTimeout(total=REASON_TIMEOUT)
        try:
            async with self._session.get(
                self.url, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                if response.status == status:
                    body = await read_body(response, MAX_ERROR_BYTES)
                    return refusal(status, response.headers, body)[0]
        except (OSError, aiohttp.ClientError):
            pass
        return fault

    def _opened(self, task: asyncio.Task[Connection]) -> None:
        self._opening = None
        if not task.cancelled():
            # The waiters get the exception; there may be none left.
            task.exception()


def _cancel_command(request_id: str) -> bytes:
    return b'{"action":"cancel","request_id":%b}' % orjson.dumps(request_id)
