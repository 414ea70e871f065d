"""A provider that sends the bytes of a script, and what a test needs to make exchanges with it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import ssl
from typing import TYPE_CHECKING, Any, Self

import pytest

from aioserver.config.settings import HttpClient
from aioserver.providers.exchange import Exchange
from aioserver.providers.pool import Pool
from tests.support.waiting import ticks
from tests.support.writing import write

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from aioserver.providers.backpressure import Backpressure
    from aioserver.providers.connections import PooledConnection


LIMITS = HttpClient(
    max_connections=6,
    max_keepalive=2,
    keepalive_expiry=30.0,
    connect_timeout=5.0,
    read_timeout=5.0,
    write_timeout=5.0,
    pool_timeout=5.0,
    requests_per_minute=1_000_000,
    concurrent_requests=6,
    max_retries=0,
    backoff_factor=0.0,
)
# The head of an answer in events, whose body is chunks; its last event; its last chunk.
EVENT_STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
DONE = b"data: [DONE]\n\n"
LAST_CHUNK = b"0\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def chunk(data: bytes, size: str = "%x") -> bytes:
    """A chunk of HTTP's chunked encoding; *size* is the format of its first line."""
    return b"%b\r\n%b\r\n" % ((size % len(data)).encode(), data)


class Peer:
    """One connection as the provider sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def head(self) -> bytes:
        """Read the head of the next request.

        Raises:
            asyncio.IncompleteReadError: the other side has left.
        """
        return await self.reader.readuntil(b"\r\n\r\n")

    async def request(self) -> bytes:
        """Read the next request, head and body."""
        head = await self.head()
        length = 0
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        return head + await self.reader.readexactly(length)

    def write(self, data: bytes) -> None:
        """Write *data* without waiting until it is taken.

        Raises:
            ConnectionResetError: the other side has left.
        """
        write(self.writer, data)

    async def send(self, *pieces: bytes) -> None:
        """Send *pieces*, each in a packet of its own, so that a reader on this loop reads it
        alone.
        """
        for piece in pieces:
            self.write(piece)
            await ticks(3)

    async def left(self) -> None:
        """Wait until the other side is gone, whether it closes or resets."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    def close(self) -> None:
        """Close the connection: FIN."""
        self.writer.close()

    def abort(self) -> None:
        """Close the connection at once: RST."""
        self.writer.transport.abort()


class ScriptedProvider:
    """A listener that calls *play* for each connection and closes it afterwards.

    `accepted` counts the connections that ever came, `open` those that are there now.
    """

    def __init__(self, play: Callable[[Peer], Awaitable[None]], **kwargs: Any) -> None:
        self._play = play
        self._kwargs = kwargs
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self.accepted = 0
        self.open = 0
        self.requests: list[bytes] = []
        self.port = 0

    async def __aenter__(self) -> Self:
        options = {"limit": 1 << 20, **self._kwargs}
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, **options)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._server is not None
        self._server.close()
        self._closing = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        """Its base URL."""
        scheme = "https" if "ssl" in self._kwargs else "http"
        return f"{scheme}://127.0.0.1:{self.port}/v1"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closing:
            # It was on its way when the listener was closed.
            writer.transport.abort()
            return
        task = asyncio.ensure_future(self._serve(Peer(reader, writer)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, peer: Peer) -> None:
        self.accepted += 1
        self.open += 1
        try:
            await self._play(peer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the other side has left
        finally:
            self.open -= 1
            peer.close()
            with contextlib.suppress(ConnectionError, TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(peer.writer.wait_closed(), 1)


Answer = bytes | tuple[bytes | asyncio.Event, ...]


async def give(peer: Peer, answer: Answer) -> None:
    """Send *answer*: one that is a tuple comes in pieces, and an event in it is waited for."""
    for piece in (answer,) if isinstance(answer, bytes) else answer:
        if isinstance(piece, asyncio.Event):
            await piece.wait()
        else:
            await peer.send(piece)


def answering(*answers: Answer) -> Callable[[Peer], Awaitable[None]]:
    """A script that answers one request after the other with *answers*, and then waits."""

    async def play(peer: Peer) -> None:
        for answer in answers:
            await peer.request()
            await give(peer, answer)
        await peer.left()

    return play


def stalling(
    until: asyncio.Event, answer: bytes = b"", *, begun: asyncio.Event | None = None
) -> Callable[[Peer], Awaitable[None]]:
    """A script that reads the head of a request, sends *answer*, and reads nothing until *until*;
    *begun* is set where it stops reading.
    """

    async def play(peer: Peer) -> None:
        await peer.head()
        if answer:
            await peer.send(answer)
        if begun:
            begun.set()
        await until.wait()

    return play


def closing(*answers: Answer) -> Callable[[Peer], Awaitable[None]]:
    """A script that answers one request on each connection, and closes it: with the next of
    *answers*, and with the last of them from then on.
    """
    left = list(answers)

    async def play(peer: Peer) -> None:
        await peer.request()
        await give(peer, left.pop(0) if len(left) > 1 else left[0])

    return play


class Got:
    """A sink that keeps what the answer to one request is."""

    def __init__(self, *, until: bytes | None = None) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []
        self.ended = False
        self._until = until

    def on_head(self, status: int, headers: Mapping[str, str]) -> Got:
        assert not self.status, "one head an answer"
        self.status, self.headers = status, dict(headers)
        return self

    @property
    def progress(self) -> int:
        return len(self.parts)

    def feed(self, data: bytes) -> bool:
        assert data, "a part is never empty"
        assert not self.ended
        self.parts.append(data)
        return self._until is None or self._until not in self.body

    def end(self) -> None:
        assert not self.ended, "one end an answer"
        self.ended = True

    def broken(self, _fault: Exception) -> bool:
        """Return False: half an answer is none."""
        return False

    def fast(self) -> None:
        """Return None: this sink has no fast path."""

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)


def request(body: bytes = b"{}", path: str = "/v1/chat/completions") -> bytes:
    """The bytes of a request, as a provider reads them."""
    head = f"POST {path} HTTP/1.1\r\nHost: provider\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def exchange(
    connection: PooledConnection,
    got: Got,
    backpressure: Backpressure | None = None,
    **timeouts: float,
) -> Exchange:
    """Make an exchange on *connection*, with 5 s for each timeout that is not passed."""
    times = {"read_timeout": 5.0, "write_timeout": 5.0, **timeouts}
    return Exchange(
        connection,
        read_timeout=times["read_timeout"],
        write_timeout=times["write_timeout"],
        on_head=got.on_head,
        backpressure=backpressure,
    )


async def ask(
    pool: Pool, got: Got | None = None, *, body: bytes = b"{}", **timeouts: float
) -> Got:
    """Make one request over *pool*; returns the answer."""
    got = got or Got()
    await exchange(await pool.connect(), got, None, **timeouts).run([request(body)])
    return got


@contextlib.asynccontextmanager
async def pooled(
    base_url: str, *, ca_file: str | None = None, **limits: Any
) -> AsyncIterator[Pool]:
    """A pool, closed at the end of the block, when no connection may be in use any more."""
    context = None if ca_file is None else ssl.create_default_context(cafile=ca_file)
    pool = Pool(base_url, dataclasses.replace(LIMITS, **limits), context=context)
    try:
        yield pool
        assert pool.stats().open == pool.stats().idle, "a connection was not given back"
    finally:
        await pool.close()


@contextlib.asynccontextmanager
async def full_listener() -> AsyncIterator[int]:
    """The port of a listener whose accept queue is full: SYNs to it are dropped."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(16):
            backlog_socket = stack.enter_context(socket.socket())
            backlog_socket.setblocking(False)
            try:
                await asyncio.wait_for(loop.sock_connect(backlog_socket, ("127.0.0.1", port)), 0.1)
            except TimeoutError:
                break
        else:
            pytest.skip("this kernel's accept queue does not fill")
        yield port
