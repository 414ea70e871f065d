"""A provider of large whole answers, and the bytes of them that our clients have not taken."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

from tests.support.scripted_provider import (
    EVENT_STREAM,
    LAST_CHUNK,
    Peer,
    ScriptedProvider,
    chunk,
)
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import RunningServer

SIZE = 4 << 20
PATH = "/v1/chat/completions"


# What makes a response of the Responses API of a body.
RESPONSE = {"id": "resp_1", "status": "completed", "object": "response", "output": []}


@contextlib.asynccontextmanager
async def provider(size: int = SIZE, *, http_status: int = 200) -> AsyncIterator[ScriptedProvider]:
    """A provider whose every answer has *size* bytes and a little; its last event, if it is
    streamed.
    """
    choice = {"message": {"content": "x" * size}, "finish_reason": "stop", "index": 0}
    body = json.dumps({**RESPONSE, "choices": [choice]}).encode()
    head = f"HTTP/1.1 {http_status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    event = b'data: {"type":"response.completed","sequence_number":0,"response":%b}\n\n' % body

    async def play(peer: Peer) -> None:
        while True:
            request = await peer.request()
            scripted.requests.append(request)
            if b'"stream": true' in request:
                await peer.send(EVENT_STREAM, chunk(event), LAST_CHUNK)
            else:
                await peer.send(head.encode() + b"\r\n\r\n" + body)

    async with ScriptedProvider(play) as scripted:
        yield scripted


def unsent(server: RunningServer) -> int:
    """Bytes that wait in our transports."""
    transports = [connection.transport for connection in server.http_server.connections]
    return sum(
        transport.get_write_buffer_size() for transport in transports if transport is not None
    )


async def until_dropped(server: RunningServer, clients: int) -> int:
    """Wait until so many *clients* were dropped that read nothing; return the most bytes that have
    waited in our transports meanwhile.
    """
    most = 0

    def dropped() -> bool:
        nonlocal most
        most = max(most, unsent(server))
        return server.context.metrics.slow_clients.value == clients

    await until(dropped, 30, server.held)
    return most
