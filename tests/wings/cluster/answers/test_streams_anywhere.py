"""Any instance resumes, attaches to, lists and cancels any stream; each is answered once."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.limits.quota import Quota
from tests.support.chat import (
    CHAT,
    STREAMED,
    cancel,
    chat,
    numbers,
    read_frames,
    resume,
    text_of,
    to_end,
    until_status,
)
from tests.support.instances import World, answered, instance_of
from tests.support.keys import bearer, keys_of
from tests.support.server import ENDLESS, PACED, QUICK, SIM_HTTP_CLIENT
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from aioserver.config.settings import ClientKey
    from aioserver.limits.scheduler import Scheduler
    from tests.support.instances import Instance, Make


KEY = {"Idempotency-Key": "k1"}
RESPONSE = {"model": "sim", "input": "Hello", "store": True}


async def patiently(at: Instance, request_id: str, after: int) -> list[Any]:
    """Resume as often as an error says that it may help."""
    events: list[Any] = []
    while True:
        async with at.server.connect() as ws:
            await ws.send_json(resume(request_id, events[-1]["event_id"] if events else after))
            frames = await to_end(ws)
        if "event_id" in frames[-1]:
            return events + frames
        assert frames[-1]["chunk"]["retryable"], frames[-1]
        events += frames[:-1]


def asked_once(*every: Instance) -> bool:
    return sum(instance.requests for instance in every) == 1


@pytest.mark.parametrize("after", [0, 7])
async def test_a_finished_stream_is_resumed_elsewhere_without_a_gap(
    make: Make, after: int
) -> None:
    a, b = await make()
    whole = await answered(a)

    async with b.server.connect() as ws:
        await ws.send_json(resume("r1", after))
        rest = await to_end(ws)

    assert rest == whole[after:]
    assert asked_once(a, b)


async def test_a_client_that_leaves_while_its_id_is_claimed_finds_the_answer_again(
    make: Make,
) -> None:
    a, b = await make()
    async with a.server.connect() as first:
        await first.send_json(chat("r1"))
        seen = await until_status(first, "chunk")
        async with b.server.connect() as second:
            await second.send_json(chat("r1"))
            # This takes the place of the first reader, before it is known who answers.
            await second.send_json(resume("r1", 1))
            rest = await to_end(second)
        whole = seen + await to_end(first)

    # The first one may have got some of it.
    assert rest[-len(whole[1:]) :] == whole[1:]
    assert await answered(b) == whole
    async with b.server.session.get(b.server.sse) as response:
        assert len((await response.json())["streams"]) == 1


async def test_of_two_that_ask_at_once_one_asks_the_provider(make: Make) -> None:
    every = await make(3)

    answers = await asyncio.gather(*(answered(instance) for instance in every))

    assert answers[0] == answers[1] == answers[2]
    assert asked_once(*every)


async def test_sse_attaches_and_resumes_elsewhere(make: Make) -> None:
    a, b = await make()
    whole = await answered(a)

    async with b.server.session.get(
        f"{b.server.sse}/r1", headers={"Last-Event-ID": "5"}
    ) as response:
        assert response.status == 200
        assert await read_frames(response) == whole[5:]
    body = {"request_id": "r1", "text": "Hello"}
    async with b.server.session.post(b.server.sse, json=body) as response:
        assert await read_frames(response) == whole
    async with b.server.session.post(
        b.server.sse, json=body, headers={"Last-Event-ID": "39"}
    ) as response:
        assert await read_frames(response) == whole[39:]
    async with b.server.session.get(
        f"{b.server.sse}/r1", headers={"Last-Event-ID": str(len(whole))}
    ) as response:
        assert response.status == 204
    assert asked_once(a, b)


MESSAGE: dict[str, Any] = {"model": "sim", "max_tokens": 100_000, **CHAT}


@pytest.mark.parametrize("model", ["sim", "fault-status-529"])
@pytest.mark.parametrize("streamed", [True, False])
async def test_an_answer_of_anthropics_api_is_the_same_elsewhere(
    make: Make, model: str, streamed: bool
) -> None:
    a, b = await make(2)
    answers = []
    for instance in (a, b):
        async with instance.server.session.post(
            f"{instance.server.v1}/messages",
            json={**MESSAGE, "model": model, "stream": streamed},
            headers=KEY,
        ) as response:
            answers.append((response.status, await response.read()))

    assert answers[0] == answers[1]
    assert answers[0][0] == (200 if model == "sim" else 529)
    assert asked_once(a, b)


def request(method: str, path: str, **options: Any) -> Callable[[Instance], Awaitable[object]]:
    """A request, whose status is 200 or whose error has a code."""

    async def ask(at: Instance) -> object:
        async with at.server.session.request(method, at.server.base + path, **options) as response:
            body = await response.read()
            return response.status if response.ok else json.loads(body)["error"]["code"]

    return ask


def frame(sent: dict[str, Any]) -> Callable[[Instance], Awaitable[object]]:
    async def ask(at: Instance) -> object:
        async with at.server.connect() as ws:
            await ws.send_json(sent)
            last = (await to_end(ws))[-1]
        return last["chunk"].get("code", last["status"])

    return ask


@pytest.mark.parametrize(
    ("ask", "over"),
    [
        (frame(chat("r2")), False),
        (frame(chat("r1")), False),
        (frame(resume("r1", 1)), False),
        (frame(resume("r1", 1)), True),
        (request("POST", "/sse/chat", json={"request_id": "r2", "text": "Hello"}), False),
        (request("POST", "/sse/chat", json={"request_id": "r1", "text": "Hello"}), True),
        (request("GET", "/sse/chat/r1", headers={"Last-Event-ID": "1"}), False),
        (request("GET", "/sse/chat/r1", headers={"Last-Event-ID": "1"}), True),
        (request("POST", "/v1/chat/completions", json=CHAT, headers=KEY), False),
        (request("POST", "/v1/chat/completions", json=STREAMED, headers=KEY), True),
    ],
)
async def test_whoever_comes_while_a_server_drains_hears_so_and_of_no_cancel(
    make: Make, world: World, ask: Callable[[Instance], Awaitable[object]], over: bool
) -> None:
    a, b = await make()
    async with a.server.connect() as ws:
        await ws.send_json(chat("r1"))
        await (to_end(ws) if over else until_status(ws, "chunk"))
        # Nothing is known yet of whose answer it is, and nobody reads it.
        world.meanwhile = b.server.owners.drain

        assert await ask(b) in {"server_shutdown", "complete", 200}
        assert world.meanwhile is None


@pytest.mark.parametrize("after", [0, 1])
async def test_an_answer_that_draining_ends_is_not_one_that_was_cancelled(
    make: Make, after: int
) -> None:
    a, b = await make(2, ENDLESS)
    async with a.server.connect() as ws:
        await ws.send_json(chat("r1"))
        await until_status(ws, "chunk")
    await until(lambda: a.server.held()["detached"] == 1)

    a.server.owners.drain()
    await until(lambda: not a.server.context.gateway.running)
    b.server.simulator.behaviour = QUICK

    # What has begun is lost, and a question is answered anew.
    if after:
        assert await frame(resume("r1", after))(b) == "stream_not_found"
    else:
        assert await frame(chat("r1"))(b) == "complete"


async def test_a_question_that_waited_elsewhere_is_answered_when_its_client_comes_back(
    make: Make,
) -> None:
    a, b = await make(2, ENDLESS, **{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1})
    async with a.server.connect() as ws:
        await ws.send_json(chat("other"))
        await until_status(ws, "chunk")
        async with a.server.connect() as leaving:
            await leaving.send_json(chat("r1"))
            await until(lambda: a.server.owners.waiting == 1)
        await until(lambda: a.server.owners.waiting == 0)
        b.server.simulator.behaviour = QUICK

        assert await frame(chat("r1"))(b) == "complete"
        await ws.send_json(cancel("other"))
        await to_end(ws)


@pytest.mark.parametrize("behaviour", [PACED, ENDLESS])
async def test_another_payload_of_a_known_id_is_a_conflict(
    make: Make, behaviour: Behaviour
) -> None:
    a, b = await make(2, behaviour)
    async with a.server.connect() as ws:
        await ws.send_json(chat("r1"))
        await until_status(ws, "chunk")

        refused = await answered(b, text="Other")
        body = {"request_id": "r1", "text": "Other"}
        async with b.server.session.post(b.server.sse, json=body) as response:
            assert response.status == 409
            assert (await response.json())["error"]["code"] == "request_conflict"
        await ws.send_json(cancel("r1"))
        await to_end(ws)
    same = await answered(b)

    assert [frame["chunk"]["code"] for frame in refused] == ["request_conflict"]
    assert same[-1]["status"] == "cancelled"
    assert asked_once(a, b)


def asking(key: ClientKey, scheduler: Scheduler | None = None) -> Quota:
    """A quota that has no place in hand, and asks others for one."""
    quota = Quota(key.max_concurrent, key.requests_per_minute, scheduler=scheduler)
    quota.resource.places.resize(0)
    quota.resource.grace = 60.0
    return quota


async def test_a_question_that_is_answered_elsewhere_asks_for_no_place_of_its_key(
    world: World, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        changes = keys_of("web")
        a = await instance_of(world, stack, tmp_path, "a", changes=changes)
        b = await instance_of(world, stack, tmp_path, "b", changes=changes, make_quota=asking)
        for at, text, status in ((a, "Hello", 200), (b, "Hello", 200), (b, "Other", 409)):
            body = {"request_id": "r1", "text": text}
            async with at.server.session.post(
                at.server.sse, json=body, headers=bearer("web")
            ) as response:
                await response.read()
                assert response.status == status

        # Otherwise it would wait for its place, and never end.
        (quota,) = b.server.context.access.quotas().values()
        assert (quota.resource.waiting, quota.resource.slots, quota.running) == (0, 0, 0)


async def test_a_stream_of_another_key_is_not_found_elsewhere(make: Make) -> None:
    a, b = await make(2, PACED, **keys_of("one", "two"))
    async with a.server.connect(headers=bearer("one")) as ws:
        await ws.send_json(chat("r1", conversation_id="c1"))
        whole = await to_end(ws)

    for name, known in (("one", True), ("two", False)):
        headers = bearer(name)
        async with b.server.session.get(f"{b.server.sse}/r1", headers=headers) as response:
            assert response.status == (200 if known else 404)
        async with b.server.session.get(b.server.sse, headers=headers) as response:
            assert len((await response.json())["streams"]) == known
        async with b.server.session.delete(f"{b.server.sse}/r1", headers=headers) as response:
            assert response.status == (204 if known else 404)
        async with b.server.connect(headers=headers) as ws:
            await ws.send_json(resume("r1", 1))
            rest = await to_end(ws)
        assert rest == whole[1:] if known else rest[-1]["chunk"]["code"] == "stream_not_found"
        assert known or "event_id" not in rest[-1]
        async with b.server.connect(headers=headers) as ws:
            await ws.send_json(chat(f"of-{name}", "again", conversation_id="c1"))
            await to_end(ws)
        sent = b.server.simulator.bodies[-1]["messages"]
        assert len(sent) == (3 if known else 1)
    # The id of another key is free.
    async with b.server.connect(headers=bearer("two")) as ws:
        await ws.send_json(chat("r1"))
        await to_end(ws)
    assert (a.requests, b.requests) == (1, 3)


async def test_an_answer_elsewhere_counts_for_no_limit_of_its_key_here(make: Make) -> None:
    limits = {"max_concurrent": 1, "requests_per_minute": 2}
    a, b = await make(2, PACED, **keys_of("one", **limits))
    headers = bearer("one")
    async with a.server.connect(headers=headers) as first:
        await first.send_json(chat("r1"))
        await until_status(first, "chunk")
        for _ in range(3):
            async with b.server.connect(headers=headers) as ws:
                await ws.send_json(chat("r1"))
                await until_status(ws, "chunk")
        await to_end(first)
    async with b.server.connect(headers=headers) as ws:
        await ws.send_json(chat("r2"))
        assert (await to_end(ws))[-1]["status"] == "complete"


@pytest.mark.parametrize("face", ["websocket", "sse"])
async def test_a_stream_is_cancelled_from_elsewhere(make: Make, face: str) -> None:
    a, b = await make(2, ENDLESS)
    async with a.server.connect() as first, b.server.connect() as second:
        await first.send_json(chat("r1"))
        await until_status(first, "chunk")

        if face == "sse":
            async with b.server.session.delete(f"{b.server.sse}/r1") as response:
                assert response.status == 204
        else:
            await second.send_json(cancel("r1"))
            assert (await to_end(second))[-1]["status"] == "cancelled"
        frames = await to_end(first)

        if face == "websocket":
            await second.send_json(cancel("r1"))
            assert (await to_end(second)) == [frames[-1]]

    assert frames[-1]["status"] == "cancelled"
    await a.server.simulator.until(lambda stats: stats.active == 0)


async def test_a_cancel_of_an_answer_that_is_followed_elsewhere_ends_it_with_all_its_events(
    make: Make,
) -> None:
    a, b = await make(2, ENDLESS)
    async with a.server.connect() as first, b.server.connect() as second:
        await first.send_json(chat("r1"))
        await until_status(first, "chunk")
        await second.send_json(resume("r1"))
        seen = await until_status(second, "chunk")

        await second.send_json(cancel("r1"))
        seen += await to_end(second)
        await to_end(first)

    assert numbers(seen) == list(range(1, len(seen) + 1))
    assert seen[-1]["status"] == "cancelled"
    await until(lambda: b.cluster.stats().tunnels == 0)


async def test_looking_for_what_nobody_has_leaves_nothing_behind(make: Make) -> None:
    _a, b = await make()
    before = b.server.owners.streams.stats()
    for number in range(20):
        async with b.server.session.get(f"{b.server.sse}/unknown-{number}") as response:
            assert response.status == 404
        async with b.server.session.get(f"{b.server.v1}/responses/{number}") as response:
            assert response.status == 404
    async with b.server.session.delete(f"{b.server.sse}/r1") as response:
        assert response.status == 404

    assert b.server.owners.streams.stats() == before
    async with b.server.connect() as ws:
        for frame in (resume("r1", 3), cancel("r1")):
            await ws.send_json(frame)
            (error,) = await to_end(ws)
            assert error["chunk"]["code"] == "stream_not_found"
            assert "event_id" not in error
    await until(lambda: b.server.owners.streams.stats() == before)


async def test_streams_of_all_instances_are_listed(make: Make) -> None:
    a, b, c = await make(3)
    await answered(a, "r1")
    await answered(b, "r2")

    for instance in (a, b, c):
        async with instance.server.session.get(instance.server.sse) as response:
            listed = {entry["request_id"] for entry in (await response.json())["streams"]}
        assert listed == {"r1", "r2"}


async def test_a_list_does_not_wait_for_an_instance_that_is_gone(make: Make, world: World) -> None:
    a, b, c = await make(3)
    await answered(a, "r1")
    await answered(b, "r2")
    world.kill("a")

    async with c.server.session.get(c.server.sse) as response:
        listed = [entry["request_id"] for entry in (await response.json())["streams"]]

    assert listed == ["r2"]


@pytest.mark.parametrize("seed", range(2))
async def test_what_a_broken_connection_loses_is_made_good(
    make: Make, world: World, seed: int
) -> None:
    a, b = await make(2, Behaviour(ttft=0, interval=0.01, tokens=60))
    whole = await answered(a)
    world.random = random.Random(seed)
    world.broken = 0.7
    started = asyncio.get_running_loop().time()
    running = asyncio.create_task(answered(a, "r2"))
    await asyncio.sleep(0.1)

    rest, live = await patiently(b, "r1", 3), await patiently(b, "r2", 0)
    first = await running

    assert rest == whole[3:], f"{seed=}"
    assert live == first, f"{seed=}"
    assert asyncio.get_running_loop().time() - started < 60


async def test_a_stored_response_is_read_elsewhere(make: Make) -> None:
    a, b = await make()
    async with a.server.session.post(
        f"{a.server.v1}/responses", json={**RESPONSE, "stream": True}
    ) as response:
        events = await response.read()
    async with a.server.session.post(f"{a.server.v1}/responses", json=RESPONSE) as response:
        whole = await response.json()
    streamed = events.split(b'"id":"', 1)[1].split(b'"', 1)[0].decode()

    for instance in (a, b):
        url = f"{instance.server.v1}/responses"
        async with instance.server.session.get(f"{url}/{whole['id']}") as response:
            assert (response.status, await response.json()) == (200, whole)
        async with instance.server.session.get(f"{url}/{streamed}") as response:
            assert (await response.json())["status"] == "completed"
        async with instance.server.session.get(f"{url}/{streamed}?stream=true") as response:
            assert await response.read() == events
        later = f"{url}/{streamed}?stream=true&starting_after=3"
        async with instance.server.session.get(later) as response:
            rest = await response.read()
        assert events.endswith(rest)
        assert b'"sequence_number":4' in rest.split(b"\n\n", 1)[0]
        async with instance.server.session.get(
            f"{url}/{streamed}?starting_after=900&stream=true"
        ) as r:
            assert r.status == 409
        async with instance.server.session.post(f"{url}/{streamed}/cancel") as response:
            assert (await response.json())["status"] == "completed"
    await until(lambda: b.cluster.stats().tunnels == 0)


async def test_a_conversation_goes_on_at_another_instance(make: Make) -> None:
    a, b = await make()
    await answered(a, "r1", text="one", conversation_id="c1")
    await answered(b, "r2", text="two", conversation_id="c1")
    await answered(a, "r3", text="three", conversation_id="c1")

    contents = [message["content"] for message in a.server.simulator.bodies[-1]["messages"]]
    assert contents[0::2] == ["one", "two", "three"]


async def test_a_finished_log_survives_a_graceful_stop(make: Make, world: World) -> None:
    a, b = await make()
    whole = await answered(a)
    async with a.server.session.post(
        f"{a.server.v1}/chat/completions", json=CHAT, headers=KEY
    ) as response:
        body = await response.read()
    await a.leave()

    async with b.server.connect() as ws:
        await ws.send_json(resume("r1", 7))
        assert await to_end(ws) == whole[7:]
    assert await answered(b) == whole
    refused = await answered(b, text="Other")
    assert refused[-1]["chunk"]["code"] == "request_conflict"
    async with b.server.session.post(
        f"{b.server.v1}/chat/completions", json=CHAT, headers=KEY
    ) as response:
        assert await response.read() == body
    async with b.server.session.delete(f"{b.server.sse}/r1") as response:
        assert response.status == 204
    assert b.requests == 0
    assert world.logs


async def test_redis_away_leaves_each_instance_with_its_own_streams(
    make: Make, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await make()
    world.away = True

    await answered(a)
    await answered(b)
    async with b.server.session.get(f"{b.server.sse}/r9") as response:
        assert (await response.json())["error"]["code"] == "instance_unavailable"

    assert (a.requests, b.requests) == (1, 1)
    assert a.cluster.stats().unclaimed == 1
    assert [r.message for r in caplog.records if "no answer of the cluster" in r.message]


async def test_a_plain_relay_asks_the_cluster_nothing(make: Make, world: World) -> None:
    a, _b = await make()
    for body in (CHAT, STREAMED):
        async with a.server.session.post(f"{a.server.v1}/chat/completions", json=body) as response:
            await response.read()

    assert world.calls == 0


async def test_an_answer_that_is_read_elsewhere_is_kept_alive(make: Make) -> None:
    a, b = await make(2, PACED, **{"chat.streams.resume_window": 0.05})
    async with b.server.connect() as second:
        async with a.server.connect() as first:
            await first.send_json(chat("r1"))
            await until_status(first, "chunk")
            await second.send_json(resume("r1"))
            seen = await until_status(second, "chunk")
        seen += await to_end(second)

    assert seen[-1]["status"] == "complete"
    assert text_of(seen)
