"""The same question on each face, and what its client sees: a text, or an error."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aioserver.protocol import eventstream
from tests.support.chat import CHAT, ENDS

if TYPE_CHECKING:
    from tests.support.server import RunningServer

# The requests that `ask_every_face` makes, by face.
FACES = Counter({"websocket": 1, "sse": 1, "openai": 2})


@dataclass
class Seen:
    """An answer as a client saw it."""

    text: str = ""
    # "complete" or "error", also on OpenAI's face, which has other names for them.
    end: str = ""
    error: dict[str, Any] = field(default_factory=dict)
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes = b""

    @property
    def code(self) -> Any:
        return self.error.get("code")


def frames_seen(frames: list[dict[str, Any]], raw: bytes) -> Seen:
    assert [frame["event_id"] for frame in frames] == list(range(1, len(frames) + 1))
    if len(frames) > 1:  # else it was refused before anybody was asked
        assert frames[0]["status"] == "processing"
    assert {frame["status"] for frame in frames[1:-1]} <= {"chunk"}
    text = "".join(frame["chunk"]["data"] for frame in frames[1:-1])
    last = frames[-1]
    return Seen(text, last["status"], last["chunk"] if last["status"] == "error" else {}, raw=raw)


async def over_websocket(server: RunningServer, model: str, name: str = "ws") -> Seen:
    payload = {"text": "Hello", "model": model}
    async with server.connect() as ws:
        await ws.send_json({"action": "chat", "request_id": f"{name}-{model}", "payload": payload})
        frames: list[dict[str, Any]] = []
        raw = b""
        while not frames or frames[-1]["status"] not in ENDS:
            message = await ws.receive_str()
            frame = json.loads(message)
            # No event: the request may have to wait for its start.
            if frame["status"] != "queued":
                raw += message.encode()
                frames.append(frame)
        # The socket lives on.
        await ws.send_json({"action": "ping", "request_id": "p"})
        assert (await ws.receive_json())["status"] == "pong"
    return frames_seen(frames, raw)


async def over_sse(
    server: RunningServer, model: str, name: str = "", *, streaming: bool = True
) -> Seen:
    name = name or f"{'sse' if streaming else 'whole'}-{model}"
    body = {"request_id": name, "text": "Hello", "model": model, "streaming": streaming}
    async with server.session.post(server.sse, json=body) as response:
        assert response.status == 200
        raw = await response.read()
    events = eventstream.parse(raw)
    frames = [json.loads(event.data) for event in events]
    assert [frame["status"].encode() for frame in frames] == [event.event for event in events]
    frames = [frame for frame in frames if frame["status"] != "queued"]
    return frames_seen(frames, raw)


async def over_openai(
    server: RunningServer,
    model: str,
    *,
    stream: bool = True,
    headers: dict[str, str] | None = None,
) -> Seen:
    body = {"model": model, **CHAT, "stream": stream}
    url = f"{server.v1}/chat/completions"
    async with server.session.post(url, json=body, headers=headers) as response:
        raw = await response.read()
        fields = {name.lower(): value for name, value in response.headers.items()}
        seen = Seen(status=response.status, headers=fields, raw=raw)
    assert seen.headers["x-request-id"]
    if response.status != 200:
        seen.end, seen.error = "error", json.loads(raw)["error"]
        return seen
    if not stream:
        seen.end, seen.text = "complete", json.loads(raw)["choices"][0]["message"]["content"]
        return seen
    assert raw.endswith((b"\n\n", b"\r\n\r\n", b"\r\r")), "a body ends with a whole event"
    for event in eventstream.parse(raw):
        assert not seen.end, "nothing comes behind the end"
        if event.data == b"[DONE]":
            seen.end = "complete"
            continue
        answer = json.loads(event.data)
        if answer.get("error"):
            seen.end, seen.error = "error", answer["error"]
        elif answer["choices"]:
            seen.text += answer["choices"][0]["delta"].get("content") or ""
    assert seen.end, "never a silent end"
    assert raw.count(b"[DONE]") == (1 if seen.end == "complete" else 0)
    return seen


async def over_anthropic(server: RunningServer, model: str, *, stream: bool = True) -> Seen:
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": model, "max_tokens": 4096, "messages": messages, "stream": stream}
    async with server.session.post(f"{server.v1}/messages", json=body) as response:
        raw = await response.read()
        headers = {name.lower(): value for name, value in response.headers.items()}
        seen = Seen(status=response.status, headers=headers, raw=raw)
    assert seen.headers["request-id"]
    if response.status != 200:
        answer = json.loads(raw)
        assert answer["type"] == "error"
        seen.end, seen.error = "error", answer["error"]
        return seen
    if not stream:
        seen.end, seen.text = "complete", json.loads(raw)["content"][0]["text"]
        return seen
    for event in eventstream.parse(raw):
        assert not seen.end, "nothing comes behind the end"
        answer = json.loads(event.data)
        assert event.event.decode() == answer["type"]
        if answer["type"] == "error":
            seen.end, seen.error = "error", answer["error"]
        elif answer["type"] == "message_stop":
            seen.end = "complete"
        elif answer["type"] == "content_block_delta":
            seen.text += answer["delta"]["text"]
    assert seen.end, "never a silent end"
    return seen


async def expected_text(server: RunningServer) -> str:
    seen = await over_openai(server, "plain")
    assert len(seen.text) > 20
    return seen.text


async def ask_every_face(server: RunningServer, model: str) -> list[Seen]:
    """Ask the same on WebSocket, SSE, and OpenAI's face streamed and not streamed, at once."""
    return [
        *await asyncio.gather(
            over_websocket(server, model),
            over_sse(server, model),
            over_openai(server, model),
            over_openai(server, model, stream=False),
        )
    ]
