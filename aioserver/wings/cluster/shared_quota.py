"""The limits of one key (limits/quota.py), shared with other instances.

An answer that finds a granted place and a slot is counted at once. Otherwise it is *undecided*
until the server has said whether another instance has a place to give, or when the next slot
begins, for PATIENCE seconds at most: an answer that would have to wait for longer is refused, and
does not queue.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from aioserver.errors import ConcurrencyExceeded, InvalidApiKey, RateLimitExceeded
from aioserver.limits.quota import REVOKED, Quota, minute
from aioserver.wings.cluster.rates import SharedRate

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.wings.cluster.leases import Leases

# Seconds for which an answer may be undecided. An instance that is told of the want gives within
# two calls.
PATIENCE = 0.25
# Of the burst so much is kept in hand by all instances together. A key of 300 a minute has 3 slots
# of it, so that its clients find nearly all of it at any instance.
SHARE_KEPT = 0.01


class SharedQuota(Quota):
    """The counts of one key at this instance, within limits that all instances share under *name*.

    Always: the answers that are counted and decided are within the granted places, unless these
    were lowered since.
    """

    def __init__(
        self,
        max_concurrent: int,
        requests_per_minute: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_connections: int = 0,
        elsewhere: Callable[[int], int] | None = None,
        leases: Leases,
        name: str,
    ) -> None:
        super().__init__(
            max_concurrent,
            requests_per_minute,
            clock,
            max_connections=max_connections,
            elsewhere=elsewhere,
        )
        self._leases = leases
        self._granted = 0
        # The answers that wait for a place or a slot, the oldest first; one that is done waits no
        # more, and has no place.
        self._undecided: deque[asyncio.Future[None]] = deque()
        self._rate = self._shared_rate = SharedRate(
            leases,
            f"K:{name}",
            *minute(requests_per_minute),
            clock,
            waiting=lambda: len(self._undecided),
            on_slots=self._decide,
            rested=True,
            share_kept=SHARE_KEPT,
        )
        self._grant = leases.hold(f"k:{name}", max_concurrent, self, least=1)

    def apply(
        self, max_concurrent: int, requests_per_minute: int, max_connections: int = 0
    ) -> None:
        """Use other limits from now on, for all instances together."""
        super().apply(max_concurrent, requests_per_minute, max_connections)
        self._grant.apply(max_concurrent)

    def revoke(self) -> None:
        """Cancel what is bound to the key, and share its limits no more."""
        super().revoke()
        self._leases.drop(self._grant)
        self._leases.drop_pace(self._shared_rate)
        for decision in self._undecided:
            _conclude(decision, InvalidApiKey(REVOKED))

    def take(self) -> asyncio.Future[None] | None:
        """Count an answer that begins, as `Quota.take`."""
        if self.revoked:
            raise InvalidApiKey(REVOKED)
        if self.running >= self._max_concurrent:
            raise self._too_many()
        if self.running < self._granted and not self._undecided:
            delay = self._rate.try_take()
            if not delay:
                self.running += 1
                return None
            if delay > PATIENCE:
                raise self._too_fast(delay)
        loop = asyncio.get_running_loop()
        decision: asyncio.Future[None] = loop.create_future()
        loop.call_later(PATIENCE, self._give_up, decision)
        self.running += 1
        self._undecided.append(decision)
        try:
            self._grant.wait_begins()
        except BaseException:
            self._undecided.remove(decision)
            self.running -= 1
            raise
        return decision

    def give_back(self, *, unused: bool = False) -> None:
        """Count an answer as ended; an *unused* one never began."""
        refused = next((decision for decision in self._undecided if decision.done()), None)
        if refused is None:
            self._grant.place_ends()
            if unused:
                self._rate.take(-self._rate.interval)
        else:
            # One that has neither a place nor a slot. If it is not this one, it counts as this one
            # until its own end: no more than one at a time.
            self._undecided.remove(refused)
        self.running -= 1
        self._decide()

    # A user of its grant (wings/cluster/grants.py).

    @property
    def inside(self) -> int:
        """The answers that are counted and decided."""
        return self.running - len(self._undecided)

    @property
    def wanting(self) -> int:
        """The answers that are counted and wait for a place."""
        return len(self._undecided)

    @property
    def weight(self) -> int:
        """The weight of this key: of all instances the same."""
        return 1

    def resize(self, places: int) -> None:
        """Use *places* from now on; called by the grant."""
        self._granted = places
        self._decide()

    def _decide(self) -> None:
        """Let the undecided answers have the granted places and slots."""
        while self._undecided and self.inside < self._granted:
            delay = 0.0 if self._undecided[0].done() else self._rate.try_take()
            if 0 < delay <= PATIENCE:
                # There may be a slot soon.
                return
            _conclude(self._undecided.popleft(), self._too_fast(delay) if delay else None)

    def _give_up(self, decision: asyncio.Future[None]) -> None:
        """Refuse an answer that has been undecided for long enough."""
        if not decision.done() and decision in self._undecided:
            no_place = self.inside >= self._granted
            _conclude(
                decision, self._too_many() if no_place else self._too_fast(self._rate.delay())
            )

    def _too_many(self) -> ConcurrencyExceeded:
        return ConcurrencyExceeded(
            f"{self._max_concurrent} answers of this key run or wait,"
            f" at most max_concurrent={self._max_concurrent}",
            retry_after=1.0,  # nobody knows when one of them ends
        )

    def _too_fast(self, delay: float) -> RateLimitExceeded:
        return RateLimitExceeded(
            f"requests_per_minute={self._per_minute} of this key reached", retry_after=delay
        )


def _conclude(decision: asyncio.Future[None], error: Exception | None = None) -> None:
    if decision.done():
        return
    if error is None:
        decision.set_result(None)
    else:
        decision.set_exception(error)
        # The client may have left.
        decision.exception()
