"""The writes of one iteration of the event loop, which go out together at its end.

If the reader of the sockets is on this machine (a proxy in front, or a provider), a write that
closely follows another finds that process still awake. Waking it is a third of the cost of a
write. Also, the work before and after the writes is done for one request after another, by code
that is still in the processor's caches.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger("aioserver.streams")


class Writable(Protocol):
    """The owner of a socket."""

    def write(self, data: bytes) -> None:
        """Write *data* to the socket, unless it is closing."""

    def abort(self) -> None:
        """Reset the connection: some of its bytes are lost."""


class Outbox:
    """The pending writes of one event loop: those of one iteration go out together.

    Always: the outbox is flushed before one of its sockets is written to by other means, and
    before it is closed.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: list[tuple[Writable, bytes]] = []
        self._waiting: list[asyncio.Future[None]] = []

    def put(self, target: Writable, data: bytes) -> None:
        """Queue *data* for *target* to write at the end of this iteration of the loop."""
        if not self._pending:
            self._loop.call_soon(self.flush)
        self._pending.append((target, data))

    def send(self, target: Writable, data: bytes) -> asyncio.Future[None]:
        """Queue *data* as `put` does; the result is done when it was written."""
        if not self._pending:
            self._loop.call_soon(self.flush)
        self._pending.append((target, data))
        written: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(written)
        return written

    def flush(self) -> None:
        """Write all that is pending, now."""
        pending, self._pending = self._pending, []
        for target, data in pending:
            try:
                target.write(data)
            except Exception:
                # The bytes after these belong to other connections, whose handlers wait for them.
                logger.exception("bug in a write")
                target.abort()
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for written in waiting:
                if not written.done():
                    written.set_result(None)
