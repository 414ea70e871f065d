"""How a client asks on the WebSocket and on the SSE face, and comes back for the rest of its
answer.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from tests.simulation.events import events
from tests.simulation.patience import GONE, Left
from tests.simulation.returning import come_back
from tests.simulation.truth import Violation

if TYPE_CHECKING:
    from tests.simulation.client import Client


async def ask(client: Client) -> None:
    """Ask, and come back until the answer has ended."""
    read = _websocket if client.face == "websocket" else _sse
    await come_back(client, functools.partial(read, client), lambda: client.reading.end)


async def _websocket(client: Client, attempt: int) -> None:
    client.came_back = attempt > 0
    url = client.base.replace("http", "ws", 1) + "/ws/chat"
    async with client.session.ws_connect(url, max_msg_size=0, headers=client.headers) as ws:
        frame = {"action": "chat", "request_id": client.name, "payload": client.own_payload()}
        if attempt and client.reading.last:
            frame["action"] = "resume"
            frame["payload"] = {"last_event_id": client.reading.last}
        else:
            client.asks()
        await ws.send_str(orjson.dumps(frame).decode())
        cancelled = False
        async for message in ws:
            client.patience.heard()
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            if take(client, orjson.loads(message.data)):
                return
            if client.now("leave", client.reading.last):
                raise Left
            if client.now("cancel", client.reading.last) and not cancelled:
                cancelled = True
                client.cancels.append("websocket")
                cancel = {"action": "cancel", "request_id": client.name}
                await ws.send_str(orjson.dumps(cancel).decode())
            await client.pause()
        raise EOFError(f"closed with {ws.close_code}")


async def _sse(client: Client, attempt: int) -> None:
    client.came_back = attempt > 0
    url = f"{client.base}/sse/chat"
    if attempt and client.reading.last:
        headers = {**client.headers, "Last-Event-ID": str(client.reading.last)}
        request = client.session.get(f"{url}/{client.name}", headers=headers)
    else:
        client.asks()
        body = {**client.own_payload(), "request_id": client.name}
        request = client.session.post(url, **client.body(body))
    async with request as response:
        if response.status == 204:
            raise Violation("204, though the end was not read")
        if response.status != 200:
            await client.refused(response)
            return
        cancelled = False
        async for data in events(response, client.patience):
            if take(client, orjson.loads(data)):
                return
            if client.now("leave", client.reading.last):
                raise Left
            if client.now("cancel", client.reading.last) and not cancelled:
                cancelled = True
                client.cancels.append("sse")
                with contextlib.suppress(*GONE):
                    await _cancel(client, f"{url}/{client.name}")
            await client.pause()
        raise EOFError


async def _cancel(client: Client, url: str) -> None:
    async with client.session.delete(url, headers=client.headers) as answer:
        await answer.read()


def take(client: Client, frame: dict[str, Any]) -> bool:
    """Take one frame; return whether it is the last one."""
    status = frame["status"]
    if frame.get("event_id") is None:
        if status in {"error", "busy"}:
            code = frame["chunk"]["code"]
            if status == "error":
                seconds = frame["chunk"].get("retry_after") or 0
                client.note_refusal(0, frame["chunk"], {"Retry-After": str(seconds)})
            client.outcome = f"refused: {code}"
            # Others' readers, and ours on the next connection, may go on.
            if code == "slow_client" and client.has("return"):
                client.outcome = ""
            return True
        return False
    if frame["request_id"] != client.name:
        raise Violation(f"an event of {frame['request_id']}")
    reading = client.reading
    reading.number(frame["event_id"])
    if (status == "processing") != (frame["event_id"] == 1) and status not in {
        "error",
        "cancelled",
    }:
        raise Violation(f"{status} is event {frame['event_id']}")
    if status == "chunk":
        reading.add(frame["chunk"]["data"])
    elif status == "error":
        reading.finish(f"error: {frame['chunk']['code']}")
    elif status == "cancelled" and not (client.came_back or client.cancels):
        raise Violation("cancelled, which nobody has asked for")
    elif status in {"complete", "cancelled"}:
        reading.finish(status)
    return bool(reading.end)
