"""Requests that wait at their key: they are told so, take nothing of others, and leave nothing
behind, however their wait ends.
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat import CHAT, STREAMED, cancel, chat, frames_of, to_end, until_status
from tests.support.keys import auth_of, bearer, code_of, key_of, keys_of
from tests.support.server import CONCURRENCY, ENDLESS, PACED, MakeServer
from tests.support.simulator import Behaviour
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from aiohttp import ClientResponse

    from aioserver.limits.quota import Quota
    from tests.support.server import RunningServer

# Time passes at once where nobody has anything to do.
pytestmark = pytest.mark.virtual_time

PING = "chat.websocket.ping_interval"
WAITS = re.compile(rb": queued at=key position=(\d+) eta=(\d+\.\d)\n\n")
BRIEF = Behaviour(ttft=0.05, interval=0.005, tokens=10)
ANSWERS = {
    "responses": {"input": "Hello", "stream": True},
    "chat/completions": STREAMED,
    "messages": {**STREAMED, "max_tokens": 100},
}


def quota(server: RunningServer, name: str = "web") -> Quota:
    found: Quota | None = server.context.access.keys.caller(key_of(name).encode()).quota
    assert found is not None
    return found


def waiting(server: RunningServer, name: str = "web") -> int:
    return len(quota(server, name).queue)


async def post(
    server: RunningServer, path: str = "chat/completions", name: str = "web", **body: Any
) -> ClientResponse:
    data = body or ANSWERS[path]
    return await server.session.post(f"{server.v1}/{path}", json=data, headers=bearer(name))


@pytest.mark.parametrize("path", ANSWERS)
async def test_fifty_streams_of_one_key_at_four_places_are_all_answered_and_told(
    make_server: MakeServer, path: str
) -> None:
    changes = {PING: 0.1, f"{CONCURRENCY}.connection_queue_size": 100}
    server = await make_server(
        BRIEF, **keys_of("web", max_concurrent=4, queue_size=200), **changes
    )
    most = 0

    async def ask() -> list[int]:
        async with await post(server, path) as response:
            assert response.status == 200
            body = b""
            async for data in response.content.iter_any():
                nonlocal most
                most = max(most, quota(server).running)
                body += data
        assert any(end in body for end in (b"[DONE]", b"response.completed", b"message_stop"))
        return [int(position) for position, _ in WAITS.findall(body)]

    told = await asyncio.gather(*(ask() for _ in range(50)))

    assert most <= 4
    # Those that came first waited for less than one interval.
    positions = [each for each in told if each]
    assert len(positions) > 30
    assert all(first >= last for first, *_, last in (each + each for each in positions))
    assert {each[0] for each in positions} > set(range(10, 30))
    await server.nothing_held(30)


async def test_a_websocket_and_a_stream_of_events_are_told_where_they_wait(
    make_server: MakeServer,
) -> None:
    server = await make_server(ENDLESS, **keys_of("web", max_concurrent=1, queue_size=5))
    async with server.connect(headers=bearer("web")) as ws:
        await ws.send_json(chat("runs"))
        await until_status(ws, "chunk")
        await ws.send_json(chat("waits"))
        while (frame := await ws.receive_json(timeout=patience(20)))["request_id"] != "waits":
            pass
        assert frame["status"] == "queued"
        assert frame["chunk"] == {"at": "key", "position": 1, "eta": frame["chunk"]["eta"]}

        body = {"request_id": "sse", "text": "Hello"}
        async with server.session.post(server.sse, json=body, headers=bearer("web")) as response:
            data = await response.content.readuntil(b"\n\n")
            while b"queued" not in data:
                data = await response.content.readuntil(b"\n\n")
            (told,) = frames_of(data)
            assert told["chunk"]["at"] == "key"
            assert told["chunk"]["position"] == 2

            await ws.send_json(cancel("runs"))
            await to_end(ws, "runs")
            await until(lambda: waiting(server) == 1)
        await ws.send_json(cancel("waits"))
        await to_end(ws, "waits")
    async with server.session.delete(f"{server.sse}/sse", headers=bearer("web")):
        pass
    await server.nothing_held(30)


async def test_a_responses_websocket_is_told_too(make_server: MakeServer) -> None:
    server = await make_server(ENDLESS, **keys_of("web", max_concurrent=1, queue_size=5))
    url = server.v1.replace("http", "ws", 1) + "/responses"
    async with (
        server.session.ws_connect(url, headers=bearer("web")) as first,
        server.session.ws_connect(url, headers=bearer("web")) as second,
    ):
        for ws in (first, second):
            await ws.send_json({"type": "response.create", "input": "Hello"})
        await first.receive_json(timeout=patience(20))
        event = await second.receive_json(timeout=patience(20))
        assert event == {"type": "aioserver:queued", "at": "key", "position": 1, "eta": 1.0}
    await server.nothing_held(30)


async def test_whoever_waits_at_its_key_lends_its_place_to_others(make_server: MakeServer) -> None:
    changes = {f"{CONCURRENCY}.max_connections": 3, f"{CONCURRENCY}.connection_queue_size": 20}
    server = await make_server(
        ENDLESS, **keys_of("web", "app", max_concurrent=1, queue_size=50), **changes
    )
    admission = server.context.admission
    gate = admission.gate
    async with AsyncExitStack() as stack:
        tasks = [
            stack.enter_context(_cancelled(asyncio.create_task(post(server)))) for _ in range(8)
        ]
        await until(lambda: waiting(server) == 7)
        await until(lambda: admission.lent == 7)
        assert (gate.inside, gate.waiting, gate.slots) == (1, 0, 7)

        async with await post(server, name="app") as other:
            assert other.status == 200, "there is a place for another key"
            assert gate.inside == 2
        # The room of the queue is half theirs, and no more.
        tasks += [
            stack.enter_context(_cancelled(asyncio.create_task(post(server)))) for _ in range(3)
        ]
        await until(lambda: admission.lent == 10)
        async with await post(server) as refused:
            assert refused.status == 429
            assert await code_of(refused) == "concurrency_exceeded"
        assert waiting(server) == 10
        for task in tasks:
            task.cancel()
        await until(lambda: waiting(server) == 0)
    await server.nothing_held(30)


def _cancelled(task: asyncio.Task[ClientResponse]) -> Any:
    class Ends:
        def __enter__(self) -> asyncio.Task[ClientResponse]:
            return task

        def __exit__(self, *_exc: object) -> None:
            task.cancel()
            if task.done() and not task.cancelled():
                task.result().close()

    return Ends()


async def test_a_turn_takes_the_next_free_place_before_those_at_the_door(
    make_server: MakeServer,
) -> None:
    changes = {
        f"{CONCURRENCY}.max_connections": 2,
        f"{CONCURRENCY}.connection_queue_size": 20,
        f"{CONCURRENCY}.queue_timeout": 60.0,
        "chat.streams.resume_window": 0,
    }
    server = await make_server(
        ENDLESS,
        **keys_of("web", "app", max_concurrent=1, queue_size=5),
        **changes,
    )
    server.context.access.keys.apply(
        auth_of("web", max_concurrent=1, queue_size=5).all_keys
        + auth_of("app", max_concurrent=9).all_keys
    )
    gate = server.context.admission.gate
    runs = await post(server)
    returns = asyncio.create_task(post(server))
    await until(lambda: waiting(server) == 1)
    takes = await post(server, name="app")
    at_door = [asyncio.create_task(post(server, name="app")) for _ in range(3)]
    await until(lambda: gate.waiting == 3)
    assert gate.inside == 2

    # The place of the first one is free, and the turn of the second has come: whichever is first.
    runs.close()
    await until(
        lambda: (
            (returns.done() or any(task.done() for task in at_door))
            and waiting(server) == 0
            and gate.waiting == 3
        )
    )
    assert quota(server).running == 1

    takes.close()
    async with await asyncio.wait_for(returns, 30) as response:
        assert response.status == 200
        # Who came to the door first is not said.
        assert sum(task.done() for task in at_door) <= 1
    for answered in asyncio.as_completed(at_door, timeout=patience(30)):
        (await answered).close()
    await server.nothing_held(30)


async def end_by_leaving(_server: RunningServer, task: asyncio.Task[ClientResponse]) -> None:
    task.cancel()


async def end_by_revocation(server: RunningServer, task: asyncio.Task[ClientResponse]) -> None:
    revoked = server.context.access.apply(auth_of("app"))
    await server.context.gateway.revoke(revoked)
    async with await asyncio.wait_for(task, 30) as response:
        assert response.status == 401


async def end_by_stop(server: RunningServer, task: asyncio.Task[ClientResponse]) -> None:
    server.owners.drain()
    async with await asyncio.wait_for(task, 30) as response:
        assert response.status == 503
        assert await code_of(response) == "server_shutdown"


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("end", [end_by_leaving, end_by_revocation, end_by_stop])
async def test_a_wait_ends_at_once_and_leaves_nothing(
    make_server: MakeServer, end: Any, streamed: bool
) -> None:
    server = await make_server(
        ENDLESS,
        **keys_of("web", max_concurrent=1, queue_size=5),
        **{"chat.streams.resume_window": 0},
    )
    first = quota(server)
    runs = await post(server)
    task = asyncio.create_task(post(server, **{**CHAT, "stream": streamed}))
    await until(lambda: waiting(server) == 1)

    await end(server, task)

    await until(lambda: len(first.queue) == 0)
    runs.close()
    await server.nothing_held(30)
    assert first.running == 0


async def test_the_queue_of_a_key_is_bounded_and_fair_among_users(
    make_server: MakeServer,
) -> None:
    server = await make_server(PACED, **keys_of("web", max_concurrent=1, queue_size=6))
    ends: list[str] = []

    async def ask(user: str) -> int:
        async with await post(server, **{**CHAT, "user": user}) as response:
            if response.status == 200:
                await response.read()
                ends.append(user)
            return response.status

    tasks = []
    for user in ("many", "many", "many", "many", "many", "one", "many"):
        tasks.append(asyncio.create_task(ask(user)))
        await until(lambda: waiting(server) == len(tasks) - 1 or bool(ends))
    assert await ask("late") == 429

    assert await asyncio.gather(*tasks) == [200] * 7
    assert ends.index("one") <= 2, "behind the first of the user who asks most"
    await server.nothing_held(30)


async def test_a_whole_answer_waits_without_a_word(make_server: MakeServer) -> None:
    server = await make_server(PACED, **keys_of("web", max_concurrent=1, queue_size=50))

    async def ask() -> int:
        async with await post(server, **CHAT) as response:
            assert json.loads(await response.read())["choices"]
            return response.status

    assert await asyncio.gather(*(ask() for _ in range(4))) == [200] * 4
    await server.nothing_held(30)


@pytest.mark.parametrize("size", [1, 0])
async def test_a_reload_that_makes_the_queue_shorter_sends_nobody_away(
    make_server: MakeServer, size: int
) -> None:
    behaviour = Behaviour(ttft=0.0, interval=0.0, tokens=5)
    server = await make_server(ENDLESS, **keys_of("web", max_concurrent=1, queue_size=5))
    runs = await post(server)
    tasks = [asyncio.create_task(post(server, **CHAT)) for _ in range(3)]
    await until(lambda: waiting(server) == 3)

    assert await server.change(**keys_of("web", max_concurrent=1, queue_size=size))

    assert waiting(server) == 3
    async with await post(server, **CHAT) as refused:
        assert refused.status == 429
        assert await code_of(refused) == "concurrency_exceeded"
    server.simulator.behaviour = behaviour
    runs.close()
    for task in tasks:
        async with await asyncio.wait_for(task, 30) as response:
            assert response.status == 200
            await response.read()
    await server.nothing_held(30)
    assert quota(server).running == 0
