"""The operating pages of several instances: sums, shares, and who does not answer."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from aioserver.errors import ServerAtCapacity
from aioserver.wings.cluster.totals import Totals
from aioserver.wings.simulator.engine import EngineOptions
from tests.support.chat import STREAMED
from tests.support.instances import instances
from tests.support.server import QUICK
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aioserver.monitoring.monitor import Monitor
    from aioserver.monitoring.state import ClusterState
    from tests.support.instances import Instance


def standing() -> ClusterState:
    """How an instance stands that has joined."""
    return {
        "state": "joined",
        "calls": 3,
        "failed_calls": 1,
        "links": 0,
        "tunnels": 2,
        "unclaimed": 0,
    }


def connections_of(instance: Instance) -> tuple[str, int]:
    """What an instance without a parent says of its connections."""
    return instance.name, instance.server.context.admission.gate.stats().limit


@asynccontextmanager
async def pages_of_both(
    path: Path, behaviour: Behaviour = QUICK, **changes: Any
) -> AsyncIterator[tuple[Instance, Instance]]:
    """Two instances whose pages are those of both."""
    async with instances(path, 2, behaviour, **changes) as (a, b):
        for instance in (a, b):
            monitor = instance.server.context.monitor
            totals = Totals(
                instance.name,
                instance.cluster.fan_out,
                lambda: [a.name, b.name],
                monitor,
                standing,
                partial(connections_of, instance),
            )
            monitor.share(totals)
            instance.look = totals.tell
        yield a, b


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Instance, Instance]]:
    async with pages_of_both(tmp_path) as both:
        yield both


@pytest.fixture
async def pair_of_groups(tmp_path: Path) -> AsyncIterator[tuple[Instance, Instance]]:
    """Two with a group of two members that have a cache."""
    engine = EngineOptions(prefill=1e7, decode=1e4)
    changes = {
        "llm.providers.second": {"like": "sim"},
        "llm.models": {
            "pair": {"members": ["sim", "second"], "choose": "least_busy", "affinity": "prefix"}
        },
    }
    async with pages_of_both(tmp_path, Behaviour(tokens=3, engine=engine), **changes) as both:
        yield both


async def answer(instance: Instance, times: int) -> None:
    """Let *instance* answer so many requests, and tick."""
    server = instance.server
    for _ in range(times):
        async with server.session.post(f"{server.v1}/chat/completions", json=STREAMED) as response:
            assert (await response.read()).endswith(b"[DONE]\n\n")
    monitor = server.context.monitor
    await until(lambda: monitor.fresh()["requests"]["total"] == times)
    monitor.tick()


async def stats(instance: Instance) -> Any:
    async with instance.server.session.get(f"{instance.server.base}/stats") as response:
        return await response.json()


async def metric(instance: Instance, line: str) -> float:
    async with instance.server.session.get(f"{instance.server.base}/metrics") as response:
        text = await response.text()
    return sum(
        float(each.rpartition(" ")[2]) for each in text.splitlines() if each.startswith(line)
    )


async def test_each_instance_shows_the_sum_and_each_share(
    pair: tuple[Instance, Instance],
) -> None:
    a, b = pair
    await answer(a, 2)
    await answer(b, 3)

    for asked in (a, b):
        state = await stats(asked)
        assert state["requests"]["total"] == 5
        assert state["providers"]["sim"]["requests"] == 5
        assert state["first_token"]["count"] == 5
        assert state["connections"]["opened"] == 5
        assert set(state["instances"]) == {a.name, b.name}
        assert state["cluster"]["calls"] == 6
        assert state["cluster"]["state"] == "joined"


async def test_connections_of_hosts_are_added_and_those_of_workers_are_what_is_configured(
    pair: tuple[Instance, Instance],
) -> None:
    """A place that is on its way between two workers of a host is granted to none of them."""
    a, b = pair
    own = a.server.context.admission.gate.stats().limit
    assert (await stats(a))["connections"]["limit"] == 2 * own

    for instance in (a, b):
        admission = instance.server.context.admission
        admission.scheduler.resize(admission.gate, own // 2 - 1)
        monitor = instance.server.context.monitor
        monitor.tick()
        totals = Totals(
            instance.name,
            instance.cluster.fan_out,
            lambda: [a.name, b.name],
            monitor,
            standing,
            lambda: ("host", own),
        )
        monitor.share(totals)
        instance.look = totals.tell
    state = await stats(a)

    assert state["connections"]["limit"] == own
    assert await metric(b, "aioserver_connections_limit") == own
    granted = [each["connections_limit"] for each in state["instances"].values()]
    assert sum(granted) < own


async def test_metrics_are_added_up_but_limits_that_are_shared_are_not(
    pair: tuple[Instance, Instance],
) -> None:
    a, b = pair
    single = await metric(a, 'aioserver_provider_limit{provider="sim"}')
    await answer(a, 2)
    await answer(b, 3)

    assert await metric(a, 'aioserver_provider_attempts_total{outcome="ok",provider="sim"}') == 5
    assert await metric(b, 'aioserver_provider_attempts_total{outcome="ok",provider="sim"}') == 5
    assert await metric(b, "aioserver_provider_first_token_seconds_count") == 5
    assert await metric(b, 'aioserver_provider_limit{provider="sim"}') == single
    assert await metric(b, 'aioserver_instances{state="heard"}') == 2
    assert await metric(b, 'aioserver_cluster_instances{state="joined"}') == 2
    assert await metric(b, "aioserver_cluster_tunnels") == 4


async def test_what_callers_have_spent_is_that_of_all_instances(
    pair: tuple[Instance, Instance],
) -> None:
    a, b = pair
    await answer(b, 3)

    # A child that the other instance has made, and this one has not.
    tokens = await metric(a, "aioserver_usage_tokens_total{")
    assert tokens == await metric(b, "aioserver_usage_tokens_total{") > 0
    await answer(a, 2)
    for asked in (a, b):
        async with asked.server.session.get(f"{asked.server.base}/usage") as response:
            shown = await response.json()
        [row] = shown["days"][0]["rows"]
        assert (row["requests"], row["provider"]) == (5, "sim")
        assert "unheard" not in shown

    b.look = lambda _what: b""
    async with a.server.session.get(f"{a.server.base}/usage") as response:
        shown = await response.json()
    assert shown["days"][0]["rows"][0]["requests"] == 2
    assert shown["unheard"] == [b.name]


async def test_counters_do_not_fall_while_an_instance_does_not_answer(
    pair: tuple[Instance, Instance],
) -> None:
    a, b = pair
    line = 'aioserver_provider_attempts_total{outcome="ok",provider="sim"}'
    await answer(b, 3)
    assert await metric(a, line) == 3

    b.world.silent.add(b.name)
    await answer(a, 2)

    assert await metric(a, line) == 5
    assert await metric(a, 'aioserver_instances{state="unheard"}') == 1


async def test_a_watcher_sees_all_instances_and_their_incidents(
    pair: tuple[Instance, Instance],
) -> None:
    a, b = pair
    await answer(b, 1)
    b.server.context.monitor.incident("reload", "before anybody watched")
    seen: list[tuple[str, Any]] = []

    url = f"{a.server.base}/events"
    async with a.server.session.get(url) as response:

        async def more() -> None:
            event = data = ""
            while not data:
                line = (await response.content.readline()).decode().strip()
                if line.startswith("event: "):
                    event = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    data = line.removeprefix("data: ")
            seen.append((event, json.loads(data)))

        await more()
        await more()
        a.server.context.monitor.tick()
        await more()
        b.server.context.monitor.incident("reload", "while somebody watches")
        # A busy machine may have incidents of its own.
        while seen[-1][1].get("text") != "while somebody watches":
            a.server.context.monitor.tick()
            await more()

    history, first = seen[0][1], seen[1][1]
    assert [name for name, _ in seen[:3]] == ["history", "stats", "stats"]
    before = [each for each in history["incidents"] if each["text"] == "before anybody watched"]
    assert [each["instance"] for each in before] == [b.name]
    assert first["requests"]["total"] == 1
    assert seen[-1][0] == "incident"
    assert seen[-1][1]["instance"] == b.name


async def test_what_instances_have_in_common_is_told_once(pair: tuple[Instance, Instance]) -> None:
    a, b = (instance.server.context.monitor for instance in pair)
    assert a.others is not None
    for monitor in (a, b, a):
        monitor.incident("cluster", "before anybody watched", severity="info")
    before = await a.others.history()
    await a.others.news()
    for monitor in (a, b):
        monitor.incident("reload", "applied", severity="info")
        monitor.incident("bug", "in the same words")
    b.incident("reload", "not applied")

    _snapshot, news = await a.others.news()
    _snapshot, later = await a.others.news()
    after = await a.others.history()

    common = [each for each in before["incidents"] if each["kind"] == "cluster"]
    assert len(common) == 2, "the one of b; the second one of a is another"
    name = pair[1].name
    told = [each for each in news if each["kind"] in {"reload", "bug"}]
    assert [(each["text"], each["instance"]) for each in told] == [
        ("in the same words", name),
        ("not applied", name),
    ]
    assert not [each for each in later if each["kind"] in {"reload", "bug"}]
    reloads = [each["text"] for each in after["incidents"] if each["kind"] == "reload"]
    assert reloads == ["applied", "not applied"]


async def test_a_bug_at_one_instance_is_told_by_each(pair: tuple[Instance, Instance]) -> None:
    a, b = pair
    b.server.context.metrics.bugs.note(KeyError("S3CR3T"))
    b.server.context.monitor.tick()

    state = await stats(a)
    others = a.server.context.monitor.others
    assert others is not None
    history = await others.history()

    assert state["bugs"] == {"total": 1, "last_minute": 1}
    assert state["verdict"]["text"] == "1 request met a bug of the server in the last minute"
    (incident,) = [each for each in history["incidents"] if each["kind"] == "bug"]
    assert incident["instance"] == b.name
    assert await metric(a, "aioserver_errors_total") == 1


async def test_an_instance_that_does_not_answer_is_named_and_delays_little(
    pair: tuple[Instance, Instance],
) -> None:
    a, b = pair
    await answer(a, 1)
    monitor = a.server.context.monitor
    monitor.share(
        Totals(
            a.name,
            a.cluster.fan_out,
            lambda: [a.name, b.name, "gone"],
            monitor,
            standing,
            partial(connections_of, a),
        )
    )

    state = await stats(a)

    assert state["requests"]["total"] == 1
    assert state["instances"]["gone"] is None
    assert state["instances"][b.name] is not None
    assert await metric(a, 'aioserver_instances{state="unheard"}') == 1


@pytest.mark.parametrize(
    "answer_of_b",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode([{}, [], [{}, 0, 0, 0.0], 0, []]),
        msgspec.msgpack.encode(7),
    ],
    ids=["nothing", "no msgpack", "another shape", "a number"],
)
async def test_an_answer_that_is_not_understood_is_none(
    pair: tuple[Instance, Instance], answer_of_b: bytes
) -> None:
    a, b = pair
    await answer(a, 1)
    b.look = lambda _what: answer_of_b

    state = await stats(a)
    assert state["requests"]["total"] == 1
    assert state["instances"][b.name] is None
    assert await metric(a, "aioserver_provider_first_token_seconds_count") == 1
    sent: list[bytes] = []
    monitor = a.server.context.monitor
    await monitor.watch_all(sent.append, 1)
    monitor.tick()
    await until(lambda: len(sent) > 1)
    monitor.leave(sent.append)
    assert b"event: history" in sent[0]


async def test_nobody_is_asked_while_nobody_looks(pair: tuple[Instance, Instance]) -> None:
    a, b = pair
    looks: list[str] = []

    def note(what: str) -> bytes:
        looks.append(what)
        return b""

    b.look = note

    for _ in range(3):
        a.server.context.monitor.tick()
    await answer(a, 1)
    assert looks == []
    await stats(a)
    assert looks == ["state"]


async def test_a_watcher_too_many_is_refused_whatever_the_others_say(
    pair: tuple[Instance, Instance],
) -> None:
    a, _b = pair
    monitor = a.server.context.monitor
    watchers = [list[bytes]().append for _ in range(257)]
    for watcher in watchers[:256]:
        monitor.watch(watcher, 60)
    with pytest.raises(ServerAtCapacity):
        await monitor.watch_all(watchers[256], 1)
    for watcher in watchers:
        monitor.leave(watcher)


def answered(monitor: Monitor, times: int) -> bool:
    return monitor.fresh()["requests"]["total"] == times


async def test_a_group_of_all_instances_is_of_what_each_has_counted(
    pair_of_groups: tuple[Instance, Instance],
) -> None:
    a, b = pair_of_groups
    question = "Say something of a gateway that serves many. " * 100
    for instance, times in ((a, 1), (b, 3)):
        server = instance.server
        for _ in range(times):
            body = {
                "model": "pair",
                "messages": [{"role": "user", "content": question}],
            }
            async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
                assert (await response.json())["usage"]
        monitor = server.context.monitor
        await until(partial(answered, monitor, times))
        monitor.tick()
    states = [await stats(each) for each in (a, b)]
    own = [each.server.context.monitor.snapshot["groups"]["pair"] for each in (a, b)]

    # Nothing was cached of the first question at each instance, and two thirds at one of them.
    assert own[0]["cached_share"] == 0.0
    assert own[1]["cached_share"] == pytest.approx(2 / 3, abs=0.01)
    for state in states:
        group = state["groups"]["pair"]
        assert group.keys() == own[0].keys()
        assert sum(member["starts"] for member in group["members"]) == 4
        assert group["homes"] == {"home": 0, "other": 0, "new": 4}
        assert group["cached_share"] == pytest.approx(2 / 4, abs=0.01)
        limits = [state["providers"][name]["limit"] for name in ("sim", "second")]
        assert [member["limit"] for member in group["members"]] == limits
    starts = 'aioserver_group_starts_total{group="pair"'
    assert await metric(a, starts) == await metric(b, starts) == 4


async def test_metrics_that_grow_are_those_of_all_instances(tmp_path: Path) -> None:
    name = "gen_ai_client_inference_"
    async with pages_of_both(tmp_path, QUICK, **{"tracing.gen_ai_metrics": True}) as (a, b):
        await answer(b, 3)

        # a has answered nothing, and makes the children for what b has.
        for asked in (a, b):
            assert await metric(asked, f"{name}duration_seconds_count") == 3
            assert await metric(asked, f"{name}operation_output_tokens_count") == 3
            assert await metric(asked, f"{name}usage_output_tokens_total") > 0
