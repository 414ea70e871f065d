"""The numbers of a run: counts, and samples of which at most so many are kept."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MAX_SAMPLES = 100_000  # of one measure: 2.4 MB, and a p99 of a thousand samples
MAX_CODES = 50  # that are told apart: a provider's own codes pass, and may be many
SHARES = (50, 95, 99)


class Samples:
    """Seconds, measured: all of them up to *limit*, beyond that a fair choice.

    Algorithm: R (J. S. Vitter, Random Sampling with a Reservoir, 1985).
    """

    def __init__(self, limit: int = MAX_SAMPLES) -> None:
        self.count = 0
        self._limit = limit
        self._kept: list[float] = []
        self._random = random.Random(1)  # noqa: S311 - a choice of samples, no secret

    @property
    def thinned(self) -> bool:
        """Whether some were not kept."""
        return self.count > self._limit

    def add(self, seconds: float) -> None:
        """Count one."""
        self.count += 1
        if self.count <= self._limit:
            self._kept.append(seconds)
        elif (at := self._random.randrange(self.count)) < self._limit:
            self._kept[at] = seconds

    def summary(self) -> dict[str, float] | None:
        """p50, p95, p99 (nearest rank) and how many there were; None: none."""
        if not self._kept:
            return None
        ordered = sorted(self._kept)
        found: dict[str, float] = {
            f"p{share}": round(ordered[-(-len(ordered) * share // 100) - 1], 6) for share in SHARES
        }
        return {**found, "count": self.count}


@dataclass(slots=True, eq=False)
class Waits:
    """Requests that were told to wait in one place: how many, and the longest wait in seconds."""

    count: int = 0
    longest: float = 0.0


@dataclass
class Results:
    """What came of all requests.

    Always: `begun` = `ok` + refused + incomplete + those under way.
    """

    begun: int = 0
    ok: int = 0
    events: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    incomplete: Counter[str] = field(default_factory=Counter)
    messages: dict[str, str] = field(default_factory=dict)  # the first one of each code
    latency: Samples = field(default_factory=Samples)
    first_token: Samples = field(default_factory=Samples)
    gap: Samples = field(default_factory=Samples)
    at_the_door: Waits = field(default_factory=Waits)
    at_the_provider: Waits = field(default_factory=Waits)

    @property
    def finished(self) -> int:
        """Requests that are over, however they ended."""
        return self.ok + self.refused.total() + self.incomplete.total()

    def count(self, counter: Counter[str], code: str, message: str) -> None:
        """One more of *code*; its first message is kept."""
        if code not in counter and len(counter) >= MAX_CODES:
            code = "other"
        counter[code] += 1
        if message:
            self.messages.setdefault(code, message)

    def numbers(self, seconds: float) -> dict[str, Any]:
        """As JSON, for a run of *seconds*; what the table shows, too."""
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
        """The measures of which not all samples were kept."""
        kept = {"latency": self.latency, "first token": self.first_token, "gap": self.gap}
        return [name for name, samples in kept.items() if samples.thinned]
