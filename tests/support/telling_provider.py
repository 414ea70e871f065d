"""A provider whose answers a test dictates, piece by piece, and which keeps what it was asked."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tests.support.web_app import served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


@dataclass
class TellingProvider:
    """Tells *pieces*, and an *afterthought*; then it waits for *go_on*, and ends. *base_url* is
    for `llm.providers`.

    *left* counts the clients that have left before the end.
    """

    pieces: Sequence[str] = ("Hello",)
    reasoning: Sequence[str] = ()
    afterthought: str = ""
    finish_reason: str = "stop"
    questions: list[list[dict[str, Any]]] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    left: int = 0
    base_url: str = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a chat completion."""
        body = await request.json()
        self.questions.append(body["messages"])
        self.models.append(body["model"])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await response.prepare(request)
            for text in self.reasoning:
                await self._send(response, {"reasoning_content": text})
            for text in self.pieces:
                await self._send(response, {"content": text})
            if self.afterthought:
                await self._send(response, {"reasoning_content": self.afterthought})
            await self.go_on.wait()
            await self._send(response, {}, self.finish_reason)
            await response.write(b"data: [DONE]\n\n")
        except (ConnectionError, asyncio.CancelledError):
            self.left += 1
            raise
        return response

    async def _send(
        self, response: web.StreamResponse, delta: dict[str, Any], reason: str | None = None
    ) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        event = {"id": "1", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}
        await response.write(f"data: {json.dumps(event)}\n\n".encode())


@asynccontextmanager
async def telling() -> AsyncIterator[TellingProvider]:
    """Run such a provider, which does not pause."""
    provider = TellingProvider()
    provider.go_on.set()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", provider.answer)
    async with served(app) as base:
        provider.base_url = f"{base}/v1"
        yield provider
