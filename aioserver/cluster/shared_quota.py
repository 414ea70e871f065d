"""The limits of one key (limits/quota.py), shared with other instances.

An answer that finds a place in hand is counted at once. Otherwise it is *undecided* until the server has said whether
another instance has a place to give, for PATIENCE seconds at most: a request over a limit is refused, and
does not queue. So is an answer for which no slot of the rate is in hand: slots are asked for with the answers that
need them, a few more than those where many answers begin.

While the server is not heard, each instance counts by itself, with its fixed share of the rate.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from aioserver.cluster.holding import State
from aioserver.cluster.messages import SECOND, PaceOp
from aioserver.errors import ConcurrencyExceeded, InvalidApiKey, RateLimitExceeded
from aioserver.limits.gcra import Gcra
from aioserver.limits.quota import MINUTE, REVOKED, Quota

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.cluster.messages import Slots
    from aioserver.cluster.shares import Shares

# Seconds for which an answer may be undecided. An instance that is told of the want gives within two calls.
PATIENCE = 0.25
# Slots are kept in hand for answers to come, one of so many of a minute's at most, and for so many seconds.
AHEAD, KEPT = 100, 1.0


class SharedQuota(Quota):
    """The counts of one key at this instance, within limits that all instances share under *name*.

    Always: the answers that are counted and decided are within the places in hand, unless these were lowered since.
    """

    def __init__(
        self,
        max_concurrent: int,
        requests_per_minute: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_connections: int = 0,
        shares: Shares,
        name: str,
    ) -> None:
        super().__init__(
            max_concurrent, requests_per_minute, clock, max_connections=max_connections
        )
        self._shares = shares
        self._hand = 0
        # The answers that wait for a place, the oldest first; one that is done waits no more, and has none.
        self._undecided: deque[asyncio.Future[None]] = deque()
        self._pace = SharedRate(f"K:{name}", requests_per_minute, shares, clock)
        self._holding = shares.hold(f"k:{name}", max_concurrent, self, least=1)

    def apply(
        self, max_concurrent: int, requests_per_minute: int, max_connections: int = 0
    ) -> None:
        """Use other limits from now on, for all instances together."""
        super().apply(max_concurrent, requests_per_minute, max_connections)
        self._pace.apply(requests_per_minute)
        self._holding.apply(max_concurrent)

    def revoke(self) -> None:
        """Cancel what is bound to the key, and share its limits no more."""
        super().revoke()
        self._shares.drop(self._holding)
        self._pace.close()
        for waiter in self._undecided:
            _settle(waiter, InvalidApiKey(REVOKED))

    def take(self) -> asyncio.Future[None] | None:
        """Count an answer that begins, as `Quota.take`."""
        if self.revoked:
            raise InvalidApiKey(REVOKED)
        if self.running >= self._max_concurrent:
            raise self._too_many()
        if self.running < self._hand and self._pace.try_take():
            self.running += 1
            return None
        self.running += 1
        loop = asyncio.get_running_loop()
        decision: asyncio.Future[None] = loop.create_future()
        if self.running <= self._hand:
            self._ask_pace(decision)
            return decision
        self._undecided.append(decision)
        loop.call_later(PATIENCE, self._give_up, decision)
        self._holding.wait_begins()
        return decision

    def give_back(self, *, unused: bool = False) -> None:
        """Count an answer as ended; an *unused* one never began."""
        undecided = [decision for decision in self._undecided if not decision.done()]
        if len(undecided) == len(self._undecided):
            self._holding.place_ends()
        # Otherwise this was an answer whose client left before it had a place.
        self._undecided = deque(undecided)
        self.running -= 1
        if unused:
            self._pace.put_back()
        self._decide()

    # A user of its holding (cluster/holding.py).

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
        """Have *places* in hand."""
        self._hand = places
        self._decide()

    def _decide(self) -> None:
        """Let the undecided answers have the places in hand."""
        while self._undecided and self.inside < self._hand:
            decision = self._undecided.popleft()
            if not decision.done():
                self._ask_pace(decision)

    def _ask_pace(self, decision: asyncio.Future[None]) -> None:
        if self._pace.try_take():
            _settle(decision)
        else:
            self._pace.ask(decision, self._too_fast)

    def _give_up(self, decision: asyncio.Future[None]) -> None:
        """Refuse an answer that has waited for a place for long enough."""
        if not decision.done() and decision in self._undecided:
            _settle(decision, self._too_many())

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


class SharedRate:
    """The rate of one key over all instances, with a burst of a whole minute: slots that may be used at once.

    Always: a decision that was asked for is made by the answer to the next call, or when that fails.
    """

    def __init__(
        self, name: str, per_minute: int, shares: Shares, clock: Callable[[], float]
    ) -> None:
        self.name = name
        self._shares = shares
        self._clock = clock
        self._asked: list[tuple[asyncio.Future[None], Callable[[float], RateLimitExceeded]]] = []
        # How many of those are in the call under way.
        self._said = 0
        # Slots in hand, until then.
        self._slots, self._until = 0, 0.0
        self._instances, self._heard = 1, False
        # Counts while the server is not heard.
        self._own = Gcra(1.0, 0.0, clock)
        self.apply(per_minute)
        shares.pace(self)

    def apply(self, per_minute: int) -> None:
        """Use another rate from now on, for all instances together."""
        self._per_minute = per_minute
        self._apply_share()

    def close(self) -> None:
        """Share the rate no more."""
        self._shares.drop_pace(self)

    def try_take(self) -> bool:
        """Take a slot that is in hand; return whether there was one."""
        if self._slots and self._clock() < self._until:
            self._slots -= 1
            return True
        return False

    def ask(
        self, decision: asyncio.Future[None], error: Callable[[float], RateLimitExceeded]
    ) -> None:
        """Settle *decision* with the next slot, or with *error* of the seconds until there is one."""
        if self._heard:
            self._asked.append((decision, error))
            self._shares.call_soon()
        else:
            delay = self._own.try_take()
            _settle(decision, error(delay) if delay else None)

    def put_back(self) -> None:
        """Have the slot of an answer that never began in hand again."""
        if self._clock() >= self._until:
            self._slots, self._until = 0, self._clock() + KEPT
        self._slots += 1

    def op(self) -> PaceOp | None:
        """Ask for a slot for each answer that waits for one, and for some more."""
        self._said = len(self._asked)
        if not self._said:
            return None
        step = MINUTE * SECOND / self._per_minute
        ahead = min(self._said, self._per_minute // AHEAD)
        return PaceOp(self.name, self._said + ahead, step, (self._per_minute - 1) * step, 0.0)

    def answered(self, slots: Slots | None, sent: float) -> None:
        """Take in the slots that were given; None: the call failed, and this instance counts by itself."""
        asked, self._asked = self._asked[: self._said], self._asked[self._said :]
        given = 0 if slots is None else len(slots.delays)
        for decision, error in asked:
            if decision.done():
                continue
            if slots is None:
                delay = self._own.try_take()
            elif given:
                given, delay = given - 1, 0.0
            else:
                delay = max(slots.next / SECOND, 0.001)
            _settle(decision, error(delay) if delay else None)
        if given:
            self._slots, self._until = given, sent + KEPT

    def stand(self, state: State, instances: int) -> None:
        """Take in how many instances share the rate, where each counts by itself."""
        self._heard = state is State.JOINED
        self._instances = max(1, instances)
        self._apply_share()

    def _apply_share(self) -> None:
        interval = MINUTE * self._instances / self._per_minute
        burst = max(1, self._per_minute // self._instances)
        self._own.apply(interval, (burst - 1) * interval)


def _settle(decision: asyncio.Future[None], error: Exception | None = None) -> None:
    if decision.done():
        return
    if error is None:
        decision.set_result(None)
    else:
        decision.set_exception(error)
        # Whoever asked may have left.
        decision.exception()
