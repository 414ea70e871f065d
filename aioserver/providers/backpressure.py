"""Backpressure: which exchanges of a provider may pause, and when they must give their places to
waiting requests.

A log asks for a pause if its client cannot come back (streams/stream.py). A paused exchange keeps
its place at the provider, so it reads on as soon as a request waits for one.

A passthrough (passthrough.py) is not stored, so it cannot be read ahead: while a request waits,
its client has to send, or to take, at least LEAST_RATE. Its `ClientPace` counts only the time in
which the client alone is awaited.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aioserver.streams.contracts import Source

# Bytes a second, averaged over RATE_SECONDS.
LEAST_RATE = 1 << 14
RATE_SECONDS = 10.0
# Seconds between two checks of the clients' paces while a request waits.
LOOK = 1.0


class ClientPace:
    """The speed at which a client sends or takes a passthrough.

    It is a leaky bucket of seconds: a second of waiting for the client takes one out, and
    LEAST_RATE bytes put one in.

    Always: `-RATE_SECONDS <= credit <= RATE_SECONDS`.
    """

    __slots__ = ("_credit", "_loop", "_moved", "_noted", "_since", "give_up")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._credit = RATE_SECONDS
        self._since = 0.0
        # Returns how many bytes have moved; None unless the client is awaited.
        self._moved: Callable[[], int] | None = None
        self._noted = 0
        # Ends the wait for the client, and with it the request.
        self.give_up: Callable[[], None] = _nothing

    @contextmanager
    def waited_for(self, moved: Callable[[], int], give_up: Callable[[], None]) -> Iterator[None]:
        """Count the time within the `with` as the client's.

        *moved* returns a number that grows by each byte that the client sends or takes, and
        *give_up* ends the wait.
        """
        self._moved, self._noted, self._since = moved, moved(), self._loop.time()
        self.give_up = give_up
        try:
            yield
        finally:
            self.credit()
            self._moved, self.give_up = None, _nothing

    def credit(self) -> float:
        """Return the seconds that are left; the client is too slow below 0."""
        if self._moved is not None:
            now, moved = self._loop.time(), self._moved()
            seconds = (moved - self._noted) / LEAST_RATE - (now - self._since)
            self._credit = max(-RATE_SECONDS, min(RATE_SECONDS, self._credit + seconds))
            self._since, self._noted = now, moved
        return self._credit

    def begin(self) -> None:
        """Start anew: a place is held from now on."""
        self._credit = RATE_SECONDS


def _nothing() -> None:
    """Do nothing: the client is not awaited."""


class Backpressure:
    """The exchanges of one provider that go at the speed of their clients.

    Always: no exchange is paused while a request waits; *waiting* counts these requests, and `end`
    must be called when one begins to wait. While *held_up* requests wait for places that others
    hold, as many of the clients that are too slow are dropped, the slowest first. Both counts
    include the requests of other instances that share the places, as far as they are known.
    """

    def __init__(self, waiting: Callable[[], int], held_up: Callable[[], int] = lambda: 0) -> None:
        self._waiting = waiting
        self._held_up = held_up
        self._paused: set[Source] = set()
        self._paces: set[ClientPace] = set()
        self._look_timer: asyncio.TimerHandle | None = None

    @property
    def paused(self) -> int:
        """The number of exchanges that are paused."""
        return len(self._paused)

    def add(self, exchange: Source) -> bool:
        """Add *exchange* to the paused ones; return False, with nothing done, if a request waits."""
        if self._waiting():
            return False
        self._paused.add(exchange)
        return True

    def discard(self, exchange: Source) -> None:
        """Remove *exchange* from the paused ones."""
        self._paused.discard(exchange)

    def watch(self, pace: ClientPace) -> None:
        """Drop the client of *pace*, which holds a place, once it is too slow."""
        pace.begin()
        self._paces.add(pace)
        if self._waiting():
            self._look_in(LOOK)

    def unwatch(self, pace: ClientPace) -> None:
        """Stop watching *pace*; nothing happens if it is not watched."""
        self._paces.discard(pace)
        if not self._paces and self._look_timer is not None:
            self._look_timer.cancel()
            self._look_timer = None

    def end(self) -> None:
        """Let all exchanges read on: a request is about to wait."""
        for exchange in tuple(self._paused):
            exchange.resume()
        if self._paces:
            self._look_in(0.0)

    def _look_in(self, seconds: float) -> None:
        if self._look_timer is None:
            self._look_timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        self._look_timer = None
        if not self._waiting():
            return
        slow = sorted((pace for pace in self._paces if pace.credit() < 0), key=ClientPace.credit)
        for pace in slow[: self._held_up()]:
            pace.give_up()
        self._look_in(LOOK)
