"""Writes a response that is not streamed, for as long as its client needs to read it.

aiohttp writes a response after its handler has returned. By then the connection has given its
place back, so any number of clients that read nothing could each hold an answer in memory. This
module writes the whole response before the handler returns, and waits until the kernel has it. A
client that takes nothing for `send_timeout` is dropped, also on a UNIX socket, where the kernel
would not drop it.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http import StreamWriter

from aioserver.faces.http import announce_close
from aioserver.faces.ready import HIGH_WATER, ReadyResponse
from aioserver.limits.write_watchdog import WriteWatchdog, reset

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def write(
    request: web.Request,
    response: web.StreamResponse,
    send_timeout: float,
    on_drop: Callable[[str, str], None],
    face: str,
) -> None:
    """Write the whole *response*, of which nothing was written, and wait until the kernel has it.

    A client that takes nothing for *send_timeout* seconds is dropped, and *on_drop* is called with
    *face* and the reason.

    Raises:
        ConnectionError: the client has left, or is dropped.
    """
    transport = request.transport
    if transport is None or transport.is_closing():
        return
    if isinstance(response, ReadyResponse):
        # If the application is embedded in another server, the connection lacks this method.
        send: Callable[[bytes], Awaitable[None]] | None = getattr(request.protocol, "send", None)
        if send is None:
            transport.write(response.first_piece(request))
        else:
            await send(response.first_piece(request))
        if not transport.get_write_buffer_size() and response.body_length <= HIGH_WATER:
            return
    drain, drop = request.writer.drain, partial(on_drop, face)
    watched = partial(drained, transport, drain, send_timeout, drop)
    if isinstance(response, ReadyResponse):
        for piece in response.more_pieces():
            if transport.is_closing():
                # The client has left meanwhile, and asyncio would warn of each further write.
                return
            if transport.get_write_buffer_size() > HIGH_WATER:
                await watched()
            transport.write(piece)
    else:
        await _write_by_aiohttp(request, response, transport, watched)
    await flush(transport, drain, send_timeout, drop)


async def _write_by_aiohttp(
    request: web.Request,
    response: web.StreamResponse,
    transport: asyncio.Transport,
    watched: Callable[[], Awaitable[None]],
) -> None:
    """Let aiohttp write *response*, but without aiohttp's own wait for the client, which has no
    deadline.
    """
    announce_close(request, response)
    writer = await response.prepare(request)
    if isinstance(response, web.Response) and isinstance(response.body, bytes):
        # Otherwise aiohttp would write it again.
        body, response.body = response.body, None
        assert isinstance(writer, StreamWriter)
        for start in range(0, len(body) if request.method != "HEAD" else 0, HIGH_WATER):
            await writer.write(memoryview(body)[start : start + HIGH_WATER], drain=False)
            if transport.get_write_buffer_size() > HIGH_WATER:
                await watched()
    await response.write_eof()


async def flush(
    transport: asyncio.Transport,
    drain: Callable[[], Awaitable[None]],
    send_timeout: float,
    on_drop: Callable[[str], None],
) -> None:
    """Wait until *transport* has nothing left to write; *drain* waits for its low-water mark.

    Raises:
        ConnectionError: as `write`.
    """
    if not transport.get_write_buffer_size() or transport.is_closing():
        return
    transport.set_write_buffer_limits(high=0)
    try:
        await drained(transport, drain, send_timeout, on_drop)
    finally:
        if not transport.is_closing():
            # asyncio's own limits, which the writers of streams rely on.
            transport.set_write_buffer_limits()


async def drained(
    transport: asyncio.Transport,
    drain: Callable[[], Awaitable[None]],
    send_timeout: float,
    on_drop: Callable[[str], None],
) -> None:
    """Wait until *drain* returns: *transport* is at its low-water mark.

    Raises:
        ConnectionError: as `write`.
    """

    def drop() -> None:
        on_drop(f"nothing taken for {send_timeout} s")
        reset(transport)

    watchdog = WriteWatchdog(asyncio.get_running_loop(), transport, send_timeout, drop)
    try:
        await drain()
    finally:
        watchdog.stop()
