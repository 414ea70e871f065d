"""The disk of a run: SQLite does its work at once, in the thread of the loop, and what comes of it
takes a moment.

A thread of its own would have a time of its own.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from tests.simulation.clock import Clock

if TYPE_CHECKING:
    import asyncio

# Seconds that a piece of work takes, as a rule; and at most, one of so many times.
MOMENT, LONG, SELDOM = 0.001, 0.5, 0.01


class Disk:
    """When what is done on a disk is over; a run with the same *seed* has the same times."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(f"disk {seed}")
        # When each thread has done what it was told so far.
        self._due: dict[Any, float] = {}

    def end_of(self, executor: Any) -> float:
        """Return when *executor* has done what it is told now."""
        seconds = self._dice.uniform(0.0, MOMENT)
        if self._dice.random() < SELDOM:
            seconds = self._dice.uniform(0.0, LONG)
        self._due[executor] = due = max(self._due.get(executor, 0.0), Clock.now + seconds)
        return due


def tell(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    """Tell who waits for *future* what came of it."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
