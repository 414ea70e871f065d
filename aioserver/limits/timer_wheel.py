"""Many timers of about the same length on one timer of the event loop.

Algorithm: the hashed timing wheel of Varghese and Lauck, "Hashed and Hierarchical Timing Wheels",
SOSP 1987, as a dict of buckets and a heap of their numbers. It serves pings and heartbeats:
thousands of members, each visited every twenty seconds. A member is in the bucket of its time, and
the one timer is set for the next bucket that has a member. Adding, removing and visiting a member
take the same time however many there are.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio

# Seconds by which the event loop's timer may fire early.
EARLY = 1e-3


class Member(Protocol):
    """A member of a wheel.

    Only the wheel sets *bucket*: 0 outside every bucket, -1 during a visit.
    """

    bucket: int

    def visit(self, now: float) -> float | None:
        """Do what is due; return the seconds until the next visit, or None for no more visits."""


class TimerWheel:
    """Visits its members at the times that they have asked for, at most one *grain* (in seconds)
    late.

    Always: a member is in at most one bucket; a timer is set while there is a member.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, grain: float) -> None:
        self._loop = loop
        self._grain = grain
        self._buckets: dict[int, dict[Member, None]] = {}
        # A heap of the buckets' numbers.
        self._order: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_bucket = 0

    def add(self, member: Member, delay: float) -> None:
        """Visit *member* in *delay* seconds; an earlier time is replaced."""
        if member.bucket:
            self.remove(member)
        if self._put(member, self._loop.time() + delay):
            self._arm()

    def remove(self, member: Member) -> None:
        """Stop visiting *member*, which need not be in the wheel."""
        if member.bucket and (bucket := self._buckets.get(member.bucket)) is not None:
            bucket.pop(member, None)
        member.bucket = 0

    def close(self) -> None:
        """Stop all visits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._buckets.clear()
        self._order.clear()

    def _put(self, member: Member, when: float) -> bool:
        """Have *member* visited at *when*, in the loop's time; return whether its bucket is new."""
        number = int(when / self._grain) + 1
        bucket = self._buckets.get(number)
        new = bucket is None
        if bucket is None:
            bucket = self._buckets[number] = {}
            heapq.heappush(self._order, number)
        bucket[member] = None
        member.bucket = number
        return new

    def _arm(self) -> None:
        if not self._order:
            return
        if self._timer is not None:
            if self._timer_bucket <= self._order[0]:
                return
            self._timer.cancel()
        self._timer_bucket = self._order[0]
        self._timer = self._loop.call_at(self._timer_bucket * self._grain, self._fire)

    def _fire(self) -> None:
        self._timer = None
        now = self._loop.time()
        try:
            while self._order and self._order[0] * self._grain <= now + EARLY:
                self._visit(self._order[0], now)
        finally:
            # A member that raises does not keep the rest of its bucket from being visited.
            self._arm()

    def _visit(self, number: int, now: float) -> None:
        bucket = self._buckets[number]
        # Any visit may add and remove members, its own and others.
        while bucket:
            member, _ = bucket.popitem()
            member.bucket = -1
            delay = member.visit(now)
            if member.bucket == -1:
                member.bucket = 0
                if delay is not None:
                    self._put(member, now + max(delay, self._grain))
        # A visit may have closed the wheel.
        if self._order and self._order[0] == number:
            del self._buckets[heapq.heappop(self._order)]
