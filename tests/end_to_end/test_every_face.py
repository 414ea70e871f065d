"""The whole road, once, on every face."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from openai import AsyncOpenAI

from aioserver.protocol import eventstream

if TYPE_CHECKING:
    from tests.support.server import RunningServer


async def test_a_streamed_answer_comes_over_the_websocket(server: RunningServer) -> None:
    async with server.connect() as ws:
        await ws.send_json({"action": "chat", "request_id": "r1", "payload": {"text": "Hello"}})

        frames = [await ws.receive_json()]
        while frames[-1]["status"] != "complete":
            frames.append(await ws.receive_json())

    assert [frame["event_id"] for frame in frames] == list(range(1, len(frames) + 1))
    assert frames[0]["status"] == "processing"
    assert {frame["status"] for frame in frames[1:-1]} == {"chunk"}
    assert frames[-1]["chunk"]["metadata"]["finish_reason"] == "stop"
    assert "Hello" in "".join(frame["chunk"]["data"] for frame in frames[1:-1])


async def test_a_streamed_answer_comes_over_sse(server: RunningServer) -> None:
    body = {"request_id": "r1", "text": "Hello"}
    async with server.session.post(server.sse, json=body) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream"
        received = await response.read()

    assert received.startswith(b"retry: 2000\n")
    events = eventstream.parse(received)
    assert [int(event.id or 0) for event in events] == list(range(1, len(events) + 1))
    assert (events[0].event, events[1].event, events[-1].event) == (
        b"processing",
        b"chunk",
        b"complete",
    )
    assert json.loads(events[1].data)["chunk"]["type"] == "text"


async def test_the_openai_sdk_works_unchanged(server: RunningServer) -> None:
    async with AsyncOpenAI(api_key="unused", base_url=server.v1) as client:
        whole = await client.chat.completions.create(
            model="sim", messages=[{"role": "user", "content": "Hello"}]
        )
        stream = await client.chat.completions.create(
            model="sim", messages=[{"role": "user", "content": "Hello"}], stream=True
        )
        text = "".join(
            [part.choices[0].delta.content or "" async for part in stream if part.choices]
        )

    assert text == whole.choices[0].message.content
