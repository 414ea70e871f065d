"""Readers that are slower than their provider: it waits for those who cannot come back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat import CHAT, big, chat, frames_of, numbers
from tests.support.raw import SMALL, Raw
from tests.support.server import SIM_HTTP_CLIENT, MakeServer
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.server import RunningServer

SIZE, COUNT = 30_000, 200  # 6 MB
MAX_STREAM_BYTES = 1 << 20
# What may be unread in a log whose provider is paused: the bound, and the reads that crossed it.
UNREAD = (1 << 18) + 3 * (1 << 18)
CHANGES: dict[str, Any] = {
    "chat.streams.resume_window": 0,
    "chat.streams.max_stream_bytes": MAX_STREAM_BYTES,
    "chat.streams.send_timeout": 30.0,
}


async def ask_websocket(raw: Raw) -> None:
    assert (await raw.upgrade()).status == 101
    await raw.send_json(chat("r1", **big(SIZE, COUNT)))


async def ask_sse(raw: Raw) -> None:
    await raw.ask_sse("r1", **big(SIZE, COUNT))


async def ask_openai(raw: Raw) -> None:
    fields = big(SIZE, COUNT)
    messages = [{"role": "user", "content": fields["text"]}]
    body = {"messages": messages, "stream": True, **fields["options"]}
    await raw.post("/v1/chat/completions", body)


async def frames_of_websocket(raw: Raw) -> list[Any]:
    frames = [await raw.json_frame()]
    while frames[-1]["status"] not in ("complete", "error"):
        frames.append(await raw.json_frame())
    return frames


async def frames_of_sse(raw: Raw) -> list[Any]:
    return frames_of((await raw.answer()).body)


FRAMES = [(ask_websocket, frames_of_websocket), (ask_sse, frames_of_sse)]


def paused(server: RunningServer) -> int:
    count: int = server.provider.backpressure.paused
    return count


@pytest.mark.both_loops
@pytest.mark.parametrize(("ask", "read"), FRAMES)
async def test_a_slow_reader_that_cannot_come_back_gets_its_whole_answer(
    make_server: MakeServer,
    ask: Callable[[Raw], Awaitable[None]],
    read: Callable[[Raw], Awaitable[list[Any]]],
) -> None:
    server = await make_server(**CHANGES)

    async with Raw(server, receive_buffer=SMALL) as raw:
        await ask(raw)
        await until(lambda: paused(server) == 1)
        unread = server.owners.streams.stats().bytes
        raw.widen()
        frames = await read(raw)

        assert numbers(frames) == list(range(1, len(frames) + 1))
        assert frames[-1]["status"] == "complete"
        assert sum(len(str(frame["chunk"].get("data", ""))) for frame in frames) > SIZE * COUNT
        assert unread < UNREAD
        assert paused(server) == 0
    await server.nothing_held()


async def test_a_slow_reader_on_v1_gets_all_of_an_answer_that_no_log_could_keep(
    make_server: MakeServer,
) -> None:
    server = await make_server(**CHANGES, **{f"{SIM_HTTP_CLIENT}.read_timeout": 4.0})
    loop = asyncio.get_running_loop()

    async with Raw(server, receive_buffer=SMALL) as raw:
        await ask_openai(raw)
        await until(lambda: paused(server) == 1)
        begun = loop.time()
        head = await raw.head()
        seen = b""
        # Longer than the provider may be silent: the deadline rests.
        while loop.time() < begun + 6.0:
            seen += await raw.exactly(1000)
            await asyncio.sleep(0.05)  # the client's own slowness
        assert paused(server) == 1
        silence = server.provider.stats().silence
        raw.widen()
        # Each chunk has a first line, which is no part of the events.
        rest = await raw.until(b"[DONE]\n\n\r\n0\r\n\r\n")

    assert head.status == 200
    assert len(seen) + len(rest) > SIZE * COUNT
    assert b"error" not in rest
    assert silence.longest == 0.0
    assert await server.counted("requests", "outcome") == {("ok",): 1}


async def test_a_provider_is_not_paused_for_a_slow_reader_while_a_request_waits_for_it(
    make_server: MakeServer,
) -> None:
    server = await make_server(**CHANGES, **{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1})

    async with Raw(server, receive_buffer=SMALL) as raw:
        await ask_openai(raw)
        await until(lambda: paused(server) == 1)
        async with server.session.post(f"{server.v1}/chat/completions", json=CHAT) as other:
            assert other.status == 200
        raw.widen()
        body = (await raw.answer()).body

    assert body.count(b'"code":"slow_client"') == 1
    assert body.endswith(b"}}\n\n")
    assert b"[DONE]" not in body
    assert len(body) < SIZE * COUNT
    await server.nothing_held()
    assert await server.counted("requests", "code", "outcome") == {
        ("slow_client", "slow_client"): 1,
        ("", "ok"): 1,
    }
    assert server.context.metrics.slow_clients.value == 1


@pytest.mark.parametrize(("ask", "read"), FRAMES)
async def test_a_reader_that_is_dropped_is_told_and_its_outcome_is_slow_client(
    make_server: MakeServer,
    ask: Callable[[Raw], Awaitable[None]],
    read: Callable[[Raw], Awaitable[list[Any]]],
) -> None:
    server = await make_server(**CHANGES, **{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1})

    async with Raw(server, receive_buffer=SMALL) as raw:
        await ask(raw)
        await until(lambda: paused(server) == 1)
        async with server.session.post(f"{server.v1}/chat/completions", json=CHAT) as other:
            assert other.status == 200
        raw.widen()
        *events, error = await read(raw)

    assert numbers(events) == list(range(1, len(events) + 1))
    assert "event_id" not in error  # no event of the log: a client goes on after the last one
    assert error["status"] == "error"
    assert error["chunk"]["code"] == "slow_client"
    assert error["chunk"]["retryable"]
    await server.nothing_held()
    outcomes = await server.counted("requests", "code", "outcome")
    assert outcomes["slow_client", "slow_client"] == 1


async def test_a_websocket_outlives_a_reader_that_was_dropped(make_server: MakeServer) -> None:
    # Here it can come back: the log takes what comes, and lets the oldest go.
    server = await make_server(**{"chat.streams.max_stream_bytes": 200_000})

    async with Raw(server, receive_buffer=SMALL) as raw:
        await ask_websocket(raw)
        await server.simulator.until(lambda stats: stats.completed == 1)
        raw.widen()
        frames = await frames_of_websocket(raw)
        await raw.send_json({"action": "ping"})
        pong = await raw.json_frame()

    assert frames[-1]["chunk"]["code"] == "slow_client"
    assert pong["status"] == "pong"
    async with server.session.get(f"{server.sse}/r1?last_event_id=3") as response:
        assert response.status == 409
