"""Clients that stop reading, or flood and leave: they go, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat import big, chat, numbers, whole
from tests.support.raw import SMALL, TEXT, Raw, masked
from tests.support.server import SILENT, MakeServer
from tests.support.simulator import Behaviour
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.server import RunningServer


# The kernel has clocks of its own for what nobody reads.
pytestmark = pytest.mark.real_time

SEND_TIMEOUT = {"chat.streams.send_timeout": 0.5}
SIZE, COUNT = 30_000, 200  # 6 MB: more than the kernel keeps for a reader with a small buffer


def places(server: RunningServer) -> int:
    return server.held()["places"]


async def stalled_websocket(raw: Raw, name: str, fields: dict[str, Any]) -> None:
    assert (await raw.upgrade()).status == 101
    await raw.send_json(chat(name, **fields))


async def stalled_sse(raw: Raw, name: str, fields: dict[str, Any]) -> None:
    await raw.ask_sse(name, **fields)


@pytest.mark.parametrize("stall", [stalled_websocket, stalled_sse])
async def test_a_client_that_stops_reading_is_dropped_and_its_stream_goes_on(
    make_server: MakeServer, stall: Callable[..., Awaitable[None]]
) -> None:
    server = await make_server(
        Behaviour(ttft=0, interval=0.002),
        **SEND_TIMEOUT,
        **{"chat.streams.max_stream_bytes": 1 << 26},
    )
    loop = asyncio.get_running_loop()

    async with Raw(server, receive_buffer=SMALL) as raw:
        begun = loop.time()
        await stall(raw, "r1", big(SIZE, COUNT))
        await server.simulator.until(lambda stats: stats.tokens_sent > 20)
        await until(lambda: places(server) == 0)
        dropped = loop.time() - begun
        # The provider went on at its own pace and is done, or will be soon.
        stats = await server.simulator.until(lambda stats: stats.active == 0)
        raw.widen()
        got = await asyncio.wait_for(
            raw.to_the_end(), patience(20)
        )  # what the kernel had, then the end

    assert dropped > 0.3
    assert len(got) < SIZE * COUNT  # aborted, not sent to its end
    assert (stats.completed, stats.aborted) == (1, 0)
    frames = await whole(server, "r1")
    assert numbers(frames) == list(range(1, len(frames) + 1))
    assert frames[-1]["status"] == "complete"
    assert sum(len(str(frame["chunk"].get("data", ""))) for frame in frames) > SIZE * COUNT


async def test_an_openai_client_that_stops_reading_is_dropped_and_its_answer_cancelled(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        Behaviour(ttft=0, interval=0.002),
        **SEND_TIMEOUT,
        **{"chat.streams.max_stream_bytes": 1 << 26},
    )
    fields = big(SIZE, COUNT)
    body = {
        "stream": True,
        "messages": [{"role": "user", "content": fields["text"]}],
        **fields["options"],
    }

    async with Raw(server, receive_buffer=SMALL) as raw:
        await raw.post("/v1/chat/completions", body)
        await server.simulator.until(lambda stats: stats.tokens_sent > 20)
        await until(lambda: places(server) == 0, 5)
        await server.simulator.until(lambda stats: stats.active == 0)
        raw.widen()
        got = await asyncio.wait_for(raw.to_the_end(), patience(20))

    assert len(got) < SIZE * COUNT
    assert b"[DONE]" not in got
    await server.nothing_held()
    assert await server.counted("requests", "code", "outcome") == {
        ("slow_client", "slow_client"): 1
    }


async def test_a_client_that_floods_and_leaves_is_noticed(make_server: MakeServer) -> None:
    server = await make_server(SILENT, **{"chat.streams.resume_window": 0})

    async with Raw(server) as raw:
        await raw.upgrade()
        await raw.send_json(chat("r1"))
        await server.simulator.until(lambda stats: stats.active == 1)
        await raw.send(b"".join(masked(TEXT, b'{"action":"ping"}') for _ in range(150)))
        raw.close()

        await until(lambda: not any(server.held().values()), 5)
    await server.simulator.until(lambda stats: stats.aborted == 1)


@pytest.mark.both_loops
async def test_a_client_that_half_closes_counts_as_gone(make_server: MakeServer) -> None:
    server = await make_server(SILENT, **{"chat.streams.resume_window": 0})

    async with Raw(server) as socket, Raw(server) as events:
        await socket.upgrade()
        await socket.send_json(chat("r1"))
        await events.ask_sse("r2", text="Hello")
        await server.simulator.until(lambda stats: stats.active == 2)
        socket.half_close()
        events.half_close()

        await server.simulator.until(lambda stats: stats.aborted == 2)
        await server.nothing_held()


@pytest.mark.both_loops
async def test_a_flood_behind_an_answered_close_does_not_keep_the_socket(
    make_server: MakeServer,
) -> None:
    server = await make_server(**SEND_TIMEOUT, **{"chat.streams.max_stream_bytes": 1 << 26})

    async with Raw(server, receive_buffer=SMALL) as raw:
        await stalled_websocket(raw, "r1", big(SIZE, COUNT))
        await server.simulator.until(lambda stats: stats.completed == 1)
        with contextlib.suppress(ConnectionError):  # a busy machine may have dropped it before
            await raw.send_frame(2, b"binary")  # to be closed, while nothing is read

        await until(lambda: not server.context.sockets, 5)
