"""A watchdog over a socket that does not accept what is written to it.

A blocked write is never cancelled: aiohttp's drain waits on one shared future, and cancelling it
once breaks every later write on that connection. Instead the watchdog looks at the size of the
transport's buffer from time to time. When it has not shrunk for *timeout* seconds, the watchdog
calls *alarm*, which aborts the transport, and the blocked write ends by itself. The watchdog runs
only while a write is blocked.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# Looks at the buffer per timeout: the alarm comes at most a quarter of the timeout late.
LOOKS = 4
# Whether the kernel can abort a connection whose last bytes nobody reads: see server/listener.py.
KERNEL_ABORTS = hasattr(socket, "TCP_USER_TIMEOUT")


class WriteWatchdog:
    """Calls *alarm* once when the buffer of *transport* has not shrunk for *timeout* seconds.

    Always: nothing is written to the transport while it is watched. The watchdog ends by itself
    when the buffer is empty or the transport is closed.
    """

    __slots__ = ("_alarm", "_handle", "_loop", "_period", "_size", "_stalled", "_transport")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.Transport,
        timeout: float,
        alarm: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._period = timeout / LOOKS
        self._alarm = alarm
        self._size = transport.get_write_buffer_size()
        # Looks in a row at which the buffer had not shrunk.
        self._stalled = 0
        self._handle: asyncio.TimerHandle | None = loop.call_later(self._period, self._look)

    def stop(self) -> None:
        """End the watch: no alarm from now on."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _look(self) -> None:
        self._handle = None
        size = self._transport.get_write_buffer_size()
        if size == 0:
            return
        self._stalled = self._stalled + 1 if size >= self._size else 0
        self._size = size
        if self._stalled >= LOOKS:
            self._alarm()
        else:
            self._handle = self._loop.call_later(self._period, self._look)


def reset(transport: asyncio.Transport) -> None:
    """Reset the connection, whatever is still to be written."""
    sock = transport.get_extra_info("socket")
    if sock is not None and not transport.is_closing():
        # A reset: otherwise the kernel would keep its bytes for a peer that reads nothing.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def watch_rest(transport: asyncio.Transport, timeout: float) -> None:
    """Abort *transport*, to which nothing is written any more, if its peer does not read the rest.

    Its close() would wait for that peer for ever. Over TCP the kernel aborts the connection
    itself.
    """
    if transport.is_closing() or not transport.get_write_buffer_size():
        return
    sock = transport.get_extra_info("socket")
    if not KERNEL_ABORTS or (sock is not None and sock.family == socket.AF_UNIX):
        WriteWatchdog(asyncio.get_running_loop(), transport, timeout, transport.abort)
