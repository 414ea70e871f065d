"""How fast requests may start at a provider: never a burst at the minute's edge.

GCRA (ITU-T I.371; Brandur Leach, "Rate limiting, cells, and GCRA", 2015): one number, the theoretical
arrival time of the next start. In any window no more starts than its share of the minute and the burst.

The provider itself lowers it: what it says of its remaining requests and their reset spreads them over
that time, before it has to say 429; where it said `Retry-After` nothing starts before, then one after
the other, without a burst, and for as long again only half as much as else.

Tokens a minute are a leaky bucket (ITU-T I.371 as well) of a sixth of the minute: a start pours in what
it is expected to cost, and its end corrects that; while it is over, nothing starts.
"""

from __future__ import annotations

import random
import re
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_COOLING = 120.0  # seconds that a provider may ask for
MAX_RESET = 86_400.0
LEFT = ("x-ratelimit-remaining-requests", "x-ratelimit-remaining-tokens")
JITTER = 0.1  # of a wait that several instances are told at the same time
_DURATION = re.compile(
    r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?"
)


class Pace:
    """*per_minute* starts a minute, *burst* of them at once after a rest.

    Always: in any span of t seconds at most `t * per_minute / 60 + burst` starts.
    """

    def __init__(
        self,
        per_minute: int,
        burst: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        tokens_per_minute: int = 0,
    ) -> None:
        self._clock = clock
        self._token_rate = tokens_per_minute / 60.0
        self._bucket = tokens_per_minute / 6.0
        self._level, self._level_at = 0.0, clock()
        self._step = 60.0 / per_minute
        self._slack = (max(1, burst) - 1) * self._step
        self._due = 0.0  # the theoretical arrival time
        self._closed_until = 0.0
        self._slow_step, self._slow_until = 0.0, 0.0
        self.per_minute = per_minute

    def apply(self, per_minute: int, burst: int, *, tokens_per_minute: int = 0) -> None:
        """Use another pace from now on; what has started counts as before."""
        now = self._clock()
        self._level, self._level_at = self._drained(now), now
        self._token_rate = tokens_per_minute / 60.0
        self._bucket = tokens_per_minute / 6.0
        if self._due > now:  # so many starts as before, at the new pace where that is faster
            self._due = now + (self._due - now) * min(1.0, self.per_minute / per_minute)
        self._step = 60.0 / per_minute
        self._slack = (max(1, burst) - 1) * self._step
        self.per_minute = per_minute

    @property
    def left(self) -> int:
        """How many could start now."""
        now = self._clock()
        if now < self._closed_until or (self._token_rate and self._overflow(now) > 0):
            return 0
        ahead = max(0.0, self._due - now)
        return max(0, int((self._slack - ahead) / self._step + 1 + 1e-9))

    @property
    def cooling(self) -> float:
        """Seconds for which the provider wants to be left alone."""
        return max(0.0, self._closed_until - self._clock())

    def delay(self, ahead: int = 0) -> float:
        """Seconds until a request may start before which *ahead* others start."""
        now = self._clock()
        step = self._stride(now)
        at = max(self._due + ahead * step - self._slack, now + max(0, ahead * step - self._slack))
        wait = max(0.0, at - now, self._closed_until + ahead * step - now)
        return max(wait, self._overflow(now)) if self._token_rate else wait

    def start(self, tokens: int = 0) -> None:
        """One starts that is expected to cost *tokens*."""
        now = self._clock()
        self._due = max(self._due, now) + self._stride(now)
        if tokens:
            self.charge(tokens)

    def charge(self, tokens: int) -> None:
        """Pour *tokens* in; negative: it was expected to cost more."""
        if self._token_rate:
            now = self._clock()
            self._level = max(0.0, self._drained(now) + tokens)
            self._level_at = now

    def _drained(self, now: float) -> float:
        return max(0.0, self._level - (now - self._level_at) * self._token_rate)

    def _overflow(self, now: float) -> float:
        """Seconds until the bucket has room for a start."""
        return max(0.0, (self._drained(now) - self._bucket) / self._token_rate)

    def cool_down(self, seconds: float) -> None:
        """The provider said so: nothing for *seconds*, then half the pace for as long again."""
        now = self._clock()
        wait = min(max(0.0, seconds), MAX_COOLING) * (1 + JITTER * random.random())  # noqa: S311
        self._closed_until = max(self._closed_until, now + wait)
        if wait:
            self._due = max(self._due, self._closed_until + self._slack)  # no burst behind it
        self._slow_step, self._slow_until = 2 * self._step, self._closed_until + wait

    def heed(self, headers: Mapping[str, str]) -> bool:
        """Lower the pace to what the provider's `x-ratelimit-*` headers leave, until their reset.

        Returns whether nothing is left, so that it stands still.
        """
        if LEFT[0] not in headers and LEFT[1] not in headers:
            return False
        nothing = False
        for kind in ("requests", "tokens"):
            left = _number(headers.get(f"x-ratelimit-remaining-{kind}", ""))
            reset = duration(headers.get(f"x-ratelimit-reset-{kind}", ""))
            if left is None or reset is None or reset <= 0:
                continue
            if left < 1:
                self._close(reset)
                nothing = True
            elif kind == "requests":
                self._spread(min(reset / left, MAX_COOLING), reset)
        return nothing

    def _spread(self, step: float, seconds: float) -> None:
        now = self._clock()
        if step > self._step:
            self._slow_step, self._slow_until = step, now + seconds
        elif now >= self._closed_until and now < self._slow_until:
            self._slow_until = 0.0  # there is more left than it said before
            self._due = min(self._due, now + self._slack + self._step)

    def forget(self) -> None:
        """What the provider has said was about another account, or it is another provider."""
        self._closed_until = self._slow_until = 0.0
        self._due = min(self._due, self._clock() + self._slack + self._step)

    def _close(self, seconds: float) -> None:
        self._closed_until = max(self._closed_until, self._clock() + min(seconds, MAX_COOLING))

    def _stride(self, now: float) -> float:
        return max(self._step, self._slow_step) if now < self._slow_until else self._step


def duration(text: str) -> float | None:
    """Seconds in OpenAI's and Groq's way ("1m30.5s", "17ms") or as a number; None: no duration."""
    text = text.strip()
    match = _DURATION.fullmatch(text)
    if text and match is not None:
        hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
        found = hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
    else:
        number = _number(text)
        if number is None:
            return None
        found = number
    return found if 0 <= found <= MAX_RESET else None


def _number(text: str) -> float | None:
    """A number of at least 0; None: it is none (-1 is what some say for "no limit")."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None
