"""Whole answers and clients that read nothing: they hold a place, and a bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat import CHAT
from tests.support.raw import SMALL, Raw
from tests.support.scripted_provider import (
    ScriptedProvider,
    answering,
)
from tests.support.server import CONCURRENCY, SIM_HTTP_CLIENT
from tests.support.waiting import until
from tests.support.whole_answers import PATH, SIZE, provider, unsent, until_dropped

if TYPE_CHECKING:
    from tests.support.server import MakeServer


# Lines of a request: the first one's response is made here, that of the others by aiohttp.
HEADS = {"plain": (), "last": ("Connection: close",)}


@pytest.mark.parametrize("lines", HEADS.values(), ids=HEADS)
async def test_clients_that_do_not_read_whole_answers_hold_places_until_they_are_dropped(
    make_server: MakeServer, lines: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    clients, places = 10, 4
    async with provider() as scripted, contextlib.AsyncExitStack() as stack:
        server = await make_server(
            **{
                "llm.providers.sim.base_url": scripted.url,
                "chat.streams.send_timeout": 0.3,
                f"{CONCURRENCY}.max_connections": places,
                f"{CONCURRENCY}.queue_timeout": 60.0,
            }
        )
        for _ in range(clients):
            raw = await stack.enter_async_context(Raw(server, receive_buffer=SMALL))
            await raw.post(PATH, CHAT, *lines)
        # For each a piece, and what was in the transport before it.
        assert 0 < await until_dropped(server, clients) <= places * 3 * 65536
        await server.nothing_held()
        assert server.owners.streams.stats().bytes == 0
        async with server.session.post(f"{server.base}{PATH}", json=CHAT) as response:
            assert len(await response.read()) > SIZE
    # Nothing is written to a connection that is gone.
    assert not [record for record in caplog.records if record.name == "asyncio"]


async def test_clients_that_do_not_read_a_large_refusal_hold_places_until_they_are_dropped(
    make_server: MakeServer,
) -> None:
    clients, places = 6, 2
    async with (
        provider(900_000, http_status=400) as scripted,
        contextlib.AsyncExitStack() as stack,
    ):
        server = await make_server(
            **{
                "llm.providers.sim.base_url": scripted.url,
                "chat.streams.send_timeout": 0.3,
                f"{CONCURRENCY}.max_connections": places,
                f"{CONCURRENCY}.queue_timeout": 60.0,
            }
        )
        for _ in range(clients):
            raw = await stack.enter_async_context(Raw(server, receive_buffer=SMALL))
            await raw.post(PATH, CHAT)
        assert 0 < await until_dropped(server, clients) <= places * 3 * 65536


@pytest.mark.parametrize(
    ("path", "lines", "fields", "window"),
    [
        (PATH, (), {}, 30),
        (PATH, ("Origin: http://x",), {}, 0),
        (PATH, ("Idempotency-Key: %d",), {}, 0),
        (PATH, ("Idempotency-Key: %d",), {}, 30),
        ("/v1/responses", (), {"store": True}, 30),
    ],
    ids=["once", "page", "keyed", "kept", "stored"],
)
async def test_whole_answers_are_bounded_together(
    make_server: MakeServer,
    path: str,
    lines: tuple[str, ...],
    fields: dict[str, Any],
    window: int,
) -> None:
    async with provider() as scripted:
        server = await make_server(
            **{
                "llm.providers.sim.base_url": scripted.url,
                "chat.streams.send_timeout": 60.0,
                "chat.streams.max_kept_bytes": 10 << 20,
                "chat.streams.resume_window": window,
                f"{SIM_HTTP_CLIENT}.concurrent_requests": 20,
            }
        )
        kept = server.owners.streams.stats
        async with contextlib.AsyncExitStack() as stack:
            for number in range(2):
                raw = await stack.enter_async_context(Raw(server, receive_buffer=SMALL))
                asked = [line.replace("%d", f"{number}") for line in lines]
                await raw.post(path, {**CHAT, **fields}, *asked)
            await until(lambda: kept().bytes > 2 * SIZE and not server.held()["sim places"])

            async with server.session.post(f"{server.base}{PATH}", json=CHAT) as response:
                assert response.status == 503
                assert (await response.json())["error"]["code"] == "server_at_capacity"
            assert 2 * SIZE < kept().bytes <= 10 << 20
        await server.nothing_held()
        async with server.session.post(f"{server.base}{PATH}", json=CHAT) as response:
            assert response.status == 200, await response.text()
            assert len(await response.read()) > SIZE
        if not window:
            await until(lambda: kept().bytes == 0, state=kept)


@pytest.mark.parametrize(
    ("way", "lines", "streamed"),
    [
        ("GET", HEADS["plain"], False),
        ("GET", HEADS["last"], True),
        ("cancel", HEADS["plain"], True),
        ("cancel", HEADS["last"], False),
    ],
)
async def test_clients_that_do_not_read_a_stored_response_are_dropped(
    make_server: MakeServer, way: str, lines: tuple[str, ...], streamed: bool
) -> None:
    clients, places = 6, 2
    async with provider() as scripted, contextlib.AsyncExitStack() as stack:
        server = await make_server(
            **{
                "llm.providers.sim.base_url": scripted.url,
                "chat.streams.send_timeout": 0.1,
                "chat.streams.max_stream_bytes": 3 * SIZE,
                f"{CONCURRENCY}.max_connections": places,
                f"{CONCURRENCY}.queue_timeout": 60.0,
            }
        )
        kept = server.owners.streams.stats
        body = {"model": "sim", "input": "Hello", "store": True, "stream": streamed}
        async with server.session.post(f"{server.v1}/responses", json=body) as response:
            assert response.status == 200
            await response.read()
        await server.nothing_held()
        before = kept().bytes
        for _ in range(clients):
            raw = await stack.enter_async_context(Raw(server, receive_buffer=SMALL))
            if way == "GET":
                await raw.get("/v1/responses/resp_1", *lines)
            else:
                await raw.post("/v1/responses/resp_1/cancel", b"", *lines)
        most = counted = 0

        def dropped() -> bool:
            nonlocal most, counted
            most, counted = max(most, unsent(server)), max(counted, kept().bytes - before)
            return server.context.metrics.slow_clients.value == clients

        await until(dropped, 30, server.held)
        at_once = places if way == "GET" else clients
        assert 0 < most <= at_once * 3 * 65536
        # What is not in the log already is counted while it is sent.
        assert (counted >= SIZE) if streamed else counted == 0
        await until(lambda: kept().bytes == before, state=kept)


@pytest.mark.parametrize(
    ("lines", "window"),
    [((), 0), (("Idempotency-Key: k",), 0), (("Idempotency-Key: k",), 30)],
    ids=["once", "keyed", "kept"],
)
async def test_half_a_whole_answer_counts_until_its_request_ends(
    make_server: MakeServer, lines: tuple[str, ...], window: int
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    play = answering(head % (2 * SIZE) + b"[" * SIZE)
    async with ScriptedProvider(play) as scripted:
        server = await make_server(
            **{"llm.providers.sim.base_url": scripted.url, "chat.streams.resume_window": window}
        )
        kept = server.owners.streams.stats
        async with Raw(server) as raw:
            await raw.post(PATH, CHAT, *lines)
            await until(lambda: kept().bytes >= SIZE, state=kept)
        if window:
            await until(lambda: server.held()["detached"] == 1)
            assert kept().bytes >= SIZE
            async with server.session.delete(f"{server.sse}/k") as response:
                assert response.status == 204
        await until(lambda: kept().bytes < SIZE, state=kept)
        assert window or kept().bytes == 0


async def test_a_slow_reader_of_a_whole_answer_gets_all_of_it(make_server: MakeServer) -> None:
    async with provider(SIZE + 60_000) as scripted:
        server = await make_server(
            **{"llm.providers.sim.base_url": scripted.url, "chat.streams.send_timeout": 1.0}
        )
        loop = asyncio.get_running_loop()
        async with Raw(server, receive_buffer=SMALL) as raw:
            await until(lambda: len(server.http_server.connections) == 1)
            (connection,) = server.http_server.connections
            transport = connection.transport
            assert transport is not None
            # The kernel takes no piece of an answer at once, not even the last one.
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
            await raw.post(PATH, CHAT)
            length = int((await raw.head()).headers["content-length"])
            last = length % 65536
            begun, seen = loop.time(), 0
            while loop.time() < begun + 2.5:
                seen += len(await raw.exactly(20_000))
                await asyncio.sleep(0.02)  # the client's own slowness
            assert server.held()["places"] == 1
            assert server.held()["body_bytes"] == 0, "its question is not held meanwhile"
            await raw.exactly(length - last - seen)
            await until(lambda: transport.get_write_buffer_limits() == (0, 0))
            assert (await raw.exactly(last)).endswith(b"}]}")
            assert [connection] == server.http_server.connections
            # A stream that follows on this connection counts on them.
            await until(lambda: transport.get_write_buffer_limits() == (16_384, 65_536))
            # The connection is kept, and its next answer is whole, too.
            await raw.post(PATH, CHAT)
            assert len((await raw.answer()).body) > SIZE


async def test_a_place_is_held_until_the_kernel_has_the_last_byte(make_server: MakeServer) -> None:
    """Of small answers, each within what a transport takes without a wait."""
    async with provider(60_000) as scripted:
        server = await make_server(
            **{"llm.providers.sim.base_url": scripted.url, "chat.streams.send_timeout": 1.0}
        )

        def stuck_or_answered(count: int) -> bool:
            answered = len(scripted.requests) == count and not any(server.held().values())
            return answered or unsent(server) > 0

        async with Raw(server, receive_buffer=SMALL) as raw:
            count = 0
            while not unsent(server):
                count += 1
                await raw.post(PATH, CHAT)
                await until(partial(stuck_or_answered, count))
            assert unsent(server) < 1 << 16

            await until(lambda: server.context.metrics.slow_clients.value == 1)
        await server.nothing_held()
