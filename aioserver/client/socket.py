"""The WebSocket transport: a connection for up to MAX_ANSWERS answers, and further ones for more."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
from multidict import CIMultiDict

from aioserver.client.connection import Connection
from aioserver.client.errors import Broken, Fault, Interrupted, Lost, protocol_error
from aioserver.client.reading import MAX_FRAME_BYTES
from aioserver.client.refusals import MAX_ERROR_BYTES, refusal, unreachable_fault
from aioserver.client.retries import Reconnection
from aioserver.client.socket_reading import SocketReading

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from aioserver.client.reading import Question
    from aioserver.client.socket_reading import Carrier

# Seconds for the handshake, connecting included; for asking why it was refused; for the server to answer a close frame.
HANDSHAKE_TIMEOUT = 30.0
REASON_TIMEOUT = 5.0
CLOSE_TIMEOUT = 2.0
# Seconds of silence before a ping; half as long may its answer take.
HEARTBEAT = 30.0
# Seconds for which the server lets an answer without a reader go on, by default: then it needs no `cancel`.
CANCEL_WINDOW = 30.0
CLOSED = Fault("connect_error", "the client is closed")


class SocketTransport:
    """The sockets of a client: one, and another one for each further MAX_ANSWERS answers at once."""

    def __init__(self, session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> None:
        self.closed = False
        self.reconnection = Reconnection(random.random)
        self._session = session
        self._url = url
        self._headers = headers
        self._connections: list[Connection] = []
        self._opening: asyncio.Task[None] | None = None
        # Why there is no connection, and the loop's time before which none is opened.
        self._loss: tuple[Fault, float] | None = None
        # Answers to be cancelled when there is a connection, and until which time of the loop.
        self._cancels: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def read(self, question: Question) -> SocketReading:
        """Return the reading of the answer to *question*."""
        return SocketReading(self, question)

    async def connection(self, request_id: str) -> Connection:
        """Return a connection with room for the answer *request_id*.

        Raises:
            Interrupted: there is none now.
        """
        loop = asyncio.get_running_loop()
        while True:
            for connection in self._connections:
                if connection.room_for(request_id):
                    return connection
            if self.closed:
                raise Broken(CLOSED)
            if self._opening is None and self._loss is not None and loop.time() < self._loss[1]:
                raise Lost(*self._loss)
            opening = self._open_once()
            # Others may wait for the same connection, so it is opened even if this one gives up.
            await asyncio.wait([opening])
            if not opening.cancelled() and (error := opening.exception()) is not None:
                raise error

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that ends before `close` returns."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def lost(self, fault: Fault, delay: float) -> Interrupted:
        """Return the loss of a connection, which holds the next one back for *delay* seconds."""
        if self.reconnection.hopeless:
            return Broken(fault)
        self._loss = fault, asyncio.get_running_loop().time() + delay
        return Lost(*self._loss)

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

    def cancel(self, request_id: str, connection: Carrier | None) -> asyncio.Future[None] | None:
        """Cancel an answer, on its connection or on the next one. Returns what is done when it was sent."""
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
        if self._loss is None or self._loss[1] <= loop.time():
            self._open_once()
        return None

    async def close(self) -> None:
        """Cancel what runs, and close all connections."""
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

    def _open_once(self) -> asyncio.Task[None]:
        """Open a connection; it is the one that is being opened, if there is one."""
        if self._opening is None:
            self._opening = self.start(self._open())
            self._opening.add_done_callback(self._opened)
        return self._opening

    async def _open(self) -> None:
        """Open a connection.

        Raises:
            Interrupted: it cannot be opened now, or not at all.
        """
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                ws = await self._session.ws_connect(
                    self._url,
                    headers=self._headers,
                    max_msg_size=MAX_FRAME_BYTES,
                    heartbeat=HEARTBEAT,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT),
                    decode_text=False,
                )
        except aiohttp.WSServerHandshakeError as error:
            fault, final = refusal(error.status, CIMultiDict(error.headers or {}), b"")
            if final:
                raise Broken(await self._reason(error.status, fault)) from None
            self.reconnection.reached = True
            delay = self.reconnection.after_loss(None, fault.retry_after)
            raise self.lost(fault, delay) from None
        except aiohttp.TooManyRedirects:
            raise protocol_error(f"{self._url} redirects for ever") from None
        except aiohttp.InvalidURL as error:
            raise Broken(unreachable_fault(self._url, error)) from None
        except (OSError, aiohttp.ClientError) as error:
            delay = self.reconnection.after_loss()
            raise self.lost(unreachable_fault(self._url, error), delay) from None
        connection = Connection(self, ws)
        self._connections.append(connection)
        now = asyncio.get_running_loop().time()
        for request_id, until in self._cancels.items():
            if now < until:
                connection.send(_cancel_command(request_id))
        self._cancels.clear()

    async def _reason(self, status: int, fault: Fault) -> Fault:
        """Return why a handshake was refused with *status*; *fault* if that cannot be known.

        aiohttp keeps the body of a refused handshake to itself, but a plain request is refused for the same reason.
        """
        timeout = aiohttp.ClientTimeout(total=REASON_TIMEOUT)
        try:
            async with self._session.get(
                self._url, headers=self._headers, timeout=timeout, allow_redirects=False
            ) as response:
                if response.status == status:
                    body = await response.content.read(MAX_ERROR_BYTES)
                    return refusal(status, response.headers, body)[0]
        except (OSError, aiohttp.ClientError):
            pass
        return fault

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening = None
        if not task.cancelled():
            # Those that wait have it raised; it may be that nobody waits any more.
            task.exception()


def _cancel_command(request_id: str) -> bytes:
    return b'{"action":"cancel","request_id":%b}' % orjson.dumps(request_id)
