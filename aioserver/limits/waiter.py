"""A request that waits in the queue of a gate, and what it is told of its position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Hashable

Place = TypeVar("Place")


class Waiter(Generic[Place]):
    """A request in the queue; *place* is done once it has a place or an error.

    *arrived* and *deadline* are times of the gate's clock. A request that has waited before counts as one
    that arrived so much earlier.
    """

    __slots__ = (
        *("arrived", "caller", "cost", "deadline", "flow"),
        *("may_fail_over", "on_position", "place", "rejoined", "reported"),
    )

    def __init__(
        self,
        place: asyncio.Future[Place],
        caller: Hashable,
        flow: Hashable,
        arrived: float,
        deadline: float,
        on_position: Callable[[int, float], None] | None,
        cost: int,
        *,
        may_fail_over: bool,
        rejoined: bool = False,
    ) -> None:
        self.place = place
        self.caller = caller
        self.flow = flow
        self.arrived = arrived
        self.deadline = deadline
        self.on_position = on_position
        self.cost = cost
        self.may_fail_over = may_fail_over
        self.rejoined = rejoined
        self.reported: tuple[int, float] | None = None

    def report(self, position: int, eta: float) -> None:
        """Tell *on_position* what has changed since the last report."""
        if self.on_position is not None and self.reported != (position, eta):
            self.reported = position, eta
            self.on_position(position, eta)


def settled(waiter: Waiter[Place]) -> bool:
    """Return whether *waiter* has a place or an error, or has given up."""
    return waiter.place.done()
