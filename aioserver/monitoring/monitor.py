"""The state of the house, once a second: a snapshot, ten minutes of history, incidents, watchers.

Everything is built once a tick, however many look at it: `/stats` gets the newest snapshot, each
watcher of `/events` the same bytes. What is counted is read, never walked: a tick costs the same with
ten clients and with ten thousand. Incidents are seen in the difference of two ticks.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from aioserver import __version__
from aioserver.errors import ServerAtCapacity
from aioserver.faces import context
from aioserver.protocol import eventstream
from aioserver.providers.breaker import CLOSED
from aioserver.telemetry.kernel import process_usage

if TYPE_CHECKING:
    from aiohttp import web

    from aioserver.providers.provider import Provider
    from aioserver.telemetry.metrics import Metrics

TICK = 1.0  # seconds
HISTORY = 600  # ticks: ten minutes
MAX_INCIDENTS = 100
MAX_WATCHERS = 256
LAG_LIMIT = 0.1  # seconds; a loop that is later is told
QUIET = 10.0  # seconds in which incidents of one kind are gathered
DENIED_BURST, DENIED_TICKS = 10, 10  # not let in, and ticks: more than a person mistypes
SLOW_TICKS = 10  # what costs with the number of tasks is looked at each so many ticks
SERIES = ("active", "waiting", "rejected_per_second", "requests_per_second", "tokens_per_second")
FAULTS = (
    "connect_error",
    "timeout",
    "http_429",
    "http_5xx",
    "tls",
    "disconnected",
    "bad_response",
)
PROVIDER_SERIES = ("in_flight", "waiting", "pool_open", "pool_idle", "tokens_per_second")
ABSENT: dict[str, float | None] = dict.fromkeys(PROVIDER_SERIES)  # of one that was not there
SEVERE = frozenset({"connect_error", "tls", "provider_auth", "loop_lag"})


class Watcher(Protocol):
    """Who follows `/events`."""

    def send(self, data: bytes) -> None:
        """Write *data*; never waits."""


class Monitor:
    """Ticks as long as the server lives.

    Always: `_history` and `_incidents` are bounded; there are MAX_WATCHERS watchers at most.
    """

    def __init__(self, app: web.Application) -> None:
        self._app = app
        self._metrics: Metrics = app[context.METRICS]
        self._loop = asyncio.get_running_loop()
        self._began = time.monotonic()
        self._history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._incidents: deque[dict[str, Any]] = deque(maxlen=MAX_INCIDENTS)
        self._gathered: dict[tuple[str, str, str | None], int] = {}
        self._quiet_until: dict[tuple[str, str, str | None], float] = {}
        self._watchers: dict[Watcher, int] = {}  # and how many ticks lie between two snapshots
        self._denied: deque[int] = deque(maxlen=DENIED_TICKS)
        self._ticks = 0
        self._tasks = 0
        self._lag_max = 0.0  # since the last tick
        self._last = self._counted()
        self._last_at, self._last_cpu = time.monotonic(), time.process_time()
        self._snapshot: dict[str, Any] = {}
        self._bytes = b"{}"
        self._history_bytes = b""  # as long as nothing comes to it
        self._timer = self._loop.call_later(TICK, self._again)
        self.tick()

    @property
    def snapshot(self) -> dict[str, Any]:
        """The state at the last tick; the shape is in docs/operating.md."""
        return self._snapshot

    @property
    def snapshot_json(self) -> bytes:
        """The same as JSON."""
        return self._bytes

    @property
    def full(self) -> bool:
        """Whether nobody more may watch."""
        return len(self._watchers) >= MAX_WATCHERS

    def watch(self, watcher: Watcher, every: int) -> None:
        """Send *watcher* the history now, a snapshot each *every* ticks, incidents as they happen.

        Raises:
            ServerAtCapacity: there are MAX_WATCHERS already.
        """
        if self.full:
            raise ServerAtCapacity(f"{MAX_WATCHERS} watch already", retry_after=10.0)
        self._watchers[watcher] = every
        watcher.send(self._history_event() + eventstream.write(self._bytes, event="stats"))

    def leave(self, watcher: Watcher) -> None:
        """Send *watcher* nothing more."""
        self._watchers.pop(watcher, None)

    def incident(
        self, kind: str, text: str, *, severity: str = "warning", provider: str | None = None
    ) -> None:
        """Something that a person who watches should know."""
        told = {
            "time": round(time.time(), 3),
            "kind": kind,
            "severity": severity,
            "text": text,
            "provider": provider,
        }
        self._incidents.append(told)
        self._history_bytes = b""
        data = eventstream.write(orjson.dumps(told), event="incident")
        for watcher in tuple(self._watchers):
            watcher.send(data)

    def tick(self) -> None:
        """Build the snapshot, remember it, see what happened, tell who watches."""
        now = time.monotonic()
        seconds = max(now - self._last_at, 1e-3)
        if self._ticks % SLOW_TICKS == 0:
            self._tasks = len(asyncio.all_tasks(self._loop))
        counted = self._counted()
        rates = {name: (n - self._last.get(name, 0)) / seconds for name, n in counted.items()}
        cpu = time.process_time()
        snapshot = self._state(now, rates)
        snapshot["process"]["cpu"] = round((cpu - self._last_cpu) / seconds, 3)
        self._gather(counted)
        self._see_breakers(snapshot)
        self._last, self._last_at, self._last_cpu = counted, now, cpu
        self._snapshot, self._bytes = snapshot, orjson.dumps(snapshot)
        self._history.append(_point(snapshot))
        self._history_bytes = b""
        self._tell(now)
        if self._watchers:
            data = eventstream.write(self._bytes, event="stats")
            for watcher, every in tuple(self._watchers.items()):
                if self._ticks % every == 0:
                    watcher.send(data)
        self._ticks += 1

    def close(self) -> None:
        """Tick no more."""
        self._timer.cancel()

    def _again(self) -> None:
        self._timer = self._loop.call_later(TICK, self._again)
        self.tick()

    def _counted(self) -> dict[str, float]:
        """What only grows, by a name for each."""
        metrics = self._metrics
        found = {f"rejection {code}": one.value for code, one in metrics.rejections.items()}
        found["rejected"] = sum(found.values())
        found["requests"] = sum(one.value for one in metrics.outcomes.values())
        found["denied"] = sum(one.value for one in metrics.auth_failures.values())
        found["slow"] = metrics.slow_clients.value
        found["events"] = 0
        for name, meter in metrics.providers.items():
            found["events"] += meter.events
            found[f"events {name}"] = meter.events
            found[f"key {name}"] = meter.key_refused.value
            for outcome, counter in meter.attempts.items():
                found[f"{outcome} {name}"] = counter.value
            found[f"attempts {name}"] = sum(one.value for one in meter.attempts.values())
        return found

    def _state(self, now: float, rates: dict[str, float]) -> dict[str, Any]:
        app, metrics = self._app, self._metrics
        settings, faces = app[context.SETTINGS], metrics.faces.items()
        gate, streams = app[context.ADMISSION].gate.stats(), app[context.STREAMS].stats()
        lifetime, router = app[context.GATEWAY].lifetime, app[context.ROUTER]
        waiting = {name: int(meter.waiting.value) for name, meter in faces}
        lag, self._lag_max = app[context.LAG].take()
        return {
            "time": round(time.time(), 3),
            "name": "aioserver",
            "version": __version__,
            "uptime": round(now - self._began, 1),
            "ready": app[context.LIFE].ready and router.usable,
            "active_provider": router.active.name,
            "connections": {
                "active": gate.inside,
                "limit": gate.limit,
                "waiting": gate.waiting,
                "queue_size": gate.queue_size,
                "oldest_wait": round(gate.oldest_wait, 3),
                "active_by_face": {name: int(meter.connections.value) for name, meter in faces},
                "waiting_by_face": waiting,
                "opened": int(sum(meter.opened.value for _, meter in faces)),
                "rejected": int(sum(meter.rejected.value for _, meter in faces)),
                "rejected_per_second": round(rates["rejected"], 1),
            },
            "rejections": {code: int(one.value) for code, one in metrics.rejections.items()},
            "requests": {
                "total": int(sum(one.value for one in metrics.outcomes.values())),
                "per_second": round(rates["requests"], 1),
                "running": sum(one.stats().queue.inside for one in router.providers.values()),
                "outcomes": {name: int(one.value) for name, one in metrics.outcomes.items()},
            },
            "first_token": metrics.recent_first_tokens.percentiles(now),
            "tokens_per_second": round(rates["events"], 1),
            "delay": {whose: one.percentiles(now) for whose, one in metrics.recent_delays.items()},
            "streams": {
                "running": streams.running,
                "detached": lifetime.detached,
                "max_detached": settings.chat.streams.max_detached,
                "finished": streams.finished,
                "bytes": streams.bytes,
                "max_bytes": streams.max_bytes,
            },
            "slow_clients": int(metrics.slow_clients.value),
            "auth_failures": {
                reason: int(one.value) for reason, one in metrics.auth_failures.items()
            },
            "providers": {
                name: self._provider(one, now, rates) for name, one in router.providers.items()
            },
            "loop": {
                "lag": round(lag, 5),
                "lag_max": round(self._lag_max, 5),
            },
            "process": {**process_usage(), "tasks": self._tasks},
            "watchers": len(self._watchers),
            "endpoints": {
                "websocket": settings.chat.websocket.endpoint,
                "sse": settings.chat.sse.endpoint,
                "openai": "/v1",
            },
        }

    def _provider(self, one: Provider, now: float, rates: dict[str, float]) -> dict[str, Any]:
        state, meter, name = one.stats(), one.meter, one.name
        attempts = {outcome: int(counter.value) for outcome, counter in meter.attempts.items()}
        return {
            "usable": state.usable,
            "active": one is self._app[context.ROUTER].active,
            "model": one.settings.model,
            "in_flight": state.queue.inside,
            "limit": state.queue.limit,
            "waiting": state.queue.waiting,
            "queue_size": state.queue.queue_size,
            "oldest_wait": round(state.queue.oldest_wait, 3),
            "pool": {
                "open": state.pool.open,
                "idle": state.pool.idle,
                "limit": state.pool.limit,
                "waiting": state.pool.waiting,
            },
            "pace": {
                "per_minute": state.pace.per_minute,
                "left": state.pace.left,
                "cooling": round(state.pace.cooling, 1),
            },
            "breaker": state.breaker,
            "flagged": state.flagged,
            "retries": int(sum(one.value for one in meter.retries.values())),
            "failovers": int(sum(one.value for one in meter.failovers.values())),
            "requests": sum(attempts.values()),
            "faults": {outcome: n for outcome, n in attempts.items() if outcome != "ok"},
            "requests_per_second": round(rates[f"attempts {name}"], 1),
            "tokens_per_second": round(rates[f"events {name}"], 1),
            "first_token": meter.recent_first_tokens.percentiles(now),
            "silence": meter.recent_silences.percentiles(now),
        }

    def _gather(self, counted: dict[str, float]) -> None:
        """Note what has happened since the last tick."""

        def grown(name: str, kind: str, what: str, provider: str | None = None) -> None:
            if more := int(counted[name] - self._last.get(name, 0)):
                key = kind, what, provider
                self._gathered[key] = self._gathered.get(key, 0) + more

        for code in self._metrics.rejections:
            grown(f"rejection {code}", "rejections", code)
        grown("slow", "slow_client", "")
        for name in self._metrics.providers:
            grown(f"key {name}", "provider_auth", "", name)
            for outcome in FAULTS:
                grown(f"{outcome} {name}", "provider_faults", outcome, name)
        self._denied.append(int(counted["denied"] - self._last.get("denied", 0)))
        if (denied := sum(self._denied)) >= DENIED_BURST:
            key = "auth", "", None
            self._gathered[key] = self._gathered.get(key, 0) + denied
            self._denied.clear()
        if self._lag_max > LAG_LIMIT:
            key = "loop_lag", "", None
            worst = round(self._lag_max * 1000)
            self._gathered[key] = max(worst, self._gathered.get(key, 0))

    def _see_breakers(self, snapshot: dict[str, Any]) -> None:
        """Tell which provider is left alone now, and which answers again."""
        before = self._snapshot.get("providers", {})
        for name, one in snapshot["providers"].items():
            was = before.get(name, {}).get("breaker", CLOSED)
            if was == CLOSED != one["breaker"]:
                self.incident(
                    "breaker", f"{name} fails, and is left alone", severity="error", provider=name
                )
            elif was != CLOSED == one["breaker"]:
                self.incident("breaker", f"{name} answers again", severity="info", provider=name)

    def _tell(self, now: float) -> None:
        """Tell what was gathered, each kind once in a while."""
        for key in [key for key in self._gathered if self._quiet_until.get(key, 0.0) <= now]:
            number = self._gathered.pop(key)
            self._quiet_until[key] = now + QUIET
            kind, what, provider = key
            text = {
                "rejections": f"{number} refused: {what}",
                "auth": f"{number} not let in: no key, a wrong one, or from where none may come",
                "slow_client": f"{number} dropped: they took nothing of what was sent",
                "provider_auth": f"{provider} refuses our key, or its quota is used up ({number})",
                "provider_faults": f"{provider}: {number} x {what}",
                "loop_lag": f"the event loop was {number} ms late",
            }[kind]
            severe = kind in SEVERE or what in SEVERE
            self.incident(kind, text, severity="error" if severe else "warning", provider=provider)

    def _history_event(self) -> bytes:
        if self._history_bytes:
            return self._history_bytes
        points = self._history
        names = (*SERIES, "first_token_p50", "first_token_p95", "lag_max")
        told = {
            "interval": TICK,
            "time": [point["time"] for point in points],
            "series": {name: [point[name] for point in points] for name in names},
            "providers": {
                provider: {
                    name: [point["providers"].get(provider, ABSENT)[name] for point in points]
                    for name in PROVIDER_SERIES
                }
                for provider in self._snapshot["providers"]
            },
            "incidents": list(self._incidents),
        }
        self._history_bytes = eventstream.write(orjson.dumps(told), event="history")
        return self._history_bytes


def _point(snapshot: dict[str, Any]) -> dict[str, Any]:
    """What the history keeps of a snapshot."""
    felt = snapshot["first_token"] or {}
    return {
        "time": snapshot["time"],
        "active": snapshot["connections"]["active"],
        "waiting": snapshot["connections"]["waiting"],
        "rejected_per_second": snapshot["connections"]["rejected_per_second"],
        "requests_per_second": snapshot["requests"]["per_second"],
        "tokens_per_second": snapshot["tokens_per_second"],
        "first_token_p50": felt.get("p50"),
        "first_token_p95": felt.get("p95"),
        "lag_max": snapshot["loop"]["lag_max"],
        "providers": {
            name: {
                "in_flight": one["in_flight"],
                "waiting": one["waiting"],
                "pool_open": one["pool"]["open"],
                "pool_idle": one["pool"]["idle"],
                "tokens_per_second": one["tokens_per_second"],
            }
            for name, one in snapshot["providers"].items()
        },
    }
