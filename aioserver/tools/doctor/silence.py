"""The life of a silent connection, and the arrival of the server's pings on it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import aiohttp

from aioserver.tools import remote

if TYPE_CHECKING:
    from aioserver.tools.doctor.arrivals import Road
    from aioserver.tools.doctor.findings import Report

# Seconds to open the connection, or to close it.
TIMEOUT = 10.0
# Seconds in which the server pings twice, by the default of chat.websocket.ping_interval.
TWO_PINGS = 41.0
SUBJECT = "idle WebSocket"


async def examine(report: Report, road: Road, seconds: float) -> None:
    """Keep a silent WebSocket open for *seconds*, and count pings (RFC 6455, 5.5.2)."""
    if not seconds:
        report.skip(SUBJECT, "not tested", "--idle 90 keeps one open for so many seconds")
        return
    began = time.monotonic()
    pings = 0
    try:
        async with (
            remote.session(road.key) as session,
            asyncio.timeout(seconds + 2 * TIMEOUT),
            session.ws_connect(
                f"{road.url}{road.paths['websocket']}",
                autoping=False,
                timeout=aiohttp.ClientWSTimeout(ws_close=TIMEOUT),
            ) as ws,
        ):
            while (left := began + seconds - time.monotonic()) > 0:
                try:
                    message = await ws.receive(timeout=left)
                except TimeoutError:
                    break
                if message.type is aiohttp.WSMsgType.PING:
                    pings += 1
                    await ws.pong(message.data)
                elif message.type is not aiohttp.WSMsgType.TEXT:
                    _tell_end(report, time.monotonic() - began, pings)
                    return
    except (aiohttp.ClientError, OSError) as error:
        report.fail(SUBJECT, f"cannot be kept open: {remote.describe(error)}")
        return
    if seconds >= TWO_PINGS and not pings:
        report.warn(
            SUBJECT,
            f"no ping of the server arrived in {seconds:g} s",
            "something on the road swallows them, or chat.websocket.ping_interval is long",
        )
    else:
        report.ok(SUBJECT, f"lives for {seconds:g} s of silence, with {pings} pings of the server")


def _tell_end(report: Report, lived: float, pings: int) -> None:
    report.fail(
        SUBJECT,
        f"was closed after {lived:.0f} s, and {pings} pings of the server",
        "raise the proxy's timeout for reading (nginx: proxy_read_timeout) above 4 x "
        "ping_interval, or see chat.websocket.idle_timeout",
    )
