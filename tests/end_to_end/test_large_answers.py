"""Large whole answers: kept ones count until they are written, and others are served meanwhile."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aioserver.auth.callers import anonymous
from aioserver.streams.formats import EVENTS
from aioserver.streams.writer import Writer
from tests.support.chat import CHAT, frames_of, numbers, resume, text_of, to_end
from tests.support.raw import SMALL, Raw
from tests.support.transport import FakeTransport
from tests.support.waiting import until
from tests.support.whole_answers import PATH, SIZE, provider, unsent

if TYPE_CHECKING:
    from tests.support.server import MakeServer


@pytest.mark.parametrize(
    ("window", "again"),
    [(0, "repeated"), (30.0, "repeated"), (30.0, "found"), (30.0, "cancelled")],
)
async def test_a_kept_answer_counts_until_it_is_written(
    make_server: MakeServer, window: float, again: str
) -> None:
    """Whatever is kept for a window may be dropped, but not while a client is still reading it."""
    async with provider() as scripted:
        server = await make_server(
            **{
                "llm.providers.sim.base_url": scripted.url,
                "chat.streams.send_timeout": 60.0,
                "chat.streams.resume_window": window,
                "chat.streams.max_kept_bytes": 10 << 20,
            }
        )
        kept = server.owners.streams.stats
        async with Raw(server, receive_buffer=SMALL) as slow, Raw(server) as raw:
            body = {"input": "Hello", "store": True}
            await (slow if again == "repeated" else raw).post("/v1/responses", body)
            if again != "repeated":
                assert (await raw.answer()).status == 200
            if again == "found":
                await slow.get("/v1/responses/resp_1")
            elif again == "cancelled":
                await slow.post("/v1/responses/resp_1/cancel", b"")
            await until(lambda: unsent(server) > 0)
            async with Raw(server, receive_buffer=SMALL) as other:
                await other.post(PATH, CHAT)
                await until(lambda: kept().bytes > 2 * SIZE and not server.held()["sim places"])
                async with server.session.post(f"{server.base}{PATH}", json=CHAT) as response:
                    assert response.status == 503
            assert kept().bytes > SIZE
            slow.widen()
            assert len((await slow.answer()).body) > SIZE
        if not window:
            await until(lambda: kept().bytes == 0)
    await server.nothing_held()


async def test_a_large_whole_answer_is_read_on_every_face_in_small_events(
    make_server: MakeServer,
) -> None:
    """Nothing of it is parsed for a reader, who gets it as fast as it is read."""
    async with provider() as scripted:
        server = await make_server(**{"llm.providers.sim.base_url": scripted.url})
        key = {"Idempotency-Key": "k1"}
        async with server.session.post(f"{server.base}{PATH}", json=CHAT, headers=key) as response:
            assert len(await response.read()) > SIZE

        async with server.session.get(f"{server.sse}/k1") as response:
            by_sse = frames_of(await response.read())
        async with server.connect(max_msg_size=0) as ws:
            await ws.send_json(resume("k1", 0))
            by_websocket = await to_end(ws)

    assert by_sse == by_websocket
    assert numbers(by_sse) == list(range(1, len(by_sse) + 1))
    assert by_sse[-1]["status"] == "complete"
    assert text_of(by_sse) == "x" * SIZE
    assert max(len(frame["chunk"].get("data", "")) for frame in by_sse) < 1 << 17


async def test_others_are_served_while_a_large_whole_answer_is_read(
    make_server: MakeServer,
) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with provider() as scripted:
        server = await make_server(**{"llm.providers.sim.base_url": scripted.url})
        key = {"Idempotency-Key": "k1"}
        async with server.session.post(f"{server.base}{PATH}", json=CHAT, headers=key) as response:
            await response.read()
        stream = server.context.gateway.find(anonymous("127.0.0.1"), "k1")
        transport = FakeTransport()
        writer = Writer(transport, transport.drain, server.context.outbox, send_timeout=30.0)
        writer.follow(stream, 0, EVENTS)
        task = asyncio.ensure_future(other())
        await writer.flush()
        task.cancel()
        writer.close()

    assert text_of(frames_of(transport.written)) == "x" * SIZE
    # A client that takes all at once gets 64 KiB in a turn, and one piece more.
    assert turns >= SIZE // (1 << 17)
    assert max(map(len, transport.writes)) < 1 << 17


async def test_a_whole_answer_that_becomes_an_event_is_bounded_as_one(
    make_server: MakeServer,
) -> None:
    async with provider() as scripted:
        server = await make_server(
            **{
                "llm.providers.sim.base_url": scripted.url,
                "chat.streams.max_stream_bytes": 1 << 20,
            }
        )
        body = {"request_id": "r1", "text": "Hello", "streaming": False}
        async with server.session.post(server.sse, json=body) as response:
            frames = frames_of(await response.read())
        async with server.session.post(f"{server.base}{PATH}", json=CHAT) as response:
            assert len(await response.read()) > SIZE

    assert frames[-1]["chunk"]["code"] == "provider_bad_response"
