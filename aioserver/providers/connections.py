"""The open connections of a pool: those that requests use, and the idle ones, which wait for the next request.

aiohttp's connector opens and closes them. What it does for each request besides (a coroutine, two objects, a search by a
key, a list of callbacks) costs more than the rest of a pool, so idle connections wait here, in front of it. For the
connector an idle one is still in use, and its `limit` counts all that are open.

Private names of aiohttp used here, guarded by `tests/providers/test_pool.py`: `_factory` and `_loop` of `TCPConnector`.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from typing import TYPE_CHECKING, Any

from aiohttp import TCPConnector

from aioserver.providers.pooled_connection import ConnectionProtocol, PooledConnection
from aioserver.streams.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiohttp import ClientRequest, ClientTimeout

    from aioserver.limits.gate import Place
    from aioserver.providers.pooled_connection import Receiver


class Connector(TCPConnector):
    """aiohttp's connector, whose connections speak our protocol."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._factory = functools.partial(  # type: ignore[assignment]
            ConnectionProtocol, loop=self._loop, outbox=Outbox(self._loop)
        )


class Connections:
    """The open connections of one pool to *endpoint*, *limit* at most; *timeout* is that of opening one.

    The other *options* are those of aiohttp's `TCPConnector`.

    Always: a connection that is given back is kept only if at most `max_idle + pending()` are idle then, and for
    *expiry* seconds at most. The connection that has been idle longest is taken first.
    """

    def __init__(
        self,
        endpoint: ClientRequest,
        timeout: ClientTimeout,
        *,
        limit: int,
        max_idle: int,
        expiry: float,
        pending: Callable[[], int],
        **options: Any,
    ) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._connector = Connector(
            limit=limit, limit_per_host=limit, keepalive_timeout=expiry, **options
        )
        self._max_idle = max_idle
        self._expiry = expiry
        self._pending = pending
        # Called when a connection is given back, or closed.
        self._on_release: Callable[[], None] | None = None
        # The idle connections, the one that has been idle longest first.
        self._idle: deque[PooledConnection] = deque()
        self._in_use: set[PooledConnection] = set()
        self._opening = 0
        self._expiry_timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> int:
        """How many connections are open and not in use."""
        return len(self._idle)

    @property
    def acquired(self) -> int:
        """How many connections are in use, or being opened."""
        return len(self._in_use) + self._opening

    @property
    def exchanges(self) -> Iterator[Receiver]:
        """Yield the exchanges under way."""
        for connection in self._in_use:
            if connection.protocol.exchange is not None:
                yield connection.protocol.exchange

    def take(self, place: Place) -> PooledConnection | None:
        """Return an idle connection for the request that has *place*; None if there is none."""
        idle = self._idle
        while idle:
            connection = idle.popleft()
            usable = False
            try:
                fresh = self._loop.time() - connection.idle_since <= self._expiry
                usable = fresh and connection.protocol.is_connected()
            finally:
                if not usable:
                    connection.discard()
            if usable:
                connection.place = place
                self._in_use.add(connection)
                return connection
        return None

    async def open_one(self, place: Place) -> PooledConnection:
        """Open a connection for the request that has *place*. Cancelling is safe.

        Raises:
            OSError, aiohttp.ClientError, TimeoutError, UnicodeError: as aiohttp's connector.
        """
        self._opening += 1
        try:
            opened = await self._connector.connect(self._endpoint, [], self._timeout)
        finally:
            self._opening -= 1
        try:
            connection = PooledConnection(self, opened)
        except BaseException:
            opened.close()
            raise
        connection.place = place
        self._in_use.add(connection)
        return connection

    def give_back(self, connection: PooledConnection) -> None:
        """Keep *connection* for the next request, or close it."""
        self._in_use.discard(connection)
        if len(self._idle) < self._max_idle + self._pending():
            connection.idle_since = self._loop.time()
            self._idle.append(connection)
            if self._expiry_timer is None:
                self._expiry_timer = self._loop.call_later(self._expiry, self._sweep)
        else:
            connection.discard()
        if self._on_release is not None:
            self._on_release()

    def gone(self, connection: PooledConnection) -> None:
        """Note that *connection*, which was in use, is closed."""
        self._in_use.discard(connection)
        if self._on_release is not None:
            self._on_release()

    def forget(self, connection: PooledConnection) -> None:
        """Take *connection*, which the provider has closed, out of the idle ones."""
        if connection in self._idle:
            self._idle.remove(connection)

    def retire(self, on_release: Callable[[], None]) -> None:
        """Keep no connection from now on; *on_release* is called when one is given back or closed."""
        self._max_idle, self._pending, self._on_release = 0, lambda: 0, on_release
        self.drop_idle()

    def trim(self) -> None:
        """Close the idle connections beyond the cap, those that have been idle longest first."""
        for _ in range(len(self._idle) - self._max_idle - self._pending()):
            self._idle.popleft().discard()

    def drop_idle(self) -> None:
        """Close every idle connection."""
        while self._idle:
            self._idle.popleft().discard()

    async def close(self) -> None:
        """Close every connection."""
        self._max_idle, self._pending = 0, lambda: 0
        self.drop_idle()
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
        await self._connector.close(abort_ssl=True)

    def _sweep(self) -> None:
        """Close the connections that have been idle for too long."""
        now = self._loop.time()
        while self._idle and self._idle[0].idle_since + self._expiry <= now:
            self._idle.popleft().discard()
        self._expiry_timer = None
        if self._idle:
            due = self._idle[0].idle_since + self._expiry
            self._expiry_timer = self._loop.call_at(due, self._sweep)
