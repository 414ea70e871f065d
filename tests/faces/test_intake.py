"""What the bodies of requests hold: their bytes, counted until they were sent for the last
time.
"""

from __future__ import annotations

import asyncio
import gc
import io
import json
import tracemalloc
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import StreamReader, WSMsgType
from aiohttp.base_protocol import BaseProtocol
from aiohttp.test_utils import make_mocked_request

from aioserver.faces import intake
from aioserver.protocol import model_body
from tests.support.chat import CHAT
from tests.support.scripted_provider import (
    DONE,
    EVENT_STREAM,
    LAST_CHUNK,
    Peer,
    ScriptedProvider,
    chunk,
)
from tests.support.server import CONCURRENCY, SIM_HTTP_CLIENT, MakeServer
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.support.server import RunningServer

MIB = 1 << 20
EVENT = (
    b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":null}]}\n\n'
)
END = EVENT.replace(b"null}]", b'"stop"}]')
WHOLE = (
    b'{"id":"1","object":"chat.completion","created":1,"model":"m","choices":'
    b'[{"index":0,"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}]}'
)
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


class Staged:
    """A provider that answers in stages: nothing, an event, then the rest; each when it is told
    to.
    """

    def __init__(self, *, refusals: int = 0) -> None:
        self.began = asyncio.Event()
        self.ended = asyncio.Event()
        self.bodies: list[int] = []
        self._refusals = refusals

    async def play(self, peer: Peer) -> None:
        while True:
            body = (await peer.request()).partition(b"\r\n\r\n")[2]
            self.bodies.append(len(body))
            ends = (body[:300] + body[-300:]).replace(b" ", b"")
            streamed = b'"stream":true' in ends
            del body
            if self._refusals:
                self._refusals -= 1
                await peer.send(UNAVAILABLE)
                continue
            await self.began.wait()
            if streamed:
                await peer.send(EVENT_STREAM + chunk(EVENT))
            await self.ended.wait()
            if streamed:
                await peer.send(chunk(END) + chunk(DONE) + LAST_CHUNK)
            else:
                length = len(WHOLE)
                answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                await peer.send(answer + b"Content-Length: %d\r\n\r\n%b" % (length, WHOLE))


@asynccontextmanager
async def staged(
    make_server: MakeServer, *, refusals: int = 0, **changes: Any
) -> AsyncIterator[tuple[Staged, RunningServer]]:
    """A provider that answers in stages, and a server before it."""
    provider = Staged(refusals=refusals)
    async with ScriptedProvider(provider.play) as scripted:
        yield (
            provider,
            await make_server(**{"llm.providers.sim.base_url": scripted.url, **changes}),
        )


async def over_openai(server: RunningServer, body: bytes) -> bytes:
    headers = {"Content-Type": "application/json"}
    url = f"{server.v1}/chat/completions"
    async with server.session.post(url, data=io.BytesIO(body), headers=headers) as response:
        return await response.read()


async def over_sse(server: RunningServer, body: bytes) -> bytes:
    headers = {"Content-Type": "application/json"}
    async with server.session.post(server.sse, data=io.BytesIO(body), headers=headers) as response:
        return await response.read()


async def over_websocket(server: RunningServer, body: bytes) -> bytes:
    async with server.connect() as ws:
        await ws.send_frame(body, WSMsgType.TEXT)
        frames = b""
        while b'"status":"complete"' not in frames:
            frames += (await ws.receive_str()).encode()
        return frames


def openai_body(*, stream: bool, model: str = "m", x: str = "") -> bytes:
    return json.dumps({**CHAT, "model": model, "x": x, "stream": stream}).encode()


def sse_body(x: str = "") -> bytes:
    messages = [{"role": "user", "content": "Hello"}]
    return json.dumps({"request_id": "r1", "messages": messages, "options": {"x": x}}).encode()


def frame_body(**payload: Any) -> bytes:
    frame = {"action": "chat", "request_id": "r1", "payload": payload}
    return json.dumps(frame).encode()


@pytest.mark.parametrize(
    ("ask", "body"),
    [
        (over_openai, openai_body(stream=True)),
        (over_openai, openai_body(stream=True, model="sim")),
        (over_sse, sse_body()),
        (over_websocket, frame_body(messages=[{"role": "user", "content": "Hello"}])),
    ],
    ids=["openai", "renamed", "sse", "websocket"],
)
async def test_a_body_counts_until_the_answer_begins(
    make_server: MakeServer, ask: Callable[[RunningServer, bytes], Awaitable[bytes]], body: bytes
) -> None:
    changes = {f"{SIM_HTTP_CLIENT}.max_retries": 1}
    async with staged(make_server, refusals=1, **changes) as (provider, server):
        asked = asyncio.ensure_future(ask(server, body))
        await until(lambda: len(provider.bodies) == 2)
        # It was sent twice, and is with the provider.
        assert server.held()["body_bytes"] == len(body)

        provider.began.set()
        await until(lambda: server.held()["body_bytes"] == 0)
        assert server.held()["running"] == 1
        assert not asked.done()

        provider.ended.set()
        assert b"Hi" in await asked
        await server.nothing_held()


async def test_a_text_counts_until_its_answer_is_in_the_conversation(
    make_server: MakeServer,
) -> None:
    body = frame_body(text="Hello" * 100, options={"x": "x" * 500})
    async with staged(make_server) as (provider, server):
        asked = asyncio.ensure_future(over_websocket(server, body))
        await until(lambda: len(provider.bodies) == 1)
        assert server.held()["body_bytes"] == len(body)

        provider.began.set()
        await until(lambda: server.held()["body_bytes"] == len('"Hello"') - 5 + 500)

        provider.ended.set()
        assert b"Hi" in await asked
        await server.nothing_held()


async def test_the_body_of_a_whole_answer_counts_until_it_is_there(
    make_server: MakeServer,
) -> None:
    async with staged(make_server) as (provider, server):
        body = openai_body(stream=False)
        asked = asyncio.ensure_future(over_openai(server, body))
        await until(lambda: len(provider.bodies) == 1)
        assert server.held()["body_bytes"] == len(body)

        provider.began.set()
        provider.ended.set()
        assert b"Hi" in await asked
        await until(lambda: server.held()["body_bytes"] == 0)


async def test_a_body_counts_on_when_its_client_has_left(make_server: MakeServer) -> None:
    body = sse_body()
    async with staged(make_server) as (provider, server):
        headers = {"Content-Type": "application/json", "Prefer": "respond-async"}
        async with server.session.post(server.sse, data=body, headers=headers) as response:
            assert response.status == 202
        await until(lambda: len(provider.bodies) == 1)
        assert server.held()["places"] == 0
        assert server.held()["body_bytes"] == len(body)

        provider.began.set()
        await until(lambda: server.held()["body_bytes"] == 0)
        provider.ended.set()
        await server.nothing_held()


async def test_a_body_does_not_count_for_a_reader_of_an_answer_that_is_known(
    make_server: MakeServer,
) -> None:
    async with staged(make_server) as (provider, server):
        body = sse_body()
        first = asyncio.ensure_future(over_sse(server, body))
        await until(lambda: len(provider.bodies) == 1)
        second = asyncio.ensure_future(over_sse(server, body))
        await until(lambda: server.held()["places"] == 2)
        assert server.held()["body_bytes"] == len(body)

        provider.began.set()
        provider.ended.set()
        assert await first == await second
        await server.nothing_held()


async def test_waiting_bodies_fill_the_bound_and_the_next_is_refused(
    make_server: MakeServer,
) -> None:
    """As 250 requests of 1 MiB fill the default, so do 4 with a bound of 4."""
    body = openai_body(stream=True, x="x" * 1000)
    changes = {
        f"{CONCURRENCY}.max_body_bytes": 4 * len(body) + 1,
        f"{SIM_HTTP_CLIENT}.concurrent_requests": 1,
    }
    async with staged(make_server, **changes) as (provider, server):
        asked = [asyncio.ensure_future(over_openai(server, body)) for _ in range(4)]
        await until(lambda: server.held()["sim waiting"] == 3)
        assert server.held()["body_bytes"] == 4 * len(body)
        assert b"max_body_bytes" in await over_openai(server, body)

        provider.began.set()
        provider.ended.set()
        for answer in await asyncio.gather(*asked):
            assert b"Hi" in answer
        await server.nothing_held()


async def test_others_are_served_between_the_steps_of_a_large_body() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(other())
    await asyncio.sleep(0)
    surrogates = rb"\ud83d" * (4 * MIB // 6)
    body = b'{"model":"m","x":"%b"}' % surrogates
    parsed = await model_body.reading(body)
    task.cancel()

    assert parsed.data == body.replace(rb"\ud83d", rb"\ufffd")
    assert turns > 15


@pytest.mark.parametrize("face", ["openai", "renamed", "sse", "websocket"])
async def test_admitted_bodies_cost_less_than_ten_times_their_bytes(
    make_server: MakeServer, face: str
) -> None:
    """Parsed, `{},` costs 25 bytes a byte, for as long as its answer runs."""
    count, size = 4, 2 * MIB
    filling = b"{}," * (size // 3)
    if face == "sse":
        bodies = [
            b'{"request_id":"r%d","messages":[{"role":"user","x":[%b0]}],"streaming":true}'
            % (number, filling)
            for number in range(count)
        ]
    elif face == "websocket":
        bodies = [
            b'{"action":"chat","request_id":"r%d","payload":'
            b'{"messages":[{"role":"user","x":[%b0]}],"streaming":true}}' % (number, filling)
            for number in range(count)
        ]
    else:
        model = b"m" if face == "openai" else b"sim"
        bodies = [
            b'{"model":"%b","messages":[{"role":"user","x":[%b0]}],"stream":true}'
            % (model, filling)
        ] * count
    ask = {"sse": over_sse, "websocket": over_websocket}.get(face, over_openai)
    async with staged(make_server) as (provider, server):
        gc.collect()
        tracemalloc.start()
        try:
            asked: list[asyncio.Future[Any]] = [
                asyncio.ensure_future(ask(server, body)) for body in bodies
            ]
            await until(lambda: len(provider.bodies) == count)
            held, peak = tracemalloc.get_traced_memory()
            provider.began.set()
            await until(lambda: server.held()["body_bytes"] == 0)
            gc.collect()
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        provider.ended.set()
        await asyncio.gather(*asked)

    # This process is also the client and the provider, which have the bytes two or three times
    # more.
    assert peak < 10 * count * size
    assert held < 5 * count * size
    assert kept < 1.5 * count * size


class Connected(BaseProtocol):
    """The protocol of a connection that is there."""

    connected = True


async def test_a_body_costs_its_bytes_in_however_many_parts_it_comes(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So many parts take a while on a busy machine, where each allocation is noted.
    monkeypatch.setattr(intake, "BODY_TIMEOUT", 3600.0)
    count = 20_000
    parts = StreamReader(Connected(asyncio.get_running_loop()), 1 << 16)
    headers = {"Content-Type": "application/json"}
    request = make_mocked_request("POST", "/", headers=headers, payload=parts)
    tracemalloc.start()
    try:
        with server.context.admission.hold() as hold:
            reading = asyncio.ensure_future(intake.read_body(request, hold, MIB))
            for number in range(count):
                parts.feed_data(b"%02d" % (number % 100))
                await asyncio.sleep(0)
            assert hold.size >= 2 * (count - 2)
            gc.collect()
            taken = tracemalloc.get_traced_memory()[0]
            parts.feed_eof()
            body = await reading
    finally:
        tracemalloc.stop()

    assert len(body) == 2 * count
    # Beside the bytes there are the request, the reader, and the task.
    assert taken < 2 * count + 100_000
