"""A provider with a fallback beside it: how soon it has its requests back after an outage, and what
it costs while it is sick. Pure: attempts are events of a queue, and the breaker has their clock.

    python -m tests.support.sick_provider      prints the table of docs/performance.md
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from aioserver.providers.breaker import TURN, Breaker
from tests.support.outage import NeverOpen

if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds that an attempt takes which succeeds, or fails, and that a fallback takes for each of its
# attempts that fails.
ANSWER, FAILURE, OTHER_FAILURE = 0.5, 0.05, 0.4
# Retries, and the seconds of the first backoff; the retries of the last BUDGET_SECONDS are a fifth
# of the requests, but always LEAST_BUDGET.
RETRIES, BACKOFF = 3, 0.5
BUDGET_SECONDS, LEAST_BUDGET = 10.0, 10
PRIMARY, FALLBACK, NOBODY = "primary", "fallback", "nobody"


class ByCount(Breaker):
    """A breaker whose sick provider gets each twentieth request, and has no trials."""

    asked = 0

    def start_spared(self, *, by_time: bool = True) -> bool:
        self.asked += 1
        return self.asked % TURN == 0


class Answered(NamedTuple):
    """A request: when it came, when it was over, and who has answered it."""

    asked_at: float
    over_at: float
    by: str


@dataclass
class _Request:
    asked_at: float
    trial: bool = False
    # It is asked of the provider last, since all others have failed.
    last: bool = False
    attempts: int = 0


@dataclass
class Run:
    """Requests that come at random, *rate* each second for *seconds*, with a breaker of *kind*.

    *fails* is the share of the attempts at the provider that fail at a time; *other* is that of
    the fallback.
    """

    rate: float
    seconds: float
    fails: Callable[[float], float]
    kind: type[Breaker] = Breaker
    other: float = 0.0
    seed: int = 1
    now: float = 0.0
    answered: list[Answered] = field(default_factory=list)
    # When each attempt at the provider began, and when it was found to be dead first.
    attempts: list[float] = field(default_factory=list)
    died_at: float = inf

    def __post_init__(self) -> None:
        self.breaker = self.kind(lambda: self.now)
        self._dice = random.Random(f"{self.seed}/{self.rate}/{self.seconds}")
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._asked: deque[float] = deque()
        self._retried: deque[float] = deque()

    def play(self) -> Run:
        """Play it to its end."""
        self._later(self._dice.expovariate(self.rate), self._ask)
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self.answered.sort()
        return self

    def _later(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), event))

    def _ask(self) -> None:
        if self.now < self.seconds:
            self._later(self._dice.expovariate(self.rate), self._ask)
        self._asked.append(self.now)
        request, breaker = _Request(self.now), self.breaker
        if breaker.dead:
            first = breaker.delay(alternative=True) <= 0
        elif breaker.sick:
            first = breaker.start_spared()
            request.trial = first and not isinstance(breaker, ByCount)
        else:
            first = True
        if first:
            self._try(request)
        else:
            self._ask_other(request)

    def _try(self, request: _Request) -> None:
        if self.breaker.start():
            request.trial = True
        request.attempts += 1
        self.attempts.append(began := self.now)
        failed = self._dice.random() < self.fails(began)
        if failed:
            self._later(FAILURE, lambda: self._failed(request, began))
        else:
            self._later(ANSWER, lambda: self._succeeded(request))

    def _succeeded(self, request: _Request) -> None:
        self.breaker.succeeded(ANSWER, trial=request.trial)
        self.answered.append(Answered(request.asked_at, self.now, PRIMARY))

    def _failed(self, request: _Request, began: float) -> None:
        trial, request.trial = request.trial, False
        self.breaker.failed(began, trial=trial)
        if self.breaker.dead:
            self.died_at = min(self.died_at, self.now)
        again = request.attempts <= RETRIES and not (trial or self.breaker.dead)
        if again and self._take_retry():
            backoff = BACKOFF * 2 ** (request.attempts - 1) * self._dice.uniform(0.5, 1)
            self._later(backoff, lambda: self._try(request))
        elif request.last:
            self.answered.append(Answered(request.asked_at, self.now, NOBODY))
        else:
            self._ask_other(request)

    def _take_retry(self) -> bool:
        for times in (self._asked, self._retried):
            while times and times[0] < self.now - BUDGET_SECONDS:
                times.popleft()
        if len(self._retried) >= max(LEAST_BUDGET, len(self._asked) / 5):
            return False
        self._retried.append(self.now)
        return True

    def _ask_other(self, request: _Request) -> None:
        """Ask the fallback, with as many retries; and the provider last, if it had no more than a
        trial.
        """
        failures = range(RETRIES + 1)
        failed = next((n for n in failures if self._dice.random() >= self.other), RETRIES + 1)
        over_at = self.now + OTHER_FAILURE * failed
        if failed <= RETRIES:
            self.answered.append(Answered(request.asked_at, over_at + ANSWER, FALLBACK))
        elif request.attempts <= 1 and not (self.breaker.dead or self.kind is NeverOpen):
            request.last, request.attempts = True, 0
            self._later(OTHER_FAILURE * failed, lambda: self._try(request))
        else:
            self.answered.append(Answered(request.asked_at, over_at, NOBODY))

    def share(self, *names: str) -> float:
        """Return the share of the requests that *names* have answered."""
        return sum(each.by in names for each in self.answered) / len(self.answered)

    @property
    def delay(self) -> float:
        """Seconds by which requests were over later than without a fault, on an average."""
        late = [each.over_at - each.asked_at - ANSWER for each in self.answered]
        return sum(late) / len(late)

    def back(self, end: float) -> float:
        """Return the seconds after *end* from which on nine of ten of the next 20 requests have
        the provider.
        """
        later = [each for each in self.answered if each.asked_at >= end]
        for number, each in enumerate(later):
            window = [other.by == PRIMARY for other in later[number : number + 20]]
            if each.by == PRIMARY and sum(window) >= 0.9 * len(window) and len(window) >= TURN / 2:
                return each.asked_at - end
        return inf


# When an outage begins.
BEGINS = 10.0


def outage(rate: float, down: float, kind: type[Breaker] = Breaker, seed: int = 1) -> Run:
    """Play a run in which the provider answers nothing for *down* seconds."""
    after = min(200.0 if rate >= 5 else 400.0, 20_000 / rate)
    run = Run(
        rate, BEGINS + down + after, lambda now: BEGINS <= now < BEGINS + down, kind, seed=seed
    )
    return run.play()


def _print_table() -> None:
    print("| outage | requests a second | by count | by time | attempts a second meanwhile |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for down, rate in itertools.product((20, 60, 600), (0.2, 0.5, 1, 2, 5, 20, 100, 300)):
        cells, run = [], outage(rate, down)
        for kind in (ByCount, Breaker):
            runs = [outage(rate, down, kind, seed) for seed in range(1, 4)]
            cells.append(max(each.back(BEGINS + down) for each in runs))
        during = [at for at in run.attempts if BEGINS <= at < BEGINS + down]
        times = " | ".join(f"{each:.1f} s" if each < inf else "never" for each in cells)
        print(f"| {down} s | {rate:g} | {times} | {len(during) / down:.2f} |", flush=True)


if __name__ == "__main__":
    _print_table()
