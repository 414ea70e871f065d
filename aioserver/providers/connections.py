"""The open connections of a pool: those in use, one request after another, and idle ones, which
wait for the next request.

aiohttp's connector opens and closes them; once one is open, its transport has our protocol. The
connector's work for each request costs more than the rest of a pool: a coroutine, two objects, a
search by a key, a list of callbacks. So idle connections wait here, in front of it. To the
connector an idle connection is still in use, and its `limit` counts all open ones.

Bytes that come while no exchange is under way (a late 408, a close) abort the connection: aiohttp
would pass them to the next request as its answer.

This file is one concept: the owner, the reader and the next user of a connection cannot change
apart.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, cast

from aiohttp import TCPConnector

from aioserver.limits.resource import Ticket
from aioserver.providers.http1 import ResponseParser
from aioserver.streams.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

    from aiohttp import ClientRequest, ClientTimeout
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection

    from aioserver.limits.resource import Grant, Resource
    from aioserver.streams.contracts import Path
    from aioserver.telemetry.request_log import RequestRecord


class Receiver(Protocol):
    """The exchange under way on a connection (exchange.py), as the connection sees it.

    *last_byte_at*: when the last byte came, in the loop's time.
    """

    record: RequestRecord
    last_byte_at: float

    def feed(self, data: bytes) -> None:
        """Take bytes from the provider."""

    def stale(self) -> None:
        """Fail: bytes have come on a kept connection before the request was written."""

    def connection_lost(self, exc: BaseException | None) -> None:
        """End, since the connection is lost; *exc* None: it was closed in an orderly way."""

    def check_deadline(self) -> float | None:
        """Fail if the read deadline has passed.

        Return the seconds until it; None if there is none.
        """

    def silence(self, now: float) -> float | None:
        """Return the seconds since the provider last sent anything; None if nothing is awaited."""


class ConnectionProtocol(asyncio.Protocol):
    """The protocol of a pooled connection: it pushes what it receives to the exchange under way.

    Always: `fast_path` is None unless an exchange is under way. *transport* is None once the
    connection is lost or aborted.
    """

    __slots__ = (
        "_deadline",
        "_deadline_timer",
        "_loop",
        "_opener",
        "_outbox",
        "_unwritten",
        "exchange",
        "fast_path",
        "pooled",
        "response_parser",
        "resumed",
        "reused",
        "transport",
        "writing_paused",
        "written_at",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, outbox: Outbox) -> None:
        self._loop = loop
        self._outbox = outbox
        self.transport: asyncio.Transport | None = None
        # The protocol with which aiohttp has opened the connection, and which closes it.
        self._opener: ResponseHandler | None = None
        self.writing_paused = False
        self.exchange: Receiver | None = None
        # The fast path of the exchange under way, while it is open.
        self.fast_path: Path | None = None
        # Whether an exchange has ended well on this connection.
        self.reused = False
        self.response_parser = ResponseParser()
        # Done when the transport takes more; None unless an upload waits for it.
        self.resumed: asyncio.Future[None] | None = None
        # Notified when the connection is lost without an exchange under way.
        self.pooled: PooledConnection | None = None
        self._deadline_timer: asyncio.TimerHandle | None = None
        # When it fires, in the loop's time: uvloop's handle of a short delay does not report it.
        self._deadline = 0.0
        # Whether a request waits in the outbox, and the monotonic time of the last write.
        self._unwritten = False
        self.written_at = 0.0

    def take_over(self, opened: Connection) -> None:
        """Read and write *opened* from now on, unless it is lost, or has received unrequested
        bytes.
        """
        opener, transport = opened.protocol, opened.transport
        if opener is not None and transport is not None and not opener.should_close:
            self._opener = opener
            transport.set_protocol(self)
            self.connection_made(transport)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Use *transport*."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Push *data* to the exchange under way; abort the connection if there is none."""
        fast_path = self.fast_path
        if fast_path is not None and fast_path.forward(data):
            return
        if (exchange := self.exchange) is not None:
            if self._unwritten and self.reused:
                # The provider has sent this unasked: a 408 for an idle connection, perhaps.
                exchange.stale()
            else:
                exchange.feed(data)
        else:
            self.abort()

    def abort(self) -> None:
        """Reset the connection, which is no longer used."""
        transport, self.transport = self.transport, None
        if transport is not None:
            transport.abort()

    def write_soon(self, data: bytes) -> None:
        """Write *data* together with the other writes of this iteration of the event loop."""
        self._unwritten = True
        self._outbox.put(self, data)

    def write(self, data: bytes) -> None:
        """Write *data*, unless the connection is lost or closing: called by the outbox."""
        self._unwritten, transport = False, self.transport
        if transport is not None and not transport.is_closing():
            transport.write(data)
            self.written_at = monotonic()

    def pause_writing(self) -> None:
        """Make an upload wait."""
        self.writing_paused = True

    def resume_writing(self) -> None:
        """Wake the upload that waits."""
        self.writing_paused = False
        if self.resumed is not None and not self.resumed.done():
            self.resumed.set_result(None)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End the exchange under way, or leave the pool."""
        self.transport = None
        opener, self._opener = self._opener, None
        if opener is not None:
            opener.connection_lost(exc)
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None
        if self.exchange is not None:
            self.exchange.connection_lost(exc)
        elif self.pooled is not None:
            self.pooled.lost()
        self.response_parser.close()

    def watch_deadline(self, read_timeout: float) -> None:
        """Enforce the read deadline of the exchange under way.

        There is one timer per connection and not one per request: it is not cancelled after an
        answer, and goes on with the request that is under way when it fires.
        """
        deadline = self._loop.time() + read_timeout
        if self._deadline_timer is not None:
            if self._deadline <= deadline:
                return
            # The timer was set for a request that could wait longer: a reload has changed the
            # timeout.
            self._deadline_timer.cancel()
        self._set_deadline(read_timeout)

    def _check_deadline(self) -> None:
        self._deadline_timer = None
        if self.exchange is not None and (seconds := self.exchange.check_deadline()) is not None:
            self._set_deadline(seconds)

    def _set_deadline(self, seconds: float) -> None:
        self._deadline = self._loop.time() + seconds
        self._deadline_timer = self._loop.call_later(seconds, self._check_deadline)


class PooledConnection:
    """An open connection of a pool.

    A request that has taken it ends its use by `release` or `close`; only the first of these calls
    has an effect.

    Always: *place* is its place in the pool's resource; None once it is closed, or while it is
    idle and its place was given to a waiting request.
    """

    __slots__ = ("_connection", "_owner", "idle_since", "place", "protocol")

    def __init__(
        self, owner: Connections, connection: Connection, protocol: ConnectionProtocol
    ) -> None:
        self._owner = owner
        self._connection: Connection | None = connection
        self.protocol = protocol
        self.place: Grant | None = None
        self.idle_since = 0.0
        protocol.pooled = self

    @property
    def transport(self) -> asyncio.Transport | None:
        """The transport; None once the connection is lost."""
        return self.protocol.transport

    def heard_at(self) -> float:
        """Return when the fast path has forwarded something, in the loop's time; 0.0 without a
        fast path.
        """
        fast_path = self.protocol.fast_path
        return 0.0 if fast_path is None else fast_path.forwarded_at

    def release(self) -> None:
        """Give the connection to the next request, or keep it for one."""
        self._owner.give_back(self)

    def close(self) -> None:
        """Close the connection, and end its use."""
        self._owner.give_back(self, keep=False)

    def give_place(self) -> None:
        """Give its place to a request that waits for one, or will."""
        place, self.place = self.place, None
        if place is not None:
            place.release()

    def discard(self) -> None:
        """Close the connection, which is not in use."""
        self.give_place()
        connection, self._connection = self._connection, None
        if connection is not None:
            self.protocol.pooled = None
            self.protocol.abort()
            connection.close()

    def lost(self) -> None:
        """Note that the provider has closed the connection.

        A request that uses it ends its use itself.
        """
        self._owner.forget(self)


class Connections:
    """The open connections of one pool to *endpoint*, *limit* at most, each with a place in
    *gate*.

    *timeout* bounds the opening of one.

    The other *options* are those of aiohttp's `TCPConnector`.

    Always: while a request waits for a place, no idle connection holds one. A released connection
    is kept only if at most `max_idle + pending()` are idle then, and for *expiry* seconds at most.
    The connection that has been idle longest is taken first.
    """

    def __init__(
        self,
        endpoint: ClientRequest,
        timeout: ClientTimeout,
        gate: Resource,
        *,
        limit: int,
        max_idle: int,
        expiry: float,
        pending: Callable[[], int],
        **options: Any,
    ) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._gate = gate
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(self._loop)
        self._connector = TCPConnector(
            limit=limit, limit_per_host=limit, keepalive_timeout=expiry, **options
        )
        self._max_idle = max_idle
        self._expiry = expiry
        self._pending = pending
        # Called when a connection is released or closed.
        self._on_release: Callable[[], None] | None = None
        # The idle connections, the one that has been idle longest first.
        self.idle: deque[PooledConnection] = deque()
        self._in_use: set[PooledConnection] = set()
        self._opening = 0
        self._expiry_timer: asyncio.TimerHandle | None = None

    @property
    def acquired(self) -> int:
        """The number of connections that are in use, or being opened."""
        return len(self._in_use) + self._opening

    @property
    def in_use(self) -> AbstractSet[PooledConnection]:
        """The connections that carry exchanges, or are about to."""
        return self._in_use

    def take(self, place: Grant | None = None) -> PooledConnection | None:
        """Return an idle connection; None if there is none, or no place for it.

        *place* is the request's own place, if it has one already, and is given back if it is not
        needed.
        """
        idle, too_old = self.idle, self._loop.time() - self._expiry
        while idle:
            connection = idle[0]
            transport = connection.protocol.transport
            fresh = connection.idle_since >= too_old
            if not fresh or transport is None or transport.is_closing():
                idle.popleft().discard()
                continue
            if connection.place is None:
                connection.place = place or self._gate.try_start(Ticket())
                if connection.place is None:
                    return None
            elif place is not None:
                place.release()
            self._in_use.add(idle.popleft())
            return connection
        return None

    async def open_one(self, place: Grant) -> PooledConnection:
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
            protocol = ConnectionProtocol(self._loop, self._outbox)
            protocol.take_over(opened)
            connection = PooledConnection(self, opened, protocol)
        except BaseException:
            opened.close()
            raise
        connection.place = place
        self._in_use.add(connection)
        return connection

    def give_back(self, connection: PooledConnection, *, keep: bool = True) -> None:
        """Keep *connection*, which was in use, for the next request; or close it, also if enough
        are idle. A second call does nothing.
        """
        if connection not in self._in_use:
            return
        self._in_use.discard(connection)
        idle, most = self.idle, self._max_idle
        if keep and (len(idle) < most or len(idle) < most + self._pending()):
            connection.idle_since = self._loop.time()
            idle.append(connection)
            if self._gate.inside >= self._gate.limit and self._gate.waiting:
                connection.give_place()
            if self._expiry_timer is None:
                self._expiry_timer = self._loop.call_later(self._expiry, self._sweep)
        else:
            connection.discard()
            if self._on_release is not None:
                self._on_release()

    def give_places(self) -> None:
        """Take the places of all idle connections back: a request is about to wait for one."""
        for connection in self.idle:
            connection.give_place()

    def forget(self, connection: PooledConnection) -> None:
        """Close *connection*, which its provider has closed, unless a request uses it: that
        request ends its use itself.
        """
        if connection in self.idle:
            self.idle.remove(connection)
            connection.discard()

    def retire(self, on_release: Callable[[], None]) -> None:
        """Keep no connection from now on.

        *on_release* is called when one is released or closed.
        """
        self._max_idle, self._pending, self._on_release = 0, lambda: 0, on_release
        self.drop_idle()

    def trim(self) -> None:
        """Close the idle connections beyond the cap, those that have been idle longest first."""
        for _ in range(len(self.idle) - self._max_idle - self._pending()):
            self.idle.popleft().discard()

    def drop_idle(self) -> None:
        """Close every idle connection."""
        while self.idle:
            self.idle.popleft().discard()

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
        while self.idle and self.idle[0].idle_since + self._expiry <= now:
            self.idle.popleft().discard()
        self._expiry_timer = None
        if self.idle:
            due = self.idle[0].idle_since + self._expiry
            self._expiry_timer = self._loop.call_at(due, self._sweep)
        else:
            # An empty deque keeps 16 of its blocks, which lie between the objects of a load.
            self.idle = deque()
