"""Counting: a few integers in plain objects, held by who counts.

A request passes a dozen of them, and the children of a metrics library cost a lock and a microsecond each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Seconds: latencies, and the short times between two events or inside us.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
SHORT = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
RECENT_SECONDS, RECENT_VALUES = 60.0, 1000


class Counter:
    """A number that grows; or, as a gauge, one that is set."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class Histogram:
    """How many observations were up to each bound, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


Child = TypeVar("Child", Counter, Histogram)


class Family(Generic[Child]):
    """One metric: a child for each set of labels, all made by the configuration."""

    def __init__(
        self,
        name: str,
        about: str,
        labels: Sequence[str],
        children: Mapping[tuple[str, ...], Child] | tuple[()] = (),
    ) -> None:
        self.name = name
        self.about = about
        self.labels = tuple(labels)
        self.children: dict[tuple[str, ...], Child] = dict(children)

    def of(self, *values: str) -> Child:
        """The child with these labels.

        Raises:
            KeyError: there is none: labels are fixed.
        """
        return self.children[values]


class Recent:
    """The newest observations: at most a thousand, of the last minute, for percentiles."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=RECENT_VALUES)

    def add(self, now: float, value: float) -> None:
        """Remember *value*, seen at *now*."""
        self._values.append((now, value))

    def percentiles(self, now: float) -> dict[str, float] | None:
        """p50, p95, p99 and their count; None where nothing was seen (nearest rank)."""
        values = self._values
        while values and values[0][0] < now - RECENT_SECONDS:
            values.popleft()
        if not values:
            return None
        ordered = sorted([value for _, value in values])
        last = len(ordered) - 1
        found = {f"p{n}": ordered[min(last, len(ordered) * n // 100)] for n in (50, 95, 99)}
        return {**found, "count": len(ordered)}
