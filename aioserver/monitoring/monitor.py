"""The tick, once a second: a snapshot, ten minutes of history, incidents, and the clients that watch.

Everything is built once a tick, however many clients look at it: `/stats` gets the bytes of the newest
snapshot, and so does each watcher of `/events`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

import orjson

from aioserver.errors import ServerAtCapacity
from aioserver.monitoring.incidents import Detector, incident
from aioserver.monitoring.interval import TICK, IntervalMeter
from aioserver.monitoring.snapshot import Snapshots
from aioserver.monitoring.troubles import Troubles
from aioserver.monitoring.verdict import Verdicts, unknown
from aioserver.protocol import eventstream

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.monitoring.incidents import Incident
    from aioserver.monitoring.snapshot import Sources
    from aioserver.monitoring.state import Percentiles, ProviderState, Snapshot

logger = logging.getLogger("aioserver.monitoring")

# Ticks that the history keeps: ten minutes.
HISTORY = 600
MAX_INCIDENTS = 100
MAX_WATCHERS = 256
# The log levels of an incident's severities.
LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

# What the history keeps of a snapshot, and of each provider in it.
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


class Watcher(Protocol):
    """A client of `/events`."""

    def send(self, data: bytes) -> None:
        """Write *data* without waiting."""


class Point(NamedTuple):
    """What the history keeps of one snapshot: the values of SERIES and of PROVIDER_SERIES, by name."""

    time: float
    values: dict[str, float | None]
    providers: dict[str, dict[str, float]]


class Monitor:
    """Ticks until it is closed.

    Always: there are at most HISTORY points, MAX_INCIDENTS incidents and MAX_WATCHERS watchers.
    """

    def __init__(self, sources: Sources) -> None:
        self._loop = asyncio.get_running_loop()
        self._snapshots = Snapshots(sources)
        self._intervals = IntervalMeter(sources.metrics, sources.lag)
        self._troubles = Troubles()
        self._verdicts = Verdicts()
        self._verdict = unknown()
        self._detector = Detector()
        self._history: deque[Point] = deque(maxlen=HISTORY)
        self._incidents: deque[Incident] = deque(maxlen=MAX_INCIDENTS)
        # The `history` event; empty when there is something new that it lacks.
        self._history_event = b""
        # Each watcher, with the number of ticks from one snapshot that it is sent to the next.
        self._watchers: dict[Watcher, int] = {}
        self._ticks = 0
        self._timer = self._loop.call_later(TICK, self._next_tick)
        # The first tick sets `_interval`, `_snapshot` and `_snapshot_json`.
        self.tick()

    @property
    def snapshot(self) -> Snapshot:
        """The state at the last tick."""
        return self._snapshot

    @property
    def snapshot_json(self) -> bytes:
        """The state at the last tick as JSON."""
        return self._snapshot_json

    @property
    def full(self) -> bool:
        """Whether there are MAX_WATCHERS watchers."""
        return len(self._watchers) >= MAX_WATCHERS

    def fresh(self) -> Snapshot:
        """Return the state of this moment; rates and the like are those of the last tick."""
        return self._snapshots.build(
            self._interval, self._troubles.now, self._verdict, watchers=len(self._watchers)
        )

    def watch(self, watcher: Watcher, every: int) -> None:
        """Send *watcher* the history, then a snapshot each *every* ticks and incidents as they happen.

        The caller must pass *watcher* to `leave` at the end.

        Raises:
            ServerAtCapacity: there are MAX_WATCHERS watchers already.
        """
        if self.full:
            raise ServerAtCapacity(
                f"{MAX_WATCHERS} clients watch already, which is the limit", retry_after=10.0
            )
        self._watchers[watcher] = every
        stats = eventstream.write(self._snapshot_json, event="stats")
        watcher.send(self._write_history() + stats)

    def leave(self, watcher: Watcher) -> None:
        """Send *watcher* nothing more, if it watches."""
        self._watchers.pop(watcher, None)

    def incident(
        self, kind: str, text: str, *, severity: str = "warning", provider: str | None = None
    ) -> None:
        """Keep an incident that happens now, and send it to all watchers; the caller logs it."""
        self._publish(incident(kind, text, severity, provider))

    def tick(self) -> None:
        """End the interval: build its snapshot, find its incidents, and send both to the watchers."""
        self._interval = self._intervals.measure()
        self._snapshot = self.fresh()
        self._troubles.observe(self._snapshot, self._interval)
        self._verdict = self._verdicts.observe(self._snapshot, self._interval)
        self._snapshot["verdict"] = self._verdict
        self._snapshot_json = orjson.dumps(self._snapshot)
        self._history.append(_point(self._snapshot))
        self._history_event = b""
        providers = self._snapshot["providers"]
        for new_incident in self._detector.detect(time.monotonic(), self._interval, providers):
            _log(new_incident)
            self._publish(new_incident)
        if self._watchers:
            stats = eventstream.write(self._snapshot_json, event="stats")
            for watcher, every in tuple(self._watchers.items()):
                if self._ticks % every == 0:
                    watcher.send(stats)
        self._ticks += 1

    def close(self) -> None:
        """Stop ticking."""
        self._timer.cancel()

    def _next_tick(self) -> None:
        self._timer = self._loop.call_later(TICK, self._next_tick)
        self.tick()

    def _publish(self, new_incident: Incident) -> None:
        self._incidents.append(new_incident)
        self._history_event = b""
        data = eventstream.write(orjson.dumps(new_incident), event="incident")
        for watcher in tuple(self._watchers):
            watcher.send(data)

    def _write_history(self) -> bytes:
        """Return the `history` event; only providers that are configured now are in it."""
        if not self._history_event:
            points = self._history
            history = {
                "interval": TICK,
                "time": [point.time for point in points],
                "series": {name: [point.values[name] for point in points] for name in SERIES},
                "providers": {
                    provider: _provider_series(provider, points)
                    for provider in self._snapshot["providers"]
                },
                "incidents": list(self._incidents),
            }
            self._history_event = eventstream.write(orjson.dumps(history), event="history")
        return self._history_event


def _log(new_incident: Incident) -> None:
    level = LEVELS[new_incident["severity"]]
    if logger.isEnabledFor(level):
        fields = {"kind": new_incident["kind"], "provider": new_incident["provider"]}
        if new_incident["advice"]:
            fields["advice"] = new_incident["advice"]
        # The detector has thinned incidents out already, each subject by itself.
        extra = {"fields": fields, "thinned": True}
        logger.log(level, "%s", new_incident["text"], extra=extra)


def _point(snapshot: Snapshot) -> Point:
    providers = {
        name: {series: read(provider) for series, read in PROVIDER_SERIES.items()}
        for name, provider in snapshot["providers"].items()
    }
    values = {series: read(snapshot) for series, read in SERIES.items()}
    return Point(snapshot["time"], values, providers)


def _provider_series(provider: str, points: deque[Point]) -> dict[str, list[float | None]]:
    """Return the values of one provider; None at the times when it was not configured."""
    return {
        series: [point.providers.get(provider, {}).get(series) for point in points]
        for series in PROVIDER_SERIES
    }
