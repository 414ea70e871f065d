"""Sends a request to a provider in pieces, with a deadline for each write.

The body of a request is there as a whole, or comes from a client that is still sending it. In the
latter case a piece is read when the piece before it has left, so that no more than a piece and the
buffers of two sockets are in memory.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from aioserver.limits.write_watchdog import PROVIDER_BYTES, WriteWatchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aioserver.providers.connections import ConnectionProtocol

# Bytes of a request for which no transport asks its writer to wait.
UPLOAD_PIECE = 65_536
# Bytes that are written before the transport is checked for room: each wait costs as much as
# hundreds of KiB of them.
WRITE_BYTES = 1 << 20


class Body(Protocol):
    """A body whose client is still sending it.

    *chunked* says that its length is not known, so that it is sent in chunks (RFC 9112, 7.1).
    """

    chunked: bool

    async def begin(self) -> None:
        """Wait for the first part, or for the end. Cancelling is safe.

        Raises:
            AioserverError: as `read`; or there is no room for the part.
        """

    async def read(self) -> bytes:
        """Return the next piece; empty at the end. Cancelling is safe.

        Raises:
            AioserverError: the client has stopped sending.
        """

    def rewind(self) -> bool:
        """Start over, and return True; False if a part of the body is gone."""


async def upload(
    request: Sequence[bytes],
    connection: ConnectionProtocol,
    done: asyncio.Future[None],
    write_timeout: float,
    on_timeout: Callable[[], None],
    body: Body | None = None,
) -> None:
    """Send the pieces of *request* and the *body* behind it, unless *done* is done before: the answer
    may come early.

    *on_timeout* is called when the provider has taken nothing for *write_timeout* seconds
    (limits/write_watchdog.py); it must complete *done*. Cancelling leaves the request half sent.

    Raises:
        AioserverError: the client does not send all of the *body*.
    """
    transport = connection.transport
    assert transport is not None
    for piece in request:
        view = memoryview(piece)
        for start in range(0, len(piece), WRITE_BYTES):
            if done.done():
                return
            transport.write(view[start : start + WRITE_BYTES])
            if connection.writing_paused:
                await _writable(connection, transport, done, write_timeout, on_timeout)
    while body is not None and (read := await _next_piece(body, done)) is not None:
        if body.chunked:
            # asyncio's `writelines` would watch the descriptor of a closing connection for good,
            # and the next connection with this number would receive nothing (cpython's gh-136234).
            if not transport.is_closing():
                transport.writelines((b"%x\r\n" % len(read), read, b"\r\n"))
        elif read:
            transport.write(read)
        if connection.writing_paused:
            await _writable(connection, transport, done, write_timeout, on_timeout)
        if not read:
            return


async def _next_piece(body: Body, done: asyncio.Future[None]) -> bytes | None:
    """Return the next piece of *body*, empty at its end.

    None if *done* is done before there is one.
    """
    reading = asyncio.get_running_loop().create_task(body.read())
    # It may end just after the wait for it was given up.
    reading.add_done_callback(lambda task: task.cancelled() or task.exception())
    try:
        await asyncio.wait((reading, done), return_when=asyncio.FIRST_COMPLETED)
        return reading.result() if reading.done() and not done.done() else None
    finally:
        reading.cancel()


async def _writable(
    connection: ConnectionProtocol,
    transport: asyncio.Transport,
    done: asyncio.Future[None],
    write_timeout: float,
    on_timeout: Callable[[], None],
) -> None:
    """Wait until the transport takes more, or the exchange has ended."""
    loop = asyncio.get_running_loop()
    watchdog = WriteWatchdog(loop, transport, write_timeout, on_timeout, least=PROVIDER_BYTES)
    try:
        while connection.writing_paused and not done.done():
            connection.resumed = resumed = loop.create_future()
            await asyncio.wait((resumed, done), return_when=asyncio.FIRST_COMPLETED)
    finally:
        connection.resumed = None
        watchdog.stop()
