"""A watch over a socket that does not take what is written to it.

A blocked write is never cancelled (aiohttp's drain waits on one shared future: cancelling it once
breaks every later write on that connection). Instead the watch looks at the transport's buffer now
and then, and gives the alarm when it has not shrunk for *timeout* seconds; the alarm aborts the
transport, and the blocked write ends by itself. It runs only while something is blocked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

LOOKS = 4  # per timeout: the alarm comes at most a quarter of it late


class WriteWatchdog:
    """Calls *alarm* once when the buffer of *transport* has not shrunk for *timeout* seconds.

    Always: nothing is written to the transport while it is watched; the watch ends by itself when
    the buffer is empty or the transport is closed.
    """

    __slots__ = ("_alarm", "_handle", "_loop", "_period", "_size", "_still", "_transport")

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
        self._still = 0
        self._handle: asyncio.TimerHandle | None = loop.call_later(self._period, self._look)

    def stop(self) -> None:
        """No alarm from now on."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _look(self) -> None:
        self._handle = None
        size = self._transport.get_write_buffer_size()
        if size == 0:
            return
        self._still = self._still + 1 if size >= self._size else 0
        self._size = size
        if self._still >= LOOKS:
            self._alarm()
        else:
            self._handle = self._loop.call_later(self._period, self._look)
