"""How a server ends, in virtual time: what is under way, what waits, and what still comes.

`test_shutdown.py` ends processes, by signals.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import aiohttp
import pytest

from aioserver.server.connections import FAREWELL
from tests.support.chat import CHAT, STREAMED, big, chat, resume
from tests.support.raw import CLOSE, SMALL, TEXT, Raw, closing
from tests.support.server import QUICK, SIM_HTTP_CLIENT, places
from tests.support.simulator import Behaviour
from tests.support.waiting import until, within

if TYPE_CHECKING:
    from tests.support.raw import Answer
    from tests.support.server import MakeServer, RunningServer

pytestmark = pytest.mark.virtual_time

LONG = Behaviour(ttft=0, interval=0.05, tokens=4000)
GRACE = "chat.websocket.shutdown_timeout"


async def stopping(server: RunningServer) -> asyncio.Task[None]:
    """A task that ends *server*, which refuses new work by now."""
    end = asyncio.create_task(server.runner.end())
    await until(lambda: server.context.lifecycle.stopping.is_set())
    return end


def refused(answer: Answer) -> bool:
    """Assert that *answer* is the refusal of a server that stops."""
    assert (answer.status, answer.code) == (503, "server_shutdown")
    assert answer.headers["connection"] == "close"
    return True


async def test_a_request_on_its_way_is_answered(make_server: MakeServer) -> None:
    """A client that asks again the moment an answer ends cannot know that the connection ends,
    too.
    """
    server = await make_server(Behaviour(ttft=0, interval=0.01, tokens=20))
    async with Raw(server) as streamed, Raw(server) as kept:
        await kept.get("/health")
        assert (await kept.answer()).status == 200
        await streamed.post("/v1/chat/completions", STREAMED)
        await server.simulator.until(lambda stats: stats.tokens_sent > 2)

        end = await stopping(server)

        for raw in (kept, streamed):
            if raw is streamed:
                answer = await raw.answer()
                assert (answer.status, "connection" in answer.headers) == (200, False)
            await raw.post("/v1/chat/completions", STREAMED)
            assert refused(await raw.answer())
            assert await raw.to_the_end() == b""
        await end


async def test_waiters_get_server_shutdown_and_no_client_comes_in(
    make_server: MakeServer,
) -> None:
    server = await make_server(LONG, **places(1, timeout=60), **{GRACE: 20.0})
    async with AsyncExitStack() as stack:
        busy, *sockets, poster, late, probe = [
            await stack.enter_async_context(Raw(server)) for _ in range(6)
        ]
        for raw in (busy, *sockets):
            await raw.upgrade()
            if raw is not busy:
                assert (await raw.json_frame())["status"] == "queued"
        await busy.send_json(chat("r1"))
        await poster.post("/v1/chat/completions", CHAT)
        await server.simulator.until(lambda stats: stats.active == 1)

        end = await stopping(server)

        for raw in sockets:
            while (frame := await raw.json_frame())["status"] == "queued":
                pass
            assert frame["chunk"]["code"] == "server_shutdown"
            opcode, payload = await raw.frame()
            assert (opcode, closing(payload)[0]) == (CLOSE, 1012)
            await raw.send_frame(CLOSE, payload)
        assert refused(await poster.answer())
        # The connections that were open already may still bring a request.
        await late.post("/v1/chat/completions", CHAT)
        assert refused(await late.answer())
        await probe.get("/ready")
        answer = await probe.answer()
        assert (answer.status, answer.headers["connection"]) == (503, "close")
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", server.port)
        await busy.send_json({"action": "cancel", "request_id": "r1"})
        while (got := await busy.frame())[0] == TEXT:
            pass
        assert closing(got[1])[0] == 1012, "with its last answer, not at the end of the grace"
        await busy.send_frame(CLOSE, got[1])
        await end


async def test_waiters_for_a_provider_get_server_shutdown_at_once(make_server: MakeServer) -> None:
    server = await make_server(LONG, **{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1, GRACE: 1.0})
    async with Raw(server) as running, Raw(server) as waiting:
        await running.post("/v1/chat/completions", STREAMED)
        await server.simulator.until(lambda stats: stats.active == 1)
        await waiting.upgrade()
        await waiting.send_json(chat("waits"))
        assert (await waiting.json_frame())["status"] == "queued"
        began = asyncio.get_running_loop().time()

        end = await stopping(server)

        while (frame := await waiting.json_frame())["status"] == "queued":
            pass
        assert frame["chunk"]["code"] == "server_shutdown"
        assert within(0.5, began)
        assert closing((await waiting.frame())[1])[0] == 1012
        assert b'"code":"server_shutdown"' in (await running.answer()).body
        await end


async def test_an_answer_can_be_resumed_while_the_server_stops(make_server: MakeServer) -> None:
    server = await make_server(LONG, **{GRACE: 1.0})
    async with Raw(server) as lost, Raw(server) as other:
        for name, raw in (("lost", lost), ("other", other)):
            await raw.upgrade()
            await raw.send_json(chat(name))
        await server.simulator.until(lambda stats: stats.tokens_sent > 4)

        end = await stopping(server)

        await other.send_json(resume("lost", 1))
        frames = [await other.json_frame()]
        while frames[-1]["request_id"] != "lost" or frames[-1]["status"] != "error":
            frames.append(await other.json_frame())
        resumed = [frame["event_id"] for frame in frames if frame["request_id"] == "lost"]
        assert resumed == [*range(2, len(resumed) + 2)]
        assert frames[-1]["chunk"]["code"] == "server_shutdown"
        for raw in (lost, other):
            raw.close()
        await end


async def test_clients_that_read_nothing_do_not_delay_the_end(make_server: MakeServer) -> None:
    server = await make_server(**{GRACE: 1.0, "chat.streams.send_timeout": 60.0})
    async with AsyncExitStack() as stack:
        socket, events, sdk = [
            await stack.enter_async_context(Raw(server, receive_buffer=SMALL)) for _ in range(3)
        ]
        much = big(20_000, 200)
        await socket.upgrade()
        await socket.send_json({"action": "chat", "request_id": "r1", "payload": much})
        await events.ask_sse("r2", **much)
        body = {**STREAMED, **much.pop("options"), "messages": CHAT["messages"]}
        await sdk.post("/v1/chat/completions", body)
        await server.simulator.until(lambda stats: stats.completed == 3)
        began = asyncio.get_running_loop().time()

        await server.runner.end()

        assert within(1.0 + FAREWELL + 1.0, began)


async def test_new_work_is_taken_until_the_delay_is_over(make_server: MakeServer) -> None:
    server = await make_server(QUICK, **{"chat.websocket.drain_delay": 1.5})
    loop = asyncio.get_running_loop()
    began = loop.time()

    end = asyncio.create_task(server.runner.end())
    await until(lambda: not server.context.lifecycle.ready)

    async with server.session.get(f"{server.base}/ready") as response:
        assert response.status == 503
    async with (
        aiohttp.ClientSession() as newcomer,  # on a connection of its own
        newcomer.post(f"{server.v1}/chat/completions", json=CHAT) as response,
    ):
        assert response.status == 200
    await end
    assert loop.time() - began >= 1.5
