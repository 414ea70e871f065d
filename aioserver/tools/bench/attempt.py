"""One request as its client sees it: what came, when, and whether it was complete."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aioserver.errors import AioserverError
from aioserver.provider_errors import subclasses

if TYPE_CHECKING:
    from collections import Counter

    from aioserver.client.faults import Fault
    from aioserver.tools.bench.results import Results, Waits


# These statuses say "not now". An answer that fails in any other way is incomplete.
REFUSING_STATUSES = frozenset({429, 503})
REFUSALS = {
    error.code for error in subclasses(AioserverError) if error.status in REFUSING_STATUSES
} | {f"http_{status}" for status in REFUSING_STATUSES}


class Attempt:
    """Measures one request. The client reports all that comes, and `settle` counts the request,
    once.

    Always: the events of the answer had the numbers 1, 2, 3 … or it has a fault.
    """

    def __init__(self, results: Results) -> None:
        results.begun += 1
        # Whether the request is settled, and its answer was complete.
        self.succeeded = False
        # Seconds, from the server's refusal.
        self.retry_after: float | None = None
        self._results = results
        self._begun = time.perf_counter()
        self._ended_at: float | None = None
        self._last_event = 0.0
        self._first_token_seen = False
        self._number = 0
        self._fault = ""
        # The counter, the code and the message of a failure.
        self._failure: tuple[Counter[str], str, str] | None = None
        # The queue in which the request waits, and since when.
        self._waiting: tuple[Waits, float] | None = None
        self._waited: set[Waits] = set()

    @property
    def ended(self) -> bool:
        """Whether the answer has ended, complete or not."""
        return self._ended_at is not None

    def event(self, number: int | None = None) -> None:
        """Record an event of the answer, with its *number* on the faces that number events."""
        now = time.perf_counter()
        self._results.events += 1
        # The wait for the first token is measured by itself.
        if self._first_token_seen:
            self._results.gap.add(now - self._last_event)
        self._last_event = now
        if self.ended:
            self.mark_faulty("events_after_the_end")
        if number is not None:
            if number > self._number + 1:
                self.mark_faulty("events_missing")
            elif number <= self._number:
                self.mark_faulty("events_doubled")
            self._number = number

    def token(self) -> None:
        """Record that the last event had a part of the model's answer."""
        if not self._first_token_seen:
            self._first_token_seen = True
            self.stop_waiting()
            self._results.first_token.add(time.perf_counter() - self._begun)

    def queued(self, *, for_admission: bool) -> None:
        """Record that the request waits: for its connection's admission, or for the provider."""
        waits = self._results.admission_waits if for_admission else self._results.provider_waits
        if self._waiting is None or self._waiting[0] is not waits:
            self.stop_waiting()
            self._waiting = waits, time.perf_counter()
            if waits not in self._waited:
                self._waited.add(waits)
                waits.count += 1

    def stop_waiting(self) -> None:
        """Record that the request waits no more."""
        if self._waiting is not None:
            waits, since = self._waiting
            waits.longest = max(waits.longest, time.perf_counter() - since)
            self._waiting = None

    def mark_faulty(self, fault: str) -> None:
        """Record that something is wrong with the answer, however it ends."""
        self._fault = self._fault or fault

    def complete(self) -> None:
        """Record the proper end of the answer."""
        if not self.ended:
            self._end()

    def error(self, error: Fault) -> None:
        """Record that the server reported an error instead of the answer, or of the rest of it."""
        self.retry_after = error.retry_after
        refused = error.code in REFUSALS and not self._first_token_seen
        counter = self._results.refused if refused else self._results.incomplete
        self._fail(counter, error.code, error.message)

    def fail(self, code: str, message: str = "") -> None:
        """Record that the client got no answer: no connection, no time left, or no valid data."""
        self._fail(self._results.incomplete, code, message)

    def _fail(self, counter: Counter[str], code: str, message: str) -> None:
        if self._failure is None:
            self._failure = counter, code, message
            self._end()

    def _end(self) -> None:
        self.stop_waiting()
        self._ended_at = time.perf_counter()

    def settle(self) -> None:
        """Count the request, after its end. Not called for a request that was cancelled."""
        if self._ended_at is None:
            self.fail("no_end")
        if self._failure is None and self._fault:
            self.fail(self._fault)
        if self._failure is not None:
            self._results.count(*self._failure)
        elif self._ended_at is not None:
            self.succeeded = True
            self._results.ok += 1
            self._results.latency.add(self._ended_at - self._begun)
