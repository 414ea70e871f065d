"""One request, as its client sees it: what came, when, and whether it is whole."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aioserver.errors import AioserverError

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator

    from aioserver.commands.bench.results import Results, Waits
    from aioserver.commands.remote import Told


def _kinds(cls: type[AioserverError]) -> Iterator[type[AioserverError]]:
    for kind in cls.__subclasses__():
        yield kind
        yield from _kinds(kind)


# A refusal says "not now": 429 and 503. Whatever else is no answer is an incomplete one.
REFUSING_STATUSES = frozenset({429, 503})
REFUSALS = {kind.code for kind in _kinds(AioserverError) if kind.status in REFUSING_STATUSES} | {
    f"http_{status}" for status in REFUSING_STATUSES
}


class Attempt:
    """Told of everything that comes; `settle` counts it, once.

    Always: the numbers of its events were 1, 2, 3 … or it has a fault.
    """

    def __init__(self, results: Results) -> None:
        results.begun += 1
        self.good = False  # settled, with its proper end and nothing wrong
        self.retry_after: float | None = None  # seconds; what the server said when it refused
        self._results = results
        self._begun = time.perf_counter()
        self._end: float | None = None
        self._last_event = 0.0
        self._token = False
        self._number = 0
        self._fault = ""
        self._failed: tuple[Counter[str], str, str] | None = None  # which counter, code, message
        self._waiting: tuple[Waits, float] | None = None  # where, and since when
        self._waited: set[Waits] = set()

    @property
    def ended(self) -> bool:
        """Whether an end came, good or bad."""
        return self._end is not None

    def event(self, number: int | None = None) -> None:
        """An event of the answer came; *number*: its own, on the faces that have numbers."""
        now = time.perf_counter()
        self._results.events += 1
        if self._token:  # the wait for the first one is measured by itself
            self._results.gap.add(now - self._last_event)
        self._last_event = now
        if self.ended:
            self.spoil("events_after_the_end")
        if number is not None:
            if number > self._number + 1:
                self.spoil("events_missing")
            elif number <= self._number:
                self.spoil("events_doubled")
            self._number = number

    def token(self) -> None:
        """That event had something of what the model said."""
        if not self._token:
            self._token = True
            self.served()
            self._results.first_token.add(time.perf_counter() - self._begun)

    def waits(self, *, at_the_door: bool) -> None:
        """The server said that this request stands in line: at its door, or at the provider."""
        place = self._results.at_the_door if at_the_door else self._results.at_the_provider
        if self._waiting is None or self._waiting[0] is not place:
            self.served()
            self._waiting = place, time.perf_counter()
            if place not in self._waited:
                self._waited.add(place)
                place.count += 1

    def served(self) -> None:
        """It waits no more."""
        if self._waiting is not None:
            place, since = self._waiting
            place.longest = max(place.longest, time.perf_counter() - since)
            self._waiting = None

    def spoil(self, fault: str) -> None:
        """Something is wrong with the answer, whatever its end says."""
        self._fault = self._fault or fault

    def complete(self) -> None:
        """The proper end came."""
        if not self.ended:
            self._close()

    def error(self, told: Told) -> None:
        """The server said that there is no answer, or no more of it."""
        self.retry_after = told.retry_after
        refused = told.code in REFUSALS and not self._token
        counter = self._results.refused if refused else self._results.incomplete
        self._fail(counter, told.code, told.message)

    def lost(self, reason: str, message: str = "") -> None:
        """The connection, the time or the sense was lost."""
        self._fail(self._results.incomplete, reason, message)

    def _fail(self, counter: Counter[str], code: str, message: str) -> None:
        if self._failed is None:
            self._failed = counter, code, message
            self._close()

    def _close(self) -> None:
        self.served()
        self._end = time.perf_counter()

    def settle(self) -> None:
        """Nothing more will come. Not called for a request that was given up."""
        if self._end is None:
            self.lost("no_end")
        if self._failed is None and self._fault:
            self.lost(self._fault)
        if self._failed is not None:
            self._results.count(*self._failed)
        elif self._end is not None:
            self.good = True
            self._results.ok += 1
            self._results.latency.add(self._end - self._begun)
