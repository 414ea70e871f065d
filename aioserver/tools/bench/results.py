"""The numbers of a run: counts, and a bounded number of samples."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

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
        self._kept: list[float] = []
        self._random = random.Random(1)  # noqa: S311 - a choice of samples, no secret

    @property
    def thinned(self) -> bool:
        """Whether some of the values were not kept."""
        return self.count > self._limit

    def add(self, seconds: float) -> None:
        """Add a value."""
        self.count += 1
        if self.count <= self._limit:
            self._kept.append(seconds)
        elif (index := self._random.randrange(self.count)) < self._limit:
            self._kept[index] = seconds

    def summary(self) -> dict[str, float] | None:
        """Return p50, p95, p99 (nearest rank) and the count; None if there are no values."""
        if not self._kept:
            return None
        ordered = sorted(self._kept)
        summary: dict[str, float] = {
            f"p{percent}": round(ordered[-(-len(ordered) * percent // 100) - 1], 6)
            for percent in PERCENTILES
        }
        return {**summary, "count": self.count}


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
        """Requests that have ended, in whatever way."""
        return self.ok + self.refused.total() + self.incomplete.total()

    def count(self, counter: Counter[str], code: str, message: str) -> None:
        """Count a request that ended with *code*; the first message of each code is kept."""
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
