"""The metrics as Prometheus text, by prometheus-client: families in, text out."""

from __future__ import annotations

import asyncio
import platform
from typing import TYPE_CHECKING

import aiohttp
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from aioserver import __version__
from aioserver.faces import context
from aioserver.providers.breaker import CLOSED, OPEN, TRIAL
from aioserver.telemetry.counters import Counter
from aioserver.telemetry.kernel import accept_queue, process_usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aiohttp import web

CONTENT_TYPE = CONTENT_TYPE_LATEST
PREFIX = "aioserver_"
STATES = (CLOSED, TRIAL, OPEN)


class House(Collector):
    """What a house counts, and its state now."""

    def __init__(self, app: web.Application) -> None:
        self._app = app

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield from self._counted()
        yield from self._state()

    def _counted(self) -> Iterator[Metric]:
        for family in self._app[context.METRICS].families():
            name, first = PREFIX + family.name, next(iter(family.children.values()))
            if isinstance(first, Counter):
                counters = CounterMetricFamily(name, family.help, labels=family.labels)
                for labels, counter in family.children.items():
                    assert isinstance(counter, Counter)
                    counters.add_metric(labels, counter.value)
                yield counters
                continue
            histograms = HistogramMetricFamily(name, family.help, labels=family.labels)
            for labels, one in family.children.items():
                assert not isinstance(one, Counter)
                below, buckets = 0, []
                for bound, number in zip((*one.bounds, "+Inf"), one.counts, strict=True):
                    below += number
                    buckets.append((str(bound), below))
                histograms.add_metric(labels, buckets, one.sum)
            yield histograms

    def _state(self) -> Iterator[Metric]:
        app = self._app
        settings, metrics = app[context.SETTINGS], app[context.METRICS]
        gate, streams = app[context.ADMISSION].gate.stats(), app[context.STREAMS].stats()
        build = {
            "version": __version__,
            "python": platform.python_version(),
            "aiohttp": aiohttp.__version__,
        }
        yield _gauge("build_info", "What runs here", [(tuple(build.values()), 1)], tuple(build))
        ready = app[context.LIFE].ready and app[context.ROUTER].usable
        yield _gauge("ready", "Whether new work is welcome", [((), ready)])
        faces = metrics.faces.items()
        yield _gauge(
            "connections",
            "Connections that have a place",
            [((name,), meter.connections.value) for name, meter in faces],
            ("face",),
        )
        yield _gauge(
            "connections_waiting",
            "Connections that wait for a place",
            [((name,), meter.waiting.value) for name, meter in faces],
            ("face",),
        )
        yield _gauge("connections_limit", "max_connections", [((), gate.limit)])
        yield _gauge("streams", "Answers under way that can be found", [((), streams.running)])
        detached = app[context.GATEWAY].lifetime.detached
        yield _gauge("streams_detached", "Those of them without a reader", [((), detached)])
        yield _gauge("kept_stream_bytes", "Of all logs", [((), streams.bytes)])
        bound = settings.chat.streams.max_kept_bytes
        yield _gauge("kept_stream_bytes_limit", "max_kept_bytes", [((), bound)])
        providers = [(name, one.stats()) for name, one in app[context.ROUTER].providers.items()]
        for name, about, values in (
            ("provider_in_flight", "Places taken", [s.queue.inside for _, s in providers]),
            ("provider_limit", "concurrent_requests", [s.queue.limit for _, s in providers]),
            ("provider_waiting", "Requests in its line", [s.queue.waiting for _, s in providers]),
            (
                "breaker_state",
                "0 closed, 1 trial, 2 open",
                [STATES.index(s.breaker) for _, s in providers],
            ),
            ("pool_open", "Connections, idle ones included", [s.pool.open for _, s in providers]),
            ("pool_idle", "Idle connections", [s.pool.idle for _, s in providers]),
        ):
            samples = [((p,), value) for (p, _), value in zip(providers, values, strict=True)]
            yield _gauge(name, about, samples, ("provider",))
        queues = [accept_queue(sock) for sock in app[context.LIFE].listening if sock.fileno() >= 0]
        known = [queue for queue in queues if queue is not None]
        waits, room = sum(one.waiting for one in known), sum(one.limit for one in known)
        yield _gauge("listen_queue", "Connections that wait to be accepted", [((), waits)])
        yield _gauge("listen_queue_limit", "How many the kernel holds", [((), room)])
        state, snapshot = process_usage(), app[context.MONITOR].snapshot
        for name, about, number in (
            ("open_fds", "Open file descriptors", state["open_fds"]),
            ("max_fds", "How many there may be", state["max_fds"]),
            ("tasks", "Tasks of the event loop, some seconds ago", snapshot["process"]["tasks"]),
            ("watchers", "Who follows /events", snapshot["watchers"]),
        ):
            if number is not None:
                yield _gauge(name, about, [((), number)])


def _gauge(
    name: str,
    about: str,
    samples: Iterable[tuple[tuple[str, ...], float]],
    labels: tuple[str, ...] = (),
) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, about, labels=labels)
    for values, number in samples:
        family.add_metric(values, float(number))
    return family


def registry(app: web.Application) -> CollectorRegistry:
    """Everything about this process."""
    found = CollectorRegistry(auto_describe=False)
    found.register(House(app))
    ProcessCollector(registry=found)
    return found


async def text(app: web.Application) -> bytes:
    """The text, of the type CONTENT_TYPE. Others have a turn behind each family."""
    parts = []
    for family in app[context.REGISTRY].collect():
        parts.append(generate_latest(_One(family)))
        await asyncio.sleep(0)
    return b"".join(parts)


class _One:
    """A registry of one family."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> tuple[Metric]:
        return (self._family,)
