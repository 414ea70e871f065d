"""A provider that counts what is in flight at it, of all instances together."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Self

import orjson
from aiohttp import web

CHUNKS = 4


class Referee:
    """The provider at `url`: each answer takes *seconds*, and is in flight until its last byte, or
    its client's end.

    A client that is gone is counted until the provider notices it, as with any provider.
    """

    def __init__(self, seconds: float = 0.02) -> None:
        self.seconds = seconds
        self.inside = self.peak = self.starts = 0
        # How often each message was asked.
        self.asked: Counter[str] = Counter()
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.inside += 1
        self.starts += 1
        self.peak = max(self.peak, self.inside)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            body = await request.json()
            self.asked[str(body["messages"][-1]["content"])] += 1
            await response.prepare(request)
            for number in range(CHUNKS):
                await response.write(_event({"content": f"{number} "}, None))
                await asyncio.sleep(self.seconds / CHUNKS)
        finally:
            # Before the client can know of the end, and give its place to another one.
            self.inside -= 1
        await response.write(_event({}, "stop") + b"data: [DONE]\n\n")
        return response


def _event(delta: dict[str, str], finish_reason: str | None) -> bytes:
    chunk = {
        "id": "answer",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "referee",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }
    return b"data: " + orjson.dumps(chunk) + b"\n\n"
