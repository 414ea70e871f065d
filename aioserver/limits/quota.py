"""The limits of one key (`auth.keys`): connections and answers at once, and new answers per
minute.

An answer counts from its beginning to its end, on whatever face, and however it ends; a request
that attaches to an answer under way begins none. A connection counts from its request or handshake
to its end, also while it waits for its place; a `max_connections` of 0 bounds nothing. The limit
per minute is a GCRA (limits/gcra.py) with a burst of a whole minute: after a rest
`requests_per_minute` answers may begin at once, then one each 60 / `requests_per_minute` seconds.
A deletion counts like the beginning of an answer, since all instances have to look for it. Tokens
count by an estimate that is reserved before the start (limits/budget.py).

A key is a resource (limits/resource.py): its answers are the places, its starts and tokens the
rate. A request over a limit is refused, unless the key has a queue. There it waits, before it
takes anything that callers share, if the limit can admit it within its time. The queue is fair
among the users of the key.

This file is one concept: an answer is counted in all limits of its key, or in none.
"""

# ruff: noqa: SLF001 - a quota and the tasks bound to it are one concept

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from math import ceil
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from aioserver.errors import (
    AioserverError,
    ConcurrencyExceeded,
    DeadlineExceeded,
    Denied,
    InvalidApiKey,
    PermissionDenied,
    RateLimitExceeded,
    TokensExceeded,
)
from aioserver.limits.budget import Budget, Reservation
from aioserver.limits.gcra import ROUNDING, Gcra
from aioserver.limits.resource import Bid, Reason, Resource, Ticket
from aioserver.limits.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aioserver.limits.budget import BudgetState, Shortage
    from aioserver.limits.fair_queue import ClassQueue
    from aioserver.limits.resource import Grant

    OnPosition = Callable[[int, float], None]

MINUTE = 60.0
# Seconds that a request may wait at its key: the timeout of the SDKs themselves.
MAX_WAIT = 600.0
REVOKED = "this API key is no longer valid"
# The result of the rate for a start that has reserved no tokens.
START = object()


class KeyRate:
    """The rate at which the answers of a key may begin: *starts* per minute, and a *budget*.

    Always: a start is counted in both, or in none. *queued* says whether requests wait for each
    other.
    """

    def __init__(self, starts: Gcra, budget: Budget) -> None:
        self.starts, self.budget = starts, budget
        self.queued = False

    def delay(self, cost: int, ahead: int = 0) -> float:
        """Return the seconds until a start of *cost*, with *ahead* other starts before it, is
        allowed.
        """
        starts = self.starts
        delay = starts.delay(ahead * starts.interval if self.queued else 0.0)
        if self.budget.limited and (shortage := self.budget.shortage(cost)) is not None:
            delay = max(delay, shortage.delay)
        return delay

    def try_take(self, cost: int) -> object:
        """Count a start, and reserve *cost* tokens for it, if both are allowed now."""
        budget = self.budget
        if not budget.limited:
            return None if self.starts.try_take() else START
        if self.starts.delay() > ROUNDING or budget.shortage(cost) is not None:
            return None
        reservation = budget.reserve(cost)
        try:
            late = self.starts.try_take()
        except BaseException:
            reservation.release()
            raise
        if late:
            reservation.release()
            return None
        return reservation

    def settle(self, taken: object, spent: int | None) -> None:
        """Correct the count of an answer that has *spent* so many tokens; None: it has never begun,
        and is not counted.
        """
        if isinstance(taken, Reservation):
            taken.settle(spent or 0)
        if spent is None:
            self.starts.take(-self.starts.interval)


class Shared(Protocol):
    """The part that shares the limits of a key among instances, owned by the key's quota."""

    # Seconds for which an answer or a deletion waits for tokens or starts that others may hold.
    patience: float

    @property
    def remembers(self) -> bool:
        """Whether another quota of the same key would allow no more starts than this one."""

    def apply(self) -> None:
        """Share the limits as they are now."""

    def end(self) -> None:
        """Share them no more: the key was revoked."""


class Quota:
    """The counts of one key; they outlive a change of its limits.

    Always: `running` is the number of answers taken and not given back, `connections` the number
    of connections that have not ended. In any span of t seconds at most `(t / 60 + 1) *
    requests_per_minute` answers are taken, and none once `revoked`.

    Its `limit` bounds the answers at once, and `resource` has the part of this process.
    *scheduler* starts the requests that wait; None: one of its own.
    """

    def __init__(
        self,
        max_concurrent: int,
        requests_per_minute: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_connections: int = 0,
        queue_size: int = 0,
        budget: Budget | None = None,
        starts: Gcra | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        self.limit, self.max_connections = max_concurrent, max_connections
        self._per_minute, self._scheduler = requests_per_minute, scheduler
        self._starts = starts or Gcra(*minute(requests_per_minute), clock)
        self.rate = KeyRate(self._starts, budget or Budget(clock=clock))
        self.resource = self._make_resource(max_concurrent, self._refusal, clock, self.rate)
        # Where instances share the limits; the connections are a resource, too, if they share those.
        self.shared: Shared | None = None
        self.slots: Resource | None = None
        self._connections = 0
        self._connected: list[Grant | None] = []
        self.revoked = False
        # The tasks that are bound to the key, and the watcher of those that need an admin key.
        self._held: dict[asyncio.Task[object], object | None] = {}
        # The cancelled tasks among them, each with the error that it raises instead.
        self._denials: dict[asyncio.Task[object], Denied] = {}
        self._use_queue(queue_size)

    def _make_resource(
        self,
        capacity: int,
        refuse: Callable[[Reason, float, Bid], BaseException],
        clock: Callable[[], float],
        rate: KeyRate | None = None,
    ) -> Resource:
        return Resource(
            "its key",
            capacity,
            queue_size=0,
            queue_timeout=0.0,
            refuse=refuse,
            serve=lambda resource: self.scheduler.serve(resource),
            clock=clock,
            rate=rate,
        )

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler that starts the waiting requests."""
        if self._scheduler is None:
            self._scheduler = Scheduler(asyncio.get_running_loop())
        return self._scheduler

    @property
    def budget(self) -> Budget:
        """Its tokens."""
        return self.rate.budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        self.rate.budget = budget

    @property
    def running(self) -> int:
        """The number of running answers."""
        return self.resource.places.inside

    @property
    def queue(self) -> ClassQueue[Bid]:
        """The requests that wait."""
        return self.resource.queue

    def apply(
        self,
        max_concurrent: int,
        requests_per_minute: int,
        max_connections: int = 0,
        queue_size: int = 0,
    ) -> None:
        """Use other limits from now on; `budget.apply` sets the limits of tokens.

        Answers and connections that were counted stay counted, and waiting requests stay in the
        queue.
        """
        self._use_queue(queue_size)
        self.limit, self.max_connections = max_concurrent, max_connections
        self._per_minute = requests_per_minute
        self._starts.apply(*minute(requests_per_minute))
        if self.shared is not None:
            self.shared.apply()
        else:
            self.resource.places.resize(max_concurrent)
        self.serve()

    def _use_queue(self, size: int) -> None:
        resource = self.resource
        # How many requests may wait.
        self.queue_size = resource.queue_size = size
        self.rate.queued = size > 0
        resource.queue_timeout = MAX_WAIT if size else 0.0

    def budgets(self) -> dict[str, BudgetState]:
        """Return the budgets of the key that there are, by the names of their settings."""
        return self.budget.states()

    @property
    def starts(self) -> tuple[int, int, float]:
        """The starts per minute, the starts that are left now, and the seconds until all of them are
        left, if none is used.
        """
        limit, left = self._per_minute, min(self._per_minute, self._starts.available)
        return limit, left, (limit - left) * self._starts.interval

    @property
    def rested(self) -> bool:
        """Whether nothing runs, waits or is open, and a new quota in place of this one would allow
        no more.
        """
        if self.running or self.connections or self.resource.waiting or self._held:
            return False
        remembered = self.shared is not None and self.shared.remembers
        whole = remembered or self._starts.available >= self._per_minute
        return whole and self.budget.whole

    def take_over(self, old: Quota) -> None:
        """Count what *old*, the quota of a former key of the same caller, has used and reserved."""
        self.budget.take_over(old.budget)

    def serve(self) -> None:
        """Start the waiting requests that may start now. Call this when a limit has changed."""
        if self.resource.waiting:
            self.scheduler.serve(self.resource)

    # Answers.

    def take(
        self,
        ticket: Ticket | None = None,
        tokens: int = 0,
        on_wait: Callable[[], None] | None = None,
    ) -> Grant | None:
        """Return the grant of an answer that begins: release it once the answer has ended, or
        cancel it if it has never begun. None: *ticket* waits; call `granted` next, or `leave`.

        *tokens* is an estimate. If the answer has to wait, *on_wait* is called, which may raise. If
        other instances may hold a free place, *on_wait* is called only after a short wait.

        Raises:
            InvalidApiKey: the key was revoked after its request came in.
            ConcurrencyExceeded, RateLimitExceeded: it is not within the limits, and cannot wait;
                nothing is counted.
            DeadlineExceeded: its deadline is over.
        """
        if ticket is None:
            ticket = Ticket()
        if (grant := self.resource.try_start(ticket, tokens)) is not None:
            return grant
        resource = self.resource
        moment = resource.grace
        if not (resource.queue_size or moment):
            raise resource.no_wait(ticket, tokens)
        # Its position is that of the moment in which it begins to wait.
        report = None if moment else _not_heard_yet
        grant = self.scheduler.enter(ticket, [Bid(resource, tokens)], report)
        if grant is None and on_wait is not None:
            try:
                if moment:
                    loop = asyncio.get_running_loop()
                    loop.call_later(moment, self._waits_on, ticket, on_wait)
                else:
                    on_wait()
            except BaseException:
                self.scheduler.leave(ticket)
                raise
        return grant

    def _waits_on(self, ticket: Ticket, on_wait: Callable[[], None]) -> None:
        if not any(bid.resource is self.resource for bid in ticket.bids):
            return
        try:
            on_wait()
        except AioserverError as error:
            refused = error
            self.scheduler.refuse(self.resource, lambda: refused, lambda bid: bid.ticket is ticket)

    async def granted(self, ticket: Ticket, on_position: OnPosition | None = None) -> Grant:
        """Return the grant that *ticket* waits for. Cancelling is safe.

        *on_position* is called with its position among those that wait for the key, and the seconds
        until its start, by an estimate: now, and again each second if they have changed.

        Raises:
            AioserverError: it may not begin.
        """
        if on_position is not None and self.queue_size:
            tell = on_position
            self.scheduler.listen(ticket, lambda _key, position, eta: tell(position, eta))
        return await self.scheduler.granted(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Let *ticket* wait no longer: its answer does not begin."""
        self.scheduler.leave(ticket)

    def waited(self, ticket: Ticket) -> float:
        """Return the seconds for which *ticket* has waited here."""
        return 0.0 if ticket.waited is None else ticket.waited.get(self.resource, 0.0)

    def refuse(self, error: Callable[[], AioserverError]) -> None:
        """Refuse every request that waits, each with an error of its own."""
        for resource in (self.resource, self.slots):
            if resource is not None and resource.waiting:
                self.scheduler.refuse(resource, error)

    @asynccontextmanager
    async def used(self) -> AsyncIterator[None]:
        """Count an answer for the length of the `async with`, and bind this task to the key.

        Raises:
            AioserverError: as `take`, `granted` and `held`.
        """
        ticket = Ticket()
        grant = self.take(ticket)
        try:
            with self.held():
                if grant is None:
                    grant = await self.granted(ticket)
                yield
        finally:
            if grant is None:
                self.leave(ticket)
            else:
                grant.release(0, 0)

    async def count(self) -> None:
        """Count a request that begins no answer in the limit per minute. Cancelling is safe.

        Raises:
            RateLimitExceeded: `requests_per_minute` is reached.
        """
        patience = 0.0 if self.shared is None else self.shared.patience
        while delay := self._starts.try_take():
            if delay > patience:
                raise self._too_fast(delay)
            patience -= delay
            await asyncio.sleep(delay)

    # The words of refusals.

    def _refusal(self, reason: Reason, seconds: float, bid: Bid) -> AioserverError:
        resource, budget = self.resource, self.budget
        if reason is Reason.DEADLINE:
            return DeadlineExceeded("it has waited at its key until then", retry_after=seconds)
        if reason is Reason.FULL and self.queue_size:
            return ConcurrencyExceeded(
                f"{resource.waiting} requests of this key wait already,"
                f" at most queue_size={self.queue_size}",
                retry_after=max(1.0, resource.eta(1)),
            )
        waited = bid.until - bid.since
        if reason is Reason.LATE and waited > MAX_WAIT / 2:
            return ConcurrencyExceeded(
                f"no place of this key was free within {MAX_WAIT:.0f} s",
                retry_after=max(1.0, resource.eta(1)),
            )
        if reason is Reason.FULL or (reason is Reason.LATE and resource.inside >= resource.limit):
            return ConcurrencyExceeded(
                f"{max(resource.inside, self.limit)} answers of this key run or wait,"
                f" at most max_concurrent={self.limit}",
                retry_after=1.0,  # the end of these answers is unknown
            )
        if late := reason is Reason.LATE:
            seconds = self._starts.delay()
        shortage = budget.shortage(bid.cost) if budget.limited else None
        if shortage is not None:
            delay = shortage.delay
            left = bid.until - asyncio.get_running_loop().time() if bid.until else 0.0
            if delay >= left:
                return too_many_tokens(
                    shortage._replace(delay=max(waited if late else 0.0, delay))
                )
        return self._too_fast(seconds)

    def _too_fast(self, delay: float) -> RateLimitExceeded:
        return RateLimitExceeded(
            f"requests_per_minute={self._per_minute} of this key reached", retry_after=delay
        )

    # Connections.

    def share_connections(self, clock: Callable[[], float]) -> Resource:
        """Let the connections be a resource, of which this process has a part; there are none yet."""
        self.slots = self._make_resource(0, self._no_connection, clock)
        return self.slots

    @property
    def connections(self) -> int:
        """The connections that are counted."""
        if self.slots is None:
            return self._connections
        return len(self._connected) + self.slots.waiting

    def connect(self) -> Awaitable[None] | None:
        """Count a connection; call `disconnect` once when it has ended.

        If other processes share the limit, the result may have to be awaited; a connection that is
        refused then has ended, too.

        Raises:
            ConcurrencyExceeded: `max_connections` of the key are open or wait; nothing is counted.
        """
        slots = self.slots
        if slots is None:
            if 0 < self.max_connections <= self._connections:
                raise self._too_many_connections()
            self._connections += 1
            return None
        ticket = Ticket()
        if (grant := slots.try_start(ticket)) is None:
            if slots.grace <= 0:
                raise slots.no_wait(ticket)
            if (grant := self.scheduler.enter(ticket, [Bid(slots)])) is None:
                return self._connecting(ticket)
        self._connected.append(grant)
        return None

    async def _connecting(self, ticket: Ticket) -> None:
        grant = None
        try:
            grant = await self.scheduler.granted(ticket)
        finally:
            # `disconnect` is called in any case.
            self._connected.append(grant)

    def disconnect(self) -> None:
        """Count a connection as ended."""
        if self.slots is None:
            self._connections -= 1
        elif (grant := self._connected.pop()) is not None:
            # They are all alike.
            grant.release()

    def _no_connection(self, _reason: Reason, _seconds: float, _bid: Bid) -> AioserverError:
        return self._too_many_connections()

    def _too_many_connections(self) -> ConcurrencyExceeded:
        most = self.max_connections
        return ConcurrencyExceeded(
            f"{max(self.connections, most)} connections of this key are open or wait,"
            f" at most max_connections={most}",
            retry_after=1.0,  # the end of these answers is unknown
        )

    # Revoking.

    def held(self, *, watcher: object | None = None) -> Held:
        """Bind this task to the key: a revocation cancels the task inside the `with`.

        If the task needs an admin key, it works for a *watcher*, and is also cancelled when the
        key is demoted, or `end_watchers` says so. The end of the `with` raises `InvalidApiKey`
        where the key was revoked meanwhile, and `PermissionDenied` where it was demoted.
        """
        task = asyncio.current_task()
        assert task is not None
        return Held(self, task, watcher)

    def revoke(self) -> None:
        """Cancel every task that is bound to the key, and refuse every new answer."""
        self.revoked = True
        if self.shared is not None:
            self.shared.end()
        for resource in (self.resource, self.slots):
            if resource is not None:
                resource.closed = _revoked
        self.refuse(_revoked)
        for task in self._held:
            self._cancel(task, _revoked())

    def demote(self) -> None:
        """Cancel the tasks that need an admin key, since the key is no longer one."""
        for task, watcher in self._held.items():
            if watcher is not None:
                self._cancel(task, PermissionDenied("this key is no longer an admin key"))

    def end_watchers(self, revoked: Callable[[Any], bool]) -> None:
        """Cancel the tasks that work for a watcher who is *revoked*, as if the key were."""
        for task, watcher in self._held.items():
            if watcher is not None and revoked(watcher):
                self._cancel(task, InvalidApiKey(REVOKED))

    def _cancel(self, task: asyncio.Task[object], denial: Denied) -> None:
        if task not in self._denials:
            self._denials[task] = denial
            task.cancel()


class Held(msgspec.Struct, eq=False):
    """The bond of *task* to the key of *quota*, for the length of a `with`: see `Quota.held`."""

    quota: Quota
    task: asyncio.Task[object]
    watcher: object | None

    def __enter__(self) -> None:
        self.quota._held[self.task] = self.watcher

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        quota, task = self.quota, self.task
        del quota._held[task]
        denial = quota._denials.pop(task, None) if quota._denials else None
        if denial is None or not isinstance(error, asyncio.CancelledError):
            return
        # Where not the key alone has cancelled the task, it stays cancelled.
        if task.uncancel() == 0:
            raise denial from None


def too_many_tokens(shortage: Shortage) -> TokensExceeded:
    """Return the error of a request for which there are too few tokens."""
    period, limit, used, tokens, delay = shortage
    # Codex parses the time from exactly these words. A time that is a tenth too long is not
    # refused again.
    seconds = ceil(delay * 10) / 10
    error = TokensExceeded(
        f"{period} of this key: limit {limit}, used {used}, requested about {tokens}."
        f" Please try again in {seconds:.1f}s.",
        retry_after=seconds,
    )
    error.period = period
    return error


def minute(requests: int) -> tuple[float, float]:
    """Return the interval and the tolerance of *requests* a minute; after a rest all may start at
    once.
    """
    interval = MINUTE / requests
    return interval, (requests - 1) * interval


def _not_heard_yet(_key: Resource, _position: int, _eta: float) -> None:
    """Do nothing: the task that waits has not run yet."""


def _revoked() -> InvalidApiKey:
    return InvalidApiKey(REVOKED)
