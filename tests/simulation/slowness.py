"""A client that is too slow for what is passed on never keeps a place that somebody waits for.

It is taken from the bytes that have come and the times at which requests were seen to wait, and
not from the credit that the server counts. A client that sends less than an eighth of the least
rate has used that up after `RATE_SECONDS * 8 / 7`.
"""

# ruff: noqa: SLF001 - no snapshot shows who waits, or what has come

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.providers.backpressure import LEAST_RATE, RATE_SECONDS
from tests.simulation.clock import Clock

if TYPE_CHECKING:
    from aioserver.limits.resource import Bid
    from aioserver.providers.backpressure import ClientPace
    from aioserver.providers.provider import Provider

# Bytes a second below which a client is certainly too slow, and the seconds after which its credit
# is gone, with two looks.
MUCH_TOO_SLOW, TOO_LONG = LEAST_RATE / 8, RATE_SECONDS * 8 / 7 + 2.0
# Seconds for which a request may wait while such a client has a place: two looks, and some more.
# From one instance to another at most one client for each look is given up.
HELD_UP, HELD_UP_ELSEWHERE = 3.0, 6.0


class Slowness:
    """How long requests have waited for places of *provider*, all of which are taken, and how long
    clients that have one have been too slow.
    """

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._waiters: dict[Bid, float] = {}
        # Since when each client is too slow, and how much of it had come at the last look.
        self._clients: dict[ClientPace, tuple[float, int]] = {}
        self._looked_at = Clock.now

    def forget(self) -> None:
        """Count from now on."""
        self._waiters.clear()
        self._clients.clear()

    def look(self) -> None:
        """Look at all that wait, and at all that are passed on."""
        now, resource = Clock.now, self._provider.capacity.resource
        full = resource.inside >= resource.limit
        waiting = list(resource.queue.queues[0].heads()) if full else []
        self._waiters = {each: self._waiters.get(each, now) for each in waiting}
        least = MUCH_TOO_SLOW * (now - self._looked_at)
        clients: dict[ClientPace, tuple[float, int]] = {}
        for pace in self._provider.backpressure._paces:
            if pace._moved is None:
                # The provider is waited for.
                continue
            moved = pace._moved()
            since, before = self._clients.get(pace, (now, moved))
            clients[pace] = (since if moved - before <= least else now), moved
        self._clients, self._looked_at = clients, now

    @property
    def waited(self) -> float:
        """The seconds for which a request waits at least, 0.0 if none does."""
        return Clock.now - min(self._waiters.values(), default=Clock.now)

    @property
    def slow(self) -> int:
        """How many clients have been too slow for too long."""
        return sum(Clock.now - since > TOO_LONG for since, _ in self._clients.values())
