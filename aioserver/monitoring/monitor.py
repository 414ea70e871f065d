"""The monitor: once a second it builds a snapshot, finds incidents, and sends both to watchers.

Everything is built once a tick, however many clients look at it: `/stats` answers with the bytes of
the newest snapshot, and each watcher of `/events` gets the same bytes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol, TypeAlias

import orjson

from aioserver.errors import ServerAtCapacity
from aioserver.monitoring.alerts import Alerts
from aioserver.monitoring.fold import MAX_INCIDENTS, Report, recent_shares, recent_values
from aioserver.monitoring.history import Past
from aioserver.monitoring.incidents import Detector, incident
from aioserver.monitoring.interval import TICK, IntervalMeter
from aioserver.monitoring.snapshot import Snapshots
from aioserver.monitoring.verdict import Verdicts, unknown
from aioserver.protocol import eventstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aioserver.monitoring.snapshot import Sources
    from aioserver.monitoring.state import (
        ClusterState,
        History,
        Incident,
        KeyState,
        Snapshot,
    )
    from aioserver.telemetry.metrics import Family
    from aioserver.usage.sums import CallerSums, Day

logger = logging.getLogger("aioserver.monitoring")

# Incidents that an instance reports to another instance at most.
NEWEST = 20
MAX_WATCHERS = 256
# A watcher is the function that writes bytes to one client of `/events`, without waiting.
Watcher: TypeAlias = "Callable[[bytes], None]"
# The log levels of an incident's severities.
LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Others(Protocol):
    """All instances of a cluster, this one among them: see wings/cluster/totals.py."""

    def standing(self) -> ClusterState:
        """Return the state of this instance in the cluster."""

    async def state(self) -> Snapshot:
        """Return the snapshot of all instances together."""

    async def news(self) -> tuple[Snapshot, list[Incident]]:
        """Return the snapshot of all instances, and the others' incidents since the last call."""

    async def history(self) -> History:
        """Return the history of all instances together."""

    async def families(self) -> list[Family]:
        """Return all metrics that are counted, over all instances."""

    async def days(self, caller: str | None) -> tuple[list[Day], list[str]]:
        """Return the spending of *caller*, or of all callers, at all instances, and the names of
        the instances that have not answered.
        """

    async def ended(self, caller: str | None, request_id: str) -> bytes | None:
        """Return a request that has ended at any instance, as `EndedRequests.find`."""


class Monitor:
    """Ticks until it is closed.

    Always: there are at most MAX_INCIDENTS incidents and MAX_WATCHERS watchers.
    """

    def __init__(self, sources: Sources) -> None:
        self._loop = asyncio.get_running_loop()
        self._metrics, self._usage = sources.metrics, sources.usage
        self._router = sources.router
        # The other instances of a cluster; None if there are none.
        self.others: Others | None = None
        self.listening, self.ended = sources.listening, sources.ended
        self._asking: asyncio.Task[None] | None = None
        self._incident_count = 0
        self._snapshots = Snapshots(sources)
        self._intervals = IntervalMeter(sources.metrics, sources.lag)
        self._troubles = Alerts()
        self.sections = sources.sections
        self._verdicts = Verdicts(sources.sections)
        self._verdict = unknown()
        self._detector = Detector()
        self._past = Past()
        self._incidents: deque[Incident] = deque(maxlen=MAX_INCIDENTS)
        # The `history` event; empty if it has to be made again.
        self._history_event = b""
        # Each watcher, with the number of ticks between two snapshots that are sent to it.
        self._watchers: dict[Watcher, int] = {}
        self._ticks = 0
        self._timer = self._loop.call_later(TICK, self._next_tick)
        # The first tick sets `_interval`, `snapshot` and `_snapshot_json`.
        self.tick()

    @property
    def full(self) -> bool:
        """Whether there are MAX_WATCHERS watchers."""
        return len(self._watchers) >= MAX_WATCHERS

    def fresh(self) -> Snapshot:
        """Return the state of this moment; rates and the like are those of the last tick."""
        return self._snapshots.build(
            self._interval, self._troubles.now, self._verdict, watchers=len(self._watchers)
        )

    def share(self, others: Others) -> None:
        """Show the state of all instances together from now on."""
        self.others = others
        self.snapshot["cluster"] = others.standing()

    def report(self) -> Report:
        """Return the report of this instance for the others: its state at the last tick."""
        metrics, now = self._metrics, time.monotonic()
        recent, shares = recent_values(metrics, now), recent_shares(metrics, now)
        return Report(self.snapshot, recent, self._verdicts.lately(), shares)

    def places(self) -> dict[str, int]:
        """Return how many places all instances have together at each provider."""
        return {
            name: provider.settings.http_client.concurrent_requests
            for name, provider in self._router.providers.items()
        }

    @property
    def usage(self) -> CallerSums:
        """The spending of callers at this instance."""
        return self._usage.sums

    async def days_of_all(self, caller: str | None = None) -> tuple[list[Day], list[str]]:
        """Return the spending of *caller*, or of all callers, at all instances of a cluster, and the
        names of the instances that have not answered.
        """
        if self.others is not None:
            return await self.others.days(caller)
        return self.usage.days(caller), []

    async def keys_of_all(self) -> dict[str, KeyState]:
        """Return the state of the keys, at all instances of a cluster together."""
        return (self.fresh() if self.others is None else await self.others.state())["keys"]

    async def ended_anywhere(self, caller: str | None, request_id: str) -> bytes | None:
        """Return a request that has ended at any instance of a cluster, as `EndedRequests.find`."""
        if self.others is not None:
            return await self.others.ended(caller, request_id)
        return self.ended.find(caller, request_id)

    def families(self) -> Iterator[Family]:
        """Yield every metric that is counted, as it is now."""
        yield from self._metrics.families()
        yield from self._usage.families()

    def newest_incidents(self) -> tuple[int, list[Incident]]:
        """Return the number of incidents so far, and the newest of them."""
        return self._incident_count, list(self._incidents)[-NEWEST:]

    async def state_of_all(self) -> bytes:
        """Return the state of all instances together as JSON, as of the last tick."""
        if self.others is None:
            return self._snapshot_json
        return orjson.dumps(await self.others.state())

    async def watch_all(self, watcher: Watcher, every: int) -> None:
        """Do what `watch` does, for all instances together.

        Raises:
            ServerAtCapacity: as `watch`.
        """
        if self.others is None:
            self.watch(watcher, every)
            return
        history = await self.others.history()
        state = await self.state_of_all()
        self._admit(watcher, every)
        watcher(
            eventstream.write(orjson.dumps(history), event="history")
            + eventstream.write(state, event="stats")
        )

    def watch(self, watcher: Watcher, every: int) -> None:
        """Send *watcher* the history, then a snapshot each *every* ticks and incidents as they
        happen.

        The caller must pass *watcher* to `leave` at the end.

        Raises:
            ServerAtCapacity: there are MAX_WATCHERS watchers already.
        """
        self._admit(watcher, every)
        stats = eventstream.write(self._snapshot_json, event="stats")
        watcher(self._write_history() + stats)

    def _admit(self, watcher: Watcher, every: int) -> None:
        if self.full:
            raise ServerAtCapacity(
                f"{MAX_WATCHERS} clients watch already, which is the limit", retry_after=10.0
            )
        self._watchers[watcher] = every

    def leave(self, watcher: Watcher) -> None:
        """Send *watcher* nothing more, if it watches."""
        self._watchers.pop(watcher, None)

    def incident(self, kind: str, text: str, *, severity: str = "warning") -> None:
        """Keep an incident that happens now, and send it to all watchers; the caller logs it."""
        self._publish(incident(kind, text, severity))

    def tick(self) -> None:
        """End the interval: build its snapshot, find its incidents, and send both to the
        watchers.
        """
        self._interval = self._intervals.measure()
        # The state at the last tick.
        self.snapshot = self.fresh()
        self._troubles.observe(self.snapshot, self._interval)
        self._verdict = self._verdicts.observe(self.snapshot, self._interval)
        self.snapshot["verdict"] = self._verdict
        if self.others is not None:
            self.snapshot["cluster"] = self.others.standing()
        self._snapshot_json = orjson.dumps(self.snapshot)
        self._past.add(self.snapshot)
        for provider in self._router.providers.values():
            provider.health.breaker.forget()
        self._history_event = b""
        sections = [(section, section.of(self.snapshot)) for section in self.sections]
        now, snapshot = time.monotonic(), self.snapshot
        for new_incident in self._detector.detect(
            now, self._interval, snapshot["providers"], sections, snapshot["groups"]
        ):
            _log(new_incident)
            self._publish(new_incident)
        if self._watchers:
            if self.others is None:
                self._send_state(self._snapshot_json)
            elif self._asking is None or self._asking.done():
                self._asking = self._loop.create_task(self._send_state_of_all(self.others))
        self._ticks += 1

    def close(self) -> None:
        """Stop ticking."""
        self._timer.cancel()
        if self._asking is not None:
            self._asking.cancel()

    def _next_tick(self) -> None:
        self._timer = self._loop.call_later(TICK, self._next_tick)
        self.tick()

    def _send_state(self, state: bytes) -> None:
        stats = eventstream.write(state, event="stats")
        for watcher, every in tuple(self._watchers.items()):
            if self._ticks % every == 0:
                watcher(stats)

    async def _send_state_of_all(self, others: Others) -> None:
        snapshot, incidents = await others.news()
        self._send_state(orjson.dumps(snapshot))
        for new_incident in incidents:
            self._send_incident(new_incident)

    def _publish(self, new_incident: Incident) -> None:
        self._incidents.append(new_incident)
        self._incident_count += 1
        self._history_event = b""
        self._send_incident(new_incident)

    def _send_incident(self, new_incident: Incident) -> None:
        data = eventstream.write(orjson.dumps(new_incident), event="incident")
        for watcher in tuple(self._watchers):
            watcher(data)

    def history(self) -> History:
        """Return the last ten minutes as series, without providers that are gone."""
        return {
            "interval": TICK,
            "time": self._past.times,
            "series": self._past.series,
            "providers": {
                provider: self._past.of_provider(provider)
                for provider in self.snapshot["providers"]
            },
            "incidents": list(self._incidents),
        }

    def _write_history(self) -> bytes:
        """Return the `history` event."""
        if not self._history_event:
            self._history_event = eventstream.write(orjson.dumps(self.history()), event="history")
        return self._history_event


def _log(new_incident: Incident) -> None:
    level = LEVELS[new_incident["severity"]]
    if logger.isEnabledFor(level):
        fields = {"kind": new_incident["kind"], "provider": new_incident["provider"]}
        if new_incident["advice"]:
            fields["advice"] = new_incident["advice"]
        # The quiet time of the detector has limited incidents already, so the log does not.
        extra = {"fields": fields, "thinned": True}
        logger.log(level, "%s", new_incident["text"], extra=extra)
