"""The slots of a rate that an instance has in hand (cluster/rates.py), by the moment at which each begins."""

from __future__ import annotations

from collections import deque
from heapq import merge
from itertools import chain, islice

from aioserver.limits.gcra import ROUNDING


class SlotsInHand:
    """Slots that pass, each with its end, and slots that last until they are taken.

    All times are seconds of one clock. Always: each group is in the order of its beginnings. A slot that has ended is
    dropped once it is the first of its group, so each operation costs the same however many slots there are.
    """

    __slots__ = ("_lasting", "_passing")

    def __init__(self) -> None:
        self._passing: deque[tuple[float, float]] = deque()
        self._lasting: deque[float] = deque()

    def count(self, now: float) -> int:
        """Return how many slots there are at *now*."""
        passing = self._passing
        while passing and passing[0][1] < now:
            passing.popleft()
        return len(passing) + len(self._lasting)

    @property
    def lasting(self) -> int:
        """How many slots last."""
        return len(self._lasting)

    def begins(self, before: int) -> float:
        """Return when the slot begins that has so many *before* it. There must be one."""
        passing, lasting = self._passing, self._lasting
        if not lasting:
            return passing[before][0]
        if not passing:
            return lasting[before]
        in_order = merge((begins for begins, _ends in passing), lasting)
        return next(islice(in_order, before, None))

    def begun(self, now: float) -> int:
        """Return how many slots have begun at *now*."""
        self.count(now)
        return sum(
            begins <= now
            for begins in chain((begins for begins, _ends in self._passing), self._lasting)
        )

    def take(self, now: float) -> None:
        """Use one slot: one that has begun before one that has not, and one that passes before one that lasts."""
        if not self.count(now):
            return
        passing, lasting = self._passing, self._lasting
        if not lasting or (
            passing and (passing[0][0] <= now + ROUNDING or passing[0][0] <= lasting[0])
        ):
            passing.popleft()
        else:
            lasting.popleft()

    def put_back(self, begins: float, ends: float) -> None:
        """Have a slot again that was taken."""
        self._passing.appendleft((begins, ends))

    def add(self, begins: float, ends: float) -> None:
        """Have one more slot, which passes at *ends*. It begins no earlier than the one before it."""
        passing = self._passing
        self._passing.append((max(begins, passing[-1][0]) if passing else begins, ends))

    def add_lasting(self, begins: float) -> None:
        """Have one more slot, which lasts. It begins no earlier than the one before it."""
        lasting = self._lasting
        lasting.append(max(begins, lasting[-1]) if lasting else begins)

    def clear(self) -> None:
        """Have none."""
        self._passing.clear()
        self._lasting.clear()
