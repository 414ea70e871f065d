"""The frames and bodies that clients of the faces send, and the reading of answers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from aioserver.protocol import eventstream
from tests.support.waiting import patience

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientWebSocketResponse

    from tests.support.server import RunningServer

ENDS = frozenset({"complete", "error", "cancelled"})
# The body of a chat completion.
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
STREAMED = {**CHAT, "stream": True}


def chat(request_id: str, text: str = "Hello", **payload: Any) -> dict[str, Any]:
    """A chat frame; `messages` in *payload* take the place of *text*."""
    if "messages" not in payload:
        payload["text"] = text
    return {"action": "chat", "request_id": request_id, "payload": payload}


def resume(request_id: str, after: int | None = None) -> dict[str, Any]:
    frame: dict[str, Any] = {"action": "resume", "request_id": request_id}
    if after is not None:
        frame["payload"] = {"last_event_id": after}
    return frame


def cancel(request_id: str) -> dict[str, Any]:
    return {"action": "cancel", "request_id": request_id}


async def to_end(ws: ClientWebSocketResponse, request_id: str | None = None) -> list[Any]:
    """Read frames up to the end of an answer; with *request_id* only the frames of that
    request.
    """
    frames = []
    while True:
        frame = await ws.receive_json(timeout=patience(20))
        if request_id is not None and frame["request_id"] != request_id:
            continue
        frames.append(frame)
        if frame["status"] in ENDS:
            return frames


async def until_status(ws: ClientWebSocketResponse, status: str) -> list[Any]:
    """Read frames up to the first one of *status*."""
    frames = [await ws.receive_json(timeout=patience(20))]
    while frames[-1]["status"] != status:
        frames.append(await ws.receive_json(timeout=patience(20)))
    return frames


def text_of(frames: list[Any]) -> str:
    """The text that the model has written in *frames*."""
    return "".join(
        frame["chunk"]["data"]
        for frame in frames
        if frame["status"] == "chunk" and frame["chunk"]["type"] == "text"
    )


def numbers(frames: list[Any]) -> list[int]:
    """The numbers of the events; a frame without a number is no event."""
    return [frame["event_id"] for frame in frames if "event_id" in frame]


def frames_of(body: bytes) -> list[Any]:
    """The frames of an SSE body; each is checked against the `id` and `event` of its block."""
    frames = []
    for event in eventstream.parse(body):
        frame = json.loads(event.data)
        assert event.event.decode() == frame["status"]
        if "event_id" in frame:
            assert int(event.id or b"0") == frame["event_id"]
        else:
            assert event.id is None
        frames.append(frame)
    return frames


async def read_frames(response: ClientResponse) -> list[Any]:
    return frames_of(await response.read())


async def whole(server: RunningServer, request_id: str, after: int = 0) -> list[Any]:
    """Read a stream over SSE, from the event behind *after* to its end."""
    headers = {"Last-Event-ID": str(after)}
    async with server.session.get(f"{server.sse}/{request_id}", headers=headers) as response:
        assert response.status == 200, await response.text()
        return await read_frames(response)


def big(size: int, count: int) -> dict[str, Any]:
    """Fields of a request whose answer has *count* tool-call events of *size* bytes."""
    value = " ".join(["x" * size] * count)
    parameters = {"type": "object", "properties": {"a": {"enum": [value]}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    return {"text": "call a tool", "options": {"tools": [tool]}}
