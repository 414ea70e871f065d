"""The choice of the idle WebSocket that closes if one key holds most places and other keys wait.

An idle socket holds a place, and the limits of a key do not bound its sockets. While a client of
another key waits for a place, the key with the most places loses the socket that has been idle
longest. At most one socket closes for each client that waits. A socket stays open if it has an
answer under way, or has asked within the last IDLE_SECONDS. No more sockets close once the key has
at most half of the places.

A chat, a resume or a cancel that is carried out counts as asking, and so does the handshake. Pings
do not count, so a client cannot keep its place by them.

The place of a socket is free as soon as the socket begins to close, however long its client takes.
So a client that may not wait (`queue_timeout: 0`) gets a place, too.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from aioserver.auth.callers import Caller

# Seconds without a question after which a socket is idle: a person may type a question as long.
IDLE_SECONDS = 30.0
# Seconds until it is known whether another process has a place for the waiting clients.
KNOWN = 0.05


class IdleSocket(Protocol):
    """A WebSocket that has a place."""

    caller: Caller

    @property
    def busy(self) -> bool:
        """Whether answers run on this socket."""

    def give_way(self) -> None:
        """Give the place back, and close, since other clients wait for a place; `remove` follows."""


class IdleSockets:
    """The places of each key, its waiting clients, and its sockets in the order of their last
    question.

    Always: `give_way` is called at most once for a socket. Clients without a key are one caller,
    and are not counted. Each change takes the same time, however many sockets there are.

    *limit* returns the number of places, and *waiting* the number of clients that wait for a place.
    *elsewhere* returns whether another process may have a free place: then no socket has to close.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        limit: Callable[[], int],
        waiting: Callable[[], int],
        elsewhere: Callable[[], bool] = lambda: False,
    ) -> None:
        self._loop = loop
        self._limit = limit
        self._waiting = waiting
        self._elsewhere = elsewhere
        self._places: dict[str, int] = {}
        self._waiters: Counter[str] = Counter()
        # The sockets of each key, with the time of their last question.
        self._sockets: dict[str, OrderedDict[IdleSocket, float]] = {}
        # The key with the most places. It may be outdated, but not while a key has more than half
        # of them.
        self._largest = ""
        self._timer: asyncio.TimerHandle | None = None
        # The loop's time at which the timer fires: uvloop's handle of a short delay does not know
        # it.
        self._due = 0.0

    def opened(self, name: str) -> None:
        """Count a place that a client of the key *name* has got."""
        if name:
            # The call comes first since it may fail: the place is then not counted.
            if self._waiters:
                self._look_in(0.0)
            places = self._places
            places[name] = count = places.get(name, 0) + 1
            if count > places.get(self._largest, 0):
                self._largest = name

    def closed(self, name: str) -> None:
        """Count a place that a client of the key *name* has given back."""
        if name:
            _take_one(self._places, name)

    def waits(self, name: str) -> None:
        """Count a client of the key *name* that begins to wait for a place in this turn of the
        loop.
        """
        if name:
            self._look_in(0.0)
            self._waiters[name] += 1

    def make_room(self, name: str) -> None:
        """Let a socket give way now, as far as the rule allows, for a client of the key *name*
        that may not wait.
        """
        if name and name != self._largest and not self._elsewhere():
            self._give(self._waiting() + 1)

    def waited(self, name: str) -> None:
        """Count a client of the key *name* that waits no more."""
        if name:
            _take_one(self._waiters, name)
            if not self._waiters and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def limit_changed(self) -> None:
        """Find the key with the most places again, since their number has changed."""
        self._largest = max(self._places, key=self._places.__getitem__, default="")
        if self._waiters:
            self._look_in(0.0)

    def add(self, socket: IdleSocket) -> None:
        """Note that *socket* has got its place."""
        if name := socket.caller.name:
            self._sockets.setdefault(name, OrderedDict())[socket] = self._loop.time()

    def asked(self, socket: IdleSocket) -> None:
        """Note that *socket* has asked now, or that an answer has ended on it."""
        sockets = self._sockets.get(socket.caller.name)
        if sockets is not None and socket in sockets:
            sockets[socket] = self._loop.time()
            sockets.move_to_end(socket)

    def remove(self, socket: IdleSocket) -> None:
        """Forget *socket*, whose connection has ended. It need not have been added."""
        name = socket.caller.name
        sockets = self._sockets.get(name)
        if sockets is not None:
            sockets.pop(socket, None)
            if not sockets:
                del self._sockets[name]

    def _look_in(self, delay: float) -> None:
        """Check in *delay* seconds, or earlier, whether a socket has to give way."""
        due = self._loop.time() + delay
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        self._timer, self._due = self._loop.call_later(delay, self._make_room), due

    def _make_room(self) -> None:
        """Let a socket give way for each client that waits, as far as the rule allows."""
        self._timer = None
        if self._elsewhere():
            if self._waiters:
                self._look_in(KNOWN)
            return
        # A client that got its place in this iteration of the loop does not wait any more.
        self._give(min(self._waiters.total() - self._waiters[self._largest], self._waiting()))

    def _give(self, others: int) -> None:
        """Let *others* sockets of the key with the most places give way."""
        name, now = self._largest, self._loop.time()
        while (
            others > 0
            and 2 * self._places.get(name, 0) > self._limit()
            and (sockets := self._sockets.get(name))
        ):
            socket, since = next(iter(sockets.items()))
            if (left := since + IDLE_SECONDS - now) > 0:
                if self._waiters:
                    self._look_in(left)
                return
            if socket.busy:
                # A socket with answers counts as asking until they have ended.
                self.asked(socket)
                continue
            others -= 1
            self.remove(socket)
            _take_one(self._places, name)
            socket.give_way()


def _take_one(counts: dict[str, int], name: str) -> None:
    if left := counts[name] - 1:
        counts[name] = left
    else:
        del counts[name]
