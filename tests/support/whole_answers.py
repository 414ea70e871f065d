"""A provider of large whole answers, and the bytes of them that our clients have not taken."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from tests.support.scripted_provider import Peer, ScriptedProvider

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import RunningServer

SIZE = 4 << 20
PATH = "/v1/chat/completions"


@contextlib.asynccontextmanager
async def provider(
    *, http_status: int = 200, size: int = SIZE, **fields: Any
) -> AsyncIterator[ScriptedProvider]:
    """A provider whose every answer has *size* bytes and a little, and *fields*."""
    choice = {"message": {"content": "x" * size}, "finish_reason": "stop", "index": 0}
    body = json.dumps({**fields, "choices": [choice]}).encode()
    head = f"HTTP/1.1 {http_status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"

    async def play(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(head.encode() + b"\r\n\r\n" + body)

    async with ScriptedProvider(play) as scripted:
        yield scripted


def unsent(server: RunningServer) -> int:
    """Bytes that wait in our transports."""
    transports = [connection.transport for connection in server.http_server.connections]
    return sum(one.get_write_buffer_size() for one in transports if one is not None)
