"""A provider that is away for a while, as a model server that restarts: `when_down: wait` and
`fail`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from yarl import URL

from aioserver.providers.breaker import TRIAL_INTERVAL
from tests.support.absent import AbsentProvider
from tests.support.chat import STREAMED, chat
from tests.support.faces import Seen, ask_every_face, over_openai, over_sse, over_websocket
from tests.support.failing import kill, left_alone
from tests.support.raw import Raw
from tests.support.scripted_provider import Peer, ScriptedProvider
from tests.support.server import QUICK, SILENT, MakeServer, RunningServer, provider_entry
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# Time passes at once where nobody has anything to do.
pytestmark = pytest.mark.virtual_time

LOADING = Behaviour(fail_rate=1.0, fail_status=503)
NOT_READY = (
    b"HTTP/1.1 503 Service Unavailable\r\n"
    b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
)


@pytest.fixture
async def away() -> AsyncIterator[AbsentProvider]:
    async with AbsentProvider() as provider:
        yield provider


def behind(away: AbsentProvider, when_down: str = "wait", **limits: Any) -> dict[str, Any]:
    """The changes that make the provider that is *away* the one that is asked first."""
    entry = provider_entry(away.url, "far-model", **limits) | {"when_down": when_down}
    return {"llm.active": "far", "llm.providers.far": entry}


def waiting(server: RunningServer) -> int:
    """How many requests wait for the provider `far`."""
    return int(server.provider_of("far").stats().queue.waiting)


async def waiters(server: RunningServer, *, known: bool) -> asyncio.Task[list[Seen]]:
    """Ask on every face, and return when all wait; with *known* the provider is known as dead
    before.
    """
    if known:
        kill(server.provider_of("far").health.breaker, unreachable=True)
    asking = asyncio.create_task(ask_every_face(server, "far"))
    await until(lambda: waiting(server) == 4)
    return asking


@pytest.mark.parametrize("known", [False, True])
async def test_requests_wait_until_it_is_back_on_every_face(
    make_server: MakeServer, away: AbsentProvider, *, known: bool
) -> None:
    server = await make_server(**behind(away))
    asking = await waiters(server, known=known)

    await away.come(server.simulator.port)

    assert [answer.end for answer in await asking] == ["complete"] * 4
    far = server.provider_of("far").stats()
    assert (far.state, far.budget.used) == ("well", 0)
    assert not await server.counted("retries", "reason"), "they cost no retry"
    assert not await server.counted("rejections", "code")
    await server.nothing_held()


async def test_requests_wait_for_an_engine_that_loads_its_model(
    make_server: MakeServer, away: AbsentProvider
) -> None:
    server = await make_server(LOADING, **behind(away))
    await away.come(server.simulator.port)
    asking = await waiters(server, known=False)
    await server.simulator.until(lambda stats: stats.requests > 4)

    server.simulator.behaviour = QUICK

    assert [answer.end for answer in await asking] == ["complete"] * 4
    await server.nothing_held()


async def test_by_default_nobody_waits(make_server: MakeServer, away: AbsentProvider) -> None:
    server = await make_server(**behind(away, "fail"))
    assert {answer.code for answer in await ask_every_face(server, "m")} == {"connect_error"}
    with left_alone(server.provider_of("far").health.breaker, unreachable=True):
        assert {answer.code for answer in await ask_every_face(server, "n")} == {"circuit_open"}
    await server.nothing_held()


async def test_a_provider_that_fails_otherwise_is_not_waited_for(
    make_server: MakeServer, away: AbsentProvider
) -> None:
    server = await make_server(Behaviour(fail_rate=1.0, fail_status=500), **behind(away))
    await away.come(server.simulator.port)
    assert {answer.code for answer in await ask_every_face(server, "m")} == {"provider_error"}
    with left_alone(server.provider_of("far").health.breaker):
        assert {answer.code for answer in await ask_every_face(server, "n")} == {"circuit_open"}
    await server.nothing_held()


async def test_the_queue_timeout_ends_the_wait(
    make_server: MakeServer, away: AbsentProvider
) -> None:
    server = await make_server(**behind(away, queue_timeout=0.3))
    with left_alone(server.provider_of("far").health.breaker, unreachable=True):
        seen = await ask_every_face(server, "far")

    assert {answer.code for answer in seen} == {"provider_queue_timeout"}
    assert [answer.status for answer in seen[2:]] == [503, 503]
    assert "was not back within 0.3 s" in seen[0].error["error"]
    await server.nothing_held()


@pytest.mark.parametrize("known", [False, True])
async def test_clients_that_leave_leave_the_queue(
    make_server: MakeServer, away: AbsentProvider, *, known: bool
) -> None:
    server = await make_server(**behind(away))
    asking = await waiters(server, known=known)

    asking.cancel()
    await asyncio.wait((asking,))

    await server.nothing_held()
    assert waiting(server) == 0


@pytest.mark.parametrize("known", [False, True])
async def test_a_stop_of_the_server_ends_the_wait(
    make_server: MakeServer, away: AbsentProvider, *, known: bool
) -> None:
    server = await make_server(**behind(away))
    asking = await waiters(server, known=known)

    server.context.gateway.drain()

    assert {answer.code for answer in await asking} == {"server_shutdown"}
    await server.nothing_held()


@pytest.mark.parametrize("known", [False, True])
async def test_the_queue_is_bounded_for_them_as_well(
    make_server: MakeServer, away: AbsentProvider, *, known: bool
) -> None:
    server = await make_server(**behind(away, queue_size=4))
    asking = await waiters(server, known=known)

    seen = await over_openai(server, "far")

    assert (seen.status, seen.code) == (503, "provider_queue_full")
    assert seen.headers["retry-after"] in {"1", "2"}
    # An SDK may ask again.
    assert "x-should-retry" not in seen.headers
    queue = server.provider_of("far").stats().queue
    assert queue.waiting + queue.inside == 4
    await away.come(server.simulator.port)

    assert [answer.end for answer in await asking] == ["complete"] * 4


async def test_a_reload_ends_the_wait_or_begins_it(
    make_server: MakeServer, away: AbsentProvider
) -> None:
    server = await make_server(**behind(away))
    asking = await waiters(server, known=True)

    assert await server.change(**behind(away, "fail"))
    assert {answer.code for answer in await asking} <= {"circuit_open", "connect_error"}

    assert await server.change(**behind(away, "wait"))
    asking = asyncio.create_task(ask_every_face(server, "n"))
    await until(lambda: waiting(server) == 4)
    moved = behind(away)
    moved["llm.providers.far"]["base_url"] = server.simulator.base_url
    assert await server.change(**moved)
    assert [answer.end for answer in await asking] == ["complete"] * 4
    await server.nothing_held()


async def test_a_fallback_answers_instead_of_a_wait(
    make_server: MakeServer, away: AbsentProvider
) -> None:
    server = await make_server(**behind(away), **{"llm.fallbacks": ["sim"]})
    for known in (False, True):
        if known:
            kill(server.provider_of("far").health.breaker, unreachable=True)
        seen = await ask_every_face(server, f"m{known}")
        assert [answer.end for answer in seen] == ["complete"] * 4
        assert seen[2].headers["x-aioserver-provider"] == "sim"
    # A request that is pinned has no fallback.
    pinned = asyncio.create_task(over_openai(server, "far"))
    await until(lambda: waiting(server) == 1)
    await away.come(server.simulator.port)
    assert (await pinned).headers["x-aioserver-provider"] == "far"
    await server.nothing_held()


async def test_while_it_is_away_it_gets_only_trials(
    make_server: MakeServer, away: AbsentProvider
) -> None:
    server = await make_server(**behind(away))
    clock = asyncio.get_running_loop().time
    began = clock()
    asking = await waiters(server, known=True)
    far = server.provider_of("far")

    await until(lambda: far.meter.attempts["connect_error"].value >= 2)

    attempts = far.meter.attempts["connect_error"].value
    assert attempts <= (clock() - began) / TRIAL_INTERVAL, "one each half second, for all of them"
    assert waiting(server) + far.stats().queue.inside == 4, "the one that tried waits on"
    await away.come(server.simulator.port)
    assert [answer.end for answer in await asking] == ["complete"] * 4
    late = [over_websocket(server, "m", "late"), over_sse(server, "late")]
    assert [answer.end for answer in await asyncio.gather(*late)] == ["complete"] * 2


async def ask_for_later(server: RunningServer, name: str) -> None:
    """Ask on SSE for an answer that is read later, or never."""
    body, headers = {"request_id": name, "text": "Hello"}, {"Prefer": "respond-async"}
    async with server.session.post(server.sse, json=body, headers=headers) as response:
        assert response.status == 202


async def test_a_client_that_has_left_does_not_wait_for_an_engine_that_loads(
    make_server: MakeServer,
) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def play(peer: Peer) -> None:
        while True:
            await peer.request()
            asked.set()
            await answer.wait()
            await peer.send(NOT_READY)

    async with ScriptedProvider(play) as engine:
        entry = provider_entry(engine.url, "far-model", queue_timeout=60.0) | {"when_down": "wait"}
        server = await make_server(
            **{"llm.active": "far", "llm.providers.far": entry, "chat.streams.resume_window": 60.0}
        )
        async with Raw(server) as raw:
            await raw.ask_sse("r1", text="Hello")
            await asked.wait()
        await until(lambda: server.held()["detached"] == 1)

        answer.set()

        # As one that leaves while it waits.
        await server.nothing_held()


async def test_an_answer_that_is_to_be_fetched_later_waits_for_an_engine_that_loads(
    make_server: MakeServer, away: AbsentProvider
) -> None:
    server = await make_server(LOADING, **behind(away))
    await away.come(server.simulator.port)
    await ask_for_later(server, "r1")
    await server.simulator.until(lambda stats: stats.requests > 1)
    assert server.held()["background"] == 1

    server.simulator.behaviour = QUICK

    async with server.session.get(f"{server.sse}/r1") as response:
        assert b"event: complete" in await response.read()
    await server.nothing_held()


async def test_an_answer_in_the_background_does_not_give_way_when_it_has_waited(
    make_server: MakeServer, away: AbsentProvider
) -> None:
    # It is parked for 2 s, so that the others come before it is back.
    limits: dict[str, Any] = {"backoff_factor": 30.0, "concurrent_requests": 1}
    server = await make_server(LOADING, **behind(away, **limits))
    await away.come(server.simulator.port)
    await ask_for_later(server, "nobody reads it")
    await until(lambda: waiting(server) == 1)
    server.simulator.behaviour = SILENT
    async with Raw(server) as raw, server.connect() as ws:
        await raw.post("/v1/chat/completions", STREAMED)
        await server.simulator.until(lambda stats: stats.active == 1)
        await ws.send_json(chat("somebody reads it"))
        frame = await ws.receive_json()
        while frame["chunk"].get("position") != 2:
            # The other one is parked. Then it is in front.
            assert frame["status"] == "queued"
            frame = await ws.receive_json()

        # The place is free, and the next one to get it is that in front.
        raw.close()
        await until(lambda: server.provider_of("far").stats().background == (1, 0))
        await server.simulator.until(lambda stats: stats.aborted == 1 and stats.active == 1)
        url = URL(f"{server.sse}/nobody%20reads%20it", encoded=True)
        async with server.session.delete(url) as response:
            assert response.status == 204

        while frame["status"] == "queued":
            frame = await ws.receive_json()
        assert frame["status"] == "processing"
        assert not server.held()["detached"]
        await ws.send_json({"action": "cancel", "request_id": "somebody reads it"})
    await server.nothing_held()
