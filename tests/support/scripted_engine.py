"""An engine that has chat completions only, behind a bridge: a test dictates its whole answers."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson

from tests.support.scripted_provider import Peer, ScriptedProvider

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import MakeServer, RunningServer

HEAD = b"HTTP/1.1 %d X\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n"
# The status of an answer, and its content: bytes are a page, and anything else is JSON.
Answer = tuple[int, Any]


def said(**message: Any) -> Answer:
    """A chat completion with this *message*."""
    return 200, {"choices": [{"message": message, "finish_reason": "stop"}]}


def refuses(message: str, **fields: Any) -> Answer:
    """A refusal in these words."""
    return 400, {"error": {"message": message, "type": "invalid_request_error", **fields}}


@asynccontextmanager
async def engine(
    make_server: MakeServer, *answers: Answer
) -> AsyncIterator[tuple[RunningServer, list[Any]]]:
    """A server with a bridge to an engine that gives these *answers*, the last for all that follow,
    and the bodies that the engine gets.
    """
    left, bodies = list(answers), []

    async def play(peer: Peer) -> None:
        while True:
            bodies.append(orjson.loads((await peer.request()).partition(b"\r\n\r\n")[2]))
            status, content = left.pop(0) if len(left) > 1 else left[0]
            page = isinstance(content, bytes)
            body = content if page else orjson.dumps(content)
            kind = b"text/html" if page else b"application/json"
            await peer.send(HEAD % (status, kind, len(body)) + body)

    async with ScriptedProvider(play) as provider:
        changes: dict[str, Any] = {
            "llm.providers.sim.base_url": provider.url,
            "llm.providers.sim.messages": "bridge",
            "llm.providers.sim.responses": False,
        }
        yield await make_server(**changes), bodies
