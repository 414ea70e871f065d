"""Leaves a provider alone that fails, and looks with one request at a time whether it is back.

After Nygard, "Release It!", 2007. Closed: all pass. It opens after FAILURES in a row, or where half of at
least MANY in SPAN seconds failed; for FIRST seconds, twice as long each time, LONGEST at most. Then
one trial at a time passes: an answer closes it, a failure opens it again.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

FAILURES = 5  # in a row
MANY, SPAN = 20, 30.0  # at least so many, in so many seconds: then half of them are enough
FIRST, LONGEST = 5.0, 60.0  # seconds
CLOSED, TRIAL, OPEN = "closed", "trial", "open"


class Breaker:
    """Asked before each request, told of each end.

    Always: while it is not closed at most one request passes at a time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._row = 0
        self._recent: deque[tuple[float, bool]] = deque()  # when, and whether it failed
        self._failed = 0  # of the recent
        self._open_until: float | None = None  # None: closed
        self._open_for = FIRST
        self._trying = False

    @property
    def state(self) -> str:
        """`closed`, `open`, or `trial`: one may try, or is trying."""
        if self._open_until is None:
            return CLOSED
        return OPEN if self._clock() < self._open_until else TRIAL

    @property
    def allows(self) -> bool:
        """Whether a request would pass now."""
        return self._open_until is None or (not self._trying and self._clock() >= self._open_until)

    @property
    def wait(self) -> float:
        """Seconds after which it is worth coming back."""
        if self._open_until is None:
            return 0.0
        return max(1.0, self._open_until - self._clock())

    def enter(self) -> bool:
        """Let a request pass that `allows` has let; whether it is a trial, which `ended` wants."""
        if self._open_until is None:
            return False
        self._trying = True
        return True

    def answered(self, *, trial: bool) -> None:
        """It has begun to answer: a trial need not be over to have succeeded."""
        if trial and self._open_until is not None:
            self._close()

    def ended(self, *, trial: bool, failed: bool | None) -> None:
        """A request that passed has ended; *failed* None: that says nothing of the provider."""
        if trial and self._trying:
            self._trying = False
            if failed:
                self._open_for = min(LONGEST, 2 * self._open_for)
                self._open()
            elif failed is False:
                self._close()
            return
        if failed is None or self._open_until is not None:
            return  # what began before it opened says nothing new
        self._row = self._row + 1 if failed else 0
        self._remember(failed)
        if self._row >= FAILURES or (
            len(self._recent) >= MANY and 2 * self._failed >= len(self._recent)
        ):
            self._open()

    def _remember(self, failed: bool) -> None:
        now = self._clock()
        if failed:
            self._failed += 1
        self._recent.append((now, failed))
        while self._recent and (self._recent[0][0] <= now - SPAN or len(self._recent) > 1000):
            self._failed -= self._recent.popleft()[1]

    def _open(self) -> None:
        self._open_until = self._clock() + self._open_for

    def _close(self) -> None:
        self._open_until, self._open_for, self._trying = None, FIRST, False
        self._row = self._failed = 0
        self._recent.clear()
