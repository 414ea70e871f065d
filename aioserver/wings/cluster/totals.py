"""The operating pages of all instances: each is asked how it is when somebody looks, and nothing
is said while nobody does.

An instance that does not answer in time is named on the page, and so is one whose answer this
version does not understand: it may be of another one, while processes are replaced one after the
other.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from aioserver.monitoring.fold import Fold, Report, add_histories, once
from aioserver.monitoring.verdict import Lately
from aioserver.telemetry.counters import Counter, Histogram, RecentBuckets, Share
from aioserver.usage.sums import MAX_CHILDREN, together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aioserver.monitoring.monitor import Monitor
    from aioserver.monitoring.state import ClusterState, History, Incident, Snapshot
    from aioserver.telemetry.metrics import Family
    from aioserver.usage.sums import Day
    from aioserver.wings.cluster.answers.fan_out import FanOut

# What an instance is asked for.
STATE, HISTORY, METRICS, USAGE, ENDED = "state", "history", "metrics", "usage", "ended"
# What an answer of another version, or a broken one, makes this one raise.
NOT_UNDERSTOOD = (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError, IndexError)


class Totals:
    """Asks all *members* of a cluster for what *monitor*, that of the instance *me*, shows.

    *standing* tells how the instance stands with the cluster's server, and *connections* the host
    whose workers share their connections, and how many these have together.
    """

    def __init__(
        self,
        me: str,
        fan_out: FanOut,
        members: Callable[[], Sequence[str]],
        monitor: Monitor,
        standing: Callable[[], ClusterState],
        connections: Callable[[], tuple[str, int]],
    ) -> None:
        self._me = me
        self.standing = standing
        self._connections = connections
        self._fan_out = fan_out
        self._members = members
        self._monitor = monitor
        self._fold = Fold(monitor.sections)
        # What each instance has counted, as it said last.
        self._counted: dict[str, bytes] = {}
        # How many incidents of each instance were shown.
        self._shown: dict[str, int] = {}

    async def state(self) -> Snapshot:
        """Return the state of all instances together."""
        snapshot, _answers = await self._ask()
        return snapshot

    async def news(self) -> tuple[Snapshot, list[Incident]]:
        """Return the state of all instances together, and what has happened in others since the
        last call.
        """
        snapshot, answers = await self._ask()
        _number, shown = self._monitor.newest_incidents()
        incidents: list[Incident] = []
        for name, (_report, number, newest) in answers.items():
            first = max(0, len(newest) - max(0, number - self._shown.get(name, number)))
            theirs: list[Incident] = [{**incident, "instance": name} for incident in newest]
            shown += theirs[:first]
            incidents += theirs[first:]
        told = len(once(shown))
        self._shown = {name: number for name, (_report, number, _newest) in answers.items()}
        return snapshot, once([*shown, *incidents])[told:]

    async def others_serve(self) -> bool:
        """Return whether an instance of another host says that it takes new work."""
        host, _connections = self._connections()
        for answer in (await self._fan_out.look(self._others(), STATE)).values():
            try:
                (report, _number, _newest), (theirs, _) = _unpack_state(answer)
                if theirs != host and report.snapshot["ready"]:
                    return True
            except NOT_UNDERSTOOD:
                continue
        return False

    async def _ask(self) -> tuple[Snapshot, dict[str, tuple[Report, int, list[Incident]]]]:
        hosts = dict([self._connections()])
        own, places = self._monitor.report(), self._monitor.places()
        others = self._others()
        answers = await self._fan_out.look(others, STATE)
        understood = {}
        for name, answer in answers.items():
            try:
                state, (host, connections) = _unpack_state(answer)
                # Where it cannot be added up, this raises.
                self._fold.add(self._me, {self._me: own, name: state[0]}, places, connections)
            except NOT_UNDERSTOOD:
                continue
            understood[name] = state
            hosts[host] = max(connections, hosts.get(host, 0))
        reports = {self._me: own, **{name: state[0] for name, state in understood.items()}}
        suspect = [name for name in others if name not in understood]
        connections = sum(hosts.values())
        return self._fold.add(self._me, reports, places, connections, suspect), understood

    async def history(self) -> History:
        """Return the history of all instances together."""
        histories = [self._monitor.history()]
        answers = await self._fan_out.look(self._others(), HISTORY)
        for name, answer in answers.items():
            try:
                history = msgspec.msgpack.decode(answer)
                for incident in history["incidents"]:
                    incident["instance"] = name
                add_histories([histories[0], history])
            except NOT_UNDERSTOOD:
                continue
            histories.append(history)
        return add_histories(histories)

    async def families(self) -> list[Family]:
        """Return all metrics that are counted, over all instances.

        Of one that does not answer they are those of the last time: a counter that falls would
        look as if all had started anew.
        """
        merged = {family.name: _copy(family) for family in self._monitor.families()}
        others = self._others()
        answers = self._counted | await self._fan_out.look(others, METRICS)
        self._counted = {name: answers[name] for name in others if name in answers}
        for answer in self._counted.values():
            try:
                counted = msgspec.msgpack.decode(answer)
                for name, children in counted:
                    if (family := merged.get(name)) is not None:
                        for labels, value in children:
                            _add(family, tuple(labels), value)
            except NOT_UNDERSTOOD:
                continue
        return list(merged.values())

    async def days(self, caller: str | None) -> tuple[list[Day], list[str]]:
        """Return what *caller*, or all of them, have spent at all instances together, and the
        instances that have not answered.
        """
        days = [self._monitor.usage.days(caller)]
        suspect = self._others()
        what = USAGE if caller is None else f"{USAGE} {caller}"
        for name, answer in (await self._fan_out.look(suspect, what)).items():
            try:
                days = [together([*days, msgspec.msgpack.decode(answer)])]
            except NOT_UNDERSTOOD:
                continue
            suspect.remove(name)
        return together(days), suspect

    async def ended(self, caller: str | None, request_id: str) -> bytes | None:
        """Return a request that has ended at any instance, as `EndedRequests.find`."""
        own = self._monitor.ended.find(caller, request_id)
        if own is not None and caller is not None:
            return own
        kept = [] if own is None else [own]
        what = f"{ENDED} {msgspec.json.encode([caller, request_id]).decode()}"
        for answer in (await self._fan_out.look(self._others(), what)).values():
            with suppress(*NOT_UNDERSTOOD):
                found = msgspec.msgpack.decode(answer, type=bytes | None)
                kept += [] if found is None else [found]
        return max(kept, default=None)

    def _others(self) -> list[str]:
        return [name for name in self._members() if name != self._me]

    def tell(self, what: str) -> bytes:
        """Return *what* another instance wants to know of this one."""
        monitor = self._monitor
        answer: Any
        if what == STATE:
            snapshot, recent, lately, shares = monitor.report()
            values = [[*key, *buckets] for key, buckets in recent.items()]
            sums = [[*key, *share] for key, share in shares.items()]
            newest = monitor.newest_incidents()
            answer = [snapshot, values, lately, *newest, sums, self._connections()]
        elif what == HISTORY:
            answer = monitor.history()
        elif what == METRICS:
            answer = [[family.name, _pack(family)] for family in monitor.families()]
        elif what == USAGE:
            answer = monitor.usage.days()
        elif what.startswith(f"{USAGE} "):
            answer = monitor.usage.days(what.partition(" ")[2])
        elif what.startswith(f"{ENDED} "):
            answer = monitor.ended.find(*msgspec.json.decode(what.partition(" ")[2]))
        else:
            answer = None
        return msgspec.msgpack.encode(answer)


def _unpack_state(
    answer: bytes,
) -> tuple[tuple[Report, int, list[Incident]], tuple[str, int]]:
    """Return what an instance says of itself, and its host with how many connections it admits."""
    snapshot, values, lately, number, newest, sums, (host, connections) = msgspec.msgpack.decode(
        answer, strict=False
    )
    recent = {
        (name, detail): RecentBuckets({int(bucket): int(n) for bucket, n in counts.items()}, age)
        for name, detail, counts, age in values
    }
    shares = {(name, group): Share(part, whole) for name, group, part, whole in sums}
    report = Report(snapshot, recent, Lately(*lately), shares)
    return (report, number, newest), (host, int(connections))


def _copy(family: Family) -> Family:
    children: dict[tuple[str, ...], Counter | Histogram] = {}
    for labels, child in family.children.items():
        if isinstance(child, Counter):
            children[labels] = counter = Counter()
            counter.value = child.value
        else:
            children[labels] = histogram = Histogram(child.bounds)
            histogram.counts, histogram.sum = list(child.counts), child.sum
    return family._replace(children=children)


def _pack(family: Family) -> Iterable[Any]:
    """Return what is counted in *family*, but for what is still 0."""
    packed = []
    for labels, child in family.children.items():
        if isinstance(child, Counter):
            if child.value:
                packed.append([labels, child.value])
        elif any(child.counts):
            packed.append([labels, [child.counts, child.sum]])
    return packed


def _add(family: Family, labels: tuple[str, ...], value: Any) -> None:
    children = family.children
    if family.grows and labels not in children and len(children) < MAX_CHILDREN:
        assert isinstance(children, dict)
        children[labels] = family.grows()
    # A child that only the other instance has is one of a provider that is configured there alone.
    child = children.get(labels)
    if isinstance(child, Counter):
        child.value += value
    elif child is not None:
        counts, total = value
        child.counts = [own + other for own, other in zip(child.counts, counts, strict=True)]
        child.sum += total
