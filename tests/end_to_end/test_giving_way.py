"""An answer that nobody reads gives its place at the provider to a request that waits."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat import CHAT, STREAMED, chat
from tests.support.raw import Raw
from tests.support.server import QUICK, SILENT, SIM_HTTP_CLIENT, SLOW, MakeServer
from tests.support.simulator import Behaviour
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.server import RunningServer

PATH = "/v1/chat/completions"
CHANGES: dict[str, Any] = {
    "chat.streams.resume_window": 60.0,
    f"{SIM_HTTP_CLIENT}.concurrent_requests": 1,
    f"{SIM_HTTP_CLIENT}.read_timeout": 60.0,
    f"{SIM_HTTP_CLIENT}.queue_timeout": 30.0,
}


async def websocket(raw: Raw, name: str) -> None:
    assert (await raw.upgrade()).status == 101
    await raw.send_json(chat(name))


async def sse(raw: Raw, name: str) -> None:
    await raw.ask_sse(name, text="Hello")


async def keyed(raw: Raw, name: str) -> None:
    await raw.post(PATH, STREAMED, f"Idempotency-Key: {name}")


async def keyed_whole(raw: Raw, name: str) -> None:
    await raw.post(PATH, CHAT, f"Idempotency-Key: {name}")


Ask = [websocket, sse, keyed, keyed_whole]


async def answer(server: RunningServer) -> int:
    async with server.session.post(f"{server.base}{PATH}", json=CHAT) as response:
        await response.read()
        return response.status


@pytest.mark.virtual_time
@pytest.mark.parametrize("ask", Ask)
async def test_a_reader_that_leaves_while_somebody_waits_frees_the_place(
    make_server: MakeServer, ask: Callable[[Raw, str], Awaitable[None]]
) -> None:
    server = await make_server(SILENT, **CHANGES)

    async with Raw(server) as raw:
        await ask(raw, "r1")
        await server.simulator.until(lambda stats: stats.active == 1)
        server.simulator.behaviour = QUICK
        waiting = asyncio.ensure_future(answer(server))
        await until(lambda: server.held()["sim waiting"] == 1)

    assert await asyncio.wait_for(waiting, patience(10)) == 200
    await server.nothing_held()
    assert server.simulator.stats().aborted == 1


@pytest.mark.virtual_time
@pytest.mark.parametrize("ask", Ask)
async def test_an_answer_that_nobody_reads_gives_way_to_a_request_that_comes(
    make_server: MakeServer, ask: Callable[[Raw, str], Awaitable[None]]
) -> None:
    server = await make_server(SILENT, **CHANGES)

    async with Raw(server) as raw:
        await ask(raw, "r1")
        await server.simulator.until(lambda stats: stats.active == 1)
    await until(lambda: server.held()["detached"] == 1)
    server.simulator.behaviour = QUICK

    assert await asyncio.wait_for(answer(server), patience(10)) == 200
    await server.nothing_held()


@pytest.mark.virtual_time
async def test_a_stream_that_waits_for_its_retry_is_not_chosen(make_server: MakeServer) -> None:
    server = await make_server(
        Behaviour(fail_rate=1.0),
        **CHANGES,
        **{f"{SIM_HTTP_CLIENT}.max_retries": 1, f"{SIM_HTTP_CLIENT}.backoff_factor": 30.0},
    )

    async with Raw(server) as raw:
        await sse(raw, "waits for its retry")
        await until(lambda: server.simulator.stats().requests == 1)
        await until(lambda: not server.held()["sim places"])
    await until(lambda: server.held()["detached"] == 1)
    server.simulator.behaviour = SLOW
    async with Raw(server) as raw:
        await sse(raw, "holds the place")
        await server.simulator.until(lambda stats: stats.active == 1)
    await until(lambda: server.held()["detached"] == 2)
    server.simulator.behaviour = QUICK

    assert await asyncio.wait_for(answer(server), patience(10)) == 200
    assert server.held()["detached"] == 1
    async with server.session.delete(f"{server.sse}/waits%20for%20its%20retry") as response:
        assert response.status == 204
    await server.nothing_held()


async def test_a_retry_that_nobody_reads_gives_way_when_it_takes_a_place_that_others_want(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        Behaviour(fail_rate=1.0),
        **CHANGES,
        **{f"{SIM_HTTP_CLIENT}.max_retries": 3, f"{SIM_HTTP_CLIENT}.backoff_factor": 1.0},
    )

    async with Raw(server) as raw:
        await sse(raw, "retried")
        await until(lambda: server.simulator.stats().requests == 1)
        await until(lambda: not server.held()["sim places"])
    await until(lambda: server.held()["detached"] == 1)
    server.simulator.behaviour = SILENT
    async with Raw(server) as raw:
        await raw.post(PATH, STREAMED)
        await server.simulator.until(lambda stats: stats.active == 1)
        waiting = asyncio.ensure_future(answer(server))
        # The retry, in front of the other.
        await until(lambda: server.held()["sim waiting"] == 2)

    await until(lambda: not server.held()["detached"], 10, server.held)
    await until(lambda: not server.held()["sim waiting"])
    assert server.held()["sim places"] == 1
    waiting.cancel()
    await asyncio.wait((waiting,))
    await server.nothing_held()


@pytest.mark.virtual_time
async def test_no_more_answers_give_way_than_requests_wait(make_server: MakeServer) -> None:
    server = await make_server(SILENT, **CHANGES | {f"{SIM_HTTP_CLIENT}.concurrent_requests": 2})

    async with Raw(server) as first, Raw(server) as second:
        await sse(first, "r1")
        await sse(second, "r2")
        await server.simulator.until(lambda stats: stats.active == 2)
        server.simulator.behaviour = QUICK
        waiting = asyncio.ensure_future(answer(server))
        await until(lambda: server.held()["sim waiting"] == 1)
        # Both leave in one turn of the loop.
        first.close()
        second.close()
        assert await asyncio.wait_for(waiting, patience(10)) == 200

    assert server.held()["detached"] == 1
    assert server.simulator.stats().aborted == 1
    async with server.session.delete(f"{server.sse}/r1") as response:
        assert response.status == 204
    async with server.session.delete(f"{server.sse}/r2") as other:
        assert other.status == 204
    await server.nothing_held()
