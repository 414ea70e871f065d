"""The balance: workers that share a listening socket stop accepting in turn, so that connections
spread evenly.

The kernel wakes all workers for a new connection, and the fastest gets it. Without a balance, 600
idle WebSockets may all go to one worker. With a new connection, a worker therefore stops accepting
if it has more than STOP times the mean of all workers and a few beyond. At a beat it resumes if it
has less than GO_ON times the mean. The mean is over the workers whose loops turn, so a blocked one
holds back no other. The worker with the fewest connections has no more than the mean, so at least
one worker always accepts.

To stop, a process closes its copies of the socket; the socket itself, which the siblings share,
continues to listen. To resume, it makes new copies. No accepted connection is lost: see
`Site.stop`.

A *beat* every BEAT shows that this worker's loop turns, and checks the others. If the worker waits
for its turn to accept again, the next beat is after SOON. If it is idle, the next is after REST:
an idle server wakes up for little else.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from aioserver.server.connection import ConnectionServer
from aioserver.server.listener import ListeningSocket, Site, watchers

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from aioserver.server.tls import Handshakes
    from aioserver.workers.loads import Loads

logger = logging.getLogger("aioserver.balance")

# Shares of the mean, and connections beyond, at which a worker stops accepting, and goes on. Below
# four workers with a few connections each the constants decide.
STOP = (1.06, 4)
GO_ON = (1.03, 2)
# Seconds between two beats. A worker counts as blocked three beats later (`loads.LATE`).
BEAT, SOON, REST = 0.025, 0.005, 0.25
# Seconds between attempts to copy the socket when the process has too many open files.
RETRY = 1.0
# Connections that asyncio's loop accepts in one iteration: a burst must not go entirely to the
# worker that wakes up first.
AT_ONCE = 16


class SharedSocket(ListeningSocket):
    """A copy of a socket that already listens, with its backlog."""

    def listen(self, backlog: int = 0, /) -> None:
        """Do nothing: asyncio's `backlog` is also the number of connections it accepts at once,
        see AT_ONCE.
        """


class Balance:
    """Decides whether this worker accepts connections.

    Always: `connections` is the number of connections of this worker, which *loads* has, too; from
    `start` to `close` one timer runs, for the next beat. *on_gone* is called with each instance of
    the cluster whose process has ended (`Loads.gone`). Instances that had ended before are
    included: if all workers end at once, no other process has noticed. *on_replaced* is called with
    the numbers of `Loads.kept` for each former process that ends from now on.
    """

    def __init__(
        self,
        loads: Loads,
        on_gone: Callable[[int], None] = lambda _instance: None,
        on_replaced: Callable[[int, int], None] = lambda _kept, _cut: None,
    ) -> None:
        self._loads = loads
        self._on_gone, self._on_replaced = on_gone, on_replaced
        self._gone = loads.gone()
        for instance in filter(None, self._gone):
            on_gone(instance)
        self.connections = 0
        # The number of connections that came or went, in total and up to the last beat.
        self._events, self._seen = 0, -1
        # The number of beats, and the seconds from the last one to the next.
        self.beats, self.interval = 0, 0.0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        # When the next beat is due, in the loop's time.
        self._due = 0.0
        self._waiting: Callable[[], int] = lambda: 0
        self._sites: list[Site] = []
        self._sockets: list[tuple[ConnectionServer, ListeningSocket, int, Handshakes | None]] = []
        # The wanted state; the task makes it so.
        self.accepts = True
        self._ended = False
        self._switching: asyncio.Task[None] | None = None
        # Whether no copy of a socket could be made, and the time before which none is tried again.
        self._failing = False
        self._retry_at = 0.0

    @property
    def able(self) -> bool:
        """Whether this worker accepts connections, or will once the others have caught up."""
        return not self._ended and not self._failing

    async def accept_on(
        self,
        server: ConnectionServer,
        sock: ListeningSocket,
        backlog: int,
        handshakes: Handshakes | None = None,
    ) -> None:
        """Accept connections for *server* on *sock*, which already listens; `end` closes it.

        *handshakes*: see `Site`.

        Raises:
            OSError: no copy of the socket can be made.
        """
        self._sockets.append((server, sock, backlog, handshakes))
        await self._open(server, sock, backlog, handshakes)

    def server(self, *args: Any, **kwargs: Any) -> ConnectionServer:
        """Return a server whose connections are counted here."""
        return _CountingServer(*args, balance=self, **kwargs)

    def made(self) -> None:
        """Count a connection; stop accepting if this worker has its share."""
        self.connections += 1
        self._events += 1
        self._loads.tell_connections(self.connections)
        if self.accepts and self.connections > self._bound(*STOP):
            self.accepts = False
            for site in self._sites:
                site.pause()
            self._switch()
            self._hurry()

    def lost(self) -> None:
        """Count a connection that has ended."""
        self.connections -= 1
        self._events += 1
        self._loads.tell_connections(self.connections)

    def start(self, waiting: Callable[[], int]) -> None:
        """Begin to beat: this worker serves.

        *waiting* returns how many clients wait for a place here.
        """
        self._waiting = waiting
        self._beat()

    def close(self) -> None:
        """Stop the beats."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _beat(self) -> None:
        self.beats += 1
        self._look()
        if self._go_on():
            self.interval = SOON
        else:
            self.interval = REST if self._events == self._seen and not self._waiting() else BEAT
        self._seen = self._events
        self._loads.beat(self.interval, accepting=self.able)
        self._beat_in(self.interval)

    def _look(self) -> None:
        """Check whether processes of the cluster have ended."""
        if (gone := self._loads.gone()) != self._gone:
            for slot, instance in enumerate(gone):
                if instance != self._gone[slot]:
                    self._on_gone(instance)
                    if any(kept := self._loads.kept(slot)):
                        self._on_replaced(*kept)
            self._gone = gone

    def _hurry(self) -> None:
        """Let the next beat be soon."""
        if self._timer is not None and self._due > self._loop.time() + SOON:
            self._timer.cancel()
            self._beat_in(SOON)

    def _beat_in(self, delay: float) -> None:
        self._due = self._loop.time() + delay
        self._timer = self._loop.call_later(delay, self._beat)

    def _go_on(self) -> bool:
        """Resume accepting if the others have caught up.

        Return whether it still has to wait for them.
        """
        if not self.accepts and not self._ended:
            if asyncio.get_running_loop().time() < self._retry_at:
                return False
            if self.connections > self._bound(*GO_ON):
                return True
            self.accepts = True
            self._switch()
        return False

    async def end(self) -> None:
        """Accept no more connections, for good."""
        self._ended = True
        self.accepts = False
        if self._switching is not None:
            await self._switching
        await self._close()
        for _server, sock, _backlog, _handshakes in self._sockets:
            sock.close()

    def _bound(self, share: float, beyond: int) -> float:
        """Return *share* times the mean of the workers that accept, plus *beyond*."""
        loads = self._loads
        connections = loads.connections()
        others = [connections[slot] for slot in loads.accepting() if slot != loads.slot]
        return share * (self.connections + sum(others)) / (1 + len(others)) + beyond

    def _switch(self) -> None:
        if self._switching is None:
            self._switching = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        """Open or close the sites until they are in the wanted state."""
        try:
            while self.accepts != bool(self._sites):
                if self.accepts:
                    for entry in self._sockets:
                        await self._open(*entry)
                    self._failing = False
                else:
                    await self._close()
        except OSError as error:
            logger.warning("no connections are accepted for %g s: %s", RETRY, error)
            self._failing = True
            self._retry_at = asyncio.get_running_loop().time() + RETRY
            self.accepts = False
            await self._close()
        finally:
            self._switching = None

    async def _open(
        self,
        server: ConnectionServer,
        sock: ListeningSocket,
        backlog: int,
        handshakes: Handshakes | None,
    ) -> None:
        count = watchers(asyncio.get_running_loop())
        for _ in range(count):
            copy = SharedSocket(sock.family, sock.type, sock.proto, fileno=sock.dup().detach())
            copy.setblocking(False)
            # libuv accepts one for each copy and iteration, and passes its backlog on to the
            # kernel.
            at_once = AT_ONCE if count == 1 else backlog
            site = Site(server, copy, backlog=at_once, handshakes=handshakes)
            self._sites.append(site)
            await site.start()

    async def _close(self) -> None:
        while self._sites:
            await self._sites.pop().stop()


class _CountingServer(ConnectionServer):
    """Makes the connections, and counts them for the balance."""

    def __init__(self, *args: Any, balance: Balance, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._balance = balance

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """Count a connection."""
        super().connection_made(handler, transport)
        self._balance.made()

    def handshake_begins(self) -> None:
        """Count a connection that is to be made."""
        self._balance.made()

    def handshake_ends(self) -> None:
        """Stop counting it: it has ended, or is made now."""
        self._balance.lost()

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        """Count a connection that has ended."""
        super().connection_lost(handler, exc)
        self._balance.lost()
