"""The state of several instances as one."""

from __future__ import annotations

import copy
import json
import time
from typing import TYPE_CHECKING, Any, TypedDict, cast

import pytest

from aioserver.monitoring.fold import Fold, Report, recent_values, rules_of
from aioserver.monitoring.state import Snapshot
from aioserver.monitoring.verdict import Lately
from aioserver.telemetry.counters import RecentValues, percentiles_of
from tests.support.chat import STREAMED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.server import RunningServer


NOTHING = Lately({}, 0, 0, 0.0)


class Bare(TypedDict):
    """A state with a field that does not say how it adds up."""

    number: int


class Within(TypedDict):
    """A state with such ones by key."""

    states: dict[str, Bare]


@pytest.fixture
async def snapshot(server: RunningServer) -> Snapshot:
    """The snapshot of a server that has answered."""
    async with server.session.post(f"{server.v1}/chat/completions", json=STREAMED) as response:
        assert (await response.read()).endswith(b"[DONE]\n\n")
    monitor = server.owners.context.monitor
    monitor.tick()
    alone: Snapshot = json.loads(await monitor.state_of_all())
    alone["cluster"] = {
        "state": "joined",
        "calls": 0,
        "failed_calls": 0,
        "links": 0,
        "tunnels": 0,
        "unclaimed": 0,
    }
    return alone


def report(snapshot: Snapshot, **changes: Any) -> Report:
    """A report of *snapshot* with *changes*; `connections__active=3` changes a value within."""
    changed: Any = copy.deepcopy(snapshot)
    for path, value in changes.items():
        *parents, name = path.split("__")
        target = changed
        for parent in parents:
            target = target[parent]
        target[name] = value
    return Report(changed, {}, NOTHING)


def total_of(
    own: str,
    reports: dict[str, Report],
    unheard: Sequence[str] = (),
    connections: int | None = None,
) -> Snapshot:
    """The sum of *reports*; at each provider all have together what the first has. Each has
    *connections* of its own, unless all have so many together.
    """
    if connections is None:
        connections = sum(each.snapshot["connections"]["limit"] for each in reports.values())
    places = {name: each["limit"] for name, each in reports[own].snapshot["providers"].items()}
    return Fold().add(own, reports, places, connections, unheard)


def provider_of(snapshot: Snapshot) -> str:
    return snapshot["active_provider"]


def test_numbers_of_things_are_added_and_of_waits_the_longest_counts(snapshot: Snapshot) -> None:
    a = report(
        snapshot, connections__active=3, connections__limit=50, connections__oldest_wait=0.5
    )
    b = report(
        snapshot, connections__active=4, connections__limit=50, connections__oldest_wait=2.0
    )

    # One of the 101 is on its way between the two.
    total = total_of("a", {"a": a, "b": b}, connections=101)["connections"]

    assert (total["active"], total["limit"], total["oldest_wait"]) == (7, 101, 2.0)


def test_every_counter_of_a_provider_is_added_and_its_shared_limits_are_not(
    snapshot: Snapshot,
) -> None:
    instance_report = report(snapshot)
    name = provider_of(snapshot)

    state, single = (
        total_of("a", {"a": instance_report, "b": instance_report})["providers"][name],
        snapshot["providers"][name],
    )

    assert state["requests"] == 2 * single["requests"] > 0
    assert state["pool"]["open"] == 2 * single["pool"]["open"]
    assert state["pool"]["limit"] == single["pool"]["limit"]
    assert state["pace"]["per_minute"] == single["pace"]["per_minute"]


def test_the_sum_of_one_instance_is_its_own_state(
    server: RunningServer, snapshot: Snapshot
) -> None:
    recent = recent_values(server.owners.context.metrics, time.monotonic())

    total = total_of("a", {"a": Report(snapshot, recent, NOTHING)})
    del total["instances"]

    single: Any = copy.deepcopy(snapshot)
    summed: Any = total
    # That of the snapshot knows what has happened lately, as a loop that was late.
    del single["verdict"], summed["verdict"]
    for owner in (single, summed, *single["providers"].values(), *summed["providers"].values()):
        for key in ("first_token", "silence", "delay"):
            owner.pop(key, None)  # in buckets, tested below
    assert summed == single


def test_an_instance_that_has_not_answered_is_named(snapshot: Snapshot) -> None:
    total = total_of("a", {"a": report(snapshot)}, unheard=["b"])

    assert list(total["instances"]) == ["a", "b"]
    assert total["instances"]["b"] is None


def test_each_instance_shows_its_share(snapshot: Snapshot) -> None:
    name = provider_of(snapshot)
    b = report(snapshot, connections__active=9)
    b.snapshot["providers"][name]["limit"] = 3
    b.snapshot["providers"][name]["in_flight"] = 2

    instances = total_of("a", {"a": report(snapshot), "b": b})["instances"]

    assert instances["b"] is not None
    assert instances["b"]["connections"] == 9
    assert instances["b"]["places"][name] == 3
    assert instances["b"]["in_flight"][name] == 2


def test_requests_that_met_a_bug_are_added_and_so_is_the_verdict_on_them(
    snapshot: Snapshot,
) -> None:
    a = report(snapshot, bugs__total=50, bugs__last_minute=40)
    b = report(snapshot, bugs__total=53, bugs__last_minute=53)

    total = total_of("a", {"a": a, "b": b})

    assert total["bugs"] == {"total": 103, "last_minute": 93}
    assert total["verdict"]["text"] == "93 requests met a bug of the server in the last minute"


def test_an_instance_of_another_version_may_lack_a_field(snapshot: Snapshot) -> None:
    a, older = report(snapshot, bugs__total=2), report(snapshot, connections__active=4)
    for owner in (older.snapshot, older.snapshot["connections"]):
        cast("Any", owner).pop("bugs", None)
        cast("Any", owner).pop("opened", None)

    total = total_of("a", {"a": a, "b": older})

    assert total["bugs"]["total"] == 2
    assert total["connections"]["active"] == 4 + snapshot["connections"]["active"]
    assert total["connections"]["opened"] == snapshot["connections"]["opened"]


def test_every_field_of_a_snapshot_says_how_it_adds_up() -> None:
    assert rules_of(Snapshot).keys() == Snapshot.__annotations__.keys()
    for shape in (Bare, Within):
        with pytest.raises(TypeError, match=r"Bare\.number"):
            rules_of(shape)


def test_the_verdict_is_made_of_the_sums(snapshot: Snapshot) -> None:
    a, b = report(snapshot), report(snapshot, connections__active=20)
    shut = Report(b.snapshot, {}, Lately({"server_at_capacity": 30}, 2, 0, 0.0))

    calm = total_of("a", {"a": a, "b": b})["verdict"]
    refusing = total_of("a", {"a": a, "b": shut})["verdict"]

    limit = snapshot["connections"]["limit"]
    assert calm["text"] == f"Room for {2 * limit - 20} more"
    assert refusing["level"] == "error"
    assert "30" in refusing["text"] + refusing["detail"]


def test_the_worst_trouble_and_state_of_a_provider_count(snapshot: Snapshot) -> None:
    name = provider_of(snapshot)
    words = {"word": "Dead", "detail": "", "advice": "", "severity": "error", "since": 0.0}
    trouble = {"kind": "dead", "text": f"{name} cannot be reached", **words}
    a, b = report(snapshot), report(snapshot)
    cast("Any", b.snapshot)["providers"][name] |= {
        "state": "dead",
        "trouble": trouble,
        "next_try": 2.5,
    }

    state = total_of("a", {"a": a, "b": b})["providers"][name]

    assert state["state"] == "dead"
    assert state["next_try"] == 2.5
    assert state["trouble"] is not None
    assert state["trouble"]["text"] == f"{name} cannot be reached (at b)"


def test_a_provider_that_only_one_instance_knows_yet_is_no_fault(snapshot: Snapshot) -> None:
    a, b = report(snapshot), report(snapshot)
    b.snapshot["providers"].clear()
    cast("Any", a.snapshot)["providers"]["new"] = a.snapshot["providers"][provider_of(snapshot)]

    assert set(total_of("a", {"a": a, "b": b})["providers"]) == {provider_of(snapshot), "new"}
    assert total_of("b", {"a": a, "b": b})["providers"] == {}


def test_percentiles_are_those_of_all_values_and_not_of_percentiles() -> None:
    slow, quick, both = RecentValues(), RecentValues(), RecentValues()
    for number in range(900):
        quick.add(0.0, 0.01 + number / 1e6)
        both.add(0.0, 0.01 + number / 1e6)
    for number in range(100):
        slow.add(1.0, 5.0 + number / 100)
        both.add(1.0, 5.0 + number / 100)
    buckets = [source.buckets(2.0) for source in (slow, quick)]

    total = percentiles_of(bucket for bucket in buckets if bucket is not None)
    exact = both.percentiles(2.0)

    assert total is not None
    assert exact is not None
    assert total["count"] == 1000
    assert total["age"] == exact["age"] == 1.0
    for name in ("p50", "p95", "p99"):
        assert total[name] == pytest.approx(exact[name], rel=0.022)


def test_no_values_have_no_percentiles() -> None:
    assert RecentValues().buckets(0.0) is None
    assert percentiles_of([]) is None


def test_values_of_zero_are_in_the_first_bucket() -> None:
    recent = RecentValues()
    recent.add(0.0, 0.0)
    buckets = recent.buckets(0.0)

    assert buckets is not None
    assert buckets.counts == {0: 1}
