"""The snapshots of several instances combined into one, for `/stats` and `/events` of a cluster.

Each instance makes a `Report` of itself. The instance that a client asks folds all reports into
one snapshot, by the rules that the fields of the snapshot declare (state.py). Some fields need more
than the fields of the reports, and are computed here:

- Percentiles are computed from the values of all instances, which reports carry in buckets.
- The shares of a group are computed from sums.
- The trouble of a provider is the worst of any instance, and its text names that instance.
- The limits of a provider and of connections are shared, so they are passed in.
- The verdict is made from the combined snapshot.
"""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    NamedTuple,
    NotRequired,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from aioserver.monitoring.findings import OF_PROVIDERS
from aioserver.monitoring.groups import member_state
from aioserver.monitoring.state import COUNTS, Snapshot
from aioserver.monitoring.verdict import Lately, judge
from aioserver.telemetry.counters import (
    RecentBuckets,
    Share,
    percentiles_of,
    quotient_of,
    sum_of,
)
from aioserver.telemetry.metrics import CACHED_SHARE, KNOWN_SHARE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from aioserver.monitoring.section import Section
    from aioserver.monitoring.state import (
        Alert,
        History,
        Incident,
        InstanceState,
        Percentiles,
        Rule,
    )
    from aioserver.telemetry.metrics import Metrics

# Series of a history that cannot be added up: the largest value of any instance counts.
LARGEST = frozenset(("first_token_p50", "first_token_p95", "lag_max"))
# Incidents that a history has at most.
MAX_INCIDENTS = 100
# Kinds of incidents that every instance reports for itself, since all of them are affected, and the
# seconds within which they all do.
COMMON, WITHIN = frozenset(("cluster", "reload", "replaced", "keys_file", "jwt")), 10.0
# The names in a report of the values from which percentiles are computed.
FIRST_TOKEN, DELAY, PROVIDER_FIRST_TOKEN, PROVIDER_SILENCE = (
    "first_token",
    "delay",
    "provider_first_token",
    "provider_silence",
)


NO_SHARES: Mapping[tuple[str, str], Share] = MappingProxyType({})


class Report(NamedTuple):
    """The report of one instance: its *snapshot*, and the values for the verdict and percentiles.

    *recent* has values by their name and detail, such as `(PROVIDER_SILENCE, "groq")`. *shares* has
    the shares of groups in the same way, such as `(CACHED_SHARE, "qwen")`.
    """

    snapshot: Snapshot
    recent: Mapping[tuple[str, str], RecentBuckets]
    lately: Lately
    shares: Mapping[tuple[str, str], Share] = NO_SHARES


def recent_values(metrics: Metrics, now: float) -> dict[tuple[str, str], RecentBuckets]:
    """Return the values of the last minute for a report; *now* is a monotonic time."""
    sources = {(FIRST_TOKEN, ""): metrics.recent_first_tokens}
    sources |= {(DELAY, cause): recent for cause, recent in metrics.recent_delays.items()}
    for name, meter in metrics.providers.items():
        sources[PROVIDER_FIRST_TOKEN, name] = meter.recent_first_tokens
        sources[PROVIDER_SILENCE, name] = meter.recent_silences
    found = {key: recent.buckets(now) for key, recent in sources.items()}
    return {key: buckets for key, buckets in found.items() if buckets is not None}


def recent_shares(metrics: Metrics, now: float) -> dict[tuple[str, str], Share]:
    """Return the shares of groups in the last minute for a report; *now* is a monotonic time."""
    return {
        (name, group): share
        for group, meter in metrics.groups.items()
        for name, share in meter.shares(now).items()
        if share is not None
    }


def rules_of(shape: type) -> dict[str, Rule]:
    """Return the rule of each field of *shape*. A field that is itself a state has no rule of its
    own: its fields are folded by theirs.

    Raises:
        TypeError: a field has no rule.
    """
    rules = {}
    for name, field in get_type_hints(shape, include_extras=True).items():
        if (rule := _rule(field)) is None:
            raise TypeError(f"{shape.__name__}.{name}: no rule says how it adds up")
        rules[name] = rule
    return rules


def _rule(field: Any) -> Rule | None:
    origin, arguments = get_origin(field), get_args(field)
    if origin is NotRequired:
        return _rule(arguments[0])
    if origin is Annotated:
        rule: Rule = arguments[1]
        return rule
    if is_typeddict(field):
        return partial(fold, rules_of(field))
    if origin is dict and is_typeddict(arguments[1]):
        return partial(_fold_by_key, rules_of(arguments[1]))
    return None


def fold(rules: Mapping[str, Rule], states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine *states* into one by *rules*. The first state is that of the instance that is asked.

    An instance of another version may lack a field. It is then left out of that field.
    """
    return {
        name: rule([state[name] for state in states if name in state])
        for name, rule in rules.items()
        if name in states[0]
    }


def _fold_by_key(
    rules: Mapping[str, Rule], states: Sequence[Mapping[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """Fold by the keys of the first state. An instance that still reloads may lack a key."""
    return {key: fold(rules, [each[key] for each in states if key in each]) for key in states[0]}


class Fold:
    """Adds up the reports of instances, by rules that are collected once, from the shapes of the
    core and of the *sections*.
    """

    def __init__(self, sections: Sequence[Section[Any]] = ()) -> None:
        self._sections = sections
        self._rules = rules_of(Snapshot)
        for section in sections:
            self._rules[section.key] = partial(fold, rules_of(section.shape))

    def add(
        self,
        own: str,
        reports: Mapping[str, Report],
        places: Mapping[str, int],
        connections: int,
        unheard: Iterable[str] = (),
    ) -> Snapshot:
        """Return the snapshot of all instances in *reports* together, the instance *own* included.

        *places* has the places of all instances at each provider, and *connections* is the number
        of connections that they admit together. Sums over the reports would be too small while a
        place moves from one instance to another. *unheard* are the instances that have not
        answered; the snapshot names them, too.
        """
        first = reports[own].snapshot
        others = [report.snapshot for name, report in reports.items() if name != own]
        total = cast("Snapshot", {**first, **fold(self._rules, [first, *others])})
        total["connections"]["limit"] = connections
        percentiles = partial(_percentiles, reports.values())
        total["first_token"] = percentiles(FIRST_TOKEN)
        total["delay"] = {cause: percentiles(DELAY, cause) for cause in first["delay"]}
        for name, provider in total["providers"].items():
            provider["limit"] = places.get(name, provider["limit"])
            provider["first_token"] = percentiles(PROVIDER_FIRST_TOKEN, name)
            provider["silence"] = percentiles(PROVIDER_SILENCE, name)
            provider["trouble"] = _worst_trouble(name, own, reports)
        for name, group in total["groups"].items():
            known, cached = (
                quotient_of(
                    sum_of(report.shares.get((share, name)) for report in reports.values())
                )
                for share in (KNOWN_SHARE, CACHED_SHARE)
            )
            group["known_share"], group["cached_share"] = known, cached
            for member in group["members"]:
                provider = total["providers"][member["provider"]]
                member["state"], member["limit"] = member_state(provider), provider["limit"]
                member["in_flight"] = provider["in_flight"]
        instances = {name: _instance(report.snapshot) for name, report in reports.items()}
        total["instances"] = dict(sorted((instances | dict.fromkeys(unheard)).items()))
        lately = _lately([report.lately for report in reports.values()])
        total["verdict"] = judge(total, lately, self._sections)
        return total


def _percentiles(reports: Iterable[Report], name: str, detail: str = "") -> Percentiles | None:
    """Return the percentiles of one kind of recent values over all *reports*."""
    key = name, detail
    return percentiles_of(report.recent[key] for report in reports if key in report.recent)


def _instance(snapshot: Snapshot) -> InstanceState:
    """Return the state of one instance, as it stands under `instances`."""
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


def _lately(all_lately: Sequence[Lately]) -> Lately:
    return Lately(
        COUNTS([lately.rejected for lately in all_lately]),
        sum(lately.answered for lately in all_lately),
        sum(lately.failed for lately in all_lately),
        max(lately.lag for lately in all_lately),
    )


def _worst_trouble(provider: str, own: str, reports: Mapping[str, Report]) -> Alert | None:
    """Return the worst trouble of *provider* at any instance; if several are equal, *own*'s."""
    kinds = list(OF_PROVIDERS)
    troubles = {
        instance: trouble
        for instance, report in reports.items()
        if (state := report.snapshot["providers"].get(provider)) is not None
        and (trouble := state["trouble"]) is not None
    }
    if not troubles:
        return None
    worst = min(troubles, key=lambda name: (kinds.index(troubles[name]["kind"]), name != own))
    trouble = troubles[worst]
    return trouble if worst == own else {**trouble, "text": f"{trouble['text']} (at {worst})"}


def add_histories(histories: Sequence[History]) -> History:
    """Return the history of all *histories* together, at the times of the first.

    The instances tick at different moments: a point is added to the point of the first history that
    is less than a tick away. Of the series LARGEST the largest value is kept, since the buckets of
    earlier percentiles are not kept.
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
        "incidents": once(incidents)[-MAX_INCIDENTS:],
    }


def once(incidents: Iterable[Incident]) -> list[Incident]:
    """Return *incidents* of several instances without repetitions.

    An incident of a COMMON kind repeats an earlier one if another instance has reported that one
    in the same words, less than WITHIN seconds before.
    """
    kept: list[Incident] = []
    # The kept incidents of COMMON kinds, each with the instances that have reported it.
    said: list[tuple[Incident, set[str | None]]] = []
    for incident in incidents:
        instance = incident.get("instance")
        if incident["kind"] in COMMON:
            for other, instances in said:
                if instance not in instances and _alike(incident, other):
                    instances.add(instance)
                    break
            else:
                said.append((incident, {instance}))
                kept.append(incident)
        else:
            kept.append(incident)
    return kept


def _alike(incident: Incident, other: Incident) -> bool:
    return (
        incident["kind"] == other["kind"]
        and incident["text"] == other["text"]
        and abs(incident["time"] - other["time"]) <= WITHIN
    )


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
