"""The state of several instances as one: what `/stats` and `/events` show where there is a cluster.

Each instance makes a `Report` of itself, and the one that is asked adds them up. Numbers of things are added;
of waits, silences and ages the longest counts; percentiles are made of all values, in buckets. What is the same in all
(names, models, the limit of a provider, which is shared) is that of the instance that is asked. The trouble of a provider
is the worst of any instance, and says whose it is; the verdict is made of the sums.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from aioserver.monitoring.troubles import WORDS
from aioserver.monitoring.verdict import Lately, judge
from aioserver.telemetry.counters import RecentBuckets, percentiles_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from aioserver.monitoring.state import (
        ClusterState,
        ConnectionsState,
        History,
        HistoryState,
        InstanceState,
        Percentiles,
        ProviderState,
        Snapshot,
        StreamsState,
        Trouble,
    )
    from aioserver.telemetry.metrics import Metrics

# Series of a history that are no numbers of things: of several instances the largest counts.
LARGEST = frozenset(("first_token_p50", "first_token_p95", "lag_max"))
# Incidents of all instances together that a history has.
MAX_INCIDENTS = 100
# How an instance stands with the cluster's server, the worst first.
STANDINGS = ("alone", "unheard", "joined")
# The states of a provider, the worst first.
STATES = ("dead", "sick", "well")
# How a value that percentiles are made of is named in a report.
FIRST_TOKEN, DELAY, PROVIDER_FIRST_TOKEN, PROVIDER_SILENCE = (
    "first_token",
    "delay",
    "provider_first_token",
    "provider_silence",
)


class Report(NamedTuple):
    """What an instance says of itself: its *snapshot*, and what the verdict and the percentiles are made of.

    *recent* has values by their name and detail: `(PROVIDER_SILENCE, "groq")`.
    """

    snapshot: Snapshot
    recent: Mapping[tuple[str, str], RecentBuckets]
    lately: Lately


def recent_values(metrics: Metrics, now: float) -> dict[tuple[str, str], RecentBuckets]:
    """Return the values of the last minute for a report; *now* is a monotonic time."""
    sources = {(FIRST_TOKEN, ""): metrics.recent_first_tokens}
    sources |= {(DELAY, cause): recent for cause, recent in metrics.recent_delays.items()}
    for name, meter in metrics.providers.items():
        sources[PROVIDER_FIRST_TOKEN, name] = meter.recent_first_tokens
        sources[PROVIDER_SILENCE, name] = meter.recent_silences
    found = {key: recent.buckets(now) for key, recent in sources.items()}
    return {key: buckets for key, buckets in found.items() if buckets is not None}


def add(
    own: str,
    reports: Mapping[str, Report],
    places: Mapping[str, int],
    unheard: Iterable[str] = (),
) -> Snapshot:
    """Return the snapshot of all instances in *reports* together, that of *own* among them.

    *places* has what all have together at each provider. *unheard* are the instances that have not answered; they are
    named in it.
    """
    first = reports[own].snapshot
    snapshots = [report.snapshot for report in reports.values()]
    recent = _Recent(reports.values())
    instances: dict[str, InstanceState | None] = {
        name: _instance(report.snapshot) for name, report in reports.items()
    }
    total: Snapshot = {
        **first,
        "uptime": max(snapshot["uptime"] for snapshot in snapshots),
        "ready": any(snapshot["ready"] for snapshot in snapshots),
        "connections": _connections([snapshot["connections"] for snapshot in snapshots]),
        "rejections": _added(snapshot["rejections"] for snapshot in snapshots),
        "requests": {
            "total": sum(snapshot["requests"]["total"] for snapshot in snapshots),
            "per_second": _rate(snapshot["requests"]["per_second"] for snapshot in snapshots),
            "running": sum(snapshot["requests"]["running"] for snapshot in snapshots),
            "outcomes": _added(snapshot["requests"]["outcomes"] for snapshot in snapshots),
        },
        "bugs": {
            "total": sum(snapshot["bugs"]["total"] for snapshot in snapshots),
            "last_minute": sum(snapshot["bugs"]["last_minute"] for snapshot in snapshots),
        },
        "first_token": recent.percentiles(FIRST_TOKEN),
        "tokens_per_second": _rate(snapshot["tokens_per_second"] for snapshot in snapshots),
        "delay": {cause: recent.percentiles(DELAY, cause) for cause in first["delay"]},
        "streams": _streams([snapshot["streams"] for snapshot in snapshots]),
        "history": _history([snapshot["history"] for snapshot in snapshots]),
        "slow_clients": sum(snapshot["slow_clients"] for snapshot in snapshots),
        "auth_failures": _added(snapshot["auth_failures"] for snapshot in snapshots),
        "providers": {
            name: _provider(name, own, reports, recent, places) for name in first["providers"]
        },
        "loop": {
            "lag": max(snapshot["loop"]["lag"] for snapshot in snapshots),
            "lag_max": max(snapshot["loop"]["lag_max"] for snapshot in snapshots),
        },
        "process": {
            "open_fds": _sum_of_known(snapshot["process"]["open_fds"] for snapshot in snapshots),
            "max_fds": sum(snapshot["process"]["max_fds"] for snapshot in snapshots),
            "rss_bytes": _sum_of_known(snapshot["process"]["rss_bytes"] for snapshot in snapshots),
            "tasks": sum(snapshot["process"]["tasks"] for snapshot in snapshots),
            "cpu": round(sum(snapshot["process"]["cpu"] for snapshot in snapshots), 3),
        },
        "watchers": sum(snapshot["watchers"] for snapshot in snapshots),
        "cluster": _cluster([snapshot["cluster"] for snapshot in snapshots]),
        "instances": dict(sorted((instances | dict.fromkeys(unheard)).items())),
    }
    total["verdict"] = judge(total, _lately([report.lately for report in reports.values()]))
    return total


class _Recent:
    """The values of all reports of which percentiles are made."""

    def __init__(self, reports: Iterable[Report]) -> None:
        self._reports = list(reports)

    def percentiles(self, name: str, detail: str = "") -> Percentiles | None:
        """Return the percentiles of one kind of values over all reports."""
        key = name, detail
        return percentiles_of(
            report.recent[key] for report in self._reports if key in report.recent
        )


def _instance(snapshot: Snapshot) -> InstanceState:
    """Return what the page shows of one instance by itself."""
    connections, process = snapshot["connections"], snapshot["process"]
    return {
        "ready": snapshot["ready"],
        "uptime": snapshot["uptime"],
        "version": snapshot["version"],
        "level": snapshot["verdict"]["level"],
        "connections": connections["active"],
        "connections_limit": connections["limit"],
        "waiting": connections["waiting"],
        "running": snapshot["requests"]["running"],
        "requests_per_second": snapshot["requests"]["per_second"],
        "tokens_per_second": snapshot["tokens_per_second"],
        "in_flight": {
            name: provider["in_flight"] for name, provider in snapshot["providers"].items()
        },
        "places": {name: provider["limit"] for name, provider in snapshot["providers"].items()},
        "lag_max": snapshot["loop"]["lag_max"],
        "cpu": process["cpu"],
        "rss_bytes": process["rss_bytes"],
        "cluster": snapshot["cluster"]["state"],
    }


def _connections(states: list[ConnectionsState]) -> ConnectionsState:
    return {
        "active": sum(state["active"] for state in states),
        "limit": sum(state["limit"] for state in states),
        "waiting": sum(state["waiting"] for state in states),
        "queue_size": sum(state["queue_size"] for state in states),
        "oldest_wait": max(state["oldest_wait"] for state in states),
        "active_by_face": _added(state["active_by_face"] for state in states),
        "waiting_by_face": _added(state["waiting_by_face"] for state in states),
        "opened": sum(state["opened"] for state in states),
        "rejected": sum(state["rejected"] for state in states),
        "rejected_per_second": _rate(state["rejected_per_second"] for state in states),
    }


def _streams(states: list[StreamsState]) -> StreamsState:
    return {
        "detached": sum(state["detached"] for state in states),
        "max_detached": sum(state["max_detached"] for state in states),
        "finished": sum(state["finished"] for state in states),
        "responses": sum(state["responses"] for state in states),
        "bytes": sum(state["bytes"] for state in states),
        "max_bytes": sum(state["max_bytes"] for state in states),
    }


def _history(states: list[HistoryState]) -> HistoryState:
    troubles = [state["trouble"] for state in states if state["trouble"] is not None]
    return {
        "storage": states[0]["storage"],
        "waiting": sum(state["waiting"] for state in states),
        "written": sum(state["written"] for state in states),
        "lost": sum(state["lost"] for state in states),
        "trouble": min(troubles, key=lambda trouble: trouble["since"], default=None),
    }


def _provider(
    name: str,
    own: str,
    reports: Mapping[str, Report],
    recent: _Recent,
    places: Mapping[str, int],
) -> ProviderState:
    """Return the state of the provider *name*; an instance whose reload is not over may lack it."""
    known = {
        instance: report.snapshot["providers"][name]
        for instance, report in reports.items()
        if name in report.snapshot["providers"]
    }
    first, states = known[own], list(known.values())
    tries = [state["next_try"] for state in states if state["next_try"] is not None]
    return {
        **first,
        "usable": any(state["usable"] for state in states),
        "in_flight": sum(state["in_flight"] for state in states),
        "limit": places.get(name, first["limit"]),
        "waiting": sum(state["waiting"] for state in states),
        "queue_size": sum(state["queue_size"] for state in states),
        "oldest_wait": max(state["oldest_wait"] for state in states),
        "pool": {
            "open": sum(state["pool"]["open"] for state in states),
            "idle": sum(state["pool"]["idle"] for state in states),
            "limit": first["pool"]["limit"],
            "waiting": sum(state["pool"]["waiting"] for state in states),
        },
        "pace": {
            "per_minute": first["pace"]["per_minute"],
            "left": sum(state["pace"]["left"] for state in states),
            "cooling": max(state["pace"]["cooling"] for state in states),
        },
        "state": min((state["state"] for state in states), key=STATES.index),
        "next_try": min(tries, default=None),
        "flagged": any(state["flagged"] for state in states),
        "retries": sum(state["retries"] for state in states),
        "retry_budget": {
            "used": sum(state["retry_budget"]["used"] for state in states),
            "limit": sum(state["retry_budget"]["limit"] for state in states),
            "refused": sum(state["retry_budget"]["refused"] for state in states),
        },
        "failovers": sum(state["failovers"] for state in states),
        "requests": sum(state["requests"] for state in states),
        "cancelled": sum(state["cancelled"] for state in states),
        "faults": _added(state["faults"] for state in states),
        "requests_per_second": _rate(state["requests_per_second"] for state in states),
        "tokens_per_second": _rate(state["tokens_per_second"] for state in states),
        "first_token": recent.percentiles(PROVIDER_FIRST_TOKEN, name),
        "silence": recent.percentiles(PROVIDER_SILENCE, name),
        "silent": {
            "longest": max(state["silent"]["longest"] for state in states),
            "stalled": sum(state["silent"]["stalled"] for state in states),
            "unanswered": sum(state["silent"]["unanswered"] for state in states),
            "under_way": sum(state["silent"]["under_way"] for state in states),
        },
        "trouble": _worst_trouble(own, known),
    }


def _cluster(states: Sequence[ClusterState]) -> ClusterState:
    return {
        "state": min((state["state"] for state in states), key=STANDINGS.index),
        "calls": sum(state["calls"] for state in states),
        "failed_calls": sum(state["failed_calls"] for state in states),
        "links": sum(state["links"] for state in states),
        "mirrors": sum(state["mirrors"] for state in states),
        "unclaimed": sum(state["unclaimed"] for state in states),
        "lost": sum(state["lost"] for state in states),
    }


def _lately(all_lately: Sequence[Lately]) -> Lately:
    return Lately(
        _added(lately.rejected for lately in all_lately),
        sum(lately.answered for lately in all_lately),
        sum(lately.failed for lately in all_lately),
        max(lately.lag for lately in all_lately),
    )


def _worst_trouble(own: str, states: Mapping[str, ProviderState]) -> Trouble | None:
    """Return the worst trouble that any instance has with a provider; of two that are as bad that of *own*."""
    kinds = list(WORDS)
    troubles = {
        instance: trouble
        for instance, state in states.items()
        if (trouble := state["trouble"]) is not None
    }
    if not troubles:
        return None
    worst = min(troubles, key=lambda name: (kinds.index(troubles[name]["kind"]), name != own))
    trouble = troubles[worst]
    return trouble if worst == own else {**trouble, "text": f"{trouble['text']} (at {worst})"}


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add up counts by name; a name that one instance has alone is kept."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def _rate(rates: Iterable[float]) -> float:
    return round(sum(rates), 1)


def _sum_of_known(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def add_histories(histories: Sequence[History]) -> History:
    """Return the history of all *histories* together, at the times of the first.

    The instances tick at different moments: a point is added to the one of the first that is less than a tick away. What is
    no number of things is the largest: percentiles of the past are not known in buckets.
    """
    first = histories[0]
    times = first["time"]
    moments = {round(time): index for index, time in enumerate(times)}
    series = {name: list(values) for name, values in first["series"].items()}
    providers = {
        provider: {name: list(values) for name, values in each.items()}
        for provider, each in first["providers"].items()
    }
    incidents = list(first["incidents"])
    for history in histories[1:]:
        places = [moments.get(round(time)) for time in history["time"]]
        for name, values in history["series"].items():
            if name in series:
                _merge(series[name], values, places, largest=name in LARGEST)
        for provider, each in history["providers"].items():
            for name, values in each.items():
                if name in providers.get(provider, {}):
                    _merge(providers[provider][name], values, places, largest=False)
        incidents += history["incidents"]
    incidents.sort(key=lambda incident: incident["time"])
    return {
        **first,
        "series": series,
        "providers": providers,
        "incidents": incidents[-MAX_INCIDENTS:],
    }


def _merge(
    own: list[float | None],
    values: Sequence[float | None],
    places: Sequence[int | None],
    *,
    largest: bool,
) -> None:
    for value, place in zip(values, places, strict=True):
        if value is not None and place is not None:
            before = own[place]
            if before is None:
                own[place] = value
            else:
                own[place] = max(before, value) if largest else round(before + value, 3)
