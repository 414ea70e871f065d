"""Writes a response that is not streamed, for as long as its client needs to read it.

aiohttp writes a response after its handler has returned, when the connection's place is given back: any
number of clients that read nothing could then hold an answer each. Here the response is in the
kernel, whole, before the handler returns, and a client that takes nothing for `send_timeout` is
dropped, also on a UNIX socket, where no kernel would do so.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from aioserver.faces.http import announce_close
from aioserver.faces.ready import HIGH_WATER, ReadyResponse
from aioserver.limits.write_watchdog import WriteWatchdog, reset

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp import web


async def write(
    request: web.Request,
    response: web.StreamResponse,
    send_timeout: float,
    on_drop: Callable[[str, str], None],
    face: str,
) -> None:
    """Write the whole *response*, unless it was written before, and wait until the kernel has it.

    *on_drop* is called with *face* and the reason when the client takes nothing for *send_timeout* seconds
    and is dropped.

    Raises:
        ConnectionError: the client has left, or is dropped.
    """
    transport = request.transport
    if response.prepared or transport is None or transport.is_closing():
        return
    if not isinstance(response, ReadyResponse):
        announce_close(request, response)
        await _written_by_aiohttp(
            request, response, transport, send_timeout, partial(on_drop, face)
        )
    else:
        transport.write(response.first_piece(request))
        if not transport.get_write_buffer_size() and response.fits_one_piece:
            return
        drain = request.writer.drain
        for piece in response.more_pieces():
            if transport.get_write_buffer_size() > HIGH_WATER:
                await _watched(transport, drain, send_timeout, partial(on_drop, face))
            transport.write(piece)
    await flush(transport, request.writer.drain, send_timeout, partial(on_drop, face))


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
        await _watched(transport, drain, send_timeout, on_drop)
    finally:
        if not transport.is_closing():
            # asyncio's own limits, which the writers of streams count on.
            transport.set_write_buffer_limits()


async def _written_by_aiohttp(
    request: web.Request,
    response: web.StreamResponse,
    transport: asyncio.Transport,
    send_timeout: float,
    on_drop: Callable[[str], None],
) -> None:
    """Let aiohttp write *response*: it gives the transport all of it, and waits for the client to read."""
    watchdogs: list[WriteWatchdog] = []

    def watch() -> None:
        watchdogs.append(_watchdog(transport, send_timeout, on_drop))

    # It begins once aiohttp waits: until then the buffer grows.
    beginning = asyncio.get_running_loop().call_soon(watch)
    try:
        await response.prepare(request)
        await response.write_eof()
    finally:
        beginning.cancel()
        for watchdog in watchdogs:
            watchdog.stop()


async def _watched(
    transport: asyncio.Transport,
    drain: Callable[[], Awaitable[None]],
    send_timeout: float,
    on_drop: Callable[[str], None],
) -> None:
    watchdog = _watchdog(transport, send_timeout, on_drop)
    try:
        await drain()
    finally:
        watchdog.stop()


def _watchdog(
    transport: asyncio.Transport, send_timeout: float, on_drop: Callable[[str], None]
) -> WriteWatchdog:
    def drop() -> None:
        on_drop(f"nothing taken for {send_timeout} s")
        reset(transport)

    return WriteWatchdog(asyncio.get_running_loop(), transport, send_timeout, drop)
