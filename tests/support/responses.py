"""The frames of OpenAI's Responses API over WebSocket, and the reading of what comes for them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.support.waiting import patience

if TYPE_CHECKING:
    from aiohttp import ClientWebSocketResponse

    from tests.support.server import RunningServer

ENDS = frozenset({"response.completed", "response.incomplete", "response.failed", "error"})


def create(text: str = "Hello", lane: str | None = None, **fields: Any) -> dict[str, Any]:
    """A `response.create` frame; `input` in *fields* takes the place of *text*."""
    named = {} if lane is None else {"stream_id": lane}
    return {"type": "response.create", "input": text, **named, **fields}


def url(server: RunningServer) -> str:
    return server.v1.replace("http", "ws", 1) + "/responses"


def connect(server: RunningServer, **kwargs: Any) -> Any:
    """Open a WebSocket: `async with connect(server) as ws`."""
    return server.session.ws_connect(url(server), **kwargs)


async def next_event(ws: ClientWebSocketResponse) -> Any:
    """The next event of the provider, or error."""
    while True:
        event = json.loads(await ws.receive_str(timeout=patience(20)))
        if not event["type"].startswith("aioserver:"):
            return event


async def to_end(ws: ClientWebSocketResponse, lane: str | None = None) -> list[Any]:
    """The events of the response that comes on *lane*; what is on others is skipped."""
    events = []
    while True:
        event = await next_event(ws)
        if event.get("stream_id") == lane:
            events.append(event)
            if event["type"] in ENDS:
                return events


async def to_ends(ws: ClientWebSocketResponse, count: int) -> list[Any]:
    """All events up to the end of *count* responses, on whatever lanes."""
    events: list[Any] = []
    while sum(event["type"] in ENDS for event in events) < count:
        events.append(await next_event(ws))
    return events


def kinds(events: list[Any]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def text_of(events: list[Any]) -> str:
    """The text that the model has written in *events*."""
    return "".join(
        event["delta"] for event in events if event["type"] == "response.output_text.delta"
    )


def whole(events: list[Any]) -> bool:
    """Whether *events* are a response, none missing, none doubled."""
    numbers = [event["sequence_number"] for event in events]
    return (
        numbers == list(range(len(numbers)))
        and events[-1]["type"] == "response.completed"
        and events[-1]["response"]["output"][0]["content"][0]["text"] == text_of(events)
    )
