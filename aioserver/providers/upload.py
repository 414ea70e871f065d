"""Sends a request to a provider, in pieces, under the deadline of each write."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from aioserver.limits.write_watchdog import WriteWatchdog

if TYPE_CHECKING:
    from collections.abc import Callable

# Bytes that are written before the transport is asked whether it takes more.
UPLOAD_PIECE = 65_536


class Connection(Protocol):
    """The protocol of the provider's connection (exchange.py), as an upload sees it.

    *resumed* is done when the transport takes more; None unless an upload waits for it.
    """

    transport: asyncio.Transport | None
    resumed: asyncio.Future[None] | None

    @property
    def writing_paused(self) -> bool:
        """Whether the transport takes no more for now."""


async def upload(
    request: bytes,
    connection: Connection,
    done: asyncio.Future[None],
    write_timeout: float,
    on_timeout: Callable[[], None],
) -> None:
    """Send *request* (head and body), unless *done* is done before: the answer may come early.

    *on_timeout* is called when a write has made no progress for *write_timeout* seconds; it must make
    *done* done. Cancelling leaves the request half sent.
    """
    transport = connection.transport
    assert transport is not None
    if len(request) <= UPLOAD_PIECE:
        transport.write(request)
        if connection.writing_paused:
            await _writable(connection, transport, done, write_timeout, on_timeout)
        return
    view = memoryview(request)
    for start in range(0, len(request), UPLOAD_PIECE):
        if done.done():
            return
        transport.write(view[start : start + UPLOAD_PIECE])
        if connection.writing_paused:
            await _writable(connection, transport, done, write_timeout, on_timeout)


async def _writable(
    connection: Connection,
    transport: asyncio.Transport,
    done: asyncio.Future[None],
    write_timeout: float,
    on_timeout: Callable[[], None],
) -> None:
    """Wait until the transport takes more, or the exchange has ended."""
    loop = asyncio.get_running_loop()
    watchdog = WriteWatchdog(loop, transport, write_timeout, on_timeout)
    try:
        while connection.writing_paused and not done.done():
            connection.resumed = resumed = loop.create_future()
            await asyncio.wait((resumed, done), return_when=asyncio.FIRST_COMPLETED)
    finally:
        connection.resumed = None
        watchdog.stop()
