"""The numbers of a run: counts, a bounded number of samples, and what one request adds to them."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aioserver.errors import AioserverError
from aioserver.provider_errors import subclasses
from aioserver.tools.remote import printable

if TYPE_CHECKING:
    from aioserver.client import AnswerError

# The codes that mean "not now". An answer that fails in any other way is incomplete.
REFUSALS = {error.code for error in subclasses(AioserverError) if error.status in {429, 503}}
# Samples of one measure: 2.4 MB, and a thousand samples above p99.
MAX_SAMPLES = 100_000
# Codes that are counted separately; a provider's own codes are passed on, and may be many.
MAX_CODES = 50
PERCENTILES = (50, 95, 99)


class Samples:
    """Measured seconds: all of them up to *limit*, beyond that a uniform random sample.

    Algorithm: R (J. S. Vitter, Random Sampling with a Reservoir, 1985).
    """

    def __init__(self, limit: int = MAX_SAMPLES) -> None:
        self.count = 0
        self._limit = limit
        # All values, unless they are *thinned*.
        self.kept: list[float] = []
        self._random = random.Random(1)  # noqa: S311 - a choice of samples, no secret

    @property
    def thinned(self) -> bool:
        """Whether some of the values were not kept."""
        return self.count > self._limit

    def add(self, seconds: float) -> None:
        """Add a value."""
        self.count += 1
        if self.count <= self._limit:
            self.kept.append(seconds)
        elif (index := self._random.randrange(self.count)) < self._limit:
            self.kept[index] = seconds

    def summary(self) -> dict[str, float] | None:
        """Return p50, p95, p99 (nearest rank) and the count; None if there are no values."""
        if not self.kept:
            return None
        ordered = sorted(self.kept)
        ranks = {f"p{n}": ordered[-(-len(ordered) * n // 100) - 1] for n in PERCENTILES}
        return {name: round(value, 6) for name, value in ranks.items()} | {"count": self.count}


@dataclass(slots=True, eq=False)
class Waits:
    """Requests that waited in one queue: how many, and the longest wait in seconds."""

    count: int = 0
    longest: float = 0.0


@dataclass
class Results:
    """The counts and samples of all requests.

    Always: `begun` = `ok` + refused + incomplete + requests that are running.
    """

    begun: int = 0
    ok: int = 0
    events: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    incomplete: Counter[str] = field(default_factory=Counter)
    # The first message of each code.
    messages: dict[str, str] = field(default_factory=dict)
    latency: Samples = field(default_factory=Samples)
    first_token: Samples = field(default_factory=Samples)
    gap: Samples = field(default_factory=Samples)
    admission_waits: Waits = field(default_factory=Waits)
    provider_waits: Waits = field(default_factory=Waits)

    @property
    def finished(self) -> int:
        """Requests that have ended, with any outcome."""
        return self.ok + self.refused.total() + self.incomplete.total()

    def count(self, counter: Counter[str], code: str, message: str) -> None:
        """Count a request that ended with *code*; the first message of each code is kept."""
        code, message = printable(code), printable(message)
        if code not in counter and len(counter) >= MAX_CODES:
            code = "other"
        counter[code] += 1
        if message:
            self.messages.setdefault(code, message)

    def numbers(self, seconds: float) -> dict[str, Any]:
        """Return the numbers of a run of *seconds*, for the JSON report and the table."""
        rate = 1 / seconds if seconds > 0 else 0.0
        return {
            "seconds": round(seconds, 3),
            "requests": {
                "total": self.begun,
                "ok": self.ok,
                "refused": self.refused.total(),
                "incomplete": self.incomplete.total(),
                "unfinished": self.begun - self.finished,
                "per_second": round(self.ok * rate, 3),
            },
            "refused": dict(self.refused.most_common()),
            "incomplete": dict(self.incomplete.most_common()),
            "messages": self.messages,
            "events": {"total": self.events, "per_second": round(self.events * rate, 3)},
            "latency": self.latency.summary(),
            "first_token": self.first_token.summary(),
            "gap": self.gap.summary(),
            "complete": not self.incomplete,
        }

    def thinned(self) -> list[str]:
        """Return the names of the measures of which not all samples were kept."""
        measures = {"latency": self.latency, "first token": self.first_token, "gap": self.gap}
        return [name for name, samples in measures.items() if samples.thinned]


class Attempt:
    """One request as its client sees it. The client reports each event; at the end either
    `complete` or `fail` counts the request, unless it was cancelled.
    """

    def __init__(self, results: Results) -> None:
        results.begun += 1
        self._results = results
        self._begun = self._last_event = time.perf_counter()
        self._token_seen = False
        # The queue in which the request waits, and since when; and the queues in which it has
        # waited.
        self._waits: Waits | None = None
        self._since = 0.0
        self._waited: set[Waits] = set()

    def event(self, *, token: bool = False) -> None:
        """Record an event of the answer. *token*: it has a part of the model's text."""
        now = time.perf_counter()
        self._results.events += 1
        # The wait for the first token is a measure of its own.
        if self._token_seen:
            self._results.gap.add(now - self._last_event)
        elif token:
            self._token_seen = True
            self.stop_waiting()
            self._results.first_token.add(now - self._begun)
        self._last_event = now

    def queued(self, *, admission: bool = False) -> None:
        """Record that the request waits: for its connection's *admission*, or for the provider."""
        waits = self._results.admission_waits if admission else self._results.provider_waits
        if self._waits is not waits:
            self.stop_waiting()
            self._waits, self._since = waits, time.perf_counter()
            waits.count += waits not in self._waited
            self._waited.add(waits)

    def stop_waiting(self) -> None:
        """Record that the wait has ended."""
        if self._waits is not None:
            self._waits.longest = max(self._waits.longest, time.perf_counter() - self._since)
            self._waits = None

    def complete(self) -> None:
        """Count the request, whose answer is complete."""
        self.stop_waiting()
        self._results.ok += 1
        self._results.latency.add(time.perf_counter() - self._begun)

    def fail(self, error: AnswerError) -> None:
        """Count the request, whose answer is incomplete, or was refused."""
        self.stop_waiting()
        refused = error.code in REFUSALS and not self._token_seen
        counter = self._results.refused if refused else self._results.incomplete
        self._results.count(counter, error.code, error.message)
