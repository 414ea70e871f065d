"""A circuit breaker: a provider that fails is not asked, except by one request at a time as a trial.

After Michael T. Nygard, "Release It!", 2007.

    closed    all requests pass. The breaker opens after CONSECUTIVE_FAILURES, or if half of at least
              MIN_ATTEMPTS in the last WINDOW seconds have failed
    open      no request passes for FIRST_WAIT seconds, twice as long each time, LONGEST_WAIT at most
    trial     one request at a time passes: an answer closes the breaker, a failure opens it again
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

CONSECUTIVE_FAILURES = 5
# Fewer attempts in the last WINDOW seconds are too few for a share of failures to mean anything.
MIN_ATTEMPTS, WINDOW = 20, 30.0
# Attempts of the window that are remembered.
MAX_REMEMBERED = 1000
# Seconds.
FIRST_WAIT, LONGEST_WAIT = 5.0, 60.0
CLOSED, TRIAL, OPEN = "closed", "trial", "open"


class Breaker:
    """Decides which attempts pass, by how earlier ones have ended.

    Always: while the breaker is not closed, it lets at most one attempt at a time pass.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._consecutive_failures = 0
        # When each of the recent attempts ended, and whether it failed.
        self._recent: deque[tuple[float, bool]] = deque()
        self._recent_failures = 0
        # None: the breaker is closed.
        self._open_until: float | None = None
        # Seconds for which the breaker opens next.
        self._next_wait = FIRST_WAIT
        self._trial_under_way = False

    @property
    def state(self) -> str:
        """`closed`, `open`, or `trial`: an attempt may pass as a trial, or one is under way."""
        if self._open_until is None:
            return CLOSED
        return OPEN if self._clock() < self._open_until else TRIAL

    @property
    def allows(self) -> bool:
        """Whether an attempt would pass now."""
        return self._open_until is None or (
            not self._trial_under_way and self._clock() >= self._open_until
        )

    @property
    def wait(self) -> float:
        """The seconds after which it is worth asking again: 0.0 while closed, else at least 1.0."""
        if self._open_until is None:
            return 0.0
        return max(1.0, self._open_until - self._clock())

    def enter(self) -> bool:
        """Let an attempt pass, which `allows` must have permitted; return whether it is a trial.

        `attempt_ended` must be called for it.
        """
        if self._open_until is None:
            return False
        self._trial_under_way = True
        return True

    def leave_alone(self, seconds: float) -> None:
        """Let no attempt pass for *seconds*, and then one as a trial."""
        self._open_until = self._clock() + seconds

    def attempt_answered(self, *, trial: bool) -> None:
        """Note that an attempt gets an answer: a *trial* succeeds with that, before its end."""
        if trial and self._open_until is not None:
            self._close()

    def attempt_ended(self, *, trial: bool, failed: bool | None) -> None:
        """Note the end of an attempt that passed; *failed* is None if it proves nothing."""
        if trial and self._trial_under_way:
            self._trial_under_way = False
            if failed:
                self._next_wait = min(LONGEST_WAIT, 2 * self._next_wait)
                self.leave_alone(self._next_wait)
            elif failed is False:
                self._close()
            return
        if failed is None or self._open_until is not None:
            # An attempt that began before the breaker opened brings no news.
            return
        self._consecutive_failures = self._consecutive_failures + 1 if failed else 0
        self._remember(failed)
        if self._consecutive_failures >= CONSECUTIVE_FAILURES or (
            len(self._recent) >= MIN_ATTEMPTS and 2 * self._recent_failures >= len(self._recent)
        ):
            self.leave_alone(self._next_wait)

    def _remember(self, failed: bool) -> None:
        now = self._clock()
        if failed:
            self._recent_failures += 1
        self._recent.append((now, failed))
        while self._recent and (
            self._recent[0][0] <= now - WINDOW or len(self._recent) > MAX_REMEMBERED
        ):
            self._recent_failures -= self._recent.popleft()[1]

    def _close(self) -> None:
        self._open_until, self._next_wait, self._trial_under_way = None, FIRST_WAIT, False
        self._consecutive_failures = self._recent_failures = 0
        self._recent.clear()
