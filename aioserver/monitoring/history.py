"""The main numbers of the snapshots of the last ten minutes.

The numbers are kept in arrays. Under load, an object that a tick makes stands in memory among the
objects of many requests. If it lived for ten minutes, the allocator could not give the arena around
it, a megabyte, back to the system.
"""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.monitoring.state import Percentiles, ProviderState, Snapshot

# Ticks that the history keeps: ten minutes.
HISTORY = 600
# The numbers that the history keeps of a snapshot, and of each provider in it.
SERIES: dict[str, Callable[[Snapshot], float | None]] = {
    "active": lambda snapshot: snapshot["connections"]["active"],
    "waiting": lambda snapshot: snapshot["connections"]["waiting"],
    "rejected_per_second": lambda snapshot: snapshot["connections"]["rejected_per_second"],
    "requests_per_second": lambda snapshot: snapshot["requests"]["per_second"],
    "tokens_per_second": lambda snapshot: snapshot["tokens_per_second"],
    "first_token_p50": lambda snapshot: _percentile(snapshot["first_token"], "p50"),
    "first_token_p95": lambda snapshot: _percentile(snapshot["first_token"], "p95"),
    "lag_max": lambda snapshot: snapshot["loop"]["lag_max"],
}
PROVIDER_SERIES: dict[str, Callable[[ProviderState], float]] = {
    "in_flight": lambda provider: provider["in_flight"],
    "waiting": lambda provider: provider["waiting"],
    "pool_open": lambda provider: provider["pool"]["open"],
    "pool_idle": lambda provider: provider["pool"]["idle"],
    "tokens_per_second": lambda provider: provider["tokens_per_second"],
}


def _percentile(percentiles: Percentiles | None, name: str) -> float | None:
    return None if percentiles is None else percentiles[name]


class Series:
    """The values of one number at the last HISTORY ticks; None for a tick without a value."""

    def __init__(self) -> None:
        self._values = array("d", [math.nan]) * HISTORY

    def add(self, value: float | None) -> None:
        """Keep the *value* of this tick."""
        del self._values[0]
        self._values.append(math.nan if value is None else value)

    def newest(self, count: int) -> list[float | None]:
        """Return the values of the last *count* ticks."""
        return [_number(value) for value in self._values[HISTORY - count :]]


def _number(value: float) -> float | None:
    """Return *value* as JSON has it: NaN as None, and a whole number as an int."""
    if math.isnan(value):
        return None
    return int(value) if value.is_integer() else value


class Past:
    """The values of SERIES, and of PROVIDER_SERIES for each provider, at the last HISTORY ticks."""

    def __init__(self) -> None:
        self._ticks = 0
        self._times = array("d", [0.0]) * HISTORY
        self._series = {name: Series() for name in SERIES}
        # By provider, with the tick at which it was configured last.
        self._providers: dict[str, dict[str, Series]] = {}
        self._seen: dict[str, int] = {}

    def add(self, snapshot: Snapshot) -> None:
        """Add the numbers of *snapshot*."""
        self._ticks += 1
        del self._times[0]
        self._times.append(snapshot["time"])
        for name, read in SERIES.items():
            self._series[name].add(read(snapshot))
        providers = snapshot["providers"]
        for provider in providers:
            self._seen[provider] = self._ticks
            if provider not in self._providers:
                self._providers[provider] = {name: Series() for name in PROVIDER_SERIES}
        for provider, series in tuple(self._providers.items()):
            state = providers.get(provider)
            for name, read_state in PROVIDER_SERIES.items():
                series[name].add(None if state is None else read_state(state))
            if self._seen[provider] <= self._ticks - HISTORY:
                del self._providers[provider], self._seen[provider]

    @property
    def times(self) -> list[float]:
        """The times of the ticks, as snapshots have them."""
        return self._times[HISTORY - self._count :].tolist()

    @property
    def series(self) -> dict[str, list[float | None]]:
        """The values of SERIES."""
        return {name: series.newest(self._count) for name, series in self._series.items()}

    def of_provider(self, provider: str) -> dict[str, list[float | None]]:
        """Return the values of one provider; None at the times when it was not configured."""
        series = self._providers[provider]
        return {name: series[name].newest(self._count) for name in PROVIDER_SERIES}

    @property
    def _count(self) -> int:
        return min(self._ticks, HISTORY)
