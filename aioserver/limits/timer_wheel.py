"""Many timers of about the same length, with one real timer.

After Varghese and Lauck, "Hashed and Hierarchical Timing Wheels", 1987. Heartbeats and pings: thousands of members, each visited every twenty seconds. A member lies in the
bucket of its moment; one timer fires for the next bucket that has anybody in it. Adding, removing
and visiting cost the same however many there are.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio


class Member(Protocol):
    """Who wants to be visited. *bucket* belongs to the wheel: 0 in none, -1 while visited."""

    bucket: int

    def visit(self, now: float) -> float | None:
        """Do what is due; returns seconds until the next visit, None for no more."""


class TimerWheel:
    """Visits its members when they asked for it, at most one *grain* (in seconds) late.

    Always: a member is in one bucket at most; a timer is set while there is a member.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, grain: float) -> None:
        self._loop = loop
        self._grain = grain
        self._buckets: dict[int, dict[Member, None]] = {}
        self._order: list[int] = []  # a heap of the buckets' numbers
        self._timer: asyncio.TimerHandle | None = None
        self._timer_bucket = 0

    def add(self, member: Member, delay: float) -> None:
        """Visit *member* in *delay* seconds; it is forgotten when it was to be visited before."""
        self.remove(member)
        self._put(member, self._loop.time() + delay)
        self._arm()

    def remove(self, member: Member) -> None:
        """Visit *member* no more."""
        if member.bucket and (bucket := self._buckets.get(member.bucket)) is not None:
            bucket.pop(member, None)
        member.bucket = 0

    def close(self) -> None:
        """Visit nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._buckets.clear()
        self._order.clear()

    def _put(self, member: Member, when: float) -> None:
        number = int(when / self._grain) + 1
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = {}
            heapq.heappush(self._order, number)
        bucket[member] = None
        member.bucket = number

    def _arm(self) -> None:
        if not self._order:
            return
        if self._timer is not None:
            if self._timer_bucket <= self._order[0]:
                return
            self._timer.cancel()
        self._timer_bucket = self._order[0]
        self._timer = self._loop.call_at(self._timer_bucket * self._grain, self._turn)

    def _turn(self) -> None:
        self._timer = None
        now = self._loop.time()
        try:
            while self._order and self._order[0] * self._grain <= now + 1e-3:
                self._visit(self._order[0], now)
        finally:
            self._arm()  # one who raised does not stop the wheel for the rest of its bucket

    def _visit(self, number: int, now: float) -> None:
        bucket = self._buckets[number]
        while bucket:  # any visit may add and remove, its own member and others
            member, _ = bucket.popitem()
            member.bucket = -1
            delay = member.visit(now)
            if member.bucket == -1:
                member.bucket = 0
                if delay is not None:
                    self._put(member, now + max(delay, self._grain))
        if self._order and self._order[0] == number:  # else the wheel was closed
            del self._buckets[heapq.heappop(self._order)]
