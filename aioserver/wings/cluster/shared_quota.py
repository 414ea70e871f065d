"""The limits of one key (limits/quota.py), shared with other instances.

An answer that finds a granted place, a slot and its tokens in hand is counted at once. Otherwise it
is *undecided* until the server has said whether another instance has a place to give, when the next
slot begins, or whether there are tokens, for PATIENCE seconds at most: an answer that would have to
wait for longer is refused, or waits in the queue of its key.

This file is one concept: what a key counts and what its quota does with it are one algorithm.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from math import inf
from typing import TYPE_CHECKING

from aioserver.errors import ConcurrencyExceeded, InvalidApiKey, RateLimitExceeded
from aioserver.limits.key_queue import conclude
from aioserver.limits.quota import REVOKED, Quota, minute
from aioserver.wings.cluster.grants import State
from aioserver.wings.cluster.rates import LOOK_AGAIN, SharedRate
from aioserver.wings.cluster.shared_budget import SharedBudget, SharedReservation

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.limits.budget import Reservation, Shortage
    from aioserver.limits.fixed_share import Scope
    from aioserver.limits.key_queue import Turn
    from aioserver.wings.cluster.grants import Grant
    from aioserver.wings.cluster.leases import Leases

# Seconds for which an answer may be undecided. An instance that is told of the want gives within
# two calls.
PATIENCE = 0.25
# Of the burst so much is kept in hand by all instances together. A key of 300 a minute has 3 slots
# of it, so that its clients find nearly all of it at any instance.
SHARE_KEPT = 0.01


class Counted:
    """What one key has of one thing at this instance, its answers or its connections, of which
    several share the limit.

    Always: those that are counted and decided are within the granted places, unless these were
    lowered since.

    *try_start* counts a start, or returns the seconds until there is one, which *delay* returns
    without a start; *refuse* makes the error, with these seconds, or with 0.0 where there is no
    place. *waiting* returns how many requests wait in front of it, which *serve* lets come. `grant`
    is set by whoever makes this, before anything is taken.
    """

    grant: Grant
    # Of all instances the same, as a user of its grant.
    weight = 1

    def __init__(
        self,
        leases: Leases,
        try_start: Callable[[], float],
        delay: Callable[[], float],
        refuse: Callable[[float], Exception],
        waiting: Callable[[], int] = lambda: 0,
        serve: Callable[[], None] = lambda: None,
    ) -> None:
        self.count = 0
        self._leases = leases
        self._granted = 0
        self._try_start = try_start
        self._delay = delay
        self._refuse = refuse
        self._waiting, self._serve = waiting, serve
        # Requests that wait for a place or a start, the oldest first; one that is done waits no
        # more, and has no place.
        self._undecided: deque[asyncio.Future[None]] = deque()
        # The tokens of those that wait for them.
        self._tokens: dict[asyncio.Future[None], SharedReservation] = {}

    def take(
        self, *, patient: bool = False, tokens: SharedReservation | None = None
    ) -> asyncio.Future[None] | None:
        """Count one more, or wait for its decision: see `Quota.take`."""
        self._leases.check()
        ready = tokens is None or tokens.ready
        if self.count < self._granted and not self._undecided and ready:
            delay = self._try_start()
            if not delay:
                self.count += 1
                return None
            if delay > PATIENCE:
                raise self._refuse(delay)
        loop = asyncio.get_running_loop()
        decision: asyncio.Future[None] = loop.create_future()
        if not patient:
            loop.call_later(PATIENCE, self._give_up, decision)
        self.count += 1
        self._undecided.append(decision)
        if tokens is not None and not ready:
            self._tokens[decision] = tokens
        try:
            self.grant.wait_begins()
        except BaseException:
            self._undecided.remove(decision)
            self._tokens.pop(decision, None)
            self.count -= 1
            raise
        return decision

    def give_back(self) -> bool:
        """Count one less; return whether it had a place."""
        refused = next((decision for decision in self._undecided if decision.done()), None)
        if refused is None:
            self.grant.place_ends()
        else:
            # One that has neither a place nor a start. If it is not this one, it counts as this
            # one until its own end: no more than one at a time.
            self._undecided.remove(refused)
            self._tokens.pop(refused, None)
        self.count -= 1
        self.decide()
        return refused is None

    def decide(self) -> None:
        """Let the undecided have the granted places and the starts."""
        while self._undecided and self.inside < self._granted:
            decision = self._undecided[0]
            error = self._lacks_tokens(decision)
            if error is None and not decision.done():
                if decision in self._tokens:
                    # It is not known yet, or they come soon.
                    return
                delay = self._try_start()
                if 0 < delay <= PATIENCE:
                    # There may be a start soon.
                    return
                error = self._refuse(delay) if delay else None
            self._undecided.popleft()
            self._tokens.pop(decision, None)
            conclude(decision, error)

    def _lacks_tokens(self, decision: asyncio.Future[None]) -> Exception | None:
        """Return the error of one that has to wait for its tokens for too long."""
        tokens = self._tokens.get(decision)
        if tokens is None or decision.done():
            return None
        if tokens.ready:
            del self._tokens[decision]
        elif (shortage := tokens.shortage) is not None and shortage.delay > PATIENCE:
            return Quota.too_many_tokens(shortage)
        return None

    def end(self, error: Exception | None) -> None:
        """Decide all, and share the limit no more."""
        self._leases.drop(self.grant)
        for decision in self._undecided:
            conclude(decision, error)

    # A user of its grant (wings/cluster/grants.py).

    @property
    def inside(self) -> int:
        """The places that are counted and decided."""
        return self.count - len(self._undecided)

    @property
    def wanting(self) -> int:
        """The places that are still wanted, for what is counted or waits in front of it."""
        return len(self._undecided) + self._waiting()

    @property
    def ready(self) -> int:
        """How many of them could use a place that is granted: each."""
        return self.wanting

    def resize(self, places: int) -> None:
        """Use *places* from now on; called by the grant."""
        self._granted = places
        self.decide()
        self._serve()

    def others_starve(self) -> None:
        """Do nothing: an answer that runs keeps its place."""

    def _give_up(self, decision: asyncio.Future[None]) -> None:
        """Refuse one that has been undecided for long enough."""
        if not decision.done() and decision in self._undecided:
            no_place, tokens = self.inside >= self._granted, self._tokens.get(decision)
            shortage = None if no_place or tokens is None else tokens.shortage
            if shortage is None:
                conclude(decision, self._refuse(0.0 if no_place else self._delay()))
            else:
                late = shortage._replace(delay=max(PATIENCE, shortage.delay))
                conclude(decision, Quota.too_many_tokens(late))


class SharedQuota(Quota):
    """The counts of one key at this instance, within limits that all instances share under *name*.

    The connections are those of the workers of one host, which is its *scope*; None: there are no
    others.
    """

    def __init__(
        self,
        max_concurrent: int,
        requests_per_minute: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_connections: int = 0,
        queue_size: int = 0,
        tokens_per_minute: int = 0,
        tokens_per_day: int = 0,
        leases: Leases,
        name: str,
        scope: Scope | None = None,
    ) -> None:
        self._complete = False
        super().__init__(
            max_concurrent,
            requests_per_minute,
            clock,
            max_connections=max_connections,
            queue_size=queue_size,
            budget=SharedBudget(
                leases,
                name,
                tokens_per_minute,
                tokens_per_day,
                clock,
                waiting=self._first_tokens,
                on_tokens=self._on_tokens,
            ),
        )
        self._leases, self._name, self._scope = leases, name, scope
        self._clock = clock
        self.answers = Counted(
            leases,
            lambda: self._rate.try_take(),
            lambda: self._rate.delay(),
            self._refusal,
            self._in_front,
            self.serve,
        )
        self._rate = self._shared_rate = SharedRate(
            leases,
            f"K:{name}",
            *minute(requests_per_minute),
            clock,
            waiting=lambda: self.answers.wanting,
            on_slots=self._on_slots,
            rested=True,
            share_kept=SHARE_KEPT,
        )
        self.answers.grant = leases.hold(f"k:{name}", max_concurrent, self.answers, least=1)
        # Where the connections are bounded, and shared.
        self._connected: Counted | None = None
        self._bound_connections()
        self._complete = True

    def apply(
        self,
        max_concurrent: int,
        requests_per_minute: int,
        max_connections: int = 0,
        queue_size: int = 0,
    ) -> None:
        """Use other limits from now on, for all instances together."""
        super().apply(max_concurrent, requests_per_minute, max_connections, queue_size)
        self.answers.grant.apply(max_concurrent)
        self._bound_connections()

    def revoke(self) -> None:
        """Cancel what is bound to the key, and share its limits no more."""
        super().revoke()
        assert isinstance(self.budget, SharedBudget)
        self.budget.drop()
        self._leases.drop_pace(self._shared_rate)
        for counted in (self.answers, self._connected):
            if counted is not None:
                counted.end(InvalidApiKey(REVOKED))

    def _in_front(self) -> int:
        """Return how many requests of the queue could start soon if there were places for them: a
        place that waits for tokens is others' to use.
        """
        if not (count := self.queue.in_front()) or not self.budget.limited:
            return count
        assert isinstance(self.budget, SharedBudget)
        delay = self.budget.hand.delay(self.queue.first_tokens())
        if delay == 0.0:
            return count
        return 1 if delay == inf or delay < LOOK_AGAIN else 0

    def _first_tokens(self) -> int:
        """Return the estimate of the request that is to start next, if only tokens are missing."""
        return self.queue.first_tokens() if self.running < self.limit else 0

    def _on_tokens(self) -> None:
        if self._complete:
            self._on_slots()

    def _shortage(self, turn: Turn) -> Shortage | None:
        """Return why *turn* cannot start, and not wait for a moment for what the server says."""
        shortage = super()._shortage(turn)
        if shortage is not None and turn.waiting:
            return shortage._replace(delay=max(shortage.delay, LOOK_AGAIN))
        return shortage if shortage is not None and shortage.delay > PATIENCE else None

    def take(
        self, *, patient: bool = False, tokens: Reservation | None = None
    ) -> asyncio.Future[None] | None:
        """Count an answer that begins, as `Quota.take`."""
        if self.revoked:
            raise InvalidApiKey(REVOKED)
        if self.running >= self.limit:
            raise self._refusal(0.0)
        try:
            shared = tokens if isinstance(tokens, SharedReservation) else None
            return self.answers.take(patient=patient, tokens=shared)
        finally:
            self.running = self.answers.count

    async def count(self) -> None:
        """Count a request that begins no answer, as `Quota.count`; its slot may take PATIENCE."""
        end = self._clock() + PATIENCE
        while delay := self._rate.try_take():
            if self._clock() + delay > end:
                raise self._too_fast(delay)
            await asyncio.sleep(delay)

    def give_back(self, *, unused: bool = False) -> None:
        """Count an answer as ended; an *unused* one never began."""
        if self.answers.give_back() and unused:
            self._rate.take(-self._rate.interval)
            self.answers.decide()
        self.running = self.answers.count
        self.serve()

    @property
    def _rate_whole(self) -> bool:
        """Whether another quota of this name would allow no more starts: the server remembers
        them.
        """
        return self._leases.standing.state is State.JOINED or super()._rate_whole

    @property
    def _tokens_whole(self) -> bool:
        """Whether another quota of this name would allow no more tokens: the server remembers what
        it was told.
        """
        assert isinstance(self.budget, SharedBudget)
        return self.budget.hand.quiet and self._rate_whole

    def _on_slots(self) -> None:
        self.answers.decide()
        self.serve()

    @property
    def connections(self) -> int:
        """The connections that are counted."""
        return self._connections if self._connected is None else self._connected.count

    def connect(self) -> asyncio.Future[None] | None:
        """Count a connection, as `Quota.connect`."""
        if self._connected is None:
            return super().connect()
        if self._connected.count >= self._max_connections:
            raise self._too_many_connections(self._connected.count)
        return self._connected.take()

    def disconnect(self) -> None:
        """Count a connection as ended."""
        if self._connected is None:
            super().disconnect()
        else:
            self._connected.give_back()

    def _bound_connections(self) -> None:
        """Share the bound of the connections as it is now, if there is one."""
        limit, connected = self._max_connections, self._connected
        if self._scope is None or self.revoked:
            return
        if connected is not None and limit:
            connected.grant.apply(limit)
        elif connected is not None:
            connected.end(None)
            self._connections, self._connected = connected.count, None
        elif limit:
            self._connected = connected = Counted(
                self._leases,
                lambda: 0.0,
                lambda: 0.0,
                lambda _delay: self._too_many_connections(self._max_connections),
            )
            connected.count = self._connections
            name = f"h:{self._scope.host}:k:{self._name}"
            connected.grant = self._leases.hold(name, limit, connected, scope=self._scope)

    def _refusal(self, delay: float) -> ConcurrencyExceeded | RateLimitExceeded:
        if delay:
            return self._too_fast(delay)
        return ConcurrencyExceeded(
            f"{self.limit} answers of this key run or wait, at most max_concurrent={self.limit}",
            retry_after=1.0,  # nobody knows when one of them ends
        )
