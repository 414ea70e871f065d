"""The end of a process whose siblings go on: it refuses nothing before its connections are
gone.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from aioserver.server.runner import until_empty
from tests.support.chat import CHAT, STREAMED, chat
from tests.support.raw import CLOSE, TEXT, Raw, closing
from tests.support.server import SIM_HTTP_CLIENT, places, runner_of
from tests.support.simulator import Behaviour
from tests.support.waiting import patience, until, within

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer

GRACE = "chat.websocket.shutdown_timeout"
KEEPS = "chat.websocket.replace_timeout"


async def replaced(server: RunningServer, stop: asyncio.Event | None = None) -> None:
    """End *server* as a worker ends whose successor serves."""
    await server.runner.retire(stop or asyncio.Event())
    await server.runner.end()


async def no_more_accepted(server: RunningServer) -> None:
    await until(lambda: not server.runner.sites)


@pytest.mark.both_loops
async def test_requests_on_open_connections_are_served_and_end_them(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    async with Raw(server) as kept, Raw(server) as silent, Raw(server) as idle:
        await kept.get("/health")
        await kept.answer()
        await idle.get("/health")
        await idle.answer()
        await until(lambda: len(server.http_server.connections) == 3)

        end = asyncio.create_task(replaced(server))
        await no_more_accepted(server)

        # Its siblings are ready: a load balancer must not think otherwise.
        await kept.get("/ready")
        ready = await kept.answer()
        assert (ready.status, ready.headers["connection"]) == (200, "close")
        await silent.post("/v1/chat/completions", CHAT)
        answer = await silent.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        for raw in (kept, silent, idle):
            assert await raw.to_the_end() == b""
        await end


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    "one_at_a_time",
    [
        places(1, timeout=60.0),
        {f"{SIM_HTTP_CLIENT}.concurrent_requests": 1},
    ],
    ids=["at the door", "for a provider"],
)
async def test_what_waits_is_served(
    make_server: MakeServer, one_at_a_time: dict[str, float]
) -> None:
    """Three requests of a second, of which two have to wait, are answered after a hand-over has
    begun.
    """
    behaviour = Behaviour(ttft=0, interval=0.1, tokens=8)
    server = await make_server(behaviour, **one_at_a_time, **{GRACE: 60.0})
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Raw(server)) for _ in range(3)]
        for raw in clients:
            await raw.post("/v1/chat/completions", CHAT)
        await until(lambda: server.owners.waiting == 2)

        end = asyncio.create_task(replaced(server))

        for raw in clients:
            answer = await raw.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
        await end


@pytest.mark.virtual_time
async def test_what_is_between_two_queues_gets_its_turn() -> None:
    """One look finds nobody waiting: a request has just left one queue, and comes to the next."""
    looks = iter([1, 0, 1, 0, 0])

    await until_empty(lambda: next(looks) == 0, 60.0, asyncio.Event())

    assert [*looks] == []


@pytest.mark.virtual_time
async def test_queue_that_does_not_empty_is_waited_for_no_longer_than_it_may() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()

    took = await until_empty(lambda: False, 0.2, asyncio.Event())

    assert 0.2 <= took <= loop.time() - began


@pytest.mark.virtual_time
async def test_what_waits_longer_than_half_of_the_grace_is_refused(
    make_server: MakeServer,
) -> None:
    changes = places(1, timeout=60) | {GRACE: 1.6, KEEPS: 0}
    server = await make_server(Behaviour(ttft=0, interval=0.1, tokens=4000), **changes)
    async with Raw(server) as running, Raw(server) as waiting:
        await running.post("/v1/chat/completions", STREAMED)
        await until(lambda: server.context.admission.gate.inside == 1)
        await waiting.post("/v1/chat/completions", CHAT)
        await until(lambda: server.owners.waiting == 1)
        loop = asyncio.get_running_loop()
        began = loop.time()

        end = asyncio.create_task(replaced(server))

        answer = await waiting.answer()
        assert (answer.status, answer.code) == (503, "server_shutdown")
        assert loop.time() - began >= 0.8
        assert within(3.0, began), "the other half is for what runs"
        assert b"server_shutdown" in (await running.answer()).body
        await end


@pytest.mark.both_loops
async def test_sockets_close_when_no_answer_runs_on_them(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0.1, tokens=18))
    async with Raw(server) as idle, Raw(server) as busy:
        for raw in (idle, busy):
            await raw.upgrade()
        await busy.send_json(chat("r1"))
        assert (await busy.json_frame())["status"] == "processing"

        end = asyncio.create_task(replaced(server))

        opcode, payload = await idle.frame()
        assert (opcode, closing(payload)) == (CLOSE, (1012, b"server is stopping"))
        await idle.send_frame(CLOSE, payload)
        frames = []
        while (got := await busy.frame())[0] == TEXT:
            frames.append(got[1])
        assert b'"status":"complete"' in frames[-1]
        assert closing(got[1])[0] == 1012
        await busy.send_frame(CLOSE, got[1])
        await end


@pytest.mark.virtual_time
async def test_a_process_without_its_parent_gives_up_the_port_at_once(tmp_path: Path) -> None:
    async with runner_of(tmp_path, **{"chat.websocket.drain_delay": 600.0}) as (runner, _):
        (listening,) = await runner.listen()

        async with asyncio.timeout(patience(5.0)):
            await runner.end(at_once=True)

        # A new parent may have it.
        with socket.create_server((listening.host, listening.port)):
            pass
