"""The one road from a face to a provider: what becomes of answers, whatever becomes of clients."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from aioserver.auth.callers import anonymous
from aioserver.faces import socket as sockets
from tests.support.chat import CHAT, STREAMED, chat, frames_of, to_end, until_status
from tests.support.raw import CLOSE, TEXT, Raw, closing
from tests.support.server import QUICK, SILENT, SLOW, MakeServer, places
from tests.support.simulator import Behaviour
from tests.support.waiting import patience, until, within

if TYPE_CHECKING:
    from tests.support.server import RunningServer


KEY = {"Idempotency-Key": "k1"}


def post(server: RunningServer, body: object, headers: dict[str, str] | None = None) -> Any:
    return server.session.post(server.v1 + "/chat/completions", json=body, headers=headers)


async def ask_and_leave(server: RunningServer, body: object) -> None:
    """A client asks with the key k1, and is gone before the answer begins."""
    async with Raw(server) as raw:
        await raw.post("/v1/chat/completions", body, "Idempotency-Key: k1")
        await server.simulator.until(lambda stats: stats.active == 1)
        raw.reset()


# Idempotency-Key.


@pytest.mark.parametrize("body", [CHAT, STREAMED])
async def test_a_repeated_request_with_a_key_is_answered_from_the_first(
    server: RunningServer, body: object
) -> None:
    answers = []
    for _ in range(3):
        async with post(server, body, KEY) as response:
            assert response.status == 200
            answers.append(await response.read())

    assert answers[0] == answers[1] == answers[2]
    assert server.simulator.stats().requests == 1


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("chat/completions", CHAT, KEY),
        ("embeddings", {"model": "sim", "input": "Hello"}, KEY),
        ("responses", {"model": "sim", "input": "Hello", "store": True}, {}),
        ("responses", {"model": "sim", "input": "Hello", "store": True}, KEY),
    ],
    ids=["key", "embeddings", "store", "store and key"],
)
async def test_a_paid_answer_is_given_although_nothing_is_kept(
    make_server: MakeServer, path: str, body: dict[str, Any], headers: dict[str, str]
) -> None:
    server = await make_server(**{"chat.streams.resume_window": 0})

    async with server.session.post(f"{server.v1}/{path}", json=body, headers=headers) as response:
        assert response.status == 200
        assert (await response.json())["object"]
    assert server.simulator.stats().requests == 1


@pytest.mark.parametrize("body", [CHAT, STREAMED])
async def test_requests_with_one_key_at_once_are_one_answer(
    make_server: MakeServer, body: object
) -> None:
    server = await make_server(Behaviour(ttft=0.1, interval=0.005, tokens=10))

    async def ask() -> bytes:
        async with post(server, body, KEY) as response:
            return bytes(await response.read())

    answers = await asyncio.gather(*(ask() for _ in range(5)))

    assert len(set(answers)) == 1
    assert server.simulator.stats().requests == 1


@pytest.mark.parametrize("other", [{**CHAT, "seed": 1}, STREAMED])
async def test_another_body_under_a_known_key_is_a_conflict(
    server: RunningServer, other: object
) -> None:
    async with post(server, CHAT, KEY) as response:
        await response.read()
    async with post(server, other, KEY) as response:
        assert response.status == 409
        assert (await response.json())["error"]["code"] == "request_conflict"
        assert response.headers["x-should-retry"] == "false"
    assert server.simulator.stats().requests == 1


@pytest.mark.parametrize("body", [CHAT, STREAMED])
async def test_a_client_that_left_and_repeats_its_key_pays_once(
    make_server: MakeServer, body: object
) -> None:
    server = await make_server(Behaviour(ttft=0.3, interval=0))
    await ask_and_leave(server, body)
    await until(lambda: server.held()["detached"] == 1)
    async with post(server, body, KEY) as response:
        assert response.status == 200
        assert await response.read()

    assert server.simulator.stats().requests == 1


@pytest.mark.parametrize("body", [CHAT, STREAMED])
async def test_attaching_to_an_answer_that_nobody_read_stops_its_window(
    make_server: MakeServer, body: object
) -> None:
    server = await make_server(
        Behaviour(ttft=0.8, interval=0), **{"chat.streams.resume_window": 0.4}
    )
    await ask_and_leave(server, body)
    await until(lambda: server.held()["detached"] == 1)
    async with post(server, body, KEY) as response:
        assert response.status == 200, await response.text()
        assert await response.read()

    assert server.simulator.stats().aborted == 0


@pytest.mark.parametrize("body", [CHAT, STREAMED])
async def test_an_answer_with_a_key_that_nobody_reads_ends_with_its_window(
    make_server: MakeServer, body: object
) -> None:
    server = await make_server(SILENT, **{"chat.streams.resume_window": 0.2})
    await ask_and_leave(server, body)

    await server.simulator.until(lambda stats: stats.aborted == 1)
    await server.nothing_held()


async def test_a_fault_is_replayed_too(server: RunningServer) -> None:
    for _ in range(2):
        async with post(server, {**CHAT, "model": "fault-status-500"}, KEY) as response:
            assert response.status == 502
    assert server.simulator.stats().requests == 1


async def test_a_refusal_before_anything_was_sent_may_be_tried_again(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        SILENT,
        **{
            "llm.providers.sim.http_client.concurrent_requests": 1,
            "llm.providers.sim.http_client.queue_timeout": 0.1,
        },
    )
    async with Raw(server) as raw:
        await raw.post("/v1/chat/completions", CHAT)
        await server.simulator.until(lambda stats: stats.active == 1)
        async with post(server, CHAT, KEY) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "provider_queue_timeout"
        server.simulator.behaviour = QUICK
        raw.reset()
    await server.nothing_held()
    async with post(server, CHAT, KEY) as response:
        assert response.status == 200


# Bounds.


async def test_finished_answers_are_forgotten_after_their_window(make_server: MakeServer) -> None:
    server = await make_server(**{"chat.streams.resume_window": 0.2})
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        await to_end(ws)
        assert server.owners.streams.stats().finished == 1

        await until(lambda: server.owners.streams.stats().finished == 0)

        assert server.owners.streams.stats().bytes == 0
        await ws.send_json({"action": "resume", "request_id": "r1"})
        assert (await ws.receive_json())["chunk"]["code"] == "stream_not_found"


async def test_an_answer_without_a_window_is_forgotten_with_its_reader(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    for body in (CHAT, STREAMED):
        async with post(server, body) as response:
            await response.read()

    await until(lambda: server.owners.streams.stats().bytes == 0)
    assert server.owners.streams.stats().finished == 0


async def test_new_answers_are_refused_where_running_ones_fill_the_memory(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        Behaviour(ttft=0, interval=0.001, tokens=3000),
        **{"chat.streams.max_kept_bytes": 10_000, "chat.streams.max_stream_bytes": 30_000},
    )
    async with server.connect() as ws:
        # Its conversation needs all of the text until it ends.
        await ws.send_json(chat("r1"))
        await until(lambda: server.owners.streams.stats().bytes > 11_000)
        await ws.send_json(chat("r2"))
        frames = await until_status(ws, "error")
        assert frames[-1]["request_id"] == "r2"
        assert frames[-1]["chunk"]["code"] == "server_at_capacity"
        await ws.send_json({"action": "cancel", "request_id": "r1"})
        await until_status(ws, "cancelled")
        await ws.send_json(chat("r3"))  # the finished one has made room
        await until_status(ws, "processing")
        await ws.send_json({"action": "cancel", "request_id": "r3"})
        await until_status(ws, "cancelled")


# The end.


async def test_the_end_closes_every_socket_with_1012_and_tells_every_stream(
    make_server: MakeServer,
) -> None:
    changes = {"chat.websocket.shutdown_timeout": 0.3, **places(4, timeout=30.0)}
    server = await make_server(SLOW, **changes)
    loop = asyncio.get_running_loop()
    async with Raw(server) as idle, Raw(server) as busy, Raw(server) as events, Raw(server) as sdk:
        for raw in (idle, busy):
            await raw.upgrade()
        await busy.send_json(chat("r1"))
        await events.ask_sse("r2", text="x")
        await sdk.post("/v1/chat/completions", STREAMED)
        await server.simulator.until(lambda stats: stats.tokens_sent > 6)
        async with Raw(server) as waiter, Raw(server) as poster:
            await waiter.upgrade()
            assert (await waiter.json_frame())["status"] == "queued"
            await poster.post("/v1/chat/completions", CHAT)
            await until(lambda: server.held()["waiting"] == 2)

            begun = loop.time()
            ending = asyncio.ensure_future(server.runner.end())
            refused = await poster.answer()
            assert (refused.status, refused.code) == (503, "server_shutdown")
            assert "retry-after" in refused.headers
            assert refused.headers["connection"] == "close"
            for raw in (waiter, idle):
                frames = [await raw.frame()]
                while frames[-1][0] == TEXT:
                    frames.append(await raw.frame())
                assert closing(frames[-1][1])[0] == 1012
                await raw.send_frame(CLOSE, frames[-1][1])
            frames = [await busy.frame()]
            while frames[-1][0] == TEXT:
                frames.append(await busy.frame())
            assert b'"server_shutdown"' in frames[-2][1]
            assert closing(frames[-1][1])[0] == 1012
            await busy.send_frame(CLOSE, frames[-1][1])
            last = frames_of((await events.answer()).body)[-1]
            assert (last["status"], last["chunk"]["code"]) == ("error", "server_shutdown")
            body = (await sdk.answer()).body
            assert b'"code":"server_shutdown"' in body
            assert b"[DONE]" not in body
            await ending
            assert within(5.0, begun)

    with pytest.raises(aiohttp.ClientConnectorError):
        await server.session.get(server.base + "/ready")
    rejections = server.context.metrics.rejections["server_shutdown"].value
    assert rejections == 5  # the two that waited, the three that ran: each once


async def test_an_answer_that_nobody_reads_does_not_delay_the_end(make_server: MakeServer) -> None:
    server = await make_server(SILENT, **{"chat.websocket.shutdown_timeout": 20.0})
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        await server.simulator.until(lambda stats: stats.active == 1)
    await until(lambda: server.held()["detached"] == 1)

    async with asyncio.timeout(patience(5)):
        await server.runner.end()

    await server.simulator.until(lambda stats: stats.aborted == 1)


async def test_a_client_that_answers_no_close_does_not_delay_the_end(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "CLOSE_TIMEOUT", 0.3)
    server = await make_server()
    async with Raw(server) as raw:
        await raw.upgrade()

        async with asyncio.timeout(patience(6)):
            await server.runner.end()

        frames = await raw.frames()
    assert closing(frames[-1][1])[0] == 1012


async def test_a_fault_keeps_nothing_of_its_question(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(fail_rate=1.0, fail_status=500))
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        assert (await to_end(ws))[-1]["status"] == "error"
    await server.nothing_held()

    stream = server.owners.streams.find(anonymous(None), "r1")

    assert stream is not None
    assert stream.error is not None
    assert (stream.error.__traceback__, stream.error.__cause__, stream.error.__context__) == (
        None,
        None,
        None,
    )
