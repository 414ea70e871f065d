"""Resources by themselves, with a scheduler on the running event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aioserver.errors import ServerAtCapacity
from aioserver.limits.resource import Bid, Reason, Resource, Ticket
from aioserver.limits.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from aioserver.limits.resource import Grant, PositionCallback

FULL, LATE, SLOW = "the line is full", "waited too long", "the rate is too slow"
WORDS = {Reason.FULL: FULL, Reason.SLOW: SLOW}


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
