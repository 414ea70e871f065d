"""Clients, and a provider, that read slowly and steadily: they are slow, and not gone.

Times are a fifth of the shipped ones, and speeds as much higher: what 4 KiB a second are to a
`send_timeout` of 10 s, 20 KiB are to one of 2 s. A busy machine is late by half of that.
"""

from __future__ import annotations

import asyncio
import io
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.passing import answer, scripted, settings_for
from tests.support.raw import Raw
from tests.support.scripted_provider import (
    EVENT_STREAM,
    LAST_CHUNK,
    Peer,
    ScriptedProvider,
    chunk,
)
from tests.support.server import SIM_HTTP_CLIENT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.server import MakeServer

# The kernel takes part.
pytestmark = pytest.mark.real_time

# Bytes of an answer: more than our kernel and our transport keep for a client.
SIZE = 400_000
SEND_TIMEOUT = 2.0
# Bytes a second, and how many at a time.
SPEED, PIECE = 20 << 10, 2048
SEGMENT = 1400
# Of a receive buffer; None: as the kernel has it, which opens a window that was shut only when a
# whole buffer was read.
BUFFERS = [None, 16_384]
TEXT = "x" * 200
ENDED = {"finish_reason": "stop", "index": 0}


def events(path: str) -> list[bytes]:
    """The events of an answer for *path*, small as tokens are."""
    count = SIZE // (len(TEXT) + 60)
    documents: list[dict[str, Any]]
    if path.endswith("/messages"):
        start = {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 1}}}
        delta = {"type": "content_block_delta", "index": 0}
        documents = [
            start,
            *[{**delta, "delta": {"type": "text_delta", "text": TEXT}}] * count,
            {"type": "message_stop"},
        ]
    elif path.endswith("/responses"):
        response = {"id": "resp_1", "object": "response", "output": []}
        documents = [
            {"type": "response.created", "sequence_number": 0, "response": response},
            *(
                {"type": "response.output_text.delta", "sequence_number": n + 1, "delta": TEXT}
                for n in range(count)
            ),
            {
                "type": "response.completed",
                "sequence_number": count + 1,
                "response": {**response, "status": "completed"},
            },
        ]
    else:
        documents = [
            *[{"choices": [{"delta": {"content": TEXT}, "index": 0}]}] * count,
            {"choices": [{"delta": {}, **ENDED}]},
        ]
    lines = [
        b"event: %b\ndata: %b\n\n" % (str(d["type"]).encode(), json.dumps(d).encode())
        if "type" in d
        else b"data: %b\n\n" % json.dumps(d).encode()
        for d in documents
    ]
    return lines if "type" in documents[0] else [*lines, b"data: [DONE]\n\n"]


async def play(peer: Peer) -> None:
    """Answer every request with SIZE bytes: in events, faster than they are read, or whole."""
    while True:
        request = await peer.request()
        path = request.split(b" ", 2)[1].decode()
        if b'"stream": true' in request or b'"stream":true' in request:
            peer.write(EVENT_STREAM)
            for event in events(path):
                # In packets of their own.
                peer.write(chunk(event))
                await peer.writer.drain()
                await asyncio.sleep(0)
            peer.write(LAST_CHUNK)
        else:
            body = json.dumps({"choices": [{"message": {"content": "x" * SIZE}, **ENDED}]})
            peer.write(answer(body.encode()))
        await peer.writer.drain()


QUESTION = {"messages": [{"role": "user", "content": "Hello"}]}
STREAMED = {**QUESTION, "stream": True}


async def ask_websocket(raw: Raw) -> None:
    await raw.upgrade()
    await raw.send_json({"action": "chat", "request_id": "ws", "payload": {"text": "Hello"}})


ASK: dict[str, tuple[Callable[[Raw], Awaitable[None]], bytes]] = {
    "whole": (lambda raw: raw.post("/v1/chat/completions", QUESTION), b'"stop", "index": 0}]}'),
    "stream": (lambda raw: raw.post("/v1/chat/completions", STREAMED), b"[DONE]\n\n"),
    "sse": (lambda raw: raw.ask_sse("sse", text="Hello"), b'"status":"complete"'),
    "websocket": (ask_websocket, b'"status":"complete"'),
    "messages": (lambda raw: raw.post("/v1/messages", STREAMED), b'"message_stop"'),
    "responses": (
        lambda raw: raw.post("/v1/responses", {"input": "Hello", "stream": True}),
        b'"response.completed"',
    ),
    "passed on": (lambda raw: raw.get("/v1/files/f/content"), b'"stop", "index": 0}]}'),
}


def changes(provider: ScriptedProvider, **more: Any) -> dict[str, Any]:
    return settings_for(
        provider,
        **{
            "llm.providers.sim.messages": True,
            "llm.providers.sim.responses": True,
            "chat.streams.send_timeout": SEND_TIMEOUT,
            "chat.streams.max_stream_bytes": 1 << 24,
            "chat.websocket.ping_interval": 4 * SEND_TIMEOUT,
            "chat.websocket.ping_timeout": SEND_TIMEOUT,
            **more,
        },
    )


async def read_steadily(raw: Raw, mark: bytes) -> int:
    """Read at SPEED until *mark*; return the number of bytes."""
    loop = asyncio.get_running_loop()
    began, count, tail = loop.time(), 0, b""
    while mark not in tail:
        data = await raw.some(PIECE)
        assert data, "the server has ended the answer"
        count += len(data)
        tail = tail[-100:] + data
        # The client's own slowness.
        await asyncio.sleep(began + count / SPEED - loop.time())
    return count


async def test_steady_readers_have_their_answers_to_the_end_on_each_face(
    make_server: MakeServer,
) -> None:
    await asyncio.gather(*(_read_all(make_server, buffer) for buffer in BUFFERS))


async def _read_all(make_server: MakeServer, buffer: int | None) -> None:
    async with ScriptedProvider(play) as provider:
        server = await make_server(**changes(provider))

        async def client(ask: Callable[[Raw], Awaitable[None]], mark: bytes) -> int:
            async with Raw(server, receive_buffer=buffer, segment=SEGMENT) as raw:
                await ask(raw)
                return await read_steadily(raw, mark)

        counts = await asyncio.gather(
            *(client(*face) for face in ASK.values()), return_exceptions=True
        )

        few = {name: count for name, count in zip(ASK, counts, strict=True) if not _enough(count)}
        assert not few
        assert server.context.metrics.slow_clients.value == 0


def _enough(count: int | BaseException) -> bool:
    return isinstance(count, int) and count >= SIZE * 0.9


async def test_a_provider_that_takes_an_upload_steadily_gets_all_of_it(
    make_server: MakeServer,
) -> None:
    await asyncio.gather(*(_upload(make_server, passed_on=each) for each in (False, True)))


async def _upload(make_server: MakeServer, *, passed_on: bool) -> None:
    """Each step in which the kernel takes what is sent to it lasts longer than the timeout."""
    size, speed = 6_000_000, 3 << 18
    received = 0

    async def take(peer: Peer) -> None:
        nonlocal received
        await peer.head()
        loop = asyncio.get_running_loop()
        began = loop.time()
        while received < size:
            data = await peer.reader.read(PIECE)
            assert data, "the server has given up"
            received += len(data)
            await asyncio.sleep(began + received / speed - loop.time())
        await peer.send(answer(json.dumps({"choices": [{"message": {}, **ENDED}]}).encode()))
        await peer.left()

    async with scripted(take, limit=1 << 14) as provider:
        server = await make_server(
            **settings_for(provider),
            **{
                f"{SIM_HTTP_CLIENT}.write_timeout": 0.4,
                f"{SIM_HTTP_CLIENT}.read_timeout": 30.0,
                "chat.websocket.max_message_size": 2 * size,
            },
        )
        path = "audio/x" if passed_on else "chat/completions"
        question = json.dumps(
            {"model": "m", "messages": [{"role": "user", "content": "x" * size}]}
        )
        headers = {"Content-Type": "audio/mpeg" if passed_on else "application/json"}
        async with server.session.post(
            f"{server.v1}/{path}", data=io.BytesIO(question.encode()), headers=headers
        ) as response:
            assert response.status == 200, await response.text()
    assert received >= size
