"""Resources by themselves: with a scheduler on the running event loop, or on a clock that is moved
by hand.
"""

from __future__ import annotations

import asyncio
from math import inf
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.errors import ServerAtCapacity
from aioserver.limits.gcra import ROUNDING
from aioserver.limits.resource import Bid, Grant, Reason, Resource, Ticket, half
from aioserver.limits.scheduler import Scheduler
from tests.support.clock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from aioserver.limits.resource import PositionCallback

FULL, LATE = "the line is full", "waited too long"
WORDS = {Reason.FULL: FULL}


class Line:
    """A resource of so much *capacity*, at which tickets wait in their order."""

    def __init__(
        self,
        capacity: int = 1,
        *,
        queue_size: int = 1000,
        queue_timeout: float = 30.0,
        clock: Callable[[], float] | None = None,
        **options: Any,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.scheduler = Scheduler(loop)
        self.resource = Resource(
            "line",
            capacity,
            queue_size=queue_size,
            queue_timeout=queue_timeout,
            refuse=self._refuse,
            serve=self.scheduler.serve,
            clock=clock or loop.time,
            **options,
        )

    @staticmethod
    def _refuse(reason: Reason, seconds: float, _bid: Bid) -> ServerAtCapacity:
        return ServerAtCapacity(WORDS.get(reason, LATE), retry_after=seconds)

    def try_enter(self, caller: Hashable = None, *, cost: int = 0, **options: Any) -> Grant | None:
        """A grant, if one is free."""
        return self.resource.try_start(Ticket(caller, **options), cost)

    async def enter(
        self,
        caller: Hashable = None,
        *,
        on_position: Callable[[int, float], None] | None = None,
        cost: int = 0,
        front: bool = False,
        waited: float = 0.0,
        **options: Any,
    ) -> Grant:
        """A grant, or a refusal; the ticket has *waited* here so many seconds before."""
        ticket = Ticket(caller, **options)
        report: PositionCallback | None = None
        if (tell := on_position) is not None:
            report = lambda _line, position, eta: tell(position, eta)  # noqa: E731
        if waited:
            ticket.waited = {self.resource: waited}
        return await self.scheduler.wait(ticket, [Bid(self.resource, cost, front=front)], report)

    def serve(self) -> None:
        """Start what may start."""
        self.scheduler.serve(self.resource)

    def resize(self, capacity: int) -> None:
        """Have another capacity."""
        self.scheduler.resize(self.resource, capacity)

    def close(self, error: Callable[[], BaseException]) -> None:
        """Refuse all."""
        self.scheduler.shut(self.resource, error)


class Refused(Exception):
    """A refusal in a `World`: its reason, and the name of the resource."""

    def __init__(self, reason: Reason | str, name: str, retry_after: float) -> None:
        assert 0.0 <= retry_after < inf
        super().__init__(reason, name, retry_after)
        self.reason, self.name, self.retry_after = reason, name, retry_after


class World:
    """Resources with one scheduler, whose timers are those of *clock*."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.scheduler = Scheduler(self.clock.loop)
        self.resources: list[Resource] = []

    def resource(self, capacity: int, **options: Any) -> Resource:
        name = f"r{len(self.resources)}"
        options = {"queue_size": 100, "queue_timeout": 60.0} | options
        resource = Resource(
            name,
            capacity,
            refuse=lambda reason, seconds, _bid: Refused(reason, name, seconds),
            serve=self.scheduler.serve,
            clock=self.clock,
            **options,
        )
        self.resources.append(resource)
        return resource

    def background(self, outer: Resource, queue_size: int = 50) -> Resource:
        """The part of *outer* for answers in the background."""
        return self.resource(
            half(outer.limit), within=outer, queue_size=queue_size, queue_timeout=600.0
        )

    def refuse_late(self, resource: Resource) -> None:
        """Refuse whom the rate of *resource* lets start too late, as a provider does."""
        assert resource.rate is not None
        delay = resource.rate.delay(0)
        self.scheduler.refuse(
            resource,
            lambda: Refused(Reason.SLOW, resource.name, min(delay, 60.0)),
            lambda bid: bid.until < self.clock.now + delay or (bid.movable and delay > 1.0),
        )

    def ticket(self, caller: str = "a", flow: str = "", **options: Any) -> Ticket:
        return Ticket(caller, flow, **{"arrived": self.clock.now, **options})

    def start(self, ticket: Ticket, *bids: Bid | Resource) -> Grant:
        """A grant, which must be free."""
        grant = self.scheduler.enter(ticket, bids_of(bids))
        assert grant is not None
        return grant

    def wait(
        self,
        ticket: Ticket,
        *bids: Bid | Resource,
        on_position: PositionCallback | None = None,
    ) -> Ticket:
        """*ticket*, which must wait."""
        assert self.scheduler.enter(ticket, bids_of(bids), on_position) is None
        return ticket

    def refused(self, ticket: Ticket, *bids: Bid | Resource) -> Refused:
        """The refusal of *ticket*."""
        with pytest.raises(Refused) as refusal:
            self.scheduler.enter(ticket, bids_of(bids))
        assert ticket not in self.scheduler.waiting
        return refusal.value

    def order(self, resource: Resource) -> list[Ticket]:
        """The tickets that wait, in the order in which they will start."""
        return [bid.ticket for bid, _, _ in resource.positions()]


class Spaced:
    """A rate: a start each *interval* seconds; and a budget of tokens, if there is one."""

    def __init__(self, world: World, interval: float, budget: int | None = None) -> None:
        self.clock, self.interval, self.next = world.clock, interval, 0.0
        self.budget, self.reserved = budget, 0

    def delay(self, cost: int, ahead: int = 0) -> float:
        if self.budget is not None and self.reserved + cost > self.budget:
            return inf
        return max(0.0, self.next + ahead * self.interval - self.clock.now)

    def try_take(self, cost: int) -> object:
        if self.delay(cost) > ROUNDING:
            return None
        self.next = max(self.next, self.clock.now) + self.interval
        self.reserved += cost
        return [cost]

    def settle(self, taken: object, spent: int | None) -> None:
        assert isinstance(taken, list)
        self.reserved -= taken.pop()


def bids_of(bids: tuple[Bid | Resource, ...]) -> list[Bid]:
    return [each if isinstance(each, Bid) else Bid(each) for each in bids]


def granted(ticket: Ticket) -> Grant:
    """The grant by which the wait of *ticket* has ended."""
    assert isinstance(ticket.outcome, Grant), ticket.outcome
    grant, ticket.outcome = ticket.outcome, None
    return grant


def error(ticket: Ticket) -> Refused:
    """The refusal by which the wait of *ticket* has ended."""
    assert isinstance(ticket.outcome, Refused), ticket.outcome
    return ticket.outcome


def last(ticket: Ticket) -> Grant:
    """The newest grant that *ticket* holds."""
    return next(reversed(ticket.grants))
