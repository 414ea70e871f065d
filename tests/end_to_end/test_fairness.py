"""Callers share a provider's work and not its starts, and batch uses what others leave: over
sockets, on faces that clients know.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import pytest

from aioserver.limits.fair_queue import LENGTH
from tests.support.keys import bearer, entry
from tests.support.server import (
    QUICK,
    SILENT,
    SIM_HTTP_CLIENT,
    MakeServer,
    RunningServer,
    provider_entry,
)
from tests.support.waiting import until

PLACES = f"{SIM_HTTP_CLIENT}.concurrent_requests"


def keys(**settings: Any) -> dict[str, Any]:
    """Callers by name, each with its settings beside those of all."""
    common = {"max_concurrent": 1000, "requests_per_minute": 100_000}
    return {
        "auth.keys": [entry(name, **common, **own) for name, own in settings.items()],
        # What is silent is no fault here.
        f"{SIM_HTTP_CLIENT}.read_timeout": 60.0,
    }


def body_of(tokens: int, **members: Any) -> dict[str, Any]:
    """A request with a prompt of about so many tokens, and an answer of one."""
    return {
        "messages": [{"role": "user", "content": "word" * tokens}],
        "max_tokens": 1,
        **members,
    }


async def ask(
    server: RunningServer, caller: str, tokens: int = 10, path: str = "chat/completions"
) -> int:
    """The status of an answer."""
    url = f"{server.v1}/{path}"
    body = body_of(tokens) if path == "chat/completions" else {"input": "word" * tokens}
    async with server.session.post(url, json=body, headers=bearer(caller)) as response:
        await response.read()
        return response.status


def charged(server: RunningServer, caller: str) -> float:
    """The work that *caller* was charged with, of whom nothing is known yet."""
    counter = server.provider.capacity.resource.queue.queues[0].callers.counters[caller]
    return float(counter.tag / LENGTH)


@contextlib.asynccontextmanager
async def waiting(server: RunningServer, *requests: tuple[str, int]) -> Any:
    """Requests of callers, with prompts of so many tokens, which wait behind one that ends with
    the block.
    """
    server.simulator.behaviour = SILENT
    first = asyncio.create_task(ask(server, "first"))
    await server.simulator.until(lambda stats: stats.active == 1)
    server.simulator.behaviour = QUICK
    tasks = []
    for count, (caller, tokens) in enumerate(requests, 1):
        tasks.append(asyncio.create_task(ask(server, caller, tokens)))
        await until(lambda count=count: server.provider.capacity.waiting == count)  # type: ignore[misc]
    yield
    first.cancel()
    assert set(await asyncio.gather(*tasks)) == {200}
    await asyncio.gather(first, return_exceptions=True)


def asked(server: RunningServer) -> list[int]:
    """The tokens of the prompts in the order in which the provider has got them."""
    return [
        len(body["messages"][0]["content"]) // 4
        for body in server.simulator.bodies
        if body["messages"][0]["content"].startswith("word")
    ][1:]


async def test_long_prompts_have_fewer_starts_than_short_ones(make_server: MakeServer) -> None:
    server = await make_server(QUICK, **keys(first={}, short={}, long={}), **{PLACES: 1})

    async with waiting(server, *[("long", 5000), ("short", 100)] * 8):
        pass

    # One long prompt is worth more than all short ones.
    assert asked(server) == [5000, *[100] * 8, *[5000] * 7]
    await server.nothing_held()


async def test_a_key_of_twice_the_priority_has_twice_the_work(make_server: MakeServer) -> None:
    server = await make_server(QUICK, **keys(first={}, one={}, two={"priority": 2}), **{PLACES: 1})

    async with waiting(server, *[("one", 100), ("two", 101)] * 9):
        pass

    order = asked(server)
    assert [order[:n].count(101) for n in (3, 6, 9, 12)] == pytest.approx([2, 4, 6, 8], abs=1)


@pytest.mark.parametrize(("path", "work"), [("chat/completions", 12), ("embeddings", 10)])
async def test_a_caller_is_charged_with_what_its_request_has_cost(
    make_server: MakeServer, path: str, work: int
) -> None:
    server = await make_server(QUICK, **keys(ann={}))

    assert await ask(server, "ann", 10, path) == 200

    await server.nothing_held()
    assert charged(server, "ann") == work


async def test_what_came_from_a_cache_costs_nothing(make_server: MakeServer) -> None:
    server = await make_server(replace(QUICK, cached=7), **keys(ann={}))

    assert await ask(server, "ann", 10) == 200

    await server.nothing_held()
    assert charged(server, "ann") == 5


async def test_a_refused_attempt_gives_its_estimate_back(make_server: MakeServer) -> None:
    server = await make_server(replace(QUICK, fail_rate=1.0), **keys(ann={}))

    assert await ask(server, "ann", 5000) == 502

    await server.nothing_held()
    assert charged(server, "ann") == 0


async def test_batch_leaves_a_place_and_uses_what_is_left(make_server: MakeServer) -> None:
    server = await make_server(
        SILENT, **keys(web={}, night={"class": "batch"}, root={}), **{PLACES: 3}
    )
    gate = server.provider.capacity
    nights = [asyncio.create_task(ask(server, "night")) for _ in range(2)]
    await until(lambda: gate.inside == 2)
    nights += [asyncio.create_task(ask(server, "night")) for _ in range(3)]
    await until(lambda: (gate.inside, gate.waiting) == (2, 3))

    # One that comes alone starts at once.
    web = [asyncio.create_task(ask(server, "web"))]
    await server.simulator.until(lambda stats: stats.active == 3)
    web.append(asyncio.create_task(ask(server, "web")))
    await until(lambda: gate.waiting == 4)
    server.context.monitor.tick()
    async with server.session.get(f"{server.base}/stats", headers=bearer("root")) as response:
        provider = (await response.json())["providers"]["sim"]
    async with server.session.get(f"{server.base}/metrics", headers=bearer("root")) as response:
        metrics = await response.text()

    assert provider["waiting_by_class"] == {"interactive": 1, "batch": 3}
    assert 'aioserver_queue_waiting{class="batch",provider="sim"} 3.0' in metrics
    # The next place is not for batch.
    nights.pop(0).cancel()
    await until(lambda: gate.waiting == 3)
    assert gate.stats().batch_waiting == 3
    for task in (*nights, *web):
        task.cancel()
    await asyncio.gather(*nights, *web, return_exceptions=True)
    await server.nothing_held()


async def test_batch_is_refused_where_half_of_the_queue_is_full(make_server: MakeServer) -> None:
    server = await make_server(
        SILENT,
        **keys(web={}, night={"class": "batch"}),
        **{PLACES: 1, f"{SIM_HTTP_CLIENT}.queue_size": 4},
    )
    gate = server.provider.capacity
    tasks = [asyncio.create_task(ask(server, "night")) for _ in range(3)]
    await until(lambda: (gate.inside, gate.waiting) == (1, 2))

    assert await ask(server, "night") == 503
    tasks.append(asyncio.create_task(ask(server, "web")))
    await until(lambda: gate.waiting == 3)

    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await server.nothing_held()


async def test_batch_stands_behind_in_every_line_of_a_group(make_server: MakeServer) -> None:
    both = {**keys(web={}, night={"class": "batch"}), PLACES: 1}
    server = await make_server(SILENT, **both)
    other = provider_entry(server.simulator.base_url, "other", concurrent_requests=1)
    pair = {"members": ["sim", "other"], "choose": "least_busy"}
    changes = {"llm.providers.other": other, "llm.models": {"pair": pair}}
    assert await server.change(**both, **changes)
    url = f"{server.v1}/chat/completions"
    started: list[str] = []

    async def grouped(caller: str) -> None:
        body = body_of(10, model="pair")
        async with server.session.post(url, json=body, headers=bearer(caller)) as response:
            await response.read()
        started.append(caller)

    running = [asyncio.create_task(grouped("web")) for _ in range(2)]
    gates = [server.provider.capacity, server.provider_of("other").capacity]
    await until(lambda: [gate.inside for gate in gates] == [1, 1])
    tasks = [asyncio.create_task(grouped(caller)) for caller in ("night", "web")]
    await until(lambda: [gate.waiting for gate in gates] == [2, 2])
    server.simulator.behaviour = QUICK
    for task in running:
        task.cancel()
    await asyncio.gather(*tasks)

    assert sorted(started) == ["night", "web"]
    assert [gate.stats().batch_waiting for gate in gates] == [0, 0]
    await asyncio.gather(*running, return_exceptions=True)
    await server.nothing_held()


async def test_a_changed_class_holds_for_new_requests(make_server: MakeServer) -> None:
    server = await make_server(SILENT, **keys(ann={}), **{PLACES: 2})
    gate = server.provider.capacity
    before = [asyncio.create_task(ask(server, "ann")) for _ in range(3)]
    await until(lambda: (gate.inside, gate.waiting) == (2, 1))

    assert await server.change(**keys(ann={"class": "batch"}), **{PLACES: 2})
    after = asyncio.create_task(ask(server, "ann"))
    await until(lambda: gate.waiting == 2)

    assert gate.stats().batch_waiting == 1
    for task in (*before, after):
        task.cancel()
    await asyncio.gather(*before, after, return_exceptions=True)
    await server.nothing_held()
