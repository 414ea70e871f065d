"""`/metrics`: Prometheus text (https://prometheus.io/docs/instrumenting/exposition_formats/).

Counters and histograms are the families of the metrics. Gauges are read from a fresh snapshot, the
same that `/stats` shows, by a table. prometheus-client writes the text.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
from aioserver.monitoring.findings import OF_PROVIDERS
from aioserver.monitoring.section import Gauge, State
from aioserver.monitoring.state import STANDINGS, STATES
from aioserver.telemetry.counters import Counter
from aioserver.telemetry.kernel import accept_queue
from aioserver.telemetry.metrics import OURS

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from aioserver.monitoring.section import Section
    from aioserver.monitoring.state import ProviderState, Snapshot
    from aioserver.telemetry.counters import Histogram
    from aioserver.telemetry.metrics import Family

CONTENT_TYPE = CONTENT_TYPE_LATEST
# The kinds of alerts for the numbers of `provider_trouble` from 1 on; 0 means no alert.
TROUBLES = tuple(reversed(OF_PROVIDERS))


def _instances(snapshot: Snapshot) -> dict[str, float]:
    instances: Mapping[str, object] = snapshot.get("instances", {"": {}})
    heard = sum(instance is not None for instance in instances.values())
    return {"heard": heard, "unheard": len(instances) - heard}


def _standings(snapshot: Snapshot) -> dict[str, float]:
    instances = snapshot.get("instances", {}).values()
    return {
        standing: sum(each is not None and each["cluster"] == standing for each in instances)
        for standing in STANDINGS
    }


# The gauges of the server.
_GAUGES: tuple[Gauge[Snapshot], ...] = (
    Gauge("ready", lambda s: s["ready"], "Whether the server takes new work"),
    Gauge(
        "connections",
        lambda s: s["connections"]["active_by_face"],
        "Connections that have a place",
        "face",
    ),
    Gauge(
        "connections_waiting",
        lambda s: s["connections"]["waiting_by_face"],
        "Connections that wait for a place",
        "face",
    ),
    Gauge(
        "queue_waiting",
        lambda s: {
            (name, class_): number
            for name, provider in s["providers"].items()
            for class_, number in provider["waiting_by_class"].items()
        },
        "Requests in the provider's queue, by their class",
        "provider,class",
    ),
    Gauge(
        "group_waiting",
        lambda s: {name: group["waiting"] for name, group in s["groups"].items()},
        "Requests that wait for a place at any member of a group",
        "group",
    ),
    Gauge("connections_limit", lambda s: s["connections"]["limit"], "max_connections"),
    Gauge("streams", lambda s: s["requests"]["running"], "Answers under way"),
    Gauge(
        "streams_detached",
        lambda s: s["streams"]["detached"],
        "Answers under way without a reader",
    ),
    Gauge(
        "streams_background",
        lambda s: s["streams"]["background"],
        "Answers that run in the background, or wait to",
    ),
    Gauge(
        "stored_responses",
        lambda s: s["streams"]["responses"],
        "Responses that can be continued by their ids",
    ),
    Gauge(
        "held_bytes",
        lambda s: s["streams"]["held"]["bytes"],
        "Bytes of answers that wait for the end of their turn",
    ),
    Gauge(
        "kept_stream_bytes",
        lambda s: s["streams"]["bytes"],
        "Bytes of all streams and stored responses together",
    ),
    Gauge("kept_stream_bytes_limit", lambda s: s["streams"]["max_bytes"], "max_kept_bytes"),
    Gauge("open_fds", lambda s: s["process"]["open_fds"], "Open file descriptors"),
    Gauge("max_fds", lambda s: s["process"]["max_fds"], "Limit of open file descriptors"),
    Gauge("tasks", lambda s: s["process"]["tasks"], "Tasks of the event loop, some seconds ago"),
    Gauge("watchers", lambda s: s["watchers"], "Clients of /events"),
    Gauge(
        "former_workers",
        lambda s: len(s["former"]),
        "Processes that were replaced, and still have answers",
    ),
    Gauge(
        "former_answers",
        lambda s: sum(each["answers"] for each in s["former"]),
        "Answers that run in processes that were replaced",
    ),
    Gauge(
        "instances",
        _instances,
        "Instances of the cluster, by whether they have answered; 1 where there is none",
        "state",
    ),
    Gauge(
        "cluster_instances",
        _standings,
        "Instances by how they stand with the cluster's server: all 0 where there is no cluster",
        "state",
    ),
    Gauge(
        "cluster_tunnels",
        lambda s: s["cluster"]["tunnels"] if "cluster" in s else 0,
        "Answers of other instances that are read at another one",
    ),
)
# The gauges of each provider: the name, the function that reads the number, and the help.
_PROVIDER_GAUGES: tuple[tuple[str, Callable[[ProviderState], float], str], ...] = (
    ("provider_in_flight", lambda p: p["in_flight"], "Requests in flight"),
    ("provider_limit", lambda p: p["limit"], "concurrent_requests"),
    ("provider_waiting", lambda p: p["waiting"], "Requests in the provider's queue"),
    (
        "provider_background",
        lambda p: p["background"]["running"],
        "Answers in the background that have a place, or are the next to get one",
    ),
    (
        "provider_background_waiting",
        lambda p: p["background"]["waiting"],
        "Answers in the background that wait until others have ended",
    ),
    (
        "provider_state",
        lambda p: STATES[::-1].index(p["state"]),
        "0 well, 1 sick (it fails often, and is asked), 2 dead (it is left alone, but for trials)",
    ),
    (
        "provider_trouble",
        lambda p: 0 if p["trouble"] is None else 1 + TROUBLES.index(p["trouble"]["kind"]),
        "0 none, 1 failing, 2 sick, 3 silent (it has stalled), 4 dead, 5 key_refused",
    ),
    ("retry_budget_used", lambda p: p["retry_budget"]["used"], "Retries in the last ten seconds"),
    (
        "retry_budget_limit",
        lambda p: p["retry_budget"]["limit"],
        "Retries that the budget allows in ten seconds: a fifth of the requests, or ten",
    ),
    (
        "provider_silence_seconds",
        lambda p: p["silent"]["longest"],
        "Longest silence of the provider that is going on now in a streamed answer",
    ),
    (
        "provider_silent_answers",
        lambda p: p["silent"]["stalled"] + p["silent"]["unanswered"],
        (
            "Streamed answers in which the provider has said nothing for seconds, "
            "and says nothing now"
        ),
    ),
    ("pool_open", lambda p: p["pool"]["open"], "Connections, idle ones included"),
    ("pool_idle", lambda p: p["pool"]["idle"], "Idle connections"),
)


def _of_each_provider(
    read: Callable[[ProviderState], float],
) -> Callable[[Snapshot], dict[str, float]]:
    return lambda s: {name: read(provider) for name, provider in s["providers"].items()}


def _key_waiting(snapshot: Snapshot) -> dict[str, float]:
    return {name: key["waiting"] for name, key in snapshot["keys"].items()}


def _budget_ratio(snapshot: Snapshot) -> dict[tuple[str, str], float]:
    return {
        (name, period): 1 - budget["remaining"] / budget["limit"]
        for name, key in snapshot["keys"].items()
        for period, budget in key["budgets"].items()
    }


GAUGES = (
    *_GAUGES,
    Gauge(
        "key_waiting",
        _key_waiting,
        "Requests that wait for a limit of their own key",
        "caller",
    ),
    Gauge(
        "budget_used_ratio",
        _budget_ratio,
        "Part of a key's budget of tokens that is used or reserved",
        "caller,period",
    ),
    *(
        Gauge(name, _of_each_provider(read), about, "provider")
        for name, read, about in _PROVIDER_GAUGES
    ),
)


class ServerCollector(Collector):
    """Gives prometheus-client what the server has counted, and its state at this moment."""

    def __init__(
        self,
        families: Callable[[], Iterable[Family]],
        snapshot: Callable[[], Snapshot],
        listening: Sequence[socket.socket],
        sections: Sequence[Section[Any]] = (),
    ) -> None:
        self._families = families
        self._snapshot = snapshot
        self._listening = listening
        self._sections = sections

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of the server, each as it is when it is yielded."""
        for family in self._families():
            yield _counted(family)
        yield _build_info()
        snapshot = self._snapshot()
        yield from _gauges(GAUGES, snapshot)
        for section in self._sections:
            yield from _gauges(section.gauges, section.of(snapshot))
        yield from _accept_queues(self._listening)


def registry(
    families: Callable[[], Iterable[Family]],
    snapshot: Callable[[], Snapshot],
    listening: Sequence[socket.socket],
    sections: Sequence[Section[Any]] = (),
) -> CollectorRegistry:
    """Return a registry of the metrics of the server and of the process.

    *snapshot* returns a fresh snapshot.
    """
    collectors = CollectorRegistry(auto_describe=False)
    collectors.register(ServerCollector(families, snapshot, listening, sections))
    ProcessCollector(registry=collectors)
    return collectors


async def text(collectors: CollectorRegistry) -> bytes:
    """Return the text, of the type CONTENT_TYPE; other tasks may run after each metric."""
    parts = []
    for metric in collectors.collect():
        parts.append(generate_latest(_OneMetric(metric)))
        await asyncio.sleep(0)
    return b"".join(parts)


class _OneMetric:
    """A registry of one metric."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> tuple[Metric]:
        return (self._metric,)


def _counted(family: Family) -> Metric:
    """Return the metric of a family of counters or histograms."""
    name = family.prefix + family.name
    counters = CounterMetricFamily(name, family.help, labels=family.labels)
    histograms = HistogramMetricFamily(name, family.help, labels=family.labels)
    for labels, child in family.children.items():
        if isinstance(child, Counter):
            counters.add_metric(labels, child.value)
        else:
            histograms.add_metric(labels, _buckets(child), child.sum)
    if family.grows is not None:
        timed = not isinstance(family.grows(), Counter)
    else:
        # The suffix gives the type of a family that has no child yet.
        timed = family.name.endswith("_seconds")
    return histograms if timed else counters


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Return the buckets as Prometheus wants them, cumulative."""
    total, buckets = 0, []
    for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((str(bound), float(total)))
    return buckets


def _gauges(gauges: Iterable[Gauge[State]], state: State) -> Iterator[Metric]:
    for name, read, about, label in gauges:
        if (value := read(state)) is not None:
            yield _gauge(name, about, value, label)


def _gauge(
    name: str,
    about: str,
    value: float | Mapping[str, float] | Mapping[tuple[str, str], float],
    label: str = "",
) -> Metric:
    labels = label.split(",") if label else ()
    family = GaugeMetricFamily(OURS + name, about, labels=labels)
    if isinstance(value, Mapping):
        for values, number in value.items():
            family.add_metric((values,) if isinstance(values, str) else values, float(number))
    else:
        family.add_metric((), float(value))
    return family


def _build_info() -> Metric:
    """Return a gauge that is always 1, with the versions as its labels."""
    versions = {
        "version": __version__,
        "python": platform.python_version(),
        "aiohttp": aiohttp.__version__,
    }
    family = GaugeMetricFamily(OURS + "build_info", "Versions of this build", labels=[*versions])
    family.add_metric([*versions.values()], 1.0)
    return family


def _accept_queues(listening: Sequence[socket.socket]) -> Iterator[Metric]:
    """Yield the accept queues of all open sockets together; they are not part of a snapshot."""
    queues = [accept_queue(sock) for sock in listening if sock.fileno() >= 0]
    known = [queue for queue in queues if queue is not None]
    waiting, limit = sum(queue.waiting for queue in known), sum(queue.limit for queue in known)
    yield _gauge("listen_queue", "Connections that wait to be accepted", waiting)
    yield _gauge("listen_queue_limit", "Limit of the kernel's accept queue", limit)
