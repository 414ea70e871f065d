"""The rate at which requests start at a provider, without a burst at the edge of a minute.

GCRA (limits/gcra.py) spaces the starts out: each span of time has at most its share of
`requests_per_minute`, and a small burst.

The provider itself can lower the rate. Its headers report how many requests remain until their
reset: the starts are spread over that time, before the provider has to answer 429. After a
`Retry-After` nothing starts until that time is over; then requests start without a burst, and for
as long again at half the rate.

`tokens_per_minute` is a second GCRA whose starts are worth their tokens, with a burst of a sixth
of the minute. A request is counted with its expected tokens when it starts, and the count is
corrected at its end. While more tokens are counted than the rate allows, nothing starts.
"""

from __future__ import annotations

import random
import time
from functools import partial
from typing import TYPE_CHECKING

from aioserver.limits.gcra import ROUNDING, Gcra
from aioserver.providers.rate_headers import limits_left

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# The most seconds for which a provider can stop the starts.
MAX_COOLING = 120.0
# The most seconds over which the remainder is spread; over a longer time, or until a date, the
# rate would be next to nothing.
MAX_RESET = 86_400.0
# Seconds' worth of tokens that may be used at once: a sixth of the minute.
TOKEN_BURST = 10.0
# The random share that is added to a wait of which several instances learn at the same time.
JITTER = 0.1


class Pace:
    """*per_minute* starts a minute, *burst* of them at once after a rest.

    Always: in any span of t seconds at most `t * per_minute / 60 + burst` starts.

    *on_cooling* is called with the seconds of a pause that the provider asks for.
    """

    def __init__(
        self,
        per_minute: int,
        burst: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        tokens_per_minute: int = 0,
        make_rate: Callable[[float, float], Gcra] | None = None,
        make_tokens: Callable[[float, float], Gcra] | None = None,
        on_cooling: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self._clock = clock
        rate = 60.0 / per_minute, _tolerance(per_minute, burst)
        self._starts = Gcra(*rate, clock) if make_rate is None else make_rate(*rate)
        self._make_tokens = make_tokens or partial(Gcra, clock=clock)
        self._tokens = self._token_rate(tokens_per_minute)
        self._closed_until = 0.0
        self._on_cooling = on_cooling
        self._slow_interval, self._slow_until = 0.0, 0.0
        self.per_minute = per_minute

    def apply(self, per_minute: int, burst: int, *, tokens_per_minute: int = 0) -> None:
        """Set another pace; earlier starts count as before."""
        # A faster pace keeps the number of starts that are counted, a slower one the seconds until
        # the next.
        scale = min(1.0, self.per_minute / per_minute)
        self._starts.apply(60.0 / per_minute, _tolerance(per_minute, burst), scale=scale)
        self.per_minute = per_minute
        if self._tokens is None or not tokens_per_minute:
            self._tokens = self._token_rate(tokens_per_minute)
        else:
            interval = 60.0 / tokens_per_minute
            # The number of counted tokens stays.
            self._tokens.apply(interval, TOKEN_BURST, scale=interval / self._tokens.interval)

    @property
    def left(self) -> int:
        """The number of requests that could start now."""
        if self.cooling or (self._tokens is not None and self._tokens.delay() > 0):
            return 0
        return self._starts.available

    @property
    def cooling(self) -> float:
        """The seconds that are left of a pause for which the provider has asked."""
        until = self._closed_until
        return max(0.0, until - self._clock()) if until else 0.0

    def delay(self, ahead: int = 0) -> float:
        """Return the seconds until a request with *ahead* others before it may start."""
        others = ahead * self._interval() if ahead else 0.0
        delay = self._starts.delay(others)
        if self._closed_until:
            delay = max(delay, self._closed_until + others - self._clock())
        return delay if self._tokens is None else max(delay, self._tokens.delay())

    def start(self, tokens: int = 0) -> None:
        """Count a start that is expected to cost *tokens*."""
        starts = self._starts
        starts.take(self._interval() if self._slow_until else starts.interval)
        if tokens:
            self.charge(tokens)

    def try_start(self, tokens: int = 0) -> bool:
        """Count a start that is expected to cost *tokens*, if it is allowed now; return whether it
        is.
        """
        if not (self._closed_until or self._slow_until or self._tokens is not None):
            return self._starts.try_take() <= 0
        if self.delay() > ROUNDING:
            return False
        self.start(tokens)
        return True

    def charge(self, tokens: int) -> None:
        """Count *tokens* more than were expected; a negative number takes some back."""
        if self._tokens is not None:
            self._tokens.take(tokens * self._tokens.interval)

    def cool_down(self, seconds: float) -> None:
        """Start nothing for *seconds*, as the provider asks, then run at half the pace for as
        long.
        """
        self.told_cooling(seconds)
        if seconds > 0:
            self._on_cooling(min(seconds, MAX_COOLING))

    def told_cooling(self, seconds: float) -> None:
        """Do the same as `cool_down`, since the provider has asked another instance for it."""
        now = self._clock()
        wait = min(max(0.0, seconds), MAX_COOLING) * (1 + JITTER * random.random())  # noqa: S311
        self._closed_until = max(self._closed_until, now + wait)
        if wait:
            self._starts.postpone(self._closed_until)
        self._slow_interval, self._slow_until = (
            2 * self._starts.interval,
            self._closed_until + wait,
        )

    def learn(self, headers: Mapping[str, str]) -> bool:
        """Lower the pace to the remaining requests and tokens that the provider's *headers* report.

        Return whether nothing remains, so that no request starts before the reset.
        """
        exhausted = False
        for requests, left, seconds in limits_left(headers):
            if left < 1:
                self._close(seconds)
                exhausted = True
            elif requests and seconds <= MAX_RESET:
                self._spread(min(seconds / left, MAX_COOLING), seconds)
        return exhausted

    def forget(self) -> None:
        """Forget the requested pauses, which concern another account or address."""
        self._closed_until = self._slow_until = 0.0
        self._starts.catch_up()

    def _spread(self, interval: float, seconds: float) -> None:
        now = self._clock()
        if interval > self._starts.interval:
            self._slow_interval, self._slow_until = interval, now + seconds
        elif now >= self._closed_until and now < self._slow_until:
            # More is left than the provider reported before.
            self._slow_until = 0.0
            self._starts.catch_up()

    def _close(self, seconds: float) -> None:
        self._closed_until = max(self._closed_until, self._clock() + min(seconds, MAX_COOLING))

    def _token_rate(self, per_minute: int) -> Gcra | None:
        return self._make_tokens(60.0 / per_minute, TOKEN_BURST) if per_minute else None

    def _interval(self) -> float:
        """Return the seconds between two starts at the present rate."""
        interval = self._starts.interval
        return max(interval, self._slow_interval) if self._clock() < self._slow_until else interval


def _tolerance(per_minute: int, burst: int) -> float:
    return (max(1, burst) - 1) * 60.0 / per_minute
